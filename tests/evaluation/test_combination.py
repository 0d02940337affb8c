"""``combine``: which arms there are, contrasts against loops, what plans hold, and the stage end to end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.artifacts import read_json
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.evaluation.combination import (
    Combination,
    combine,
    contrast,
    effects,
    name_of,
    pairs,
    subsets,
    whole_plan,
)
from neureasoner.evaluation.combination_config import CombineConfig
from neureasoner.evaluation.combination_text import sentence
from neureasoner.evaluation.metrics import Outcome
from neureasoner.inference.plan import Plan
from neureasoner.models import fingerprint, load
from neureasoner.probes.detectors.probe import Probe
from neureasoner.probes.features import FeatureSet
from neureasoner.traces import read_traces, write_rows

PARTS = ["a", "b", "c"]


def test_subsets_and_their_names() -> None:
    assert [name_of(on, PARTS) for on in subsets(PARTS, "minus")] == [
        "none", "a", "b", "c", "without_c", "without_b", "without_a", "all",
    ]  # fmt: skip
    four = [name_of(on, [*PARTS, "d"]) for on in subsets([*PARTS, "d"], "factorial")]
    assert len(four) == len(set(four)) == 16 and {"a+b", "c+d", "without_d", "none", "all"} <= set(four)
    assert subsets(PARTS, "whole") == [(), ("a", "b", "c")]
    assert [name_of(on, ["a", "b"]) for on in subsets(["a", "b"], "minus")] == ["none", "a", "b", "all"]


def rows_of(values: dict[str, np.ndarray]) -> dict[str, list[Outcome]]:
    """Two samples a problem; ``values`` [P, 2] of 0 and 1 by arm."""
    return {
        name: [
            Outcome(f"p{i}", "f", 1, s, bool(v[i, s]), 10.0 * i + s + len(name))
            for i in range(len(v))
            for s in range(2)
        ]
        for name, v in values.items()
    }


def test_contrasts_equal_loops(config: Callable[..., CombineConfig]) -> None:
    rng = np.random.default_rng(0)
    names = [name_of(on, PARTS) for on in subsets(PARTS, "factorial")]
    values = {n: rng.integers(0, 2, size=(30, 2)) for n in names}
    rows, settings = rows_of(values), config(resamples=500)
    mean = {n: v.mean() for n, v in values.items()}
    tokens = {n: np.mean([o.tokens for o in rows[n]]) for n in names}
    by_part = {e["part"]: e for e in effects(rows, PARTS, settings)}
    for x in PARTS:
        others = [p for p in PARTS if p != x]
        alone, beside = mean[x] - mean["none"], mean["all"] - mean[f"without_{x}"]
        assert by_part[x]["alone"]["accuracy"] == pytest.approx(alone)
        assert by_part[x]["beside"]["accuracy"] == pytest.approx(beside)
        assert by_part[x]["change"]["accuracy"] == pytest.approx(beside - alone)
        assert by_part[x]["change"]["tokens"] == pytest.approx(
            tokens["all"] - tokens[f"without_{x}"] - tokens[x] + tokens["none"]
        )
        low, high = by_part[x]["change"]["accuracy_ci"]
        assert low < beside - alone < high
        gains = []
        for k in range(3):
            for context in combinations(others, k):
                on = [p for p in PARTS if p in (x, *context)]
                gains.append(mean[name_of(on, PARTS)] - mean[name_of(list(context), PARTS)])
        assert by_part[x]["mean"]["accuracy"] == pytest.approx(np.mean(gains)) and len(gains) == 4
    first = pairs(rows, PARTS, settings)[0]
    assert first["parts"] == ["a", "b"]
    both = mean["without_c"]
    assert first["first_beside"]["accuracy"] == pytest.approx(both - mean["b"])
    assert first["change"]["accuracy"] == pytest.approx(both - mean["a"] - mean["b"] + mean["none"])
    without_mean = {n: r for n, r in rows.items() if n != "without_a"}
    with pytest.raises(KeyError):
        effects(without_mean, PARTS, settings)
    with pytest.raises(ValueError, match="same problems"):
        contrast({**rows, "none": rows["none"][2:]}, {"a": 1.0, "none": -1.0}, settings)


def test_a_part_that_another_explains_is_told_from_one_that_adds_up(config: Callable[..., CombineConfig]) -> None:
    n = 200
    need = np.arange(n) % 4  # 0: nothing helps, 1: a or b helps, 2: c helps, 3: solved anyhow
    base = need == 3

    def solved(a: bool, b: bool, c: bool) -> np.ndarray:
        right = base | ((need == 1) & (a or b)) | ((need == 2) & c)
        return np.repeat(right[:, None], 2, axis=1).astype(int)

    values = {name_of(on, PARTS): solved(*(p in on for p in PARTS)) for on in subsets(PARTS, "factorial")}
    said = {e["part"]: sentence(e) for e in effects(rows_of(values), PARTS, config(resamples=500))}
    assert "they explain it" in said["a"] and "they explain it" in said["b"]
    assert "no change of it by the others is shown" in said["c"]
    same = {name: values["none"] for name in values}
    assert "no effect is shown" in sentence(effects(rows_of(same), PARTS, config(resamples=200))[0])


def _contrast(value: float, half: float) -> dict[str, Any]:
    return {"accuracy": value, "accuracy_ci": [value - half, value + half], "accuracy_shown": abs(value) > half}


def test_the_other_verdicts() -> None:
    def said(alone: float, beside: float) -> str:
        return sentence(
            {"part": "x", "alone": _contrast(alone, 0.02), "beside": _contrast(beside, 0.02)}
            | {"change": _contrast(beside - alone, 0.02)}
        )

    assert "larger beside the others" in said(0.01, 0.10)
    assert "changes beside the others" in said(0.10, 0.05)
    assert "changes beside the others" in said(0.10, -0.05)


@pytest.fixture(scope="session")
def combination_root(tmp_path_factory: Any, checkpoint: Path) -> Path:
    """A direction of the steered checkpoint, another probe for ``inter``, and two problem files."""
    root: Path = tmp_path_factory.mktemp("combination")
    model, _ = load(str(checkpoint / "model"), device="cpu")
    values = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 2
    origin: dict[str, Any] = {"model": "model", "fingerprint": fingerprint(model)}
    Direction({"residual:1": values}, "positive = up", info={"sizes": {"neuron": 48, "head": 4}}, **origin).save(
        root / "bias"
    )
    rng = np.random.default_rng(1)
    probe = Probe(
        FeatureSet.named("length", "instance", 2), model_fingerprint=origin["fingerprint"], hidden=4, epochs=1
    )
    probe.fit(rng.normal(size=(40, 6)), np.arange(40) % 2)
    probe.threshold = 0.0
    probe.save(root / "early")
    for name, seed in (("validation", 3), ("test", 4)):
        write_rows(root / f"{name}.jsonl", make_problems(["arithmetic", "words"], 8, name, seed))
    return root


@pytest.fixture
def config(combination_root: Path, checkpoint: Path, tmp_path: Path) -> Callable[..., CombineConfig]:
    def make(**changes: Any) -> CombineConfig:
        fixed: dict[str, Any] = {
            "model": str(checkpoint / "model"),
            "problems": str(combination_root / "test.jsonl"),
            "validation": str(combination_root / "validation.jsonl"),
            "out": str(tmp_path / "out"),
            "rules": {
                "bias": {
                    "site": "residual:*",
                    "trigger": {"always": True},
                    "direction": str(combination_root / "bias"),
                    "action": {"add": True},
                }
            },
            "parts": {"triggers": ["intra", "inter"], "bias": ["bias"], "instance": ["instance"]},
            "strengths": {"bias": [0.5, 2.0]},
            "variants": {"early": {"instance": str(combination_root / "early")}},
            "validation_samples": 1,
            "samples": 2,
            "max_new_tokens": 32,
            "temperature": 1.0,
            "batch_size": 8,
            "resamples": 200,
            "device": "cpu",
        }
        return CombineConfig(**(fixed | changes))

    return make


def test_stage_end_to_end(
    config: Callable[..., CombineConfig], checkpoint: Path, capsys: Any, monkeypatch: Any
) -> None:
    settings = config()
    summary = combine(settings)
    out = Path(settings.out)
    found = read_json(out / "results.json")
    names = ["none", "triggers", "bias", "instance", "without_instance", "without_bias", "without_triggers", "all"]
    assert [a["name"] for a in found["arms"]] == [*names, "early"] == list(summary["arms"])
    traces = {n: read_traces(out / "traces" / f"{n}.jsonl") for n in [*names, "early"]}
    assert all(len(t) == 8 * 2 for t in traces.values())
    # an arm is the plan of its parts: no event of a rule that is off, and the arm of nothing is plain generation
    rules = {n: {e["rule"] for t in ts for e in t.events} for n, ts in traces.items()}
    assert rules["none"] == set() and rules["bias"] == {"bias"} and rules["without_bias"].isdisjoint({"bias"})
    assert rules["without_triggers"] <= {"bias", "instance"} and rules["early"] >= {"bias", "instance"}
    assert {r.name for r in Plan.load(out / "plans" / "without_triggers.yaml").rules} == {"bias", "instance"}
    early = Plan.load(out / "plans" / "early.yaml")
    assert early.rule("instance").trigger.at_step == 2  # follows the other probe
    assert Plan.load(out / "plans" / "all.yaml").rule("instance").trigger.at_step == 3
    # a plan of the folder runs as it stands and repeats the arm
    from neureasoner.evaluation.runner import batch_seed
    from neureasoner.inference.steered import SteeredModel

    steered = SteeredModel.from_pretrained(checkpoint / "model", out / "plans" / "all.yaml", device="cpu")
    again = steered.generate(
        [t.problem for t in traces["all"][:8]], max_new_tokens=32, temperature=1.0, seed=batch_seed(0, 0, 0)
    )
    assert [g.response_ids for g in again] == [t.response_ids for t in traces["all"][:8]]
    # the strength: best on validation, and in the plans of every arm
    chosen = [t["strength"] for t in found["tuning"] if t["chosen"]]
    best = max(t["accuracy"] for t in found["tuning"])
    assert len(chosen) == 1 and chosen[0] == min(t["strength"] for t in found["tuning"] if t["accuracy"] == best)
    assert Plan.load(out / "plans" / "bias.yaml").rule("bias").strength.value == chosen[0] == found["strengths"]["bias"]
    assert len(found["effects"]) == 3 and len(found["pairs"]) == 3
    text = capsys.readouterr().out
    for name in names:
        assert f"| {name} |" in text
    assert "difference of differences" in text and "Only 2 seeds" in text
    monkeypatch.setattr(Combination, "run", lambda *a: pytest.fail("ran again"))
    assert combine(settings) == summary


def test_whole_runs_two_arms_and_every_rule_is_a_part_by_itself(config: Callable[..., CombineConfig]) -> None:
    settings = config(arms="whole", parts={}, strengths={}, validation="", variants={}, samples=1)
    combine(settings)
    found = read_json(Path(settings.out) / "results.json")
    assert [a["name"] for a in found["arms"]] == ["none", "all"] and found["effects"] == []
    assert list(found["parts"]) == ["instance", "inter", "intra", "bias"]


def test_other_probes_keep_the_threshold_of_the_plan(
    config: Callable[..., CombineConfig], combination_root: Path
) -> None:
    plan = whole_plan(config(probes={"instance": str(combination_root / "early")}))
    trigger = plan.rule("instance").trigger
    assert trigger.at_step == 2 and trigger.max == 1
    assert (plan.folder.resolve() / str(trigger.probe)).resolve() == (combination_root / "early").resolve()


def test_what_does_not_fit_is_named_before_anything_runs(
    config: Callable[..., CombineConfig], combination_root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Combination, "run", lambda *a: pytest.fail("ran"))

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=match):
            combine(config(**({"out": str(tmp_path / f"out{len(seen)}")} | changes)))
        seen.append(match)

    seen: list[str] = []
    refused("8 questions are also in", validation=str(combination_root / "test.jsonl"))
    refused("holds no plan.yaml", model=str(checkpoint / "base"))
    refused("has no rule 'nine'", parts={"x": ["nine"]}, strengths={})
    refused("no part is named 'y'", strengths={"y": [1.0]})
    refused("only forces texts", strengths={"triggers": [1.0]})
    refused("expected a rule as in a plan", rules={"bias": 3})
    refused("two rules are named intra", rules={"intra": {"trigger": {"always": True}, "action": {"force": "x"}}})
    refused(r"early.*probe\.json", probes={"intra": str(tmp_path / "early")})
    refused("expected RULE: probe folder", variants={"v": "x"})
    bad = {"site": "residual:1", "trigger": {"always": True}, "action": {"add": True}}
    refused("direction", rules={"bias": {**bad, "direction": str(tmp_path / "none")}})
    Direction({"residual:1": torch.ones(32)}, "up", model="other", fingerprint="0" * 16).save(tmp_path / "foreign")
    refused("other", rules={"bias": {**bad, "direction": str(tmp_path / "foreign")}})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"problems": ""}, "'problems' is empty"),
        ({"arms": "some"}, "'arms' must be one of whole, minus, factorial"),
        ({"samples": 0}, "'samples' must be at least 1"),
        ({"seed": -1}, "'seed' must not be negative"),
        ({"top_p": 1.5}, "'top_p' must lie in"),
        ({"validation": ""}, "'strengths' needs 'validation'"),
        ({"strengths": {"bias": [0.1, 0.1]}}, "needs different numbers above 0"),
        ({"parts": {"all": ["intra"]}}, "'all' is no name for a part"),
        ({"parts": {"without_x": ["intra"]}}, "is no name for a part"),
        ({"parts": {"a/b": ["intra"]}}, "is no name for a part"),
        ({"parts": {"a": ["intra"], "b": ["intra"]}}, "rule intra is in two parts"),
        ({"parts": {"a": []}}, "a part names no rule"),
        ({"parts": {"early": ["intra"]}, "strengths": {}}, "names a part and a variant"),
        ({"parts": {f"p{i}": [f"r{i}"] for i in range(7)}}, "has 7 parts; at most 6"),
    ],
)
def test_bad_settings_are_named(config: Callable[..., CombineConfig], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**more)


def test_what_held_programs_stands_in_the_results(
    config: Callable[..., CombineConfig], programs: tuple[str, str, str], capsys: Any
) -> None:
    problems, validation, level = programs
    settings = config(problems=problems, validation=validation, arms="whole", parts={}, strengths={}, variants={})
    combine(settings)
    assert read_json(Path(settings.out) / "results.json")["sandbox"]["level"] == level
    assert f"Programs ran in the sandbox at the level '{level}'" in capsys.readouterr().out
