"""Agreement of two judges against numbers worked out by hand and against scikit-learn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from neureasoner.data_builders.agreement import compare, kappa, table
from neureasoner.errors import UserError
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace

TYPES = ["calculation", "hallucination", "dropped_case", "none"]


def trace(i: int, kind: str, step: int | None = None, loop: int | None = None, problem: str = "", judge: str = "a"):
    wrong = kind != "none"
    steps = None if loop is None else (loop, loop + 3)
    labels = Labels(
        correct=not wrong,
        answer=None,
        intra=IntraLabel(wrong, "q" if wrong else None, kind, "", (0, 1) if wrong else None, step),
        inter=InterLabel(loop is not None, None, "modular_checks" if steps else "none", "low", "", None, steps),
        judge=judge,
    )
    p = Problem(problem or f"p{i}", "math", 1, "?", "1")
    return Trace(f"t{i}", p, [], [], "", [], True, labels=labels)


def test_by_hand() -> None:
    # wrong step: first 4 of 8, second 4 of 8, both 3 -> precision = recall = 3/4; po = 6/8, pe = 1/2, kappa = 1/2
    first = [*(trace(i, "calculation", i, loop=1) for i in range(4)), *(trace(i, "none") for i in range(4, 8))]
    second = [
        trace(0, "calculation", 0, loop=1), trace(1, "calculation", 5, loop=2), trace(2, "hallucination", 2),
        trace(3, "none"), trace(4, "calculation", 1), *(trace(i, "none") for i in range(5, 8)),
    ]  # fmt: skip
    result = compare(first, second, resamples=200)
    rows = {r.name.strip(): r for r in result.rows}
    wrong = rows["wrong step"]
    assert (wrong.first, wrong.second, wrong.both) == (4, 4, 3)
    assert (wrong.precision.value, wrong.recall.value) == (0.75, 0.75)
    assert wrong.kappa.value == pytest.approx(0.5) and wrong.agreement.value == 0.75
    # calculation: first 4, second 3, both 2: po = 5/8, pe = (4*3 + 4*5)/64 = 1/2
    calculation = rows["calculation"]
    assert calculation.precision.value == pytest.approx(2 / 3) and calculation.recall.value == 0.5
    assert calculation.kappa.value == pytest.approx(0.25)
    assert rows["hallucination"].precision.value == 0 and rows["hallucination"].recall.value is None
    assert rows["error type"].both == 2 and rows["error type"].precision.value is None
    # stagnation: first 4, second 2, both 2: po = 6/8, pe = (4*2 + 4*6)/64 = 1/2
    assert (rows["stagnation"].precision.value, rows["stagnation"].recall.value) == (1.0, 0.5)
    assert rows["stagnation"].kappa.value == pytest.approx(0.5)
    assert result.error_step.value == pytest.approx(2 / 3), "of three found by both, one is another step"
    assert result.loop_start.value == 0.5
    about = [(d.id, d.about, d.first, d.second) for d in result.disagreements]
    assert ("t1", "error step", "1", "5") in about and ("t2", "error type", "calculation", "hallucination") in about
    assert ("t1", "loop start", "1", "2") in about and ("t4", "error type", "none", "calculation") in about
    assert not any(d.id in ("t0", "t5", "t6", "t7") for d in result.disagreements)
    assert all(r.kappa.low <= r.kappa.value <= r.kappa.high for r in (wrong, rows["stagnation"]))


def test_kappa_equals_scikit_learn() -> None:
    rng = random.Random(0)
    for n in (5, 40, 300):
        kinds = [(rng.choice(TYPES), rng.choice(TYPES)) for _ in range(n)]
        kinds = [(a, a if rng.random() < 0.5 else b) for a, b in kinds]
        result = compare(
            [trace(i, a, 0) for i, (a, _) in enumerate(kinds)], [trace(i, b, 0) for i, (_, b) in enumerate(kinds)]
        )
        rows = {r.name.strip(): r for r in result.rows}
        a, b = zip(*kinds, strict=True)
        assert rows["error type"].kappa.value == pytest.approx(cohen_kappa_score(a, b))
        for name in (set(a) | set(b)) - {"none"}:
            expected = cohen_kappa_score([x == name for x in a], [x == name for x in b])
            assert rows[name].kappa.value == pytest.approx(expected)
    tables = np.random.default_rng(0).integers(0, 9, (20, 3, 3)).astype(float)
    for t, k in zip(tables, kappa(tables), strict=True):
        a = [i for i in range(3) for j in range(3) for _ in range(int(t[i, j]))]
        b = [j for i in range(3) for j in range(3) for _ in range(int(t[i, j]))]
        assert k == pytest.approx(cohen_kappa_score(a, b))


def test_intervals_are_seeded_and_by_problem() -> None:
    rng = random.Random(1)
    flips = [rng.random() < 0.3 for _ in range(10)]  # every trace of a problem agrees or disagrees together
    first = [trace(i, "calculation" if i % 2 else "none", 0, problem=f"p{i // 20}") for i in range(200)]
    second = [
        trace(i, "calculation" if (i % 2 == 1) != flips[i // 20] else "none", 0, problem=f"p{i // 20}")
        for i in range(200)
    ]
    a, b = (compare(first, second, resamples=500, seed=3) for _ in range(2))
    assert a == b and a.problems == 10
    alone = [trace(i, t.labels.intra.error_type, 0) for i, t in enumerate(second)]
    one = [trace(i, t.labels.intra.error_type, 0) for i, t in enumerate(first)]
    wide = next(r for r in a.rows if r.name == "wrong step").agreement
    narrow = next(r for r in compare(one, alone, resamples=500).rows if r.name == "wrong step").agreement
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low), "traces of one problem are not independent"


def test_what_is_undefined_is_none_and_what_is_not_compared_is_listed() -> None:
    clean = [trace(i, "none", judge="exact") for i in range(4)]
    other = [trace(i, "none", judge="llm:m") for i in range(1, 5)]
    other[0].labels = None
    result = compare(clean, other)
    assert result.n == 2 and result.left_out == ["t0", "t1", "t4"] and not result.disagreements
    row = next(r for r in result.rows if r.name == "wrong step")
    assert row.kappa.value is None and row.precision.value is None and row.agreement.value == 1
    shown = table(result)
    assert "first judge: exact, second judge: llm:m" in shown and "left out" in shown and "0 disagreements" in shown
    with pytest.raises(UserError, match="share no labelled trace"):
        compare(clean[:1], other[:1])
    with pytest.raises(UserError, match="'t0' twice"):
        compare([clean[0], clean[0]], other)


def test_the_table_is_plain_text_and_short() -> None:
    first = [trace(i, "calculation", 0) for i in range(50)]
    second = [trace(i, "none") for i in range(50)]
    second[0].id = first[0].id = "t\x1b[31m\n0"
    shown = table(compare(first, second, resamples=50), listed=5)
    assert "\x1b" not in shown and "… and" in shown
    assert all(len(line) <= 130 for line in shown.split("\n"))
