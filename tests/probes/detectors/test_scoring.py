"""Figures of detectors against loops written out, on made-up decisions."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, brier_score_loss, roc_auc_score

from neureasoner.errors import UserError
from neureasoner.probes.detectors.scoring import Decisions, Evaluation
from neureasoner.probes.detectors.tables import Table, beside
from neureasoner.steps import segment
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace


@pytest.fixture
def scored(made_up):
    d = made_up()
    p = np.clip(0.5 * np.random.default_rng(1).random(len(d.y)) + 0.5 * (d.y == 1), 0, 1)
    p[::17] = -np.inf  # not valid
    return d, p


def test_figures_equal_scikit_learn_and_loops(scored):
    d, p = scored
    got = Evaluation(d, 20, 0).figures(p, 0.45)
    rows = (d.split[d.trace] == "test") & (d.y >= 0) & np.isfinite(p)
    y, s = d.y[rows], p[rows]
    assert got["n"] == rows.sum() and got["n_problems"] == 10
    assert got["auroc"]["value"] == pytest.approx(roc_auc_score(y, s), abs=1e-4)
    assert got["average_precision"]["value"] == pytest.approx(average_precision_score(y, s), abs=1e-4)
    assert got["brier"]["value"] == pytest.approx(brier_score_loss(y, s), abs=1e-4)
    assert got["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(y, s > 0.45), abs=1e-4)
    assert got["accuracy"]["value"] == pytest.approx(((s > 0.45) == y).mean(), abs=1e-4)
    assert got["recall"]["value"] == pytest.approx((s > 0.45)[y == 1].mean(), abs=1e-4)
    assert got["precision"]["value"] == pytest.approx(y[s > 0.45].mean(), abs=1e-4)
    clean = found = failing = alarms = alarmed = 0
    delays = []
    for t in range(len(d.split)):
        if d.split[t] != "test":
            continue
        mine = np.flatnonzero(d.trace == t)
        fired = [i for i in mine if p[i] > 0.45]
        if d.clean[t]:
            clean, alarms, alarmed = clean + 1, alarms + len(fired), alarmed + bool(fired)
        else:
            failing += 1
            late = [i for i in fired if d.step[i] >= d.onset[t]]
            if late:
                found += 1
                begin = next(i for i in mine if d.step[i] == d.onset[t])
                delays.append((d.step[late[0]] - d.onset[t], d.token[late[0]] - d.token[begin]))
    assert got["n_clean_traces"] == clean and got["n_failing_traces"] == failing
    assert got["clean_traces_alarmed"]["value"] == pytest.approx(alarmed / clean, abs=1e-4)
    assert got["false_alarms_per_1000_tokens"]["value"] == pytest.approx(alarms / clean / 0.07, abs=1e-3)
    assert got["failing_traces_detected"]["value"] == pytest.approx(found / failing, abs=1e-4)
    assert got["delay_steps"]["value"] == pytest.approx(np.mean([a for a, _ in delays]), abs=1e-4)
    assert got["delay_tokens"]["value"] == pytest.approx(np.mean([b for _, b in delays]), abs=1e-4)


def test_intervals_resample_problems_not_decisions(scored):
    d, p = scored
    got = Evaluation(d, 2000, 3).figures(p, 0.45)["recall"]
    rows = (d.split[d.trace] == "test") & (d.y == 1) & np.isfinite(p)
    problem, hit = d.problem[d.trace[rows]], p[rows] > 0.45
    rng, values, ids = np.random.default_rng(9), [], np.flatnonzero(d.split[::3] == "test")
    for _ in range(2000):
        drawn = rng.choice(ids, len(ids))
        n = sum((problem == i).sum() for i in drawn)
        values.append(sum(hit[problem == i].sum() for i in drawn) / n if n else np.nan)
    assert [got["low"], got["high"]] == pytest.approx(np.nanquantile(values, [0.025, 0.975]).tolist(), abs=0.04)


def test_a_statistic_in_its_own_unit_decides_and_the_probability_ranks(scored):
    d, p = scored
    plain, other = Evaluation(d, 5, 0).figures(p, 0.45), Evaluation(d, 5, 0).figures(p, 4.5, statistic=10 * p)
    assert plain | {"threshold": 0} == other | {"threshold": 0}


def test_of_reads_labels_and_refuses_a_problem_without_a_split(tiny_tokenizer):
    ids = tiny_tokenizer("One.\n\nTwo.\n\n</think>\n\nDone.", add_special_tokens=False)["input_ids"]
    steps, thinking = segment(ids, tiny_tokenizer)
    labels = Labels(False, "1", IntraLabel(True, step=1), InterLabel(False))
    trace = Trace(
        "t", Problem("p", "f", 1, "q", "a"), [1], ids, "", steps, True, labels, meta={"thinking_tokens": thinking}
    )
    table = Table(
        np.zeros((2, 1)), np.ones(2, bool), np.array([0, 1]), np.zeros(2, int), np.arange(2), np.array([4, 8])
    )
    d = Decisions.of("intra", table, [trace], {"p": "test"}, {})
    assert d.onset.tolist() == [1] and d.clean.tolist() == [False] and d.tokens.tolist() == [thinking]
    assert d.rows("test").tolist() == [True, True] and d.maxima(np.array([0.1, 0.7])).tolist() == [0.7]
    for wrong in ({}, {"p": "train and test"}):
        with pytest.raises(UserError, match="problem 'p' is in split"):
            Decisions.of("intra", table, [trace], wrong, {})


def test_tables_side_by_side_are_valid_where_all_are():
    make = lambda v, ok: Table(np.full((3, 2), v), np.array(ok), *(np.arange(3) for _ in range(4)))  # noqa: E731
    got = beside([make(1.0, [True, True, False]), make(2.0, [False, True, True])])
    assert got.valid.tolist() == [False, True, False]
    np.testing.assert_array_equal(got.x, [[1, 1, 2, 2]] * 3)
