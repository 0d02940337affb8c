"""Metrics against a plain-loop oracle and known values."""

from __future__ import annotations

import random
from itertools import combinations, product
from math import comb
from statistics import mean

import numpy as np
import pytest

from neureasoner.evaluation.metrics import (
    Outcome,
    answer_classes,
    compare,
    cons_at_k,
    costs,
    interval,
    majority,
    pass_at_k,
    per_problem,
    resampled_means,
    sign_flip_p,
    speedup,
    split_by,
    subsets_of,
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


@pytest.mark.parametrize("right", [True, False])
def test_where_all_is_right_or_wrong_the_interval_is_exact(right: bool) -> None:
    from scipy.stats import binomtest

    rows = [Outcome(f"p{i}", "f", 1, s, right, 10.0) for i in range(50) for s in range(4)]
    low, high = binomtest(50 * right, 50).proportion_ci(0.95, "exact")
    assert summarise(rows)["accuracy_ci"] == pytest.approx([low, high], abs=1e-12)
    one = [*rows, Outcome("p0", "f", 1, 4, not right, 10.0)]
    assert summarise(one)["accuracy_ci"] != pytest.approx([low, high], abs=1e-3), "elsewhere it is the bootstrap's"


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
    assert c["accuracy_delta"] == 0 and c["accuracy_delta_ci"] == [0, 0] and not c["accuracy_shown"]
    assert c["tokens_relative"] == pytest.approx(-0.5)
    np.testing.assert_allclose(c["tokens_relative_ci"], [-0.5, -0.5])
    assert c["tokens_shown"] and c["accuracy_p"] == 1.0


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


def test_cons_at_k_by_hand() -> None:
    # Answers A B B - (missing): A is right. Pairs in order: AB AB A- BB B- B- ; a tie goes to the first seen.
    # AB -> A, AB -> A, A- -> A, BB -> B, B- -> B, B- -> B: right in 3 of 6. Triples: ABB -> B, AB- -> A, AB- -> A,
    # BB- -> B: 2 of 4. All four: B. One: A B B -: 1 of 4, the missing answer being wrong.
    classes, correct = [[0, 1, 1, -1]], [[True, False, False, False]]
    assert [cons_at_k(classes, correct, k)[0] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.5, 0.0]
    # B first, A right: BA tie -> B. Pairs BA B- A-: only A- is right.
    assert cons_at_k([[0, 1, -1]], [[False, True, False]], 2)[0] == pytest.approx(1 / 3)
    assert list(cons_at_k([[-1, -1], [0, 0]], [[False, False], [True, True]], 2)) == [0.0, 1.0], "all abstain: wrong"
    with pytest.raises(ValueError, match="a subset of 5 out of 4"):
        cons_at_k(classes, correct, 5)


def test_cons_at_k_agrees_with_votes_one_by_one() -> None:
    rng = random.Random(3)
    answers = [[rng.choice(["1", "1.0", "2", "3", None]) for _ in range(7)] for _ in range(5)]
    equal = lambda a, b: float(a) == float(b)  # noqa: E731
    classes = [answer_classes(row, equal) for row in answers]
    correct = [[a is not None and float(a) == 1 for a in row] for row in answers]
    for k in (1, 2, 4, 7):
        expected = []
        for row in answers:
            votes = [majority(list(part), equal) for part in combinations(row, k)]
            expected.append(mean(v is not None and float(v) == 1 for v in votes))
        np.testing.assert_allclose(cons_at_k(classes, correct, k), expected)


def test_subsets_are_seeded_and_near_all_of_them() -> None:
    drawn = subsets_of(64, 16, 500, seed=1)
    assert drawn.shape == (500, 16) and (np.diff(drawn, axis=1) > 0).all(), "no sample twice, in order of drawing"
    np.testing.assert_array_equal(drawn, subsets_of(64, 16, 500, seed=1))
    assert (drawn != subsets_of(64, 16, 500, seed=2)).any()
    # 12 samples, 5 right (class 0), 7 spread over two wrong classes: the exact average over all 924 subsets of 6
    row, right = [[0, 1, 0, 2, 1, 0, 2, 0, 1, 0, 2, 1]], [[c == 0 for c in (0, 1, 0, 2, 1, 0, 2, 0, 1, 0, 2, 1)]]
    exact = cons_at_k(row, right, 6, subsets=924)[0]
    assert cons_at_k(row, right, 6, subsets=900, seed=5)[0] == pytest.approx(exact, abs=0.05)
    assert len(subsets_of(12, 6, 924)) == comb(12, 6) == 924


def test_pass_at_k_by_hand() -> None:
    # 1 right of 4: one sample 1/4; two: 1 - C(3,2)/C(4,2) = 1 - 3/6; four: 1. 2 of 4 at two: 1 - 1/6.
    rows = [[True, False, False, False], [True, True, False, False], [False] * 4]
    assert list(pass_at_k(rows, 1)) == [0.25, 0.5, 0.0]
    np.testing.assert_allclose(pass_at_k(rows, 2), [0.5, 5 / 6, 0.0])
    assert list(pass_at_k(rows, 4)) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="pass@8 needs at least 8"):
        pass_at_k(rows, 8)


def test_sign_flips_by_hand() -> None:
    # Three problems gained: of 8 flips only +++ and --- reach a sum of 3: p = 2/8. Unmoved problems change nothing.
    assert sign_flip_p(np.array([1.0, 1, 1])) == 0.25 == sign_flip_p(np.array([0.0, 1, 1, 1, 0]))
    # +1 +1 -1: |sum| >= 1 always.
    assert sign_flip_p(np.array([1.0, 1, -1])) == 1.0 == sign_flip_p(np.zeros(4))
    # 1, .5, .25: only the two extreme ones of 8 reach 1.75.
    assert sign_flip_p(np.array([1, 0.5, 0.25])) == 0.25
    difference = np.array([1.0] * 9 + [-1.0] * 3)
    exact = sign_flip_p(difference, draws=4096)
    tail = 2 * sum(comb(12, i) for i in range(4)) / 4096  # 3 or fewer minus signs, or 3 or fewer plus signs
    assert exact == pytest.approx(tail)
    assert sign_flip_p(difference, draws=4000, seed=1) == pytest.approx(exact, abs=0.03), "drawn, not counted"


@pytest.mark.parametrize("difference", [[0.5, 0.25, -0.125, 0.0, 0.5], [0.1, 0.1, 0.1, 0.1], [0.2, -0.2]])
def test_sign_flips_equal_all_flips_in_a_loop(difference: list[float]) -> None:
    d = np.array(difference)
    exact = np.mean([abs(np.dot(s, d)) >= abs(d.sum()) - 1e-9 for s in product((1, -1), repeat=len(d))])
    counted = sign_flip_p(d, 20_000)
    assert counted == pytest.approx(exact) and counted == sign_flip_p(-d, 20_000)


def test_cost_by_hand() -> None:
    rows = [
        Outcome("a", "f", 1, 0, True, 10, seconds=2, forced=3, probe_tokens=8),
        Outcome("a", "f", 1, 1, False, 10, seconds=4),
        Outcome("b", "f", 1, 0, False, 10, seconds=5),
        Outcome("b", "f", 1, 1, False, 10, seconds=5),
    ]
    found = costs(rows, 500)
    # a: 3 s and half right, b: 5 s and never: 4 s a problem, 16 s a solved one
    assert found["seconds_per_problem"] == 4 and found["seconds_per_solved"] == 16
    assert found["seconds_per_solved_ci"] == [6.0, None], "twice a: 3 s for half a solution; twice b: no end"
    assert found["forced_mean"] == 0.75 and found["probe_tokens_mean"] == 2
    wrong = costs([Outcome("a", "f", 1, 0, False, 10, seconds=2)], 50)
    assert wrong["seconds_per_solved"] is None and wrong["seconds_per_problem"] == 2
    assert costs([Outcome("a", "f", 1, 0, True, 10)])["seconds_per_problem"] is None, "nobody took the time"


def test_speedup_is_the_ratio_of_seconds_per_solved_problem() -> None:
    def rows(right: list[bool], seconds: float) -> list[Outcome]:
        return [Outcome(f"p{i}", "f", 1, 0, r, 1, seconds=seconds) for i, r in enumerate(right)]

    fast, slow = rows([True, True, True, False] * 10, 2.0), rows([True, False, True, False] * 10, 3.0)
    found = speedup(fast, slow, 500)
    assert found["speedup"] == pytest.approx((3.0 / 0.5) / (2.0 / 0.75))
    low, high = found["speedup_ci"]
    assert 1.5 < low < found["speedup"] < high
    assert speedup(slow, fast, 500)["speedup"] == pytest.approx(1 / found["speedup"])
    for other in (rows([False] * 40, 3.0), rows([True] * 40, 0.0)):
        assert speedup(fast, other, 100) == {"speedup": None, "speedup_ci": None}
