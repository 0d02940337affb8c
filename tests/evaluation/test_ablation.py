"""``ablate``: how the strength is chosen, the paired test, the plans of the arms, and the stage end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.artifacts import read_json
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.evaluation.ablation import Ablation, ablate, arms_of, choose_strength
from neureasoner.evaluation.ablation_config import AblateConfig
from neureasoner.evaluation.metrics import Outcome
from neureasoner.inference.plan import Plan
from neureasoner.models import fingerprint, load
from neureasoner.probes.detectors.gate import FailureGate, question_values
from neureasoner.traces import Problem, read_problems, read_traces, write_rows


def outcomes(accuracy: float, n: int = 10) -> list[Outcome]:
    return [Outcome(f"p{i}", "f", 1, 0, i < accuracy * n, 5.0) for i in range(n)]


def test_the_best_strength_and_of_equals_the_weakest() -> None:
    tried = {1.0: outcomes(0.5), 0.3: outcomes(0.7), 0.1: outcomes(0.7), 0.5: outcomes(0.6)}
    assert choose_strength(tried) == 0.1
    assert choose_strength(tried | {2.0: outcomes(0.8)}) == 2.0


@pytest.fixture(scope="session")
def ablation_root(tmp_path_factory: Any, checkpoint: Path, tiny_tokenizer: Any) -> Path:
    """The base model of ``checkpoint`` with a direction, a variant, a gate that picks some, and two problem files."""
    root: Path = tmp_path_factory.mktemp("ablation")
    model, tokenizer = load(str(checkpoint / "base"), device="cpu")
    origin: dict[str, Any] = {"model": "base", "fingerprint": fingerprint(model)}
    for name, seed in (("full", 0), ("other", 1)):
        values = torch.randn(3, generator=torch.Generator().manual_seed(seed)) * 3
        info = {"sizes": {"neuron": 48, "head": 4}, "about": f"about {name}"}
        Direction({"neuron:1[5,0,7]": values}, "positive = up", info=info, **origin).save(root / name)
    for name, seed in (("validation", 3), ("test", 4)):
        write_rows(root / f"{name}.jsonl", make_problems(["arithmetic", "words"], 8, name, seed))
    from neureasoner.inference.steered import encode_prompt

    channels = np.array([[0, 3], [1, 5]])
    prompts = [encode_prompt(tokenizer, p) for n in ("validation", "test") for p in read_problems(root / f"{n}.jsonl")]
    values_of = question_values(model, channels, prompts, 4)
    gate = FailureGate(channels, model="base", model_fingerprint=fingerprint(model), hidden=32, lr=0.01, epochs=5)
    gate.fit(values_of, np.arange(16) % 2)
    gate.threshold = float(np.median(gate.predict_proba(values_of)))
    gate.save(root / "gate")
    return root


@pytest.fixture
def config(ablation_root: Path, checkpoint: Path, tmp_path: Path) -> Callable[..., AblateConfig]:
    def make(**changes: Any) -> AblateConfig:
        fixed: dict[str, Any] = {
            "model": str(checkpoint / "base"),
            "direction": str(ablation_root / "full"),
            "variants": {"other": str(ablation_root / "other")},
            "gate": str(ablation_root / "gate"),
            "validation": str(ablation_root / "validation.jsonl"),
            "problems": str(ablation_root / "test.jsonl"),
            "out": str(tmp_path / "out"),
            "strengths": [0.5, 2.0],
            "validation_samples": 1,
            "samples": 2,
            "max_new_tokens": 24,
            "temperature": 1.0,
            "batch_size": 8,
            "resamples": 200,
            "device": "cpu",
        }
        return AblateConfig(**(fixed | changes))

    return make


def test_arms_and_their_plans(config: Callable[..., AblateConfig], ablation_root: Path) -> None:
    settings = config()
    arms = {a.name: a for a in arms_of(settings)}
    assert list(arms) == ["full", "other", "no_gate", "random_gate", "flipped"]
    assert arms["other"].about == "about other"
    rules = {name: arm.plan(settings, 0.5, 0.25).rules[0] for name, arm in arms.items()}
    assert [rules[n].strength.value for n in rules] == [0.5, 0.5, 0.5, 0.5, -0.5]
    folder = Path(settings.out) / "plans"
    for name, rule in rules.items():
        wanted = ablation_root / ("other" if name == "other" else "full")
        assert (folder / str(rule.direction)).resolve() == wanted.resolve()
        gate = rule.trigger.gate
        if name in ("no_gate", "random_gate"):
            assert gate == {"no_gate": None, "random_gate": 0.25}[name]
        else:
            assert (folder / str(gate)).resolve() == (ablation_root / "gate").resolve()
    assert rules["no_gate"].trigger.decode
    bare = config(gate="", trigger="boundary", variants={})
    assert [a.name for a in arms_of(bare)] == ["full", "flipped"]
    assert arms_of(bare)[0].plan(bare, 1.0, 0.0).rules[0].trigger.boundary


def test_stage_end_to_end(config: Callable[..., AblateConfig], capsys: Any, monkeypatch: Any) -> None:
    settings = config()
    summary = ablate(settings)
    out = Path(settings.out)
    found = read_json(out / "results.json")
    names = [a["name"] for a in found["arms"]]
    assert names == ["vanilla", "full", "other", "no_gate", "random_gate", "flipped"] == list(summary["arms"])
    traces = {n: read_traces(out / "traces" / f"{n}.jsonl") for n in names}
    assert all(len(t) == 8 * 2 for t in traces.values())
    # rows that the gate passes over are those of vanilla, token by token; the others are not
    gate = FailureGate.load(settings.gate)
    model, _ = load(settings.model, device="cpu")
    prompts = [t.prompt_ids for t in traces["vanilla"]]
    picked = gate.predict_proba(question_values(model, gate.channels, prompts, 4)) > gate.threshold
    assert 0 < picked.sum() < len(picked)
    same = {
        n: np.array([a.response_ids == b.response_ids for a, b in zip(traces[n], traces["vanilla"], strict=True)])
        for n in names
    }
    for name in ("full", "other", "flipped"):
        assert same[name][~picked].all() and not same[name][picked].all()
    assert not same["no_gate"].all()
    by_name = {a["name"]: a for a in found["arms"]}
    assert by_name["full"]["steered"] == pytest.approx(picked.mean()) and by_name["vanilla"]["steered"] == 0
    assert by_name["no_gate"]["steered"] == 1
    tried = found["tuning"]["tried"]
    chosen = [t["strength"] for t in tried if t["chosen"]]
    assert [t["strength"] for t in tried] == [0.5, 2.0] and len(chosen) == 1
    assert max(t["accuracy"] for t in tried) == next(t["accuracy"] for t in tried if t["chosen"])
    assert by_name["other"]["strength"] == by_name["full"]["strength"] == chosen[0]
    plan = Plan.load(out / "plans" / "flipped.yaml")
    assert plan.rules[0].strength.value == -chosen[0]
    pairs = {(c["arm"], c["against"]) for c in found["comparisons"]}
    assert {("other", "vanilla"), ("full", "other"), ("full", "vanilla")} <= pairs
    assert all(0 < c["accuracy_p"] <= 1 for c in found["comparisons"])
    assert found["gate"]["questions"] == 8 and found["gate"]["picked"] == pytest.approx(picked.mean())
    text = capsys.readouterr().out
    for name in names:
        assert f"| {name} |" in text
    assert "Only 2 seeds" in text and "Strengths on validation problems" in text
    monkeypatch.setattr(Ablation, "run", lambda *a: pytest.fail("ran again"))
    assert ablate(settings) == summary


def test_each_arm_may_have_its_own_strength(config: Callable[..., AblateConfig]) -> None:
    settings = config(gate="", tune="each", samples=1)
    ablate(settings)
    found = read_json(Path(settings.out) / "results.json")
    tried = found["tuning"]["tried"]
    assert {t["arm"] for t in tried} == {"full", "other", "flipped"} and found["gate"] == {}
    for arm in found["arms"][1:]:
        assert [t["strength"] for t in tried if t["arm"] == arm["name"] and t["chosen"]] == [arm["strength"]]


def test_a_killed_run_goes_on(config: Callable[..., AblateConfig], monkeypatch: Any) -> None:
    from neureasoner.evaluation import ablation as module

    settings = config(variants={}, gate="")
    real, calls = module.ArmRun.part, []

    def part(self: Any, sample: int, batch: int) -> Any:
        calls.append(self.arm.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, sample, batch)

    monkeypatch.setattr(module.ArmRun, "part", part)
    with pytest.raises(KeyboardInterrupt):
        ablate(settings)
    monkeypatch.setattr(module.ArmRun, "part", real)
    first = {p: p.stat().st_mtime_ns for p in Path(settings.out).rglob("*.jsonl")}
    ablate(settings)
    merged = {p: t for p, t in first.items() if p.parent.name == "traces"}
    assert merged and all(p.stat().st_mtime_ns == t for p, t in merged.items())


def test_problems_of_a_benchmark_are_graded_as_such(
    config: Callable[..., AblateConfig], tmp_path: Path, capsys: Any
) -> None:
    rows = {n: [Problem(f"{n}{i}", "gsm8k", 1, f"What is {i} + {n == 'a'}?", str(i)) for i in range(3)] for n in "ab"}
    files = {n: str(tmp_path / f"{n}.jsonl") for n in rows}
    for n, problems in rows.items():
        write_rows(files[n], problems)
    found = ablate(config(problems=files["a"], validation=files["b"], strengths=[0.5], variants={}, gate=""))
    assert found["arms"]["full"]["accuracy"] == 0.0 and found["n_problems"] == 3
    write_rows(files["a"], [Problem("x", "poems", 1, "Rhyme?", "time")])
    with pytest.raises(UserError, match="unknown problem family 'poems'"):
        ablate(config(problems=files["a"], out=str(tmp_path / "other")))


def test_overlapping_files_and_foreign_parts_are_refused(
    config: Callable[..., AblateConfig], ablation_root: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"8 questions are also in .*the strength would be chosen on what is measured"):
        ablate(config(validation=str(ablation_root / "test.jsonl")))
    with pytest.raises(UserError, match="made on model 'base'"):
        ablate(config(model=str(checkpoint / "model"), gate=""))
    with pytest.raises(UserError, match="the gate was fitted on model"):
        ablate(config(model=str(checkpoint / "model"), out=str(tmp_path / "b")))
    with pytest.raises(UserError, match="does not exist"):
        ablate(config(direction=str(tmp_path / "none"), out=str(tmp_path / "c")))
    gate = FailureGate.load(ablation_root / "gate")
    gate.threshold = 1.0
    gate.save(tmp_path / "gate")
    with pytest.raises(UserError, match="the gate picks none of the 8 validation questions"):
        ablate(config(gate=str(tmp_path / "gate"), out=str(tmp_path / "d")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"direction": ""}, "'direction' is empty"),
        ({"trigger": "x"}, "'trigger' must be one of decode, always, boundary"),
        ({"action": "x"}, "'action' must be one of add, add_keep_norm"),
        ({"tune": "x"}, "'tune' must be one of full, each"),
        ({"strengths": []}, "'strengths' needs different numbers above 0"),
        ({"strengths": [0.0, 0.1]}, "'strengths' needs different numbers above 0"),
        ({"strengths": [0.1, 0.1]}, "'strengths' needs different numbers above 0"),
        ({"variants": {"full": "x"}}, "'full' is no name for an arm"),
        ({"variants": {"a/b": "x"}}, "'a/b' is no name for an arm"),
        ({"samples": 0}, "'samples' must be at least 1"),
        ({"limit": -1}, "'limit' must not be negative"),
        ({"top_p": 0.0}, "'top_p' must lie in"),
    ],
)
def test_bad_settings_are_named(config: Callable[..., AblateConfig], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**more)


def test_what_held_programs_stands_in_the_results(
    config: Callable[..., AblateConfig], programs: tuple[str, str, str], capsys: Any
) -> None:
    problems, validation, level = programs
    settings = config(problems=problems, validation=validation, strengths=[0.5], variants={}, gate="")
    ablate(settings)
    assert read_json(Path(settings.out) / "results.json")["sandbox"]["level"] == level
    assert f"Programs ran in the sandbox at the level '{level}'" in capsys.readouterr().out
