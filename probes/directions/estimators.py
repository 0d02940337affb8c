"""Estimators of directions: from labelled states to what steering adds (related.md A1-A4, A6, G).

Legend: ``C`` values of a site (heads: all slices in a row), ``Q`` problems, ``F`` neurons of a block. An example is one
pooled state at every site, with its side. Sums are float64 and run over the examples as they come; in memory are the
sums, for ``pca_difference`` also one difference a problem (``8 Q C`` bytes a site).

Every estimate points from the negative side to the positive one. Its length is that of a difference between real
states, so a strength of 1 moves a state by as much as the sides differ; ``info`` holds the norms to compare it with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.sites import Site

POOL = 200  # the released code of AdaRAS lists so many neurons and uses the first of them
Subspace = Mapping[str, np.ndarray]  # site -> [k, C], rows that span what is taken out


@dataclass(frozen=True)
class Example:
    """One pooled state ``[C]`` at every site, and the side it is on."""

    values: Mapping[str, np.ndarray]
    positive: bool
    problem: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A direction ``[C]`` float64 at every site (a sparse one names its indices), and how it came about."""

    values: dict[str, np.ndarray]
    info: dict[str, Any] = field(default_factory=dict)


class Moments:
    """Weighted sums of the states of one site: mean and standard deviation ``[C]``, mean norm."""

    def __init__(self) -> None:
        self.n, self.weight, self.norm = 0, 0.0, 0.0
        self.total: np.ndarray | float = 0.0
        self.square: np.ndarray | float = 0.0

    def add(self, x: np.ndarray, weight: float) -> None:
        """Count ``x [C]``, float64."""
        self.n, self.weight, self.norm = self.n + 1, self.weight + weight, self.norm + weight * float(np.linalg.norm(x))
        self.total = self.total + weight * x
        self.square = self.square + weight * x * x

    @property
    def mean(self) -> np.ndarray:
        """Mean ``[C]``."""
        return np.asarray(self.total / self.weight)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation ``[C]``, of the weighted states as they are (no correction for their number)."""
        return np.asarray(np.sqrt(np.maximum(self.square / self.weight - self.mean**2, 0)))


class Watch:
    """Passes examples on, checked and as float64, and keeps the moments of all of them and of each side."""

    def __init__(self, examples: Iterable[Example]):
        self._examples = examples
        self.sides: tuple[dict[str, Moments], dict[str, Moments]] = ({}, {})
        self.all: dict[str, Moments] = {}
        self.counts = [0, 0]

    def __iter__(self) -> Iterator[Example]:
        for e in self._examples:
            if not np.isfinite(e.weight) or e.weight < 0:
                raise UserError(f"an example of problem '{e.problem}' has weight {e.weight}; weights are 0 or more")
            if self.all and set(e.values) != set(self.all):
                raise UserError(f"an example of problem '{e.problem}' lacks sites of the others; read the same sites")
            if not e.weight:
                continue
            values = {site: np.asarray(v, dtype=np.float64).reshape(-1) for site, v in e.values.items()}
            for site, x in values.items():
                if not np.isfinite(x).all():
                    raise UserError(
                        f"site '{site}', problem '{e.problem}': states hold NaN or infinity; load the model in float32 "
                        "or bfloat16, or leave the problem out"
                    )
                for moments in (self.all, self.sides[e.positive]):
                    moments.setdefault(site, Moments()).add(x, e.weight)
            self.counts[e.positive] += 1
            yield Example(values, e.positive, e.problem, e.weight)

    def info(self, estimator: str, **more: Any) -> dict[str, Any]:
        """What every estimate tells: counts, natural norms, deviations of each neuron of a sparse site."""
        natural = {
            site: {"norm": m.norm / m.weight, "std": float(np.sqrt((m.std**2).mean()))} for site, m in self.all.items()
        }
        std = {s: m.std.tolist() for s, m in self.all.items() if Site.parse(s).kind == "neuron"}
        examples = {"positive": self.counts[1], "negative": self.counts[0]}
        return {"estimator": estimator, "examples": examples, **more, "natural": natural, "std": std}


def mean_difference(
    examples: Iterable[Example], paired: bool = False, remove: Subspace | None = None, least: int = 2
) -> Estimate:
    """Mean of the positive states minus mean of the negative ones.

    ``paired``: within each problem, then averaged over the problems that have both sides (ASC, AdaRAS); otherwise over
    all states of a side (SEAL). ``remove``: a subspace taken out of the result. Raises UserError for fewer than
    ``least`` problems (paired) or states of a side.
    """
    watch = Watch(examples)
    if paired:
        total: dict[str, np.ndarray] = {}
        n = 0
        for difference in _pairs(watch):
            n += 1
            for site, d in difference.items():
                total[site] = total.get(site, 0.0) + d
        enough({"problems with both sides": n}, least)
        values = {site: d / n for site, d in total.items()}
        info = watch.info("paired mean difference", problems=n)
    else:
        for _ in watch:
            pass
        enough({"positive states": watch.counts[1], "negative states": watch.counts[0]}, least)
        values = {s: watch.sides[1][s].mean - watch.sides[0][s].mean for s in watch.all}
        info = watch.info("mean difference")
    return Estimate(_without(values, remove), info)


def pca_difference(examples: Iterable[Example], remove: Subspace | None = None, least: int = 2) -> Estimate:
    """First principal axis of the differences within problems (not centred), as long as they are along it (rms).

    An axis has no sign: it is turned so that states correlate with their label along it. ``info['pca']``: that
    correlation (of the states centred within their problem) and the share of the squares that the axis explains. Raises
    UserError for too few problems, or where that correlation is 0 and the sign therefore unknown.
    """
    watch = Watch(examples)
    rows: dict[str, list[np.ndarray]] = {}
    for difference in _pairs(watch):
        for site, d in difference.items():
            rows.setdefault(site, []).append(d)
    enough({"problems with both sides": len(next(iter(rows.values()), []))}, least)
    values, told = {}, {}
    for site, differences in rows.items():
        table = np.stack([_project(d, site, remove) for d in differences])
        _, s, axes = np.linalg.svd(table, full_matrices=False)
        along = table @ axes[0]
        size = float(np.sqrt((along**2).mean()))
        correlation = float(along.mean() / size) if size > 0 else 0.0
        if abs(correlation) < 1e-9:
            raise UserError(
                f"site '{site}': the differences' first axis does not correlate with the label, so its sign is "
                "unknown; use the mean difference, or more problems"
            )
        values[site] = axes[0] * (size if correlation > 0 else -size)
        told[site] = {"label_correlation": abs(correlation), "explained": float(s[0] ** 2 / (s**2).sum())}
    return Estimate(values, watch.info("PCA of differences", problems=len(differences), pca=told))


def relative_difference(examples: Iterable[Example], top_k: int, least: int = 2) -> Estimate:
    """``g - b`` of the ``top_k`` neurons of all ``neuron:LAYER`` sites together, by the ranking of the released AdaRAS.

    ``g``, ``b``: means of the positive and the negative states. Neurons are sorted by ``|g - b| / (|g| + |b| + 1e-8)``
    and then by ``|g - b|``; ties go to the lower block and neuron. Raises UserError for other sites or too few states.
    """
    if not 1 <= top_k <= POOL:
        raise UserError(f"key 'top_k' must lie between 1 and {POOL}, got {top_k}")
    watch = Watch(examples)
    for _ in watch:
        pass
    enough({"positive states": watch.counts[1], "negative states": watch.counts[0]}, least)
    sites = sorted((Site.parse(s) for s in watch.all), key=lambda s: s.layer or 0)
    for site in sites:
        if site.kind != "neuron" or site.indices is not None:
            raise UserError(f"site '{site}': the relative difference ranks all neurons of a block; use 'neuron:LAYER'")
    sides = [[m[str(s)].mean for s in sites] for m in watch.sides]
    b, g = np.concatenate(sides[0]), np.concatenate(sides[1])
    size = np.abs(g - b)
    key = size / (np.abs(g) + np.abs(b) + 1e-8)
    chosen = np.lexsort((-size, -key))[:top_k]
    chosen = chosen[size[chosen] > 0]
    if not len(chosen):
        raise UserError("no neuron's mean differs between the two sides")
    start = np.cumsum([0, *(len(m) for m in sides[0])])
    info = watch.info("relative difference", top_k=top_k)
    std = info.pop("std")
    values, kept = {}, {}
    for i, site in enumerate(sites):
        at = np.sort(chosen[(chosen >= start[i]) & (chosen < start[i + 1])])
        if len(at):
            index = tuple(int(n) for n in at - start[i])
            name = str(Site("neuron", site.layer, index))
            values[name], kept[name] = (g - b)[at], [std[str(site)][n] for n in index]
    return Estimate(values, {**info, "std": kept})


def _pairs(examples: Iterable[Example]) -> Iterator[dict[str, np.ndarray]]:
    """Weighted mean of the positive minus that of the negative states of each problem that has both."""
    seen: set[str] = set()
    for problem, group in groupby(examples, key=lambda e: e.problem):
        if problem in seen:
            raise UserError(f"the examples of problem '{problem}' do not follow each other; sort them by problem")
        seen.add(problem)
        sides: tuple[dict[str, Moments], dict[str, Moments]] = ({}, {})
        for e in group:
            for site, x in e.values.items():
                sides[e.positive].setdefault(site, Moments()).add(x, e.weight)
        if sides[0] and sides[1]:
            yield {site: sides[1][site].mean - sides[0][site].mean for site in sides[1]}


def enough(counts: Mapping[str, int], least: int) -> None:
    """Raises UserError for a count below ``least``."""
    for what, n in counts.items():
        if n < least:
            raise UserError(f"{n} {what}, {least} are needed; sample more traces, or lower least_problems")


def _without(values: dict[str, np.ndarray], remove: Subspace | None) -> dict[str, np.ndarray]:
    return {site: _project(d, site, remove) for site, d in values.items()}


def _project(d: np.ndarray, site: str, remove: Subspace | None) -> np.ndarray:
    """``d [C]`` without its part in the removed subspace of ``site``, if there is one."""
    if remove is None or site not in remove:
        return d
    basis = np.atleast_2d(np.asarray(remove[site], dtype=np.float64))
    if basis.shape[1] != len(d):
        raise UserError(f"site '{site}': the subspace to remove has {basis.shape[1]} values a row, not {len(d)}")
    _, s, rows = np.linalg.svd(basis, full_matrices=False)
    rows = rows[s > 1e-10 * s.max(initial=0.0)]
    rest = d - rows.T @ (rows @ d)
    if np.linalg.norm(rest) <= 1e-9 * np.linalg.norm(d):
        raise UserError(f"site '{site}': nothing is left of the direction outside the removed subspace")
    return np.asarray(rest)
