"""Weighted figures against scikit-learn's, draw by draw; bins, thresholds and differences against plain loops."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
)

from neureasoner.probes.detectors.metrics import (
    balanced_accuracy,
    bootstrap_draws,
    calibration_bins,
    interval,
    paired_difference,
    threshold_for,
    weighted_auroc,
    weighted_average_precision,
    weighted_brier,
    weighted_log_loss,
    youden_threshold,
)


def sample(seed=0, n=200, levels=20, draws=6):
    """Labels, tied scores in [0, 1] (both ends occur) that carry some signal, and draws of 30 problems."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    p = np.clip(np.rint((rng.random(n) + 0.3 * y - 0.15) * levels) / levels, 0, 1)
    return y, p, bootstrap_draws(30, draws, seed)[:, rng.integers(0, 30, n)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (weighted_auroc, roc_auc_score),
        (weighted_average_precision, average_precision_score),
        (weighted_brier, brier_score_loss),
        (weighted_log_loss, log_loss),
    ],
)
def test_weighted_figures_equal_scikit_learn(ours, theirs, seed):
    y, p, weights = sample(seed)
    assert (weights == 0).any() and len(np.unique(p)) <= 21 and {0.0, 1.0} <= set(p)
    want = [theirs(y, p, sample_weight=row) for row in weights]
    np.testing.assert_allclose(ours(y, p, weights), want, rtol=1e-12)
    fractions = np.random.default_rng(seed).random(weights.shape)
    np.testing.assert_allclose(
        ours(y, p, fractions), [theirs(y, p, sample_weight=row) for row in fractions], rtol=1e-10
    )


@pytest.mark.parametrize("seed", range(3))
def test_balanced_accuracy_equals_scikit_learn(seed):
    y, p, weights = sample(seed)
    want = [balanced_accuracy_score(y, p > 0.6, sample_weight=row) for row in weights]
    np.testing.assert_allclose(balanced_accuracy(y, p > 0.6, weights), want, rtol=1e-12)


def test_figures_without_meaning_are_nan():
    ones, none = np.ones((2, 4)), np.zeros((0,))
    p = np.array([0.1, 0.4, 0.6, 0.9])
    for y in (np.zeros(4), np.ones(4)):
        for figure in (weighted_auroc, balanced_accuracy, youden_threshold):
            assert np.isnan(figure(y, p, ones)).all()
    assert np.isnan(weighted_average_precision(np.zeros(4), p, ones)).all()
    assert (weighted_average_precision(np.ones(4), p, ones) == 1).all()
    for figure in (weighted_auroc, weighted_average_precision, weighted_brier, weighted_log_loss, youden_threshold):
        assert np.isnan(figure(none, none, np.zeros((3, 0)))).all()
        assert np.isnan(figure(np.array([0, 1, 0, 1]), p, np.zeros((2, 4)))).all()
    bins = calibration_bins(none, none, np.zeros((3, 0)))
    assert np.isnan(bins["error"]).all() and bins["predicted"].shape == (3, 10)


def test_only_the_order_matters_where_only_the_order_is_read():
    y, p, weights = sample()
    invalid = np.where(p == p.min(), -np.inf, p)
    for figure in (weighted_auroc, weighted_average_precision):
        np.testing.assert_array_equal(figure(y, p, weights), figure(y, invalid, weights))
        np.testing.assert_array_equal(figure(y, p, weights), figure(y, 7 * p - 3, weights))


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_calibration_bins_equal_scikit_learn_on_repeated_samples(bins):
    y, p, weights = sample(1)
    p = np.append(p[:-3], [0.25, 0.5, 0.75])  # upper edges of bins
    got = calibration_bins(y, p, weights, bins)
    for r, row in enumerate(weights.astype(int)):
        observed, predicted = calibration_curve(np.repeat(y, row), np.repeat(p, row), n_bins=bins)
        used = got["share"][r] > 0
        np.testing.assert_allclose(got["observed"][r, used], observed)
        np.testing.assert_allclose(got["predicted"][r, used], predicted)
        assert np.isnan(got["observed"][r, ~used]).all() and got["share"][r].sum() == pytest.approx(1)
        assert got["error"][r] == pytest.approx((got["share"][r, used] * abs(observed - predicted)).sum())


def test_calibration_error_of_known_data():
    p = np.array([0.05, 0.05, 0.95, 0.95])
    got = calibration_bins(np.array([0, 0, 1, 0]), p, np.array([[1, 1, 1, 1], [1, 1, 1, 0.0]]))
    np.testing.assert_allclose(got["error"], [0.5 * 0.05 + 0.5 * 0.45, 0.05])
    np.testing.assert_allclose(got["share"][1, [0, 9]], [2 / 3, 1 / 3])


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=30))
def test_youden_threshold_is_the_best_and_highest(rows):
    y, score, w = (np.array(c, dtype=float) for c in zip(*rows, strict=True))
    got = youden_threshold(y, score, w[None])[0]
    if not (w[y == 1].sum() > 0 and w[y == 0].sum() > 0):
        assert np.isnan(got)
        return

    def gain(t):  # times both numbers, so that equal is equal
        return w[(y == 1) & (score > t)].sum() * w[y == 0].sum() - w[(y == 0) & (score > t)].sum() * w[y == 1].sum()

    gains = {t: gain(t) for t in sorted(set(score))}
    assert got == max(t for t, g in gains.items() if g == max(gains.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fpr, tpr, _ = roc_curve(y, score, sample_weight=w)
    assert gains[got] / w[y == 1].sum() / w[y == 0].sum() == pytest.approx((tpr - fpr).max(), abs=1e-9)


def test_youden_threshold_of_every_draw():
    y, p, weights = sample(2)
    got = youden_threshold(y, p, weights)
    assert len(set(got)) > 1
    for row, threshold in zip(weights, got, strict=True):
        assert youden_threshold(y, p, row[None])[0] == threshold
        best = 2 * balanced_accuracy(y, p > threshold, row[None])[0] - 1
        fpr, tpr, _ = roc_curve(y, p, sample_weight=row)
        assert best == pytest.approx((tpr - fpr).max())


def test_paired_difference_uses_the_same_draws():
    rng = np.random.default_rng(0)
    common = rng.normal(size=1001)
    a, b = common + 0.02 + rng.normal(size=1001) * 0.01, common
    got = paired_difference(a, b)
    assert got == interval(a - b) | {"above_zero": round(float(np.mean([x > 0 for x in (a - b)[1:]])), 4)}
    assert 0 < got["high"] - got["low"] < 0.05 < interval(a)["high"] - interval(a)["low"]
    assert 0.9 < got["above_zero"] < 1
    assert paired_difference(b, b)["above_zero"] == 0.0
    b = b.copy()
    b[1:501] = np.nan
    assert paired_difference(a, b)["above_zero"] == round(float(((a - b)[501:] > 0).mean()), 4)
    empty = paired_difference(a, np.full(1001, np.nan))
    assert empty == {"value": None, "low": None, "high": None, "above_zero": None}


def test_threshold_default_is_for_data_that_sets_none():
    assert threshold_for(np.array([]), 0.1, -2.0) == threshold_for(np.full(3, -np.inf), 0.1, -2.0) == -2.0
    assert threshold_for(np.array([3.0, 5.0]), 0.5, -2.0) == 3.0
