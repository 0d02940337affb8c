"""Decision rules: written-out recursions, the online form, thresholds that keep a budget, JSON, every refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.errors import UserError
from neureasoner.probes.detectors.sequential import RULES, Sequential, threshold_for_budget

SHOWN = [
    Sequential("none"),
    Sequential("consecutive", m=1),
    Sequential("consecutive", m=3),
    Sequential("ewma", alpha=0.3),
    Sequential("ewma", alpha=1.0),
    Sequential("cusum", kappa=0.0),
    Sequential("cusum", kappa=-0.7),
]
score = st.one_of(st.floats(0, 1), st.sampled_from([-math.inf, 0.0, 1.0, 0.5]))


def logit(p):
    p = min(max(p, 1e-12), 1 - 1e-12)
    return math.log(p / (1 - p))


def written_out(rule, scores):
    """The definition of every rule over the scores of one trace, from the whole past at each place."""
    out = []
    for i, last in enumerate(scores):
        past = [s for s in scores[: i + 1] if s > -math.inf]
        if last == -math.inf:
            out.append(-math.inf)
        elif rule.name == "none":
            out.append(last)
        elif rule.name == "consecutive":
            out.append(min(past[-rule.m :]) if len(past) >= rule.m else -math.inf)
        elif rule.name == "ewma":
            s = logit(past[0])
            for p in past[1:]:
                s = rule.alpha * logit(p) + (1 - rule.alpha) * s
            out.append(s)
        else:  # the largest sum of a run of evidence that ends here
            steps = [logit(p) - rule.kappa for p in past]
            out.append(max(0.0, *(sum(steps[j:]) for j in range(len(steps)))))
    return out


@pytest.mark.parametrize("rule", SHOWN, ids=str)
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), score), max_size=40))
def test_offline_equals_online_exactly_and_both_the_definition(rule, rows):
    trace, scores = np.array([t for t, _ in rows], dtype=int), np.array([s for _, s in rows], dtype=float)
    got = rule.apply(scores, trace)
    assert got.shape == scores.shape
    running = {t: rule.start() for t in range(5)}
    online = [running[t].update(s) for t, s in rows]  # traces mix, and share nothing
    np.testing.assert_array_equal(got, online)
    for t in range(5):
        want = written_out(rule, scores[trace == t].tolist())
        np.testing.assert_allclose(got[trace == t], want, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(scores=st.lists(st.floats(0, 1), max_size=30), m=st.integers(1, 5), threshold=st.floats(0, 1))
def test_consecutive_above_a_threshold_is_m_positives_in_a_row(scores, m, threshold):
    alarm = Sequential("consecutive", m=m).apply(np.array(scores), np.zeros(len(scores))) > threshold
    run = 0
    for s, a in zip(scores, alarm, strict=True):
        run = run + 1 if s > threshold else 0
        assert a == (run >= m)


def test_many_traces_at_once_in_any_numbering():
    rng = np.random.default_rng(0)
    trace, scores = rng.choice([-7, 3, 900, 10**12], 500), rng.random(500)
    for rule in SHOWN:
        got = rule.apply(scores, trace)
        for t in np.unique(trace):
            np.testing.assert_array_equal(got[trace == t], rule.apply(scores[trace == t], np.zeros((trace == t).sum())))
        np.testing.assert_array_equal(got, rule.apply(scores, trace.astype(str)))
        assert rule.apply(np.array([]), np.array([])).shape == (0,)


def test_an_invalid_decision_leaves_the_state_alone():
    for rule in SHOWN:
        running, again = rule.start(), rule.start()
        with_gap = [running.update(s) for s in (0.9, -math.inf, 0.8, -math.inf, -math.inf, 0.3, 0.7)]
        assert [with_gap[i] for i in (1, 3, 4)] == [-math.inf] * 3
        assert [with_gap[i] for i in (0, 2, 5, 6)] == [again.update(s) for s in (0.9, 0.8, 0.3, 0.7)]


def test_middle_is_one_half_in_the_rules_unit():
    for rule in SHOWN:
        statistic = rule.apply(np.full(5, 0.5), np.zeros(5))
        if rule.kappa is None:
            assert statistic[-1] == rule.middle
    assert Sequential("cusum", kappa=0.0).apply(np.array([0.5]), np.array([0]))[0] == 0.0
    assert Sequential("cusum", kappa=-1.0).middle == 0.0


@pytest.mark.parametrize("rule", SHOWN, ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.9])
def test_threshold_keeps_the_budget_and_is_the_smallest(rule, rate):
    rng = np.random.default_rng(3)
    trace, scores = rng.integers(0, 60, 900), rng.random(900)
    scores[rng.random(900) < 0.2] = -np.inf
    scores[trace == 11] = -np.inf
    clean = np.append(np.arange(0, 60, 2), [11, 77])  # 11 has no valid decision, 77 none at all
    statistic = rule.apply(scores, trace)
    threshold = threshold_for_budget(statistic, trace, clean, rate, rule.middle)

    def alarmed(at):
        return sum(any(s > at for s in statistic[trace == t]) for t in clean)

    assert alarmed(threshold) <= rate * 32
    assert alarmed(np.nextafter(threshold, -np.inf)) > rate * 32


def test_threshold_where_the_data_set_none():
    nothing = np.full(4, -np.inf)
    assert threshold_for_budget(nothing, np.arange(4), np.arange(4), 0.1) == 0.5
    assert threshold_for_budget(nothing, np.arange(4), np.arange(4), 0.1, 0.0) == 0.0
    assert threshold_for_budget(np.ones(4), np.arange(4), np.array([], dtype=int), 0.1, -1.0) == -1.0
    two = np.array([0.2, 0.9]), np.array([5, 5])
    assert threshold_for_budget(*two, np.array([5, 5]), 0.5) == 0.9  # one trace, named twice
    assert threshold_for_budget(*two, np.array([5, 6]), 0.5, -3.0) == -3.0  # the other one cannot alarm


def test_rules_are_values_that_survive_json():
    assert RULES == ("none", "consecutive", "ewma", "cusum")
    assert [r.to_dict() for r in SHOWN[1:4]] == [
        {"name": "consecutive", "m": 1},
        {"name": "consecutive", "m": 3},
        {"name": "ewma", "alpha": 0.3},
    ]
    for rule in SHOWN:
        assert Sequential.from_dict(rule.to_dict()) == rule
    assert len(set(SHOWN)) == len(SHOWN)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "sprt"}, "decision rule 'sprt' is unknown; use one of none, consecutive, ewma, cusum"),
        ({"name": "consecutive"}, "'consecutive' needs setting 'm'"),
        ({"name": "ewma", "m": 4}, "'ewma' has no setting 'm'"),
        ({"name": "none", "kappa": 0.0}, "'none' has no setting 'kappa'"),
        ({"name": "consecutive", "m": 0}, "m must be at least 1, got 0"),
        ({"name": "consecutive", "m": 2.5}, "m must be a whole number, got 2.5"),
        ({"name": "consecutive", "m": True}, "m must be a whole number, got True"),
        ({"name": "ewma", "alpha": "x"}, "alpha must be a number, got 'x'"),
        ({"name": "ewma", "alpha": 0}, r"alpha must lie in \(0, 1\], got 0"),
        ({"name": "ewma", "alpha": 1.5}, "alpha must lie in"),
        ({"name": "cusum", "kappa": math.nan}, "kappa must be finite, got nan"),
        ({"name": "cusum", "drift": 1}, "expected a name and its setting"),
        ({"m": 3}, "expected a name and its setting"),
        ("cusum", "expected a name and its setting, got 'cusum'"),
    ],
)
def test_malformed_rules_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        Sequential.from_dict(value)


@pytest.mark.parametrize("wrong", [1.2, -0.1, math.nan, math.inf])
def test_scores_that_are_no_probabilities_are_refused(wrong):
    with pytest.raises(ValueError, match="scores must lie in"):
        SHOWN[3].apply(np.array([0.5, wrong]), np.zeros(2))
    with pytest.raises(ValueError, match="scores must lie in"):
        SHOWN[3].start().update(wrong)
