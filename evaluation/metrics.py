"""Accuracy, tokens and their intervals. Every interval is a bootstrap over problems, never over samples.

Legend: ``P`` problems, ``R`` resamples, ``C`` columns. The statistic of one resample is the mean over the ``P`` drawn
problems of the problem's own mean over its samples, so samples of one problem never count as independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
_CELLS = 2_000_000  # drawn indices held at once


@dataclass(frozen=True)
class Outcome:
    """What one attempt at one problem came to.

    ``tokens`` counts every generated or forced token; a truncated response is wrong and costs the full cap. For a vote,
    ``tokens`` is the sum over its responses and ``truncated`` the share of them that were cut off.
    """

    problem: str
    family: str
    difficulty: int
    sample: int
    correct: bool
    tokens: float
    truncated: float = 0.0
    triggers: int = 0
    seconds: float = 0.0
    responses: int = 1


@dataclass(frozen=True)
class PerProblem:
    """Means per problem, in order of problem id: ``accuracy`` [P] and ``tokens`` [P]."""

    ids: tuple[str, ...]
    accuracy: np.ndarray
    tokens: np.ndarray


def per_problem(outcomes: Iterable[Outcome]) -> PerProblem:
    """Average the samples of each problem."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(o.problem, []).append(o)
    ids = tuple(sorted(groups))
    accuracy = np.array([np.mean([o.correct for o in groups[i]]) for i in ids], dtype=np.float64)
    tokens = np.array([np.mean([o.tokens for o in groups[i]]) for i in ids], dtype=np.float64)
    return PerProblem(ids, accuracy, tokens)


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Bootstrap means over rows: ``values`` [P, C] -> [R, C]. The same seed and P draw the same problems."""
    rows = len(values)
    if rows == 0:
        raise ValueError("cannot resample zero problems")
    rng = np.random.default_rng(seed)
    out = np.empty((resamples, values.shape[1]))
    chunk = max(1, _CELLS // rows)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, rows, size=(min(chunk, resamples - start), rows), dtype=np.int32)
        for c in range(values.shape[1]):
            out[start : start + len(drawn), c] = values[:, c][drawn].mean(axis=1)
    return out


def interval(draws: np.ndarray, level: float = LEVEL) -> list[float]:
    """Percentile interval of bootstrap draws [R]."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def summarise(outcomes: Sequence[Outcome], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Accuracy and mean tokens of one arm (or of a part of it), each with its interval."""
    table = per_problem(outcomes)
    draws = resampled_means(np.stack([table.accuracy, table.tokens], axis=1), resamples, seed)
    return {
        "accuracy": float(table.accuracy.mean()),
        "accuracy_ci": interval(draws[:, 0]),
        "tokens_mean": float(table.tokens.mean()),
        "tokens_ci": interval(draws[:, 1]),
        "n_problems": len(table.ids),
        "n_samples": len(outcomes),
    }


def split_by(outcomes: Sequence[Outcome], key: Callable[[Outcome], Any], **how: Any) -> dict[str, dict[str, Any]]:
    """``summarise`` for each value of ``key``, in order of the values."""
    groups: dict[Any, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(key(o), []).append(o)
    return {str(k): summarise(groups[k], **how) for k in sorted(groups)}


def compare(
    arm: Sequence[Outcome], against: Sequence[Outcome], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Paired bootstrap by problem: accuracy difference, and relative token difference ``mean(arm)/mean(against) - 1``.

    Raises ValueError if the two did not answer the same problems.
    """
    a, b = per_problem(arm), per_problem(against)
    if a.ids != b.ids:
        raise ValueError("paired comparison needs the same problems on both sides")
    draws = resampled_means(np.stack([a.accuracy - b.accuracy, a.tokens, b.tokens], axis=1), resamples, seed)
    accuracy_ci, tokens_ci = interval(draws[:, 0]), interval(draws[:, 1] / draws[:, 2] - 1)
    return {
        "accuracy_delta": float((a.accuracy - b.accuracy).mean()),
        "accuracy_delta_ci": accuracy_ci,
        "tokens_relative": float(a.tokens.mean() / b.tokens.mean() - 1),
        "tokens_relative_ci": tokens_ci,
        "accuracy_excludes_zero": bool(accuracy_ci[0] > 0 or accuracy_ci[1] < 0),
        "tokens_excludes_zero": bool(tokens_ci[0] > 0 or tokens_ci[1] < 0),
        "n_problems": len(a.ids),
    }


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> str | None:
    """Vote over equivalence classes of answers (core.md §5.3): ties go to the first seen, missing answers abstain."""
    classes: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        home = next((c for c in classes if same(c[0], answer)), None)
        if home is None:
            classes.append([answer])
        else:
            home.append(answer)
    return max(classes, key=len)[0] if classes else None  # max keeps the first of equals
