"""Figures of a detector, with intervals from resampling whole problems.

Legend: ``n`` samples, ``P`` problems, ``R`` bootstrap draws. A ``draws [R, P]`` matrix says how often each problem was
drawn; every figure is a ratio of sums over problems, or an AUROC in which a sample weighs as its problem was drawn.
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
    order = np.argsort(score, kind="stable")
    s, w = score[order], weights[:, order]
    groups = np.flatnonzero(np.r_[True, s[1:] != s[:-1]])
    positive = np.add.reduceat(w * (y[order] == 1), groups, axis=1)
    negative = np.add.reduceat(w * (y[order] == 0), groups, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    won = (positive * (below + negative / 2)).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / (positive.sum(axis=1) * negative.sum(axis=1))


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


def ratio(numerator: np.ndarray, denominator: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """Sum of ``numerator [P]`` over sum of ``denominator [P]``, with interval."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return interval((draws @ numerator) / (draws @ denominator))


def threshold_for(maxima: np.ndarray, rate: float) -> float:
    """Smallest threshold at which at most ``floor(rate * n)`` of n clean traces have a score above it.

    ``maxima [n]``: each clean trace's largest score (-inf where it had no valid decision).
    """
    if len(maxima) == 0:
        return 0.5
    allowed = int(np.floor(rate * len(maxima) + 1e-9))
    value = float(np.sort(maxima)[::-1][allowed])
    return value if np.isfinite(value) else 0.5
