"""Probes over the kept decisions: channels and penalties chosen without the test problems, figures with intervals.

Legend: ``n`` decisions, ``P`` problems, ``R`` bootstrap draws (row 0 of ``[1 + R]`` is the data itself), ``F`` neurons.

Problems are dealt into five folds. Each fold is the test set once, the next one is the validation set, the other three
train: 60/20/20, and every problem is tested by probes that never saw it. An AUROC counts pairs of a failing and a clean
decision within a stratum (a fold, and for instance a source model in it); it is the share of them that the score wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from neureasoner.probes.detectors.estimators import make_estimator
from neureasoner.probes.detectors.metrics import bootstrap_draws, interval, weighted_auroc

FOLDS, CHANNELS, RANDOM_DRAWS = 5, 32, 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # C of the logistic regression


@dataclass
class Table:
    """``arrays``, ``extra`` hold ``[n, …]``; ``y``, ``problem``, ``fold`` are integers, ``stratum`` strings, ``[n]``.

    ``stratum``: the group within which decisions are compared, within a fold.
    """

    arrays: dict[str, np.ndarray]
    extra: dict[str, np.ndarray]
    y: np.ndarray
    problem: np.ndarray
    fold: np.ndarray
    stratum: np.ndarray

    def take(self, rows: np.ndarray) -> Table:
        """The decisions in the boolean mask ``rows [n]``."""
        return Table(
            {k: v[rows] for k, v in self.arrays.items()},
            {k: v[rows] for k, v in self.extra.items()},
            *(v[rows] for v in (self.y, self.problem, self.fold, self.stratum)),
        )

    def roles(self, test: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of training, validation and test decisions when fold ``test`` is tested."""
        held = self.fold == (test + 1) % FOLDS
        tested = self.fold == test
        return ~(held | tested), held, tested


def codes(values: Sequence[Any]) -> np.ndarray:
    """Integers that are equal where the values are."""
    return np.unique(np.array([str(v) for v in values]), return_inverse=True)[1]


def one_hot(values: Sequence[Any]) -> np.ndarray:
    """``[n, number of different values]``."""
    found = codes(values)
    return np.eye(found.max() + 1)[found]


def with_logs(counts: Any) -> np.ndarray:
    """Counts ``[n, c]`` and their logarithms."""
    x = np.asarray(counts, dtype=np.float64)
    return np.concatenate([x, np.log1p(x)], axis=1)


def contrast(level: np.ndarray, y: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """How far mean activations of failing and clean decisions lie apart, in standard deviations: ``[n, F]`` -> ``[F]``.

    Taken within each stratum and averaged over them, weighted by the smaller class, so that a channel that only tells
    the strata apart scores nothing.
    """
    total, weight = np.zeros(level.shape[1]), 0.0
    for s in np.unique(stratum):
        failing, clean = (level[(stratum == s) & (y == c)].astype(np.float64) for c in (1, 0))
        n = min(len(failing), len(clean))
        if n >= 2:
            spread = np.sqrt((failing.var(0, ddof=1) + clean.var(0, ddof=1)) / 2)
            total += n * (failing.mean(0) - clean.mean(0)) / np.maximum(spread, 1e-12)
            weight += n
    return total / max(weight, 1e-12)


def channels(table: Table, train: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """Indices of channels: ``chosen`` by contrast on training decisions, ``random`` among the others, or ``all``."""
    n = table.arrays["level"].shape[1]
    if kind == "all":
        return np.arange(n)
    score = np.abs(contrast(table.arrays["level"][train], table.y[train], table.stratum[train]))
    best = np.argsort(-score, kind="stable")
    if kind == "chosen":
        return best[:CHANNELS]
    return np.random.default_rng(seed).choice(best[CHANNELS:], CHANNELS, replace=False)


def matrix(table: Table, parts: Sequence[str], train: np.ndarray, seed: int) -> np.ndarray:
    """``[n, d]``, the parts side by side: spectra of some channels, residual, entropy, or what ``extra`` holds."""
    spectra = {"spectral": "chosen", "random": "random", "all spectra": "all"}
    blocks = []
    for part in parts:
        if part in spectra:
            block = table.arrays["spectra"][:, :, channels(table, train, spectra[part], seed)]
        elif part == "residual":
            block = table.arrays["residual"][:, :2]
        elif part == "residual mean":
            block = table.arrays["residual"][:, 2]
        elif part == "entropy":
            block = table.arrays["uncertainty"]
        else:
            block = table.extra[part]
        blocks.append(block.reshape(len(block), -1))
    return np.concatenate(blocks, axis=1)


def area(y: np.ndarray, score: np.ndarray, strata: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Stratified AUROC, ``weights [1 + R, n]`` -> ``[1 + R]``; nan where no stratum holds both classes."""
    won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for s in np.unique(strata):
        rows = strata == s
        if 0 < y[rows].sum() < rows.sum():
            w = weights[:, rows]
            here = (w * (y[rows] == 1)).sum(1) * (w * (y[rows] == 0)).sum(1)
            won += np.nan_to_num(weighted_auroc(y[rows], score[rows], w)) * here
            pairs += here
    with np.errstate(invalid="ignore", divide="ignore"):
        return won / pairs


def within_problems(y: np.ndarray, score: np.ndarray, problem: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Share of (failing, clean) pairs of one problem in which the failing one scores higher. ``draws [1 + R, P]``."""
    won, pairs = np.zeros(draws.shape[1]), np.zeros(draws.shape[1])
    for p in np.unique(problem):
        rows = problem == p
        a, b = score[rows][y[rows] == 1][:, None], score[rows][y[rows] == 0][None]
        won[p], pairs[p] = ((a > b) + 0.5 * (a == b)).sum(), a.size * b.size
    with np.errstate(invalid="ignore", divide="ignore"):
        return (draws @ won) / (draws @ pairs)


def out_of_fold(table: Table, parts: Sequence[str], kind: str, seed: int) -> np.ndarray:
    """Test scores ``[n]`` of every decision. Validation problems choose the penalty, and when the MLP stops."""
    scores = np.full(len(table.y), np.nan)
    for test in range(FOLDS):
        train, held, tested = table.roles(test)
        x = matrix(table, parts, train, seed)
        if kind == "mlp":
            candidates = [make_estimator("mlp", seed=seed)]
        else:
            candidates = [make_estimator("logistic", C=c, max_iter=300) for c in PENALTIES]
        held_strata, ones = codes(table.stratum[held]), np.ones((1, held.sum()))
        reached = []
        for estimator in candidates:
            estimator.fit(x[train], table.y[train], validation=(x[held], table.y[held]))
            found = area(table.y[held], estimator.decision_function(x[held]), held_strata, ones)
            reached.append(round(float(np.nan_to_num(found[0])), 3))
        scores[tested] = candidates[int(np.argmax(reached))].decision_function(x[tested])
    return scores


Measure = Callable[[np.ndarray], np.ndarray]  # scores [n] -> [1 + R]


def measures(table: Table, names: Sequence[str], bootstrap: int, seed: int) -> dict[str, Measure]:
    """Ways to read scores, by name.

    ``pooled`` (strata are the folds), ``within`` (folds and strata), ``problem`` (pairs of one problem), and the
    name of a stratum (decisions of that stratum only).
    """
    problem = np.unique(table.problem, return_inverse=True)[1]
    draws = bootstrap_draws(problem.max() + 1, bootstrap, seed)
    weights = draws[:, problem]
    strata = codes([f"{f}/{s}" for f, s in zip(table.fold, table.stratum, strict=True)])

    def only(name: str) -> Measure:
        rows = table.stratum == name
        return lambda s: area(table.y[rows], s[rows], table.fold[rows], weights[:, rows])

    of: dict[str, Measure] = {
        "pooled": lambda s: area(table.y, s, table.fold, weights),
        "within": lambda s: area(table.y, s, strata, weights),
        "problem": lambda s: within_problems(table.y, s, problem, draws),
    }
    return {name: of.get(name) or only(name) for name in names}


def compare(
    table: Table,
    sets: dict[str, tuple[Sequence[str], str]],
    names: Sequence[str],
    differences: Sequence[tuple[str, str]],
    *,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Fit every set (``label: (parts, "logistic" or "mlp")``), read it every way; paired differences the first way.

    A set with ``random`` is drawn five times and its figures are means over the draws. Sets whose label begins with
    "shuffled" are fitted and tested on labels shuffled within strata.
    """
    from rich.progress import track

    read = measures(table, names, bootstrap, seed)
    rng = np.random.default_rng(seed)
    mixed = table.y.copy()
    for s in np.unique(table.stratum):
        rows = np.flatnonzero(table.stratum == s)
        mixed[rows] = rng.permutation(mixed[rows])
    control = replace(table, y=mixed)
    read_control = measures(control, names, bootstrap, seed)
    rows, kept = [], {}
    for label, (parts, kind) in track(sets.items(), description="fitting"):
        shuffled = label.startswith("shuffled")
        seeds = range(seed, seed + (RANDOM_DRAWS if "random" in parts else 1))
        scores = [out_of_fold(control if shuffled else table, parts, kind, s) for s in seeds]
        values = {k: np.mean([f(s) for s in scores], axis=0) for k, f in (read_control if shuffled else read).items()}
        kept[label] = values[names[0]]
        rows.append({"label": label, **{k: interval(v) for k, v in values.items()}})
    return {
        "n": len(table.y),
        "failing": int(table.y.sum()),
        "problems": len(np.unique(table.problem)),
        "measures": list(names),
        "rows": rows,
        "differences": [{"a": a, "b": b, **interval(kept[a] - kept[b])} for a, b in differences],
    }
