"""Metrics against a plain-loop oracle and known values."""

from __future__ import annotations

import random
from statistics import mean

import numpy as np
import pytest

from neureasoner.evaluation.metrics import (
    Outcome,
    compare,
    interval,
    majority,
    per_problem,
    resampled_means,
    split_by,
    summarise,
)


def outcomes(seed: int, problems: int = 40, samples: int = 3, p: float = 0.6, tokens: float = 100) -> list[Outcome]:
    rng = random.Random(seed)
    return [
        Outcome(f"p{i}", f"f{i % 2}", i % 4, s, rng.random() < p, rng.gauss(tokens, 20), triggers=rng.randint(0, 2))
        for i in range(problems)
        for s in range(samples)
    ]


def loop_bootstrap(rows: list[Outcome], resamples: int, seed: int) -> tuple[list[float], list[float]]:
    """Draw problems one by one, average by hand, take quantiles from a sorted list."""
    by: dict[str, list[Outcome]] = {}
    for o in rows:
        by.setdefault(o.problem, []).append(o)
    ids, rng = sorted(by), random.Random(seed)
    accuracies, lengths = [], []
    for _ in range(resamples):
        drawn = [by[rng.choice(ids)] for _ in ids]
        accuracies.append(mean(mean(float(o.correct) for o in rs) for rs in drawn))
        lengths.append(mean(mean(o.tokens for o in rs) for rs in drawn))
    cut = lambda values: [sorted(values)[int(q * (resamples - 1))] for q in (0.025, 0.975)]  # noqa: E731
    return cut(accuracies), cut(lengths)


def test_summary_agrees_with_a_plain_loop() -> None:
    rows = outcomes(0)
    found = summarise(rows, resamples=4000)
    accuracy_ci, tokens_ci = loop_bootstrap(rows, 4000, 1)
    assert found["accuracy"] == pytest.approx(mean(o.correct for o in rows))
    assert found["tokens_mean"] == pytest.approx(mean(o.tokens for o in rows))
    np.testing.assert_allclose(found["accuracy_ci"], accuracy_ci, atol=0.015)
    np.testing.assert_allclose(found["tokens_ci"], tokens_ci, atol=0.8)
    assert found["n_problems"] == 40 and found["n_samples"] == 120


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for i in range(300):
        draws = resampled_means((rng.random((60, 1)) < 0.5).astype(float), 300, seed=i)
        low, high = interval(draws[:, 0])
        hits += low <= 0.5 <= high
    assert 0.89 <= hits / 300 <= 0.985


def test_known_values() -> None:
    rows = [Outcome("a", "f", 1, 0, True, 10), Outcome("b", "f", 1, 0, False, 30)]
    found = summarise(rows, resamples=2000)
    assert found["accuracy"] == 0.5 and found["tokens_mean"] == 20
    assert found["accuracy_ci"] == [0.0, 1.0] and found["tokens_ci"] == [10.0, 30.0]


def test_problems_weigh_the_same_whatever_their_samples() -> None:
    rows = [Outcome("a", "f", 1, s, True, 10) for s in range(9)] + [Outcome("b", "f", 1, 0, False, 10)]
    assert summarise(rows, resamples=10)["accuracy"] == 0.5


def test_samples_of_one_problem_are_no_extra_evidence() -> None:
    once = [Outcome(f"p{i}", "f", 1, 0, i % 2 == 0, 10) for i in range(30)]
    often = [Outcome(o.problem, "f", 1, s, o.correct, 10) for o in once for s in range(8)]
    assert summarise(once)["accuracy_ci"] == summarise(often)["accuracy_ci"]


def test_pairing_removes_what_both_share() -> None:
    vanilla = outcomes(1, problems=100, samples=1)
    arm = [Outcome(o.problem, o.family, o.difficulty, 0, o.correct, o.tokens * 0.5) for o in vanilla]
    c = compare(arm, vanilla, resamples=500)
    assert c["accuracy_delta"] == 0 and c["accuracy_delta_ci"] == [0, 0] and not c["accuracy_excludes_zero"]
    assert c["tokens_relative"] == pytest.approx(-0.5)
    np.testing.assert_allclose(c["tokens_relative_ci"], [-0.5, -0.5])
    assert c["tokens_excludes_zero"]


def test_paired_difference_agrees_with_a_plain_loop() -> None:
    a, b = outcomes(2, p=0.8, tokens=70), outcomes(3, p=0.5)
    c, rng, deltas, ratios = compare(a, b, resamples=4000), random.Random(0), [], []
    mine, theirs = per_problem(a), per_problem(b)
    for _ in range(4000):
        drawn = [rng.randrange(40) for _ in range(40)]
        deltas.append(mean(mine.accuracy[i] - theirs.accuracy[i] for i in drawn))
        ratios.append(sum(mine.tokens[i] for i in drawn) / sum(theirs.tokens[i] for i in drawn) - 1)
    np.testing.assert_allclose(c["accuracy_delta_ci"], np.quantile(deltas, [0.025, 0.975]), atol=0.02)
    np.testing.assert_allclose(c["tokens_relative_ci"], np.quantile(ratios, [0.025, 0.975]), atol=0.01)


def test_different_problems_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same problems"):
        compare(outcomes(0, problems=3), outcomes(0, problems=4))


def test_split_by_keeps_order_and_counts() -> None:
    parts = split_by(outcomes(0), lambda o: o.difficulty, resamples=10)
    assert list(parts) == ["0", "1", "2", "3"] and sum(p["n_problems"] for p in parts.values()) == 40


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((30, 2))
    whole = resampled_means(values, 100, 5)
    monkeypatch.setattr("neureasoner.evaluation.metrics._CELLS", 30 * 7)
    np.testing.assert_array_equal(resampled_means(values, 100, 5), whole)


def test_majority() -> None:
    equal = lambda a, b: float(a) == float(b)  # noqa: E731
    assert majority(["1", "2", "2.0"], equal) == "2"
    assert majority(["1", "2", None, None, None], equal) == "1", "ties go to the first, missing answers abstain"
    assert majority([None, None], equal) is None
