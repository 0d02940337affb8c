"""Training-free baselines as arms: what they are run with, what is counted, whom they are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from neureasoner.artifacts import read_json
from neureasoner.data_builders.grading.grade import same_answer
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import (
    ARMS,
    as_baseline,
    baseline_settings,
    choose,
    closed_share,
    options_of,
    thinking_of,
)
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.evaluate import evaluate
from neureasoner.evaluation.ready import check_thinking
from neureasoner.evaluation.runner import judged
from neureasoner.inference.baselines.decoder import Decoder
from neureasoner.inference.plan import Plan
from neureasoner.inference.steered import SteeredModel
from neureasoner.models import load, load_tokenizer
from neureasoner.traces import NO_THINKING, Problem, Trace, read_traces, write_rows

BASELINES = [a.name for a in ARMS.values() if a.baseline]
NEEDS_FULL = ["no_thinking_share"]  # so it runs on a steered checkpoint only
RULES = {
    "no_thinking_budget": {"no_thinking", "close", "stub"},
    "budget_forcing": {"close", "stub"},
    "thinking_budget": {"budget"},
    "wait_penalty": {"wait_penalty"},
    "think_or_not": {"sure"},
    "alpha_one": {"slow", "fast"},
}
CAP = 72


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vanilla and every baseline on the plain base model, run once."""
    out = tmp_path_factory.mktemp("baselines") / "out"
    config = EvaluateConfig(
        str(checkpoint / "base"),
        str(checkpoint / "data" / "problems.jsonl"),
        str(out),
        arms=list(RULES),  # vanilla is needed, so it runs as well
        max_new_tokens=CAP,
        batch_size=4,
        temperature=1.0,
        resamples=200,
        device="cpu",
        show_examples=0,
    )
    evaluate(config)
    return out


@pytest.mark.parametrize("name", list(RULES))
def test_a_baseline_runs_and_all_its_tokens_are_counted(run: Path, name: str) -> None:
    arm = next(a for a in read_json(run / "results.json")["arms"] if a["name"] == name)
    traces = read_traces(run / "traces" / f"{name}.jsonl")
    assert len(traces) == arm["n_problems"] == 6
    mean = lambda values: pytest.approx(sum(values) / len(traces))  # noqa: E731
    assert arm["tokens_mean"] == mean([len(t.response_ids) if t.finished else CAP for t in traces])
    assert arm["forced_mean"] == mean([len(t.meta["forced"]) for t in traces])
    assert arm["probe_tokens_mean"] == mean([t.meta["probe_tokens"] for t in traces])
    assert {e["rule"] for t in traces for e in t.events} <= RULES[name]
    assert (arm["forced_mean"] > 0) == any(t.events for t in traces if name != "wait_penalty")
    assert (arm["probe_tokens_mean"] > 0) == (name == "think_or_not")
    if name in ("budget_forcing", "thinking_budget", "alpha_one"):
        assert arm["forced_mean"] > 0 and arm["triggers_per_trace"] > 0
    for t in traces:
        assert not t.meta["forced"] or max(t.meta["forced"]) < len(t.response_ids)


def test_budgets_are_taken_from_vanillas_thinking(run: Path) -> None:
    found = read_json(run / "results.json")
    assert found["arms"][0]["name"] == "vanilla" and len(found["arms"]) == 1 + len(RULES)
    lengths = [t.meta["thinking_tokens"] for t in read_traces(run / "traces" / "vanilla.jsonl")]
    mean = sum(lengths) / len(lengths)
    half = round(mean / 2)
    assert found["baselines"] == {
        "alpha_one": {"n_think": pytest.approx(mean)},
        "thinking_budget": {"tokens": half},
        "budget_forcing": {"budget": half},
        "no_thinking_budget": {"budget": half, "no_thinking": True},
        "wait_penalty": {},
        "think_or_not": {"options": ""},
    }
    for name in ("budget_forcing", "thinking_budget"):
        for t in read_traces(run / "traces" / f"{name}.jsonl"):
            assert all(e["token"] >= half for e in t.events), "not before the budget"
    assert {(c["arm"], c["against"]) for c in found["comparisons"]} == {(name, "vanilla") for name in RULES}
    text = (run / "results.md").read_text()
    assert "verdict" not in text and "Against vanilla, alpha_one" in text and "**vanilla: " in text


def test_a_baseline_draws_what_vanilla_draws_until_it_steps_in(run: Path) -> None:
    plain = {t.problem.id: t.response_ids for t in read_traces(run / "traces" / "vanilla.jsonl")}
    for name in ("budget_forcing", "thinking_budget", "alpha_one", "think_or_not"):
        for t in read_traces(run / "traces" / f"{name}.jsonl"):
            until = min(t.meta["forced"], default=len(t.response_ids))
            assert t.response_ids[:until] == plain[t.problem.id][:until], name


def test_decoders_stay_decoders(checkpoint: Path) -> None:
    base = SteeredModel(*load(str(checkpoint / "base"), device="cpu"), Plan("none"))
    settings = {name: baseline_settings(ARMS[name], [], 40.0) for name in BASELINES}
    made = {name: as_baseline(base, ARMS[name], settings[name]) for name in BASELINES}
    assert {n for n, m in made.items() if isinstance(m, Decoder)} == {
        "budget_forcing_25",
        "budget_forcing",
        "budget_forcing_75",
        "no_thinking_budget",
        "think_or_not",
        "alpha_one",
    }
    budgets = [made[f"thinking_budget{end}"].plan.rules[0].trigger.min_tokens for end in ("_25", "", "_75")]
    assert budgets == [10, 20, 30] == [made[f"budget_forcing{end}"].budget for end in ("_25", "", "_75")]
    assert made["budget_forcing"].budget == made["thinking_budget"].plan.rules[0].trigger.min_tokens == 20
    assert made["alpha_one"].moment == pytest.approx(1.4 * 40) and made["think_or_not"].same is same_answer
    assert all(m.model is base.model for m in made.values()), "the weights are shared"


def test_baselines_run_only_when_named_and_where_they_can() -> None:
    assert NEEDS_FULL + list(RULES) == [name for name in BASELINES if not name[-1].isdigit()]
    found = {a.name for a in choose([], ["instance", "intra"], True)[0]}
    assert "no_thinking_share" in found, "every report of an instance rule needs it"
    assert choose([], ["intra"], True)[1]["no_thinking_share"].startswith("the plan has no rule instance")
    with pytest.raises(UserError, match="arm 'no_thinking_share' cannot run: the model is no steered checkpoint"):
        choose(NEEDS_FULL, [], False, plain=True)
    assert not {a.name for a in choose([], ["intra"], True)[0]} & set(RULES)
    arms, skipped = choose(
        ["vanilla", "full", "random_trigger", "sft_only"], [], False
    )  # nothing paid: `choose` kept no rule
    assert [a.name for a in arms] == ["vanilla", "sft_only"] and set(skipped) == {"full", "random_trigger"}
    arms, _ = choose(["alpha_one", "wait_penalty"], [], False, plain=True)
    assert [a.name for a in arms] == ["vanilla", "wait_penalty", "alpha_one"]
    with pytest.raises(UserError, match=r"arm 'think_or_not' cannot run: .* no recipe for programs; leave it out$"):
        choose(["think_or_not"], [], False, votable=False)
    assert [a.name for a in choose(["wait_penalty"], [], False, votable=False)[0]] == ["wait_penalty"]


def choice(question: str = "Which?\n\n(A) one\n(B) two\n(C) three\n\nSay it.", answer: str = "B") -> Problem:
    return Problem("q", "quiz", 1, question, answer)


@pytest.mark.parametrize(("problems", "letters"), [
    ([choice(), choice(answer="A")], "ABC"), ([], ""), ([choice(), choice("2 + 2?", "4")], ""),
    ([choice(), choice("Which?\n(A) one\n(B) two")], ""),  # not the same options
    ([choice("Of\n(A) this\n(B) that\nwhich?\n\n(A) one\n(B) two")], "AB"),  # the stem has a list of its own
    ([choice(answer="4")], ""), ([choice("Which letter?", "C")], ""), ([choice("(B) a\n(C) b")], ""),
])  # fmt: skip
def test_options_of_the_problems(problems: list[Problem], letters: str) -> None:
    assert options_of(problems) == letters
    assert baseline_settings(ARMS["think_or_not"], problems, 0.0) == {"options": letters}


def test_options_are_asked_for_by_letter(settings: Callable[..., EvaluateConfig], checkpoint: Path) -> None:
    shown = "\n".join(f"({c}) {w}" for c, w in zip("ABCD", ("one", "two", "three", "four"), strict=True))
    file = Path(settings().out).parent / "options.jsonl"
    write_rows(file, [Problem(f"g{i}", "gpqa_diamond", 1, f"Which, {i}?\n\n{shown}", "B") for i in range(2)])
    done = settings(model=str(checkpoint / "base"), problems=str(file), arms=["think_or_not"], show_examples=0)
    evaluate(done)
    found = read_json(Path(done.out) / "results.json")
    assert found["baselines"] == {"think_or_not": {"options": "ABCD"}}
    assert [a["name"] for a in found["arms"]] == ["think_or_not"] and found["arms"][0]["probe_tokens_mean"] > 0


def trace(**changes: Any) -> Trace:
    fixed: dict[str, Any] = {"id": "t", "problem": Problem("g", "gsm8k", 1, "?", "4"), "prompt_ids": [1]}
    fixed |= {"response_ids": [2], "response": "", "steps": [], "finished": True}
    return Trace(**(fixed | changes))


def test_without_thinking_there_is_no_budget() -> None:
    assert thinking_of([trace(meta={"thinking_tokens": n}) for n in (10, 20)]) == 15.0
    for lengths in ([], [0, 1]):
        with pytest.raises(UserError, match="leave out no_thinking_budget, budget_forcing, thinking_budget, alpha_one"):
            thinking_of([trace(meta={"thinking_tokens": n}) for n in lengths])


def test_a_share_of_thinkings_is_closed_by_a_coin(checkpoint: Path) -> None:
    def closed(rule: str, suppressed: bool = False) -> Trace:
        return trace(events=[{"rule": rule, "suppressed": suppressed}])

    full = [closed("instance"), closed("instance", True), closed("intra"), trace()]
    assert closed_share(full) == 0.25 and closed_share([]) == 0.0
    base = SteeredModel(*load(str(checkpoint / "base"), device="cpu"), Plan("none"))
    arm = ARMS["no_thinking_share"]
    for share, least, most in ((0.0, 0, 0), (0.25, 5, 27), (1.0, 64, 64)):
        model = as_baseline(base, arm, baseline_settings(arm, [], 0.0, share))
        done = model.generate(["1 + 1?"] * 64, max_new_tokens=2, seed=3, batch_size=64)
        assert least <= sum(g.forced[0] for g in done) <= most


def test_the_closed_thinking_of_the_prompt_is_counted(
    settings: Callable[..., EvaluateConfig], checkpoint: Path
) -> None:
    """core.md §5.10: forced tokens are generated tokens, wherever the thinking was closed."""
    done = settings(model=str(checkpoint / "base"), arms=["no_thinking"], show_examples=0, max_new_tokens=40)
    evaluate(done)
    n = len(load(str(checkpoint / "base"), device="cpu")[1].encode(NO_THINKING, add_special_tokens=False))
    traces = read_traces(Path(done.out) / "traces" / "no_thinking.jsonl")
    assert 5 < n < 40 and all(len(t.response_ids) <= 40 - n for t in traces)
    [arm] = read_json(Path(done.out) / "results.json")["arms"]
    costs = [len(t.response_ids) + n if t.finished else 40 for t in traces]
    assert arm["tokens_mean"] == pytest.approx(sum(costs) / len(costs)) and arm["forced_mean"] == n


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENS, CLOSES = (PLAIN.replace("{% endif %}", t + "{% endif %}") for t in ("<think>\n", "<think>\n\n</think>\n\n"))


@pytest.mark.parametrize(
    ("template", "added"),
    [
        (PLAIN, "<think>\n" + NO_THINKING),
        (OPENS, NO_THINKING),
        (CLOSES, ""),
        (None, "<think>\n" + NO_THINKING),
    ],
)
def test_the_closed_thinking_fits_the_template_and_is_counted(
    settings: Callable[..., EvaluateConfig], checkpoint: Path, tmp_path: Path, template: str | None, added: str
) -> None:
    tokenizer = load_tokenizer(str(checkpoint / "base"))
    shutil.copytree(checkpoint / "base", tmp_path / "base")
    tokenizer.chat_template = template
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "base")
    file = tmp_path / "p" / "problems.jsonl"
    write_rows(file, [Problem(f"b{i}", "gsm8k", 1, q, "1") for i, q in enumerate(("one?", "What does </think> mean?"))])
    done = settings(model=str(tmp_path / "base"), problems=str(file), arms=["no_thinking"], show_examples=0)
    evaluate(done)
    n = len(tokenizer.encode(added, add_special_tokens=False)) if added else 0
    [arm] = read_json(Path(done.out) / "results.json")["arms"]
    assert arm["forced_mean"] == n
    for t in read_traces(Path(done.out) / "traces" / "no_thinking.jsonl"):
        prompt = tokenizer.decode(t.prompt_ids)
        before = "\nAnswer:" if template is None else template.split("prompt %}")[1].removesuffix("{% endif %}")
        assert prompt.endswith(before + added) and len(t.response_ids) <= 48 - n
        assert t.meta.get("prefill", 0) == n and t.thinking_end == 0


def test_an_unmarked_number_counts_unless_it_is_cut_off() -> None:
    said = "So 7.\n</think>\n\nThe answer is 4."
    assert judged(trace(response=said)).correct and judged(trace(response=said)).answer == "4"
    cut = judged(trace(response=said, finished=False))
    assert not cut.correct and cut.answer is None


def test_a_thinking_that_a_model_may_not_know_is_told_of(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tag that has to be spelled: nothing but the template tells that the model was trained to think."""
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if "think" not in t["content"]]
    spelling = type(tiny_tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>")
    monkeypatch.setattr("neureasoner.models.load_tokenizer", lambda name: spelling)
    arms = [ARMS["no_thinking"], ARMS["vanilla"]]
    for template, told in ((PLAIN, True), (None, True), (CLOSES, False)):
        spelling.chat_template = template
        check_thinking("some/base", arms)
        said = capsys.readouterr().out
        assert ("some/base" in said and "no_thinking" in said and "vanilla" not in said) is told
    check_thinking("some/base", arms[1:])
    assert not capsys.readouterr().out
