"""``evaluation runtime``: turns, overheads against loops, and that watching changes no token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from neureasoner.artifacts import read_json
from neureasoner.errors import UserError
from neureasoner.evaluation.reproduce import runtime as module
from neureasoner.evaluation.reproduce.config import RuntimeConfig
from neureasoner.evaluation.reproduce.runtime import figures, overhead, percent, runtime, silent, timed
from neureasoner.inference.plan import Plan


def test_arms_take_turns_and_are_timed_apart(monkeypatch: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    cost = {"plain": 1.0, "watched": 1.5, "free": 2.0}
    calls: list[tuple[str, int]] = []

    def run(arm: str, b: int) -> list[Any]:
        calls.append((arm, b))
        clock[0] += cost[arm] * (b + 1)
        return [SimpleNamespace(response_ids=list(range(3 if arm == "free" else 5)))] * 2

    ticks: list[int] = []
    seconds, tokens = timed(run, 2, 3, lambda: ticks.append(1))
    assert len(ticks) == len(calls) == 18 and {calls[3 * i][0] for i in range(6)} == set(cost)
    for a, name in enumerate(cost):
        assert np.allclose(seconds[a], [[cost[name], 2 * cost[name]]] * 3)
    assert tokens.tolist() == [[10, 10], [10, 10], [6, 6]]
    found = figures(seconds, tokens, RuntimeConfig("m", "p", "o", resamples=50))
    assert found["watching"]["value"] == pytest.approx(0.5) and found["free"]["value"] == pytest.approx(1.0)
    assert found["free_tokens"]["value"] == pytest.approx(-0.4)
    assert found["arms"]["plain"]["seconds"] == 3.0 and found["arms"]["plain"]["tokens_per_second"] == 20 / 3


def test_a_disturbed_repeat_does_not_count() -> None:
    seconds = np.ones((3, 3, 2))
    seconds[1, 0, 0] = 100.0
    found = figures(seconds, np.ones((3, 2)), RuntimeConfig("m", "p", "o", resamples=50))
    assert found["watching"]["value"] == 0.0 and found["arms"]["watched"]["seconds_of_repeats"] == [101.0, 2.0, 2.0]


def test_the_interval_of_an_overhead_resamples_batches() -> None:
    rng = np.random.default_rng(0)
    plain = rng.uniform(1, 3, size=12)
    arm = plain * rng.uniform(1.0, 1.2, size=12)
    found = overhead(arm, plain, 2000, 0)
    draws = []
    for _ in range(2000):
        drawn = rng.integers(0, 12, size=12)
        draws.append(arm[drawn].sum() / plain[drawn].sum() - 1)
    assert found["value"] == pytest.approx(arm.sum() / plain.sum() - 1)
    assert np.allclose(found["ci"], np.quantile(draws, [0.025, 0.975]), atol=0.004)
    assert overhead(arm[:1], plain[:1], 10, 0)["ci"] is None
    assert percent({"value": 0.071, "ci": [0.06, 0.08]}) == "+7.1 % [+6.0, +8.0]"
    assert percent({"value": -0.05, "ci": None}) == "-5.0 %"


def test_other_tokens_are_refused() -> None:
    def run(arm: str, b: int) -> list[Any]:
        return [SimpleNamespace(response_ids=[1, 2] if arm == "watched" else [1])]

    with pytest.raises(UserError, match="the watched run wrote other tokens"):
        timed(run, 1, 1, lambda: None)


def test_silent_keeps_the_watching_and_no_action(checkpoint: Path) -> None:
    plan = silent(Plan.load(checkpoint / "model"))
    assert plan.names == ["instance", "inter", "intra"] and all(0.99 < r.trigger.threshold < 1 for r in plan.rules)
    with pytest.raises(UserError, match="no rule has a probe"):
        silent(
            Plan.from_dict(
                {"name": "x", "rules": [{"name": "a", "trigger": {"start": True}, "action": {"force": "x"}}]}
            )
        )


def test_stage_end_to_end(checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    config = RuntimeConfig(
        str(checkpoint / "model"),
        str(checkpoint / "data" / "problems.jsonl"),
        str(tmp_path / "out"),
        batch_size=3,
        repeats=2,
        max_new_tokens=40,
        temperature=1.0,
        resamples=100,
        device="cpu",
    )
    watched: list[float] = []
    from neureasoner.probes.detectors.probe import Probe

    real = Probe.predict_proba

    def count(self: Any, x: Any) -> Any:
        watched.append(self.threshold)
        return real(self, x)

    monkeypatch.setattr(Probe, "predict_proba", count)
    summary = runtime(config)
    assert watched  # the probes were asked
    found = read_json(tmp_path / "out" / "results.json")
    assert found["problems"] == 6 and found["batches"] == 2 and found["repeats"] == 2
    arms = found["arms"]
    assert arms["plain"]["tokens"] == arms["watched"]["tokens"] > 0 and arms["free"]["tokens"] != 0
    assert all(len(a["seconds_of_repeats"]) == 2 and a["seconds"] > 0 for a in arms.values())
    assert found["watching"]["value"] == pytest.approx(arms["watched"]["seconds"] / arms["plain"]["seconds"] - 1)
    assert "| watched: probes watch, nobody intervenes |" in capsys.readouterr().out
    monkeypatch.setattr(module, "timed", lambda *a: pytest.fail("timed again"))
    assert runtime(config) == summary
    with pytest.raises(UserError, match=r"holds no plan\.yaml"):
        runtime(RuntimeConfig(str(checkpoint / "base"), config.problems, str(tmp_path / "b")))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"out": ""}, "'out' is empty"),
        ({"repeats": 0}, "'repeats' must be at least 1"),
        ({"seed": -1}, "'seed' must not be negative"),
        ({"top_p": 0.0}, "'top_p' must lie in"),
    ],
)
def test_bad_settings_are_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RuntimeConfig(**({"model": "m", "problems": "p", "out": "o"} | more))
