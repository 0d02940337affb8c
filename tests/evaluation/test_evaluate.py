"""The arms on a random checkpoint: results, resuming, controls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neureasoner.artifacts import read_json, write_text
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import ARMS, choose, replay, votes
from neureasoner.evaluation.evaluate import evaluate
from neureasoner.evaluation.oracle import ExactOracles, new_loop
from neureasoner.evaluation.runner import ArmRun, outcomes, same_answer
from neureasoner.inference.plan import Plan
from neureasoner.traces import Trace, read_traces

BY_DEFAULT = [a.name for a in ARMS.values() if a.default and a.name not in ("flipped", "random_direction")]
KEYS = {
    *("name", "accuracy", "accuracy_ci", "tokens_mean", "tokens_ci", "truncated", "triggers_per_trace", "seconds"),
    *("n_problems", "n_samples", "by_family", "by_difficulty"),
}


def texts(out: Path, arm: str) -> list[tuple[str, list[int], int]]:
    return [(t.id, t.response_ids, len(t.events)) for t in read_traces(out / "traces" / f"{arm}.jsonl")]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every arm, run once."""
    from neureasoner.evaluation.config import EvaluateConfig

    out = tmp_path_factory.mktemp("all") / "out"
    data = checkpoint / "data" / "problems.jsonl"
    config = EvaluateConfig(
        str(checkpoint / "model"), str(data), str(out), max_new_tokens=48, batch_size=4, temperature=1.0, resamples=200
    )
    evaluate(config)
    return out


def test_results_have_every_arm_and_key(whole: Path) -> None:
    found = read_json(whole / "results.json")
    assert {a["name"] for a in found["arms"]} == set(BY_DEFAULT) and not found["skipped"]
    for arm in found["arms"]:
        assert set(arm) >= KEYS
        assert arm["n_problems"] == 6
        assert set(arm["by_family"]) == {"arithmetic", "countdown", "words"}
    assert set(found["probes"]) == {"intra", "inter", "instance"} and "neurons" in found
    assert all((whole / name).is_file() for name in ("report.html", "results.md", "stage.json"))
    assert not list((whole / "parts").glob("*/*.jsonl")), "parts are dropped when merged"


def test_promise_12_every_number_has_interval_seed_split_and_command(whole: Path) -> None:
    found = read_json(whole / "results.json")
    for arm in found["arms"]:
        for part in [arm, *arm["by_family"].values(), *arm["by_difficulty"].values()]:
            for value, ci in (("accuracy", "accuracy_ci"), ("tokens_mean", "tokens_ci")):
                low, high = part[ci]
                assert low <= part[value] <= high and part["n_problems"] > 0
    assert {(c["arm"], c["against"]) for c in found["comparisons"]} >= {
        *((name, "vanilla") for name in BY_DEFAULT if name != "vanilla"),
        ("full", "random_trigger"),
        ("full", "sft_only"),
    }
    for c in found["comparisons"]:
        assert c["accuracy_delta_ci"][0] <= c["accuracy_delta"] <= c["accuracy_delta_ci"][1]
        assert c["tokens_relative_ci"][0] <= c["tokens_relative"] <= c["tokens_relative_ci"][1]
    assert found["seeds"] == found["seeds"] | {"sampling": 0, "bootstrap": 0}
    assert found["problems"]["split"] == "test" and found["command"] and found["versions"]["torch"]
    assert found["intervals"]["level"] == 0.95 and "problems" in found["intervals"]["method"]


def test_truncated_is_wrong_and_costs_the_cap(whole: Path) -> None:
    traces = read_traces(whole / "traces" / "vanilla.jsonl")
    assert any(not t.finished for t in traces) and any(t.finished for t in traces), "the fixture should show both"
    for t, o in zip(traces, outcomes(traces, 999), strict=True):
        assert o.tokens == (len(t.response_ids) if t.finished else 999)
        assert o.correct <= t.finished


def test_arms_use_the_same_problems_and_seeds(whole: Path) -> None:
    runs = {name: read_traces(whole / "traces" / f"{name}.jsonl") for name in BY_DEFAULT}
    key = lambda t: (t.problem.id, t.meta["sample"], t.meta["seed"])  # noqa: E731
    same = [sorted(map(key, rows)) for name, rows in runs.items() if name != "self_consistency"]
    assert all(rows == same[0] for rows in same)


def test_arms_intervene_only_as_they_say(whole: Path) -> None:
    def rules(name: str) -> set[str]:
        return {e["rule"] for t in read_traces(whole / "traces" / f"{name}.jsonl") for e in t.events}

    for name in ("vanilla", "sft_only", "no_thinking", "self_consistency"):
        assert not rules(name)
    for name in ("intra", "inter", "instance"):
        assert rules(name) <= {name} and rules(f"oracle_{name}") <= {name}
    assert rules("family_closing") | rules("random_closing") <= {"instance"}
    assert rules("full"), "the fixture's probes should fire"
    for t in read_traces(whole / "traces" / "full.jsonl"):
        joined = "".join(t.response[a:b] for a, b in t.meta["forced_chars"])
        assert joined == "".join(e["action"] for e in t.events if not e["suppressed"])[: len(joined)]


def test_random_trigger_takes_its_rates_from_full(whole: Path, checkpoint: Path) -> None:
    from neureasoner.models import load_tokenizer

    tokenizer, plan = load_tokenizer(str(checkpoint / "model")), Plan.load(checkpoint / "model")
    found, due, fired = read_json(whole / "results.json"), dict.fromkeys(plan.names, 0), dict.fromkeys(plan.names, 0)
    for t in read_traces(whole / "traces" / "full.jsonl"):
        counted = replay(t, plan, tokenizer)
        evaluated = {(s["rule"], s["token"]) for s in t.meta["scores"]}
        won = {e["token"]: e["rule"] for e in t.events if not e["suppressed"]}
        order = plan.priority
        live = [(r, k) for r, k in evaluated if k not in won or order.index(r) <= order.index(won[k])]
        for name in plan.names:
            assert counted[name][1] == sum(not e["suppressed"] and e["rule"] == name for e in t.events)
            # the probe is silent on its first tokens, where a coin may already fall
            assert counted[name][0] >= sum(r == name for r, _ in live)
            due[name] += counted[name][0]
            fired[name] += counted[name][1]
    rates = {n: fired[n] / due[n] if due[n] else 0.0 for n in plan.names}
    assert found["random_rates"] == pytest.approx(rates)
    for t in read_traces(whole / "traces" / "random_trigger.jsonl"):
        assert all(e["threshold"] == pytest.approx(1 - rates[e["rule"]]) for e in t.events)


def test_closing_rates_are_those_of_the_traces(whole: Path, checkpoint: Path) -> None:
    """Counted by hand where the rule acts alone: wherever its probe was asked, it could have won."""
    from neureasoner.evaluation.closings import closing_rates
    from neureasoner.models import load_tokenizer

    plan, tokenizer = Plan.load(checkpoint / "model"), load_tokenizer(str(checkpoint / "model"))
    alone = read_traces(whole / "traces" / "instance.jsonl")
    next(t for t in alone if t.events).events = []  # as if its score had been below the threshold
    asked = {t.id: t.meta["scores"] for t in alone}
    closed = {t.id: [e for e in t.events if not e["suppressed"]] for t in alone}
    assert any(closed.values()) and sum(map(len, closed.values())) < sum(map(len, asked.values()))
    found = closing_rates(alone, plan.select(["instance"]), tokenizer)
    for family in ("arithmetic", "countdown", "words", "*"):
        rows = [t.id for t in alone if family in (t.problem.family, "*")]
        n, k = (sum(len(of[i]) for i in rows) for of in (asked, closed))
        assert found["share"][family] == pytest.approx(k / len(rows))
        rates = found["pooled"]["*"] if family == "*" else found["by_family"][family]
        assert rates == ({"3": pytest.approx(k / n)} if k else {}), "it is read after three steps only"


def test_closing_coins_take_their_rates_from_full(whole: Path, checkpoint: Path) -> None:
    from neureasoner.evaluation.closings import closing_rates
    from neureasoner.models import load_tokenizer

    plan, tokenizer = Plan.load(checkpoint / "model"), load_tokenizer(str(checkpoint / "model"))
    full = closing_rates(read_traces(whole / "traces" / "full.jsonl"), plan, tokenizer)
    assert read_json(whole / "results.json")["closings"] == full
    for name, rates in (("family_closing", full["by_family"]), ("random_closing", full["pooled"])):
        for t in read_traces(whole / "traces" / f"{name}.jsonl"):
            known = rates.get(t.problem.family, rates.get("*", {}))
            assert all(known[str(e["step"] + 1)] > 0 for e in t.events)
            assert bool(t.meta["scores"]) or not t.events


def test_closing_coins_fall_by_family_and_step(tiny_tokenizer: Any) -> None:
    from neureasoner.evaluation.closings import coins
    from neureasoner.inference.rows import RowState
    from neureasoner.inference.rules import Action, Rule, Trigger
    from neureasoner.traces import Problem

    rule = Rule("instance", Trigger(oracle="instance"), Action("</think>"))
    own = {"words": {"2": 0.25, "3": 1.0}, "countdown": {}}

    def share(rates: Any, family: str, steps: int, tokens: int = 40) -> float:
        hits = 0
        for index in range(400):
            row = RowState(index, SimpleNamespace(bounds=range(steps + 1)), problem=Problem("p", family, 1, "?", "1"))
            row.tokens = [0] * tokens
            hits += coins(rates, rule)["instance"](row)
        return hits / 400

    assert share(own, "words", 3) == 1 and share(own, "words", 1) == share(own, "countdown", 3) == 0
    assert share(own, "words", 3, tokens=2) == 0, "no probe speaks so early"
    assert share(own, "words", 2) == pytest.approx(0.25, abs=0.08)
    pooled = {"*": {"2": 0.5}}
    assert share(pooled, "words", 2) == share(pooled, "countdown", 2) == pytest.approx(0.5, abs=0.08)


def test_self_consistency_costs_about_as_much_as_full(whole: Path) -> None:
    found = read_json(whole / "results.json")
    arms = {a["name"]: a for a in found["arms"]}
    k = found["votes"]["k"]
    assert k == votes(arms["full"]["tokens_mean"], arms["no_thinking"]["tokens_mean"])
    assert arms["self_consistency"]["responses_per_answer"] == k
    assert len(read_traces(whole / "traces" / "self_consistency.jsonl")) == 6 * k
    assert votes(100, 26) == 4 and votes(10, 40) == 1


def test_promise_9_killed_and_rerun_loses_and_repeats_nothing(
    settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arms, made, original = ["vanilla", "full"], [], ArmRun._generate

    def dying(self: ArmRun, sample: int, batch: int, vote: int) -> list[Trace]:
        if len(made) in (1, 3):
            made.append("killed")
            raise KeyboardInterrupt
        made.append((self.arm.name, sample, batch, vote))
        return original(self, sample, batch, vote)

    monkeypatch.setattr(ArmRun, "_generate", dying)
    out = tmp_path / "killed"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings(arms=arms, out=str(out)))
        assert not (out / "results.json").exists() and not (out / "stage.json").exists()
    evaluate(settings(arms=arms, out=str(out)))
    work = [m for m in made if m != "killed"]
    assert len(work) == len(set(work)) == 4, "two arms of two batches, each once"
    count = len(made)
    evaluate(settings(arms=arms, out=str(out)))
    assert len(made) == count, "a finished evaluation generates nothing"
    monkeypatch.setattr(ArmRun, "_generate", original)
    evaluate(settings(arms=arms, out=str(tmp_path / "straight")))
    for arm in arms:
        assert texts(out, arm) == texts(tmp_path / "straight", arm)
    with pytest.raises(UserError, match="other settings"):
        evaluate(settings(arms=arms, out=str(out), seed=5))


def test_bad_input_is_one_line_and_leaves_nothing(
    settings: Callable[..., Any], tmp_path: Path, checkpoint: Path
) -> None:
    with pytest.raises(UserError, match="unknown arm 'ful'; known: vanilla, sft_only"):
        evaluate(settings(arms=["ful"]))
    with pytest.raises(UserError, match="no such file"):
        evaluate(settings(problems=str(tmp_path / "none.jsonl")))
    write_text(tmp_path / "empty.jsonl", "\n")
    with pytest.raises(UserError, match="holds no problems"):
        evaluate(settings(problems=str(tmp_path / "empty.jsonl")))
    row = {"id": "1", "family": "arithmetic", "difficulty": 1, "question": "?", "answer": "3"}
    write_text(tmp_path / "bad.jsonl", json.dumps(row) + "\n{oops\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        evaluate(settings(problems=str(tmp_path / "bad.jsonl")))
    write_text(tmp_path / "family.jsonl", json.dumps(row | {"family": "poems"}) + "\n")
    with pytest.raises(UserError, match="unknown problem family 'poems'"):
        evaluate(settings(problems=str(tmp_path / "family.jsonl")))
    with pytest.raises(UserError, match="no steered checkpoint"):
        evaluate(settings(model=str(checkpoint / "base")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arms", "gone", "said"),
    [
        ("vanilla,intra", "probes/intra/probe.json", "names probe probes/intra, but .*probe.json does not exist"),
        ("vanilla,full_paper", "probes/paper/inter/probe.safetensors", "names probe probes/paper/inter, but"),
        ("vanilla,sft_only", "tokenizer", "trigger token <INT(RA|ER)> that the tokenizer lacks"),
        ("vanilla,wait_penalty", "words", "wait_penalty forbids is a single token .* leave it out"),
    ],
)
def test_what_an_arm_lacks_is_said_before_another_one_runs(
    settings: Callable[..., Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arms: str, gone: str, said: str, tiny_tokenizer: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(ArmRun, "_generate", lambda *a: pytest.fail("generated"))
    copy = shutil.copytree(checkpoint / "model", tmp_path / "model")
    if gone == "tokenizer":
        tiny_tokenizer.save_pretrained(copy)
    elif gone == "words":
        monkeypatch.setattr("neureasoner.inference.baselines.plans.WAIT_WORDS", ("a-word-in-pieces",))
    else:
        (copy / gone).unlink()
    with pytest.raises(UserError, match=said):
        evaluate(settings(model=str(copy), arms=arms.split(",")))


def test_an_arm_needs_what_it_uses(
    settings: Callable[..., Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ArmRun, "_generate", lambda *a: pytest.fail("generated"))
    copy = shutil.copytree(checkpoint / "model", tmp_path / "model")
    shutil.rmtree(copy / "probes" / "intra")
    with pytest.raises(pytest.fail.Exception, match="generated"):  # the base model asks for no probe
        evaluate(settings(model=str(copy), arms=["vanilla", "no_thinking"]))


def test_choose_leaves_out_what_the_checkpoint_lacks() -> None:
    arms, skipped = choose([], ["intra"], has_paper=False)
    closing = {"instance", "oracle_instance", "family_closing", "random_closing", "no_thinking_share"}
    assert {*closing, "inter", "oracle_inter", "full_paper"} == set(skipped) and "full" in {a.name for a in arms}
    with pytest.raises(UserError, match="no rule inter"):
        choose(["inter"], ["intra"], has_paper=True)
    arms, skipped = choose([], [], has_paper=True)
    assert {a.name for a in arms} == {"vanilla", "sft_only", "no_thinking"} and "self_consistency" in skipped
    names = [a.name for a in choose(["self_consistency"], ["intra"], True)[0]]
    assert names == ["full", "no_thinking", "self_consistency"], "needs come first"


class Row:
    """What an oracle reads of a row."""

    index = 0

    def __init__(self, problem: Any, paragraphs: list[str], tokenizer: Any, events: list[dict[str, Any]]):
        self.problem, self.tokenizer, self.events = problem, tokenizer, events
        self.tokens, self.bounds = [], [0]
        for p in paragraphs:
            self.tokens += tokenizer.encode(p + "\n\n", add_special_tokens=False)
            self.bounds.append(len(self.tokens))


def test_oracles_follow_the_exact_judge(tiny_tokenizer: Any) -> None:
    from neureasoner.traces import Problem

    problem = Problem("c", "countdown", 1, "Use 2, 3 and 7, each exactly once, with + - * / to reach 13.", "2 * 3 + 7")

    def ask(rule: str, paragraphs: list[str], events: list[dict[str, Any]] | None = None) -> bool:
        row = Row(problem, paragraphs, tiny_tokenizer, events or [])
        return ExactOracles().functions()[rule](row)

    start, bad, good = (
        "I have 2, 3 and 7 and want 13.",
        "Try 2 + 3 = 6, 6 + 7 = 13. That is 13.",
        "Try 2 + 3 = 5, 5 + 7 = 12. Not 13.",
    )
    assert not ask("intra", [start, good]) and ask("intra", [start, bad])
    repaired = [{"rule": "intra", "step": 1, "suppressed": False}]
    assert not ask("intra", [start, bad, "<INTRA>\n[FAILURE_INTRA] I see."], repaired)
    assert ask("intra", [start, bad, "<INTRA>\n[FAILURE_INTRA] I see.", bad], repaired)
    assert not ask("instance", [start, good])
    assert ask("instance", [start, "Try 2 * 3 = 6, 6 + 7 = 13. That is 13."])
    assert not ask("inter", [start, good, good, good]) and ask("inter", [start, good, good, good, good])
    left = [{"rule": "inter", "step": 4, "suppressed": False}]
    assert not ask("inter", [start, good, good, good, good, "<INTER>\nx", good, good], left)
    assert ask("inter", [start, good, good, good, good, "<INTER>\nx", good, good, good], left)
    assert not new_loop([], 0)


def test_equal_answers() -> None:
    assert same_answer("42", " 42") and same_answer("2 + 3 * 7", "3 * 7 + 2")
    assert not same_answer("42", "43") and not same_answer("2 + 3", "4 + 1") and not same_answer("x", "y")


@pytest.mark.parametrize("name", ["quickstart", "full"])
def test_shipped_recipes_are_well_formed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from neureasoner.floor_config import RunConfig
    from neureasoner.run import load_recipe

    file = Path(__file__).parents[2] / "configs" / "recipes" / "tiny" / f"{name}.yaml"
    monkeypatch.chdir(file.parents[3])  # paths in a recipe count from the repository's root
    found, _, stages = load_recipe(RunConfig(recipe=str(file)))
    order = [s.label for s in stages]
    assert found == name and order[0] == "data problems" and order[-1] == "evaluate"
    evaluated = next(s for s in stages if s.label == "evaluate")
    test = next(s for s in stages if s.label == "test problems")
    assert evaluated.settings["problems"].startswith(str(test.out)) and test.settings["split"] == "test"
