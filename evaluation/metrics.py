"""Accuracy, tokens and their intervals. Every interval is a bootstrap over problems, never over samples.

Legend: ``P`` problems, ``R`` resamples, ``C`` columns, ``S`` samples of one problem. The statistic of one resample is
the mean over the ``P`` drawn problems of the problem's own mean over its samples, so samples of one problem never count
as independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, isfinite
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
SUBSETS = 1000  # subsets of one draw behind a Cons@k; where there are no more than that, all of them
_CELLS = 2_000_000  # drawn indices held at once


@dataclass(frozen=True)
class Outcome:
    """What one attempt at one problem came to.

    ``tokens`` counts every generated or forced token; a truncated response is wrong and costs the full cap. For a vote,
    ``tokens`` is the sum over its responses and ``truncated`` the share of them that were cut off. ``forced`` tokens
    are part of ``tokens``; ``probe_tokens`` were read to decide something, stand in no response and are counted apart.
    ``answer`` is None where there is none, or none in time. ``seconds`` 0: nobody took the time.
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
    forced: float = 0.0
    probe_tokens: float = 0.0
    answer: str | None = None


@dataclass(frozen=True)
class PerProblem:
    """Means per problem, in order of problem id: ``accuracy`` (Pass@1), ``tokens`` and ``seconds``, each [P]."""

    ids: tuple[str, ...]
    accuracy: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray


def by_problem(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Outcomes of each problem in order of sample, problems in order of id."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(o.problem, []).append(o)
    return {i: sorted(groups[i], key=lambda o: o.sample) for i in sorted(groups)}


def per_problem(outcomes: Iterable[Outcome]) -> PerProblem:
    """Average the samples of each problem."""
    groups = by_problem(outcomes)
    mean = lambda key: np.array([np.mean([getattr(o, key) for o in rows]) for rows in groups.values()], np.float64)  # noqa: E731
    return PerProblem(tuple(groups), mean("correct"), mean("tokens"), mean("seconds"))


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


def accuracy_interval(values: np.ndarray, draws: np.ndarray, level: float = LEVEL) -> list[float]:
    """Interval of a mean accuracy: percentile of the bootstrap ``draws`` [R] of ``values`` [P].

    Where every problem is solved, or none, all draws are equal and say nothing; then the exact (Clopper-Pearson)
    interval of P problems: 0 of 50 is 0 to 7 %.
    """
    if (values == values[0]).all() and values[0] in (0.0, 1.0):
        reach = ((1 - level) / 2) ** (1 / len(values))
        return [float(reach), 1.0] if values[0] else [0.0, float(1 - reach)]
    return interval(draws, level)


def summarise(outcomes: Sequence[Outcome], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Accuracy and mean tokens of one arm (or of a part of it), each with its interval."""
    table = per_problem(outcomes)
    draws = resampled_means(np.stack([table.accuracy, table.tokens], axis=1), resamples, seed)
    return {
        "accuracy": float(table.accuracy.mean()),
        "accuracy_ci": accuracy_interval(table.accuracy, draws[:, 0]),
        "tokens_mean": float(table.tokens.mean()),
        "tokens_ci": interval(draws[:, 1]),
        "n_problems": len(table.ids),
        "n_samples": len(outcomes),
    }


def costs(outcomes: Sequence[Outcome], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """What an answer costs: forced and probe tokens, seconds per problem, and seconds per solved problem.

    The last is all seconds divided by all that was right (means by problem on both sides), so wrong answers are paid
    for by the right ones. None where no time was taken or nothing was solved; an end of its interval is None where
    that happens in the resample that stands there.
    """
    table = per_problem(outcomes)
    forced, probes = (float(np.mean([getattr(o, key) for o in outcomes])) for key in ("forced", "probe_tokens"))
    found: dict[str, Any] = {"forced_mean": forced, "probe_tokens_mean": probes}
    if not table.seconds.any():
        return found | dict.fromkeys(
            ("seconds_per_problem", "seconds_per_problem_ci", "seconds_per_solved", "seconds_per_solved_ci")
        )
    draws = resampled_means(np.stack([table.seconds, table.accuracy], axis=1), resamples, seed)
    solved = table.accuracy.mean()
    with np.errstate(divide="ignore"):
        ends = _ends(draws[:, 0] / draws[:, 1])
    return found | {
        "seconds_per_problem": float(table.seconds.mean()),
        "seconds_per_problem_ci": interval(draws[:, 0]),
        "seconds_per_solved": float(table.seconds.mean() / solved) if solved else None,
        "seconds_per_solved_ci": ends if solved else None,
    }


def speedup(
    arm: Sequence[Outcome], against: Sequence[Outcome], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """``seconds_per_solved`` of ``against`` over the arm's, paired by problem: above 1 the arm solves in less time.

    None where no time was taken or one side solved nothing; an end of the interval is None where that happens there.
    """
    a, b = per_problem(arm), per_problem(against)
    if not (a.seconds.any() and b.seconds.any() and a.accuracy.any() and b.accuracy.any()):
        return {"speedup": None, "speedup_ci": None}
    columns = np.stack([b.seconds, a.accuracy, a.seconds, b.accuracy], axis=1)
    means = np.concatenate([columns.mean(axis=0)[None], resampled_means(columns, resamples, seed)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(means[:, 0] * means[:, 1] / (means[:, 2] * means[:, 3]), nan=np.inf, posinf=np.inf)
    return {"speedup": float(ratios[0]), "speedup_ci": _ends(ratios[1:])}


def _ends(draws: np.ndarray) -> list[float | None]:
    """The interval of draws some of which are infinite: between a number and infinity nothing can be interpolated."""
    ends = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="lower")
    return [float(x) if isfinite(x) else None for x in ends]


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

    ``accuracy_p``: two-sided sign-flip permutation test of the accuracy difference by problem. ``..._shown``: see
    ``shown``. Raises ValueError if the
    two did not answer the same problems.
    """
    a, b = per_problem(arm), per_problem(against)
    if a.ids != b.ids:
        raise ValueError("paired comparison needs the same problems on both sides")
    draws = resampled_means(np.stack([a.accuracy - b.accuracy, a.tokens, b.tokens], axis=1), resamples, seed)
    accuracy_ci, tokens_ci = interval(draws[:, 0]), interval(draws[:, 1] / draws[:, 2] - 1)
    p = sign_flip_p(a.accuracy - b.accuracy, resamples, seed)
    return {
        "accuracy_delta": float((a.accuracy - b.accuracy).mean()),
        "accuracy_delta_ci": accuracy_ci,
        "accuracy_p": p,
        "tokens_relative": float(a.tokens.mean() / b.tokens.mean() - 1),
        "tokens_relative_ci": tokens_ci,
        "accuracy_shown": shown(accuracy_ci, p),
        "tokens_shown": shown(tokens_ci),
        "n_problems": len(a.ids),
    }


def shown(ends: Sequence[float], p: float = 0.0) -> bool:
    """Whether a difference may be spoken of: its interval leaves 0 out, and where there is a p-value, so does that.

    With few problems that differ the bootstrap's interval is too narrow; sign flips are exact there.
    """
    return bool((ends[0] > 0 or ends[1] < 0) and p <= 1 - LEVEL)


def sign_flip_p(difference: np.ndarray, draws: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference by problem ``[P]`` being 0, under signs flipped by problem.

    Exact over all flips where there are at most ``draws`` of them; else ``(1 + hits) / (1 + draws)`` of random ones.
    """
    moved = np.asarray(difference, dtype=np.float64)
    moved = moved[np.abs(moved) > 1e-12]  # the sign of nothing changes nothing
    least = abs(moved.sum()) - 1e-9
    if 2 ** len(moved) <= draws:
        signs = (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1) * 2 - 1
        return float((np.abs(signs @ moved) >= least).mean())
    rng, hits = np.random.default_rng([seed, 11]), 0
    for start in range(0, draws, 1000):
        signs = rng.integers(0, 2, size=(min(1000, draws - start), len(moved)), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ moved) >= least).sum())
    return (1 + hits) / (1 + draws)


def answer_classes(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int]:
    """The equivalence class of each answer, numbered as first seen; -1 for a missing one.

    An answer joins the first class whose first member it equals.
    """
    heads: list[str] = []
    found = []
    for answer in answers:
        home = -1
        if answer is not None:
            home = next((i for i, head in enumerate(heads) if same(head, answer)), len(heads))
            if home == len(heads):
                heads.append(answer)
        found.append(home)
    return found


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> str | None:
    """Vote over equivalence classes of answers (core.md §5.3): ties go to the first seen, missing answers abstain."""
    classes = answer_classes(answers, same)
    if max(classes, default=-1) < 0:
        return None
    return answers[classes.index(max(range(max(classes) + 1), key=classes.count))]  # max keeps the first of equals


def subsets_of(n: int, k: int, most: int = SUBSETS, seed: int = 0) -> np.ndarray:
    """Subsets of ``n`` samples of size ``k``, each in order of drawing: ``[<= most, k]``.

    All of them where there are at most ``most``, else random ones without repetition inside a subset.
    """
    if not 1 <= k <= n:
        raise ValueError(f"a subset of {k} out of {n} samples does not exist")
    if comb(n, k) <= most:
        return np.array(list(combinations(range(n), k)))
    drawn = np.random.default_rng([seed, n, k]).random((most, n)).argsort(axis=1)[:, :k]
    return np.sort(drawn, axis=1)


def cons_at_k(
    classes: Sequence[Sequence[int]],
    correct: Sequence[Sequence[bool]],
    k: int,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> np.ndarray:
    """Cons@k (core.md §5.3) from one draw of S samples a problem: is the majority of k right? Averaged over subsets.

    ``classes`` [P, S] (see ``answer_classes``), ``correct`` [P, S] -> share of the subsets whose majority is right [P].
    In each subset ties go to the class seen first in it, and where all abstain the vote is wrong.
    """
    found = []
    for row, right in zip(np.asarray(classes), np.asarray(correct, dtype=bool), strict=True):
        picked = row[subsets_of(len(row), k, subsets, seed)]  # [R, k]
        known = np.arange(max(row.max() + 1, 1))
        votes = picked[:, :, None] == known  # [R, k, classes]
        counts = votes.sum(axis=1)
        winner = (counts * (k + 1) - votes.argmax(axis=1)).argmax(axis=1)  # of equal counts the earliest
        good = np.array([right[(row == c).argmax()] if (row == c).any() else False for c in known])
        found.append((good[winner] & counts.any(axis=1)).mean())
    return np.array(found)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> np.ndarray:
    """Unbiased pass@k by problem: ``1 - C(S - c, k) / C(S, k)`` with ``c`` of S samples right. [P, S] -> [P]."""
    rows = np.asarray(correct, dtype=bool)
    n = rows.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return np.array([1 - comb(n - int(c), k) / comb(n, k) for c in rows.sum(axis=1)])
