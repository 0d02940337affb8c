"""The sample store, shards, and outcomes of repeats: nothing lost, nothing twice, nothing strange."""

from __future__ import annotations

from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neureasoner.artifacts import read_json, write_json, write_text
from neureasoner.errors import UserError
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.evaluate import evaluate
from neureasoner.evaluation.runner import ArmRun, outcomes
from neureasoner.evaluation.store import Key, SampleStore, key_of
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, read_traces, write_rows


def trace(key: Key, text: str = "x", answer: str | None = "4", finished: bool = True) -> Trace:
    problem = Problem(key.problem, "arithmetic", 1, "Calculate 2 + 2.", "4")
    labels = Labels(answer == "4" and finished, answer, IntraLabel(), InterLabel())
    return Trace(key.problem, problem, [1], [2, 3], text, [], finished, labels, meta=key._asdict() | {"seconds": 0.5})


JOBS = {(s, b): [Key("full", f"p{2 * b + i}", s, 0, 10 * s + b) for i in range(2)] for s in range(2) for b in range(2)}


def test_parts_become_one_file_in_one_order(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, "full", JOBS)
    for job in reversed(JOBS):
        assert job in store.missing() and store.read(job) is None
        store.write(job, [trace(k) for k in JOBS[job]])
    assert not store.missing() and not store.whole
    store.merge()
    wanted = [k for keys in JOBS.values() for k in keys]
    assert [key_of(t) for t in store.traces()] == wanted and store.whole and not store.folder.exists()
    store.merge()
    assert [key_of(t) for t in store.traces()] == wanted


def test_a_kill_between_merging_and_dropping_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore(tmp_path, "full", JOBS)
    for job, keys in JOBS.items():
        store.write(job, [trace(k) for k in keys])
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.merge()
    monkeypatch.undo()
    before = store.file.read_bytes()
    assert len(list(store.folder.iterdir())) == 4
    store.merge()
    assert store.file.read_bytes() == before and not store.folder.exists()


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, "full", JOBS)
    good = [trace(k) for k in JOBS[0, 0]]
    with pytest.raises(UserError, match="problem 'p0', sample 0, vote 0, seed 0 is there twice"):
        store.write((0, 0), [good[0], good[0]])
    with pytest.raises(UserError, match=r"seed=99.* does not belong there"):
        store.write((0, 0), [good[0], trace(JOBS[0, 0][1]._replace(seed=99))])
    with pytest.raises(UserError, match="1 of 2 samples"):
        store.write((0, 0), good[:1])
    assert not store.path((0, 0)).exists()
    write_rows(store.path((0, 0)), [trace(k) for k in JOBS[1, 0]])
    with pytest.raises(UserError, match=r"000-00000\.jsonl.* delete the file and run again"):
        store.read((0, 0))
    with pytest.raises(UserError, match=r"3 of 4 parts are missing \(sample 0: batches 1; sample 1: batches 0, 1\)"):
        store.merge()
    write_rows(store.file, good)
    with pytest.raises(UserError, match="is missing or does not belong there"):
        store.traces()


def test_a_part_that_goes_away_while_merging_shortens_nothing(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, "full", JOBS)
    for job, keys in JOBS.items():
        store.write(job, [trace(k) for k in keys])
    store.missing = lambda: []  # type: ignore[method-assign]
    store.path((1, 0)).unlink()
    with pytest.raises(UserError, match="went away"):
        store.merge()
    assert not store.whole and store.path((0, 0)).is_file()


def test_repeats_are_two_samples_and_never_a_vote() -> None:
    keys = [Key("full", "p", 0, 0, 5), Key("full", "p", 1, 0, 6)]
    same = [trace(k, "the same words") for k in keys]
    assert [o.sample for o in outcomes(same, 100)] == [0, 1], "equal texts of two samples stay two"
    with pytest.raises(UserError, match="sample 0, vote 0, seed 5 is there twice"):
        outcomes([same[0], trace(keys[0], "other words")], 100)


def test_votes_are_one_outcome() -> None:
    votes = [trace(Key("v", "p", 0, v, v), answer=a) for v, a in enumerate(["5", "4", "4", None])]
    (found,) = outcomes(votes, 100)
    assert found.correct and found.responses == 4 and found.tokens == 8 and found.answer == "4" and found.seconds == 2
    cut = [trace(Key("v", "p", 0, v, v), answer="4", finished=v == 0) for v in range(3)]
    (found,) = outcomes(cut, 100)
    assert found.tokens == 2 + 200 and found.truncated == pytest.approx(2 / 3) and found.correct


def test_shards_make_what_one_process_makes(
    settings: Callable[..., EvaluateConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arms = {"arms": ["vanilla", "full", "random_trigger"], "batch_size": 2}
    evaluate(settings(**arms, out=str(tmp_path / "one")))
    out, made, original = tmp_path / "shards", [], ArmRun._generate

    def counted(self: ArmRun, sample: int, batch: int, vote: int) -> list[Trace]:
        made.append((self.arm.name, sample, batch))
        return original(self, sample, batch, vote)

    monkeypatch.setattr(ArmRun, "_generate", counted)
    first = evaluate(settings(**arms, out=str(out), shard="0/2"))
    assert made == [(arm, 0, b) for b in (0, 2) for arm in ("vanilla", "full")], "arms take turns"
    assert first["parts"] == 4
    assert first["left"] == {"random_trigger": "needs all of full, merged"}
    assert not (out / "stage.json").exists() and not (out / "traces").exists()
    with pytest.raises(UserError, match=r"vanilla: 1 of 3 parts are missing \(sample 0: batches 1\); full: 1 of 3"):
        evaluate(settings(**arms, out=str(out), shard="merge"))
    evaluate(settings(**arms, out=str(out), shard="1/2"))
    with pytest.raises(UserError, match="random_trigger: 3 of 3 parts are missing"):
        evaluate(settings(**arms, out=str(out), shard="merge"))
    assert (out / "traces" / "full.jsonl").is_file(), "what is whole is merged"
    evaluate(settings(**arms, out=str(out), shard="0/2"))
    capsys.readouterr()
    evaluate(settings(**arms, out=str(out)))
    assert "arm random_trigger: 1 of 3 parts are missing (sample 0: batches 1)" in capsys.readouterr().out
    assert len(made) == len(set(made)) == 9
    for name in arms["arms"]:  # type: ignore[attr-defined]
        straight, shared = (read_traces(tmp_path / d / "traces" / f"{name}.jsonl") for d in ("one", "shards"))
        assert [(key_of(t), t.response_ids) for t in straight] == [(key_of(t), t.response_ids) for t in shared]
    assert evaluate(settings(**arms, out=str(out), shard="1/2")) == read_json(out / "stage.json")["summary"]


def test_seconds_of_an_interrupted_run_are_those_of_its_responses(
    settings: Callable[..., EvaluateConfig], tmp_path: Path
) -> None:
    arms = {"arms": ["vanilla", "intra"], "batch_size": 2, "max_new_tokens": 12, "show_examples": 0}
    evaluate(settings(**arms, shard="0/2"))  # and killed
    out = tmp_path / "out"
    before = {key_of(t): t.meta["seconds"] for f in (out / "parts").glob("*/*.jsonl") for t in read_traces(f)}
    evaluate(settings(**arms))
    for arm in read_json(out / "results.json")["arms"]:
        after = {key_of(t): t.meta["seconds"] for t in read_traces(out / "traces" / f"{arm['name']}.jsonl")}
        assert 0 < len(before.keys() & after.keys()) < len(after) == 6
        assert {k: after[k] for k in before.keys() & after.keys()}.items() <= before.items()
        assert arm["seconds"] == pytest.approx(sum(after.values()), abs=0.01)
        assert arm["seconds_per_problem"] == pytest.approx(sum(after.values()) / 6)


def test_where_and_how_it_is_shown_is_no_other_work(settings: Callable[..., EvaluateConfig], tmp_path: Path) -> None:
    """Shards on two devices, and a run taken up on a third, that shows more or less of it; a seed is another work."""
    arms = {"arms": ["vanilla", "full"], "batch_size": 2, "max_new_tokens": 8}
    evaluate(settings(**arms, shard="0/2", device="cpu"))
    evaluate(settings(**arms, shard="1/2", device="cpu:0", report_traces=3, show_examples=0))
    with pytest.raises(UserError, match="output of other settings"):
        evaluate(settings(**arms, seed=1))
    done = evaluate(settings(**arms, device="cpu:0", report_traces=2, show_examples=1))
    found = read_json(tmp_path / "out" / "results.json")
    assert found["device"] == "cpu:0" and "sandbox" not in found
    assert "2 of 12 traces are embedded" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert evaluate(settings(**arms, device="", show_examples=0)) == done
    with pytest.raises(UserError, match="output of other settings"):
        evaluate(settings(**arms, resamples=7))


@pytest.mark.parametrize("shard", ["4/4", "1", "-1/2", "0/0", "half"])
def test_bad_shards(settings: Callable[..., EvaluateConfig], shard: str) -> None:
    with pytest.raises(UserError, match="key 'shard' must look like 0/4"):
        settings(shard=shard)


def benchmark_file(folder: Path, rows: list[tuple[str, str]], name: str = "gsm8k") -> str:
    problems = [Problem(f"b{i}", name, 1, q, a) for i, (q, a) in enumerate(rows)]
    write_rows(folder / "problems.jsonl", problems)
    write_json(
        folder / "stage.json",
        {"name": "evaluation benchmark", "config": {"split": ""}, "summary": {"benchmark": name, "whole_set": 1319}},
    )
    return str(folder / "problems.jsonl")


def test_a_plain_model_on_a_benchmark(
    settings: Callable[..., EvaluateConfig], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neureasoner.inference.steered import SteeredModel

    file = benchmark_file(
        tmp_path / "gsm8k", [("What is 1/2 + 1/4?", "3/4"), ("What is 6 * 7?", "42"), ("5 - 1?", "4")]
    )
    said = iter([r"\boxed{0.75}", r"\boxed{41}", "no answer"])
    original = SteeredModel.generate

    def answering(self: SteeredModel, prompts: Any, **how: Any) -> Any:
        found = original(self, prompts, **how)
        for g in found:
            g.text, g.finished = "thinking \\boxed{9}\n</think>\n\n" + next(said), True
        return found

    monkeypatch.setattr(SteeredModel, "generate", answering)
    plain = {"model": str(checkpoint / "base"), "problems": file, "arms": ["vanilla"]}
    evaluate(settings(**plain, show_examples=0))
    found = read_json(tmp_path / "out" / "results.json")
    (arm,) = found["arms"]
    assert arm["accuracy"] == pytest.approx(1 / 3) and arm["seconds_per_solved"] > arm["seconds_per_problem"] > 0
    assert [t.labels.answer for t in read_traces(tmp_path / "out" / "traces" / "vanilla.jsonl") if t.labels] == [
        "0.75", "41", None,
    ]  # fmt: skip
    assert found["sampling"]["differs_from_paper"] == {
        "temperature": [1.0, 0.6], "max_new_tokens": [48, 16000], "samples": [1, 5],
    }  # fmt: skip
    text = (tmp_path / "out" / "results.md").read_text()
    assert "Benchmark gsm8k: 3 of 1319 problems." in text and "max_new_tokens 48 (paper: 16000)" in text
    assert found["problems"]["split"] == "test" and (tmp_path / "out" / "report.html").is_file()


def test_programs_and_letters_are_graded_end_to_end(
    settings: Callable[..., EvaluateConfig], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neureasoner.evaluation.benchmarks.code import sandbox
    from neureasoner.evaluation.benchmarks.suites import Suite, keep
    from neureasoner.inference.steered import SteeredModel

    monkeypatch.setenv("NEUREASONER_CACHE", str(tmp_path / "cache"))
    try:
        sandbox()
    except UserError as e:
        pytest.skip(str(e))
    tests = keep(Suite((("41", "42"), ("0", "1")), "", 0.0))
    rows = [("Add one.", tests), ("Add one again.", tests), ("Which? (A) 1 (B) 2", "B")]
    said = {
        "Add one.": "```python\nprint(int(input()) + 1)\n```",
        "Add one again.": "```python\nprint(42)\n```",
        "Which? (A) 1 (B) 2": "The answer is (B).",
    }
    original = SteeredModel.generate

    def answering(self: SteeredModel, prompts: Any, **how: Any) -> Any:
        found = original(self, prompts, **how)
        for g, p in zip(found, prompts, strict=True):
            g.text, g.finished = "\\boxed{A}\n</think>\n\n" + said[p.question], True
        return found

    monkeypatch.setattr(SteeredModel, "generate", answering)
    file = benchmark_file(tmp_path / "b", rows, "mixed")
    plain = {"model": str(checkpoint / "base"), "problems": file, "max_new_tokens": 4, "show_examples": 0}
    evaluate(settings(**plain, arms=["vanilla"], samples=4))
    right = {
        t.problem.question: t.labels.correct
        for t in read_traces(tmp_path / "out" / "traces" / "vanilla.jsonl")
        if t.labels
    }
    assert right == {"Add one.": True, "Add one again.": False, "Which? (A) 1 (B) 2": True}
    found = read_json(tmp_path / "out" / "results.json")
    (arm,) = found["arms"]
    assert arm["pass_at"]["4"]["accuracy"] == pytest.approx(2 / 3) and not arm["cons"], "no majority of programs"
    held = sandbox().containment
    assert found["sandbox"] == {"level": held.level, "user": held.user, "held": list(held.held)}
    said = f"Programs ran in the sandbox at the level 'namespaces', {held.user}."
    assert said in (tmp_path / "out" / "results.md").read_text()
    page = unescape((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert said in page and "Benchmark mixed: 3 of 1319 problems." in page and "samples 4 (paper: 5)" in page


def test_programs_of_one_run_are_held_alike(
    settings: Callable[..., EvaluateConfig], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neureasoner.evaluation.benchmarks import code
    from neureasoner.evaluation.benchmarks.suites import Suite, keep
    from neureasoner.evaluation.sandbox import Containment

    monkeypatch.setenv("NEUREASONER_CACHE", str(tmp_path / "cache"))
    file = benchmark_file(tmp_path / "b", [("Add one.", keep(Suite((("41", "42"),), "", 0.0)))], "mixed")
    held = Containment("limits", "as the same user", ("memory",))
    monkeypatch.setattr(code, "sandbox", lambda: SimpleNamespace(containment=held))
    monkeypatch.setattr(ArmRun, "_generate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    config = settings(model=str(checkpoint / "base"), problems=file, arms=["vanilla"], max_new_tokens=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert read_json(tmp_path / "out" / "sandbox.json")["level"] == "limits"
    held = Containment("namespaces", "as the same user, without rights", ("memory", "network"))
    with pytest.raises(UserError, match="ran at the level 'limits' of the sandbox so far, and would run at 'namesp"):
        evaluate(config)


def test_the_cap_is_the_papers_for_a_benchmark(
    settings: Callable[..., EvaluateConfig], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def stop(self: ArmRun, *_: Any) -> list[Trace]:
        seen.append(self.config.max_new_tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(ArmRun, "_generate", stop)
    file = benchmark_file(tmp_path / "b", [("1 + 1?", "2")])
    for i, problems in enumerate((file, str(checkpoint / "data" / "problems.jsonl"))):
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings(arms=["vanilla"], problems=problems, max_new_tokens=0, out=str(tmp_path / str(i))))
    assert seen == [16000, 512]


def test_what_cannot_run_is_said_before_anything_runs(
    settings: Callable[..., EvaluateConfig], checkpoint: Path, tmp_path: Path
) -> None:
    base, file = str(checkpoint / "base"), benchmark_file(tmp_path / "b", [("1 + 1?", "2")])
    with pytest.raises(UserError, match="arm 'full' cannot run: the model is no steered checkpoint"):
        evaluate(settings(model=base, arms=["full"]))
    with pytest.raises(UserError, match="arm 'self_consistency' cannot run: the model is no steered"):
        evaluate(settings(model=base, arms=["self_consistency"]))
    with pytest.raises(UserError, match="is a plain model and its own base"):
        evaluate(settings(model=base, arms=["vanilla"], base="tiny"))
    with pytest.raises(UserError, match="arm 'oracle_trigger' cannot run: the exact judge knows the generators'"):
        evaluate(settings(problems=file, arms=["oracle_trigger"]))
    programs = benchmark_file(tmp_path / "p", [("Print 1.", "tests:" + "0" * 64)], "livecodebench")
    with pytest.raises(UserError, match="the tests 000000000000… of a code problem are not in"):
        evaluate(settings(problems=programs))
    with pytest.raises(UserError, match="'endpoint' serves arms that need no hooks"):
        evaluate(settings(arms=["full"], endpoint={"model": "m", "base_url": "http://127.0.0.1:9/v1"}))
    with pytest.raises(UserError, match="'endpoint' must not hold 'max_tokens': set --max_new_tokens"):
        settings(endpoint={"model": "m", "max_tokens": "5"})
    with pytest.raises(UserError, match="'endpoint' must name a model"):
        settings(endpoint={"base_url": "http://127.0.0.1:9/v1"})
    write_text(tmp_path / "mine.jsonl", (tmp_path / "b" / "problems.jsonl").read_text().replace("gsm8k", "mine"))
    with pytest.raises(UserError, match=r"unknown problem family 'mine'.* evaluation benchmark"):
        evaluate(settings(problems=str(tmp_path / "mine.jsonl")))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_gets_a_plain_prompt(tiny_tokenizer: Any, make_model: Any) -> None:
    import copy

    from neureasoner.inference.plan import Plan
    from neureasoner.inference.steered import SteeredModel

    problem = Problem("b", "gsm8k", 1, "What is 2 + 2?", "4")
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    (g,) = SteeredModel(make_model(), bare, Plan("none")).generate([problem], max_new_tokens=3, temperature=0)
    assert bare.decode(g.prompt_ids) == "What is 2 + 2?\nAnswer:"


def test_curves_of_several_samples(settings: Callable[..., EvaluateConfig], tmp_path: Path) -> None:
    evaluate(settings(arms=["vanilla"], samples=5, max_new_tokens=8))
    (arm,) = read_json(tmp_path / "out" / "results.json")["arms"]
    assert list(arm["pass_at"]) == ["1", "2", "4"] and list(arm["cons"]) == ["4"]
    assert arm["pass_at"]["1"]["accuracy"] == pytest.approx(arm["accuracy"])
    assert arm["cons"]["4"]["tokens_mean"] == pytest.approx(4 * arm["tokens_mean"])
    assert "Cons@k from one draw of 5 samples" in (tmp_path / "out" / "results.md").read_text()


def test_closing_a_thinking_needs_a_tokenizer_that_can_spell_it(
    settings: Callable[..., EvaluateConfig], checkpoint: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, "a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path / "plain")
    write_text(tmp_path / "plain" / "config.json", (checkpoint / "base" / "config.json").read_text())
    with pytest.raises(UserError, match="cannot spell plain text"):
        evaluate(settings(model=str(tmp_path / "plain"), arms=["vanilla", "no_thinking"]))
    assert not (tmp_path / "out").exists()
