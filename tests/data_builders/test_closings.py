"""Forecasts of closing on a random model: the gold answer stands in the closing text, so what is right is known."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

from neureasoner.data_builders import closings as stage
from neureasoner.data_builders.closings import closings, describe, places_of
from neureasoner.data_builders.closings_config import ClosingsConfig
from neureasoner.errors import UserError
from neureasoner.probes.labels import Closing, bounds_of, read_closings
from neureasoner.steps import segment
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows

TEXT = "So.\n</think>\n\nThe answer is \\boxed{42}."
CAP = 60


def trace_of(tokenizer, number, steps, gold="42", answer_token=None):
    text = "".join(f"Okay, let me think about {i} apples.\n\n" for i in range(steps)) + "</think>\n\nDone."
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found, thinking = segment(ids, tokenizer)
    prompt = tokenizer(f"<think>\n{number} apples", add_special_tokens=False)["input_ids"]
    labels = Labels(False, None, IntraLabel(), InterLabel(), answer_token=answer_token)
    problem = Problem(f"p{number}", "math", 1 + number % 2, "q", gold)
    meta = {"thinking_tokens": thinking}
    return Trace(f"t{number}", problem, prompt, ids, tokenizer.decode(ids), found, True, labels, meta=meta)


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_model, tiny_tokenizer):
    root = tmp_path_factory.mktemp("closings")
    model = make_model(tie_word_embeddings=True)
    with torch.no_grad():  # a response ends after some tokens
        model.get_input_embeddings().weight[tiny_tokenizer.eos_token_id] *= 2.0
    model.save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    traces = [trace_of(tiny_tokenizer, i, 1 + i % 4, gold="42" if i % 3 else "41") for i in range(8)]
    write_rows(root / "traces.jsonl", traces)
    return root


def config(root, out="out", **more):
    base = {"model": str(root / "model"), "traces": str(root / "traces.jsonl"), "out": str(root / out)}
    small = {
        "samples": 3,
        "left": 3,
        "first": 2,
        "text": TEXT,
        "max_new_tokens": CAP,
        "batch_size": 6,
        "temperature": 1.0,
    }
    return ClosingsConfig(**(base | small | more))


def test_greedy_forecasts_are_what_stock_generation_goes_on_with(work, make_model, tiny_tokenizer, stock_config):
    from transformers import AutoModelForCausalLM

    done = closings(config(work, "greedy", samples=1, left=1, temperature=0, most=0))
    rows = read_closings(work / "greedy" / "closings.jsonl")
    traces = {t.id: t for t in stage.stream_traces(work / "traces.jsonl")}
    model = AutoModelForCausalLM.from_pretrained(work / "model").eval()
    closing = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    kinds = Counter()
    for row in rows:
        trace = traces[row.trace]
        for forced, right, tokens in (
            [closing, row.right_closed, row.tokens_closed],
            [[], row.right_left, row.tokens_left],
        ):
            head = [*trace.response_ids[: trace.steps[row.step].token_end], *forced]
            whole = torch.tensor([[*trace.prompt_ids, *head]])
            settings = stock_config(model, tiny_tokenizer, CAP - len(head))
            new = model.generate(whole, generation_config=settings)[0, whole.shape[1] :].tolist()
            finished = new[-1] == tiny_tokenizer.eos_token_id
            assert tokens == len(forced) + len(new), row
            assert right == (finished and bool(forced) and trace.problem.answer == "42"), row
            kinds[bool(forced), finished, trace.problem.answer] += 1
    assert kinds[True, True, "42"] and kinds[True, True, "41"], "some end, right and wrong"
    expected = {(t.id, s) for t in traces.values() for s in range(1, len(bounds_of(t)) - 1)}
    assert {(r.trace, r.step) for r in rows} == {
        (i, s) for i, s in expected if traces[i].steps[s].token_end + len(closing) < CAP
    }
    assert done["separators"] == len(rows) and done == json.loads((work / "greedy" / "summary.json").read_text())


def test_promise_9_a_killed_stage_goes_on_and_writes_the_same_file(work, monkeypatch, capsys):
    closings(config(work, "whole"))
    assert "separators of" in capsys.readouterr().out.splitlines()[0], "the forecast comes before anything else"
    real, calls = stage._forecast_part, []

    def killed(model, tokenizer, batch, *rest):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, batch, *rest)

    monkeypatch.setattr(stage, "_forecast_part", killed)
    with pytest.raises(KeyboardInterrupt):
        closings(config(work, "cut"))
    assert not (work / "cut" / "closings.jsonl").exists() and len(list((work / "cut" / "parts").iterdir())) == 2
    closings(config(work, "cut"))
    whole = (work / "whole" / "closings.jsonl").read_bytes()
    rows = read_closings(work / "whole" / "closings.jsonl")
    assert (work / "cut" / "closings.jsonl").read_bytes() == whole and len(rows) > 6
    assert sum(calls) == len(rows) + calls[2], "only the part that was cut is sampled again"
    assert not list((work / "cut").rglob("*.tmp")) and not list((work / "cut" / "parts").iterdir())
    monkeypatch.setattr(stage, "_forecast_part", lambda *_: pytest.fail("sampled again"))
    assert closings(config(work, "cut"))["separators"] == len(rows)
    with pytest.raises(UserError, match="other settings"):
        closings(config(work, "cut", seed=1))


def test_places_are_spread_seeded_and_leave_room_for_the_text(tiny_tokenizer):
    trace = trace_of(tiny_tokenizer, 0, 23)
    chosen = {}
    for seed in range(12):
        c = ClosingsConfig("m", "t", "o", first=3, every=2, most=4, seed=seed, max_new_tokens=10_000)
        chosen[seed] = places_of(trace, c, 5)
        assert chosen[seed] == places_of(trace, c, 5) and len(chosen[seed]) == 4
        assert all(s >= 2 and s % 2 == 0 for s in chosen[seed])
        assert all(b > a for a, b in pairwise(chosen[seed])) and chosen[seed][0] <= 6 and chosen[seed][-1] >= 18
    assert len({tuple(v) for v in chosen.values()}) > 4
    every = ClosingsConfig("m", "t", "o", first=1, most=0, max_new_tokens=10_000)
    assert places_of(trace, every, 5) == list(range(23))
    end = trace.steps[4].token_end
    capped = ClosingsConfig("m", "t", "o", first=1, most=0, max_new_tokens=end + 6)
    assert places_of(trace, capped, 5) == [0, 1, 2, 3, 4] and places_of(trace, capped, 6) == [0, 1, 2, 3]


def row(problem, closed, left, tokens=(10.0, 50.0), **more):
    base = {"trace": f"{problem}#0", "problem": problem, "family": "f", "difficulty": 1, "first": 2, "step": 1}
    known = {"token": 50, "n": 4, "n_left": 4, "tokens_closed": tokens[0], "tokens_left": tokens[1], "answered": False}
    return Closing(**(base | known | {"right_closed": closed, "right_left": left} | more))


def test_the_summary_tells_solved_from_hopeless(tiny_tokenizer):
    traces = [trace_of(tiny_tokenizer, i, 2) for i in range(3)]
    traces[2].labels.correct = True
    rows = [row("p0", 0, 0), row("p1", 1, 3, family="g", answered=True), row("p2", 0, 0, tokens=(20.0, 50.0))]
    found = describe(rows, traces)
    assert found["by_question"]["hopeless"] == {"n": 1, "free": 1.0, "points": 0.0, "saved": 40.0, "saved_free": 40.0}
    assert found["by_question"]["solved"] == {"n": 2, "free": 0.5, "points": -25.0, "saved": 35.0, "saved_free": 15.0}
    assert found["all"]["n"] == 3 and found["by_family"]["g"]["free"] == 0 and found["tokens"] == 4 * 190
    assert found["by_answer"]["the answer stands"]["points"] == -50.0


def test_with_none_left_alone_the_trace_itself_is_what_is_compared(work):
    closings(config(work, "both"))
    closings(config(work, "cheap", left=0))
    both, cheap = (read_closings(work / name / "closings.jsonl") for name in ("both", "cheap"))
    traces = {t.id: t for t in stage.stream_traces(work / "traces.jsonl")}
    assert [(r.trace, r.step) for r in cheap] == [(r.trace, r.step) for r in both]
    for a, b in zip(cheap, both, strict=True):
        trace = traces[a.trace]
        assert (a.right_closed, a.tokens_closed) == (b.right_closed, b.tokens_closed)
        assert (a.n, a.n_left, a.right_left) == (3, 1, int(trace.labels.correct))
        assert a.token + a.tokens_left == len(trace.response_ids)
    # two of three closed against a trace that was right, or wrong: shares are compared, not counts
    assert row("p", 2, 1, n=3, n_left=1).label == 0 and row("p", 3, 1, n=3, n_left=1).label == 1
    assert row("p", 0, 0, n=3, n_left=1).label == 1 and row("p", 1, 2, n=3, n_left=6).label == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "Okay."}, "'text'"),
        ({"temperature": 0.0}, "'temperature'.*samples: 1"),
        ({"samples": 0}, "'samples'"),
        ({"first": 0}, "'first'"),
        ({"most": -1}, "'most'"),
        ({"top_p": 0.0}, "'top_p'"),
    ],
)
def test_wrong_settings_name_the_key(work, settings, message):
    with pytest.raises(UserError, match=message):
        config(work, **settings)


def test_what_cannot_be_forecast_is_refused_before_a_model_is_loaded(work, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("neureasoner.models.load", lambda *_: pytest.fail("loaded a model"))

    def refused(change, message, **more):
        traces = [trace_of(tiny_tokenizer, i, 3) for i in range(2)]
        change(traces)
        write_rows(tmp_path / "traces.jsonl", traces)
        with pytest.raises(UserError, match=message):
            closings(config(work, "no", traces=str(tmp_path / "traces.jsonl"), **more))

    refused(lambda t: setattr(t[1], "labels", None), "'t1'.*data judge")
    refused(lambda t: setattr(t[1], "id", "t0"), "id occurs twice")
    refused(lambda t: setattr(t[1], "response", "another"), "'t1'.*model that wrote")
    refused(lambda t: None, "'first'", first=9)
    assert not (work / "no").exists()
