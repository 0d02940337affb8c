"""Figures of a detector, with intervals from resampling whole problems.

Legend: ``n`` samples, ``P`` problems, ``R`` bootstrap draws, ``G`` different scores, ascending, ``B`` bins. A
``draws [R, P]`` matrix says how often each problem was drawn; every figure is a ratio of sums over problems, or one in
which a sample weighs as its problem was drawn (``weights [R, n] = draws[:, problem]``), exact with tied scores. Figures
without meaning (one class, no weight) are nan.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def auroc(y: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; ties count half; nan without both classes."""
    return float(weighted_auroc(np.asarray(y), np.asarray(score), np.ones((1, len(y))))[0])


def weighted_auroc(y: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``y [n]``, ``score [n]``, ``weights [R, n]`` -> ``[R]``, exact with ties."""
    if len(y) == 0:
        return np.full(len(weights), np.nan)
    _, positive, negative = _by_score(y, score, weights)
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (below + negative / 2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (positive.sum(axis=1) * negative.sum(axis=1))


def _by_score(y: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different scores ``[G]`` ascending, and the weight of positives and negatives at each ``[R, G]``."""
    order = np.argsort(score, kind="stable")
    s, w = score[order], weights[:, order]
    groups = np.flatnonzero(np.r_[True, s[1:] != s[:-1]])
    positive = np.add.reduceat(w * (y[order] == 1), groups, axis=1)
    negative = np.add.reduceat(w * (y[order] == 0), groups, axis=1)
    return s[groups], positive, negative


def _from_above(x: np.ndarray) -> np.ndarray:
    """Sums over each score and all above it. ``[R, G]`` -> ``[R, G]``."""
    return np.cumsum(x[:, ::-1], axis=1)[:, ::-1]


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means: ``values [n]``, ``weights [R, n]`` -> ``[R]``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ values) / weights.sum(axis=1)


def weighted_average_precision(y: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Precision averaged over thresholds by the recall each gains. ``[n]``, ``[n]``, ``[R, n]`` -> ``[R]``."""
    if len(y) == 0:
        return np.full(len(weights), np.nan)
    _, positive, negative = _by_score(y, score, weights)
    hits = _from_above(positive)
    alarms = hits + _from_above(negative)
    precision = np.divide(hits, alarms, out=np.zeros_like(hits), where=alarms > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * precision).sum(axis=1) / positive.sum(axis=1)


def weighted_brier(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean squared error of probabilities ``p [n]``; ``y [n]``, ``weights [R, n]`` -> ``[R]``."""
    return _mean(np.square(p - (y == 1)), weights)


def weighted_log_loss(y: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean negative log likelihood in nats, ``p [n]`` kept off 0 and 1 by 2e-16; ``weights [R, n]`` -> ``[R]``."""
    eps = np.finfo(np.float64).eps
    p = np.clip(p, eps, 1 - eps)
    return _mean(-np.where(y == 1, np.log(p), np.log(1 - p)), weights)


def balanced_accuracy(y: np.ndarray, alarm: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of recall and specificity of ``alarm [n]`` (bool); ``y [n]``, ``weights [R, n]`` -> ``[R]``."""
    alarm = np.asarray(alarm, dtype=np.float64)
    return (_mean(alarm[y == 1], weights[:, y == 1]) + _mean(1 - alarm[y == 0], weights[:, y == 0])) / 2


def calibration_bins(y: np.ndarray, p: np.ndarray, weights: np.ndarray, bins: int = 10) -> dict[str, np.ndarray]:
    """Reliability curve of probabilities ``p [n]`` over ``B = bins`` equal parts of [0, 1], each with its upper edge.

    ``y [n]``, ``weights [R, n]`` -> ``predicted``, ``observed`` ``[R, B]``: mean probability and share of positives
    (nan in an empty bin); ``share [R, B]`` of the weight; ``error [R]``: expected calibration error, the mean gap of
    the two weighted by share.
    """
    of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p)
    member = np.zeros((len(p), bins))
    member[np.arange(len(p)), of] = 1.0
    total, scores, hits = weights @ member, weights @ (member * p[:, None]), weights @ (member * (y == 1)[:, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        everything = total.sum(axis=1)
        return {
            "predicted": scores / total,
            "observed": hits / total,
            "share": total / everything[:, None],
            "error": np.abs(scores - hits).sum(axis=1) / everything,
        }


def youden_threshold(y: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Threshold with the largest true minus false positive rate of ``score > threshold``; the highest of equals.

    ``y [n]``, ``score [n]``, ``weights [R, n]`` -> ``[R]``, each one of the scores (the largest: no alarm is best).
    """
    if len(y) == 0:
        return np.full(len(weights), np.nan)
    values, positive, negative = _by_score(y, score, weights)
    n_positive, n_negative = positive.sum(axis=1), negative.sum(axis=1)
    tp, fp = _from_above(positive) - positive, _from_above(negative) - negative
    gain = tp * n_negative[:, None] - fp * n_positive[:, None]  # times both numbers: equals stay exactly equal
    best = values[len(values) - 1 - np.argmax(gain[:, ::-1], axis=1)]
    return np.where((n_positive > 0) & (n_negative > 0), best, np.nan)


def roc(y: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, from (0, 0) to (1, 1)."""
    order = np.argsort(-score, kind="stable")
    s, hit = score[order], y[order] == 1
    ends = np.r_[np.flatnonzero(s[1:] != s[:-1]), len(s) - 1]
    tp, fp = np.cumsum(hit)[ends], np.cumsum(~hit)[ends]
    return np.r_[0, fp / max(1, fp[-1])], np.r_[0, tp / max(1, tp[-1])]


def bootstrap_draws(n_problems: int, n: int, seed: int) -> np.ndarray:
    """``[n, P]`` multiplicities; the first row is the data itself (all ones)."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=n)
    return np.concatenate([np.ones((1, n_problems)), draws]).astype(np.float64)


def interval(values: np.ndarray) -> dict[str, Any]:
    """``values [1 + R]``, the data's own first -> value and 95 % percentile interval (None where undefined)."""
    rest = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(rest, [0.025, 0.975]) if len(rest) else (np.nan, np.nan)
    clean = [None if not np.isfinite(v) else round(float(v), 4) for v in (values[0], low, high)]
    return {"value": clean[0], "low": clean[1], "high": clean[2]}


def paired_difference(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Interval of ``a - b``, figures ``[1 + R]`` over the same draws, and the share of draws ``above_zero``."""
    rest = (a - b)[1:]
    rest = rest[np.isfinite(rest)]
    return interval(a - b) | {"above_zero": round(float((rest > 0).mean()), 4) if len(rest) else None}


def ratio(numerator: np.ndarray, denominator: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """Sum of ``numerator [P]`` over sum of ``denominator [P]``, with interval."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return interval((draws @ numerator) / (draws @ denominator))


def threshold_for(maxima: np.ndarray, rate: float, default: float = 0.5) -> float:
    """Smallest threshold at which at most ``floor(rate * n)`` of n clean traces have a score above it.

    ``maxima [n]``: each clean trace's largest score (-inf where it had no valid decision). ``default``: where so few
    clean traces have a score that any threshold keeps the budget.
    """
    if len(maxima) == 0:
        return default
    allowed = int(np.floor(rate * len(maxima) + 1e-9))
    value = float(np.sort(maxima)[::-1][allowed])
    return value if np.isfinite(value) else default
