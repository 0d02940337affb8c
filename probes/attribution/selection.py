"""Which components a block's scores single out over spans of tokens, and how firmly (core.md §1.2.3, §1.2.4).

A span places all components of a pool by their worst rank over its tokens and selects the first ones; a component is
chosen for the share of failing spans that select it, minus the share of clean ones. Choosing again with whole problems
resampled says how much of that is the sample.

Legend: ``n`` target tokens, ``F`` neurons, ``H`` query heads, ``C`` components of a pool (F, H or both together), ``R``
spans, ``P`` problems, ``W`` draws of problems; ``draws [W, P]`` says how often each draw holds each problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

CELLS = 2**23  # values of one [draws, components] table; more draws than fit are taken in turn


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of every component for every token, 1 is the largest score. ``[n, C]`` -> int32; ties by index."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    numbers = torch.arange(1, scores.shape[1] + 1, dtype=torch.int32, device=scores.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, numbers.expand_as(order))


def worst_rank(scores: torch.Tensor, quantile: float = 1.0) -> torch.Tensor:
    """``rho [C]``: the smallest K with which a component is in TopK of a share ``quantile`` of the tokens, or more.

    1.0 is the worst rank: ``rho <= K`` is the literal intersection of all TopK sets (core.md §1.2.3). Below 1, the
    tokens that a component does worst at, such as punctuation, are forgiven.
    """
    return _over_tokens(ranks(scores), quantile)


def _over_tokens(r: torch.Tensor, quantile: float) -> torch.Tensor:
    needed = max(1, math.ceil(quantile * len(r) - 1e-9))
    return r.amax(dim=0) if needed == len(r) else r.sort(dim=0).values[needed - 1]


def places(scores: torch.Tensor, quantile: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(rho, place, mean)``, ``[C]`` each: worst ranks, the places 1 to C that they give, mean ranks.

    Equal worst ranks go by mean rank. They are common where components are few: over a long span, nearly every head of
    a block is last at some token, and going by index would select the first heads every time.
    """
    r = ranks(scores)
    rho = _over_tokens(r, quantile)
    mean = r.mean(dim=0, dtype=torch.float64)
    order = mean.argsort(stable=True)
    order = order[rho[order].argsort(stable=True)]
    place = torch.empty_like(rho)
    place[order] = torch.arange(1, len(rho) + 1, dtype=rho.dtype, device=rho.device)
    return rho, place, mean


def pooled(groups: Sequence[torch.Tensor], z_scored: bool) -> torch.Tensor:
    """Scores of several groups of components as those of one pool, ``[n, C_1], [n, C_2], …`` -> ``[n, sum of C]``.

    ``z_scored``: each group to mean 0 and deviation 1 over the span first, because a head adds up what ``hd``
    directions write and outranks neurons by that alone (core.md §1.2.4).
    """
    if z_scored:
        groups = [(g - g.mean()) / (g.std(correction=0) if g.std(correction=0) > 0 else 1.0) for g in groups]
    return torch.cat(list(groups), dim=1)


@dataclass
class Pool:
    """What the spans of one side say of the components of one pool."""

    rho: np.ndarray  # [R, C], worst ranks
    place: np.ndarray  # [R, C], 1 to C
    mean: np.ndarray  # [R, C], mean ranks
    problem: np.ndarray  # [R], column of the draws

    def selects(self, size: int, k: int = 0) -> np.ndarray:
        """``[R, C]`` bool: the first ``size`` of each span or, with ``k``, the intersection of its TopK sets."""
        return self.rho <= k if k else self.place <= size

    def means(self, values: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Mean of ``values [R, C]`` over the spans of every draw, ``[W, C]``."""
        weights = draws[:, self.problem]
        return weights @ values.astype(np.float64) / weights.sum(axis=1, keepdims=True)


def usable(draws: np.ndarray, *sides: Pool | None) -> np.ndarray:
    """``[W]`` bool: draws that hold a span of every side."""
    return np.all([draws[:, side.problem].sum(axis=1) > 0 for side in sides if side is not None], axis=0)


def orders(
    failing: Pool, clean: Pool | None, size: int, draws: np.ndarray, k: int = 0
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Components from first to last choice in every draw: ``(draws done, order [w, C], number chosen [w])``.

    By selection frequency on failing spans, with ``clean`` (the contrast) minus the one on clean spans, else always-on
    components win; ties by mean worst rank, likewise as a difference. ``size`` are chosen or, with a literal ``k``, as
    many of them as any failing span selects. Every draw has to be ``usable``.
    """
    width = failing.rho.shape[1]
    step = max(1, CELLS // width)
    for begin in range(0, len(draws), step):
        part = draws[begin : begin + step]
        often = failing.means(failing.selects(size, k), part)
        rank, never = failing.means(failing.rho, part), (often == 0) & (k > 0)
        if clean is not None:
            often = often - clean.means(clean.selects(size, k), part)
            rank = rank - clean.means(clean.rho, part)
        order = np.lexsort((rank.round(9), -often.round(12), never), axis=-1)
        yield slice(begin, begin + len(part)), order, np.minimum(size, (~never).sum(axis=1))


def effects(failing: Pool, clean: Pool, draws: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """How much further ahead failing spans rank each component than clean ones: ``(draws done, effect [w, C])``.

    The difference of its mean ranks in their (pooled) standard deviations: each component on its own scale. The worst
    rank has no such scale: what writes much, with either sign, is last at some token of every span, failing or clean.
    """
    step = max(1, CELLS // failing.mean.shape[1])
    for begin in range(0, len(draws), step):
        part = draws[begin : begin + step]
        means = [side.means(side.mean, part) for side in (failing, clean)]
        squares = [side.means(side.mean.astype(np.float64) ** 2, part) for side in (failing, clean)]
        spread = np.sqrt(np.maximum(0, sum(s - m**2 for s, m in zip(squares, means, strict=True)) / 2))
        ahead = means[1] - means[0]
        yield slice(begin, begin + len(part)), np.where(spread > 1e-6, ahead / np.maximum(spread, 1e-6), 0.0)


def chosen_sets(failing: Pool, clean: Pool | None, size: int, draws: np.ndarray, k: int = 0) -> np.ndarray:
    """Which components each draw chooses, ``[W, C]`` bool. Arguments as ``orders``."""
    sets = np.zeros((len(draws), failing.rho.shape[1]), dtype=bool)
    for rows, order, n in orders(failing, clean, size, draws, k):
        first = order[:, :size]
        np.put_along_axis(sets[rows], first, np.arange(first.shape[1]) < n[:, None], axis=1)
    return sets


def hypergeometric(total: int, marked: int, drawn: int) -> np.ndarray:
    """Chances of 0, 1, … ``drawn`` marked ones among ``drawn`` of ``total``, of which ``marked`` are."""
    ways = math.comb(total, drawn)
    return np.array([math.comb(marked, i) * math.comb(total - marked, drawn - i) / ways for i in range(drawn + 1)])


def overlap_by_chance(total: int, size: int) -> float:
    """Expected Jaccard overlap of two independent random sets of ``size`` of ``total`` components."""
    common = np.arange(size + 1)
    return float(hypergeometric(total, size, size) @ (common / (2 * size - common)))


@dataclass
class Selection:
    """Chosen components, best first, with the figures that chose them. All lists are aligned with ``indices``.

    ``implied_k``: the K at which the literal intersection of a median failing span would hold them all. ``again``: the
    share of the draws of problems that choose the component again (random sets would hold it in ``by_chance`` of them);
    ``jaccard``: mean overlap of the draws' sets with this one (``jaccard_by_chance``: of random sets).
    """

    indices: list[int]
    frequency: list[float]
    clean_frequency: list[float]
    mean_rank: list[float]
    again: list[float]
    by_chance: float
    jaccard: float
    jaccard_by_chance: float
    implied_k: int
    n_spans: int
    n_clean: int
    n_problems: int


def implied_k(failing: Pool, size: int) -> int:
    """The K at which the literal intersection of a median failing span holds ``size`` components."""
    return int(np.ceil(np.median(np.sort(failing.rho, axis=1)[:, min(size, failing.rho.shape[1]) - 1])))


def select(failing: Pool, clean: Pool | None, size: int, draws: np.ndarray, k: int = 0) -> Selection:
    """Components chosen most often over failing spans; ``orders`` says how. ``draws[0]`` is the data itself, all ones.

    With a literal ``k`` fewer than ``size`` may come, and none if every intersection is empty.
    """
    size = min(size, failing.rho.shape[1])
    clean = clean if clean is not None and len(clean.rho) else None
    sets = chosen_sets(failing, clean, size, draws[usable(draws, failing, clean)], k)
    _, order, n = next(orders(failing, clean, size, draws[:1], k))
    chosen = order[0, : n[0]]
    resampled = sets[1:] if len(sets) > 1 else sets
    common = resampled[:, chosen].sum(axis=1)
    union = resampled.sum(axis=1) + len(chosen) - common
    often = failing.selects(size, k).mean(axis=0)
    clean_often = clean.selects(size, k).mean(axis=0) if clean is not None else np.zeros_like(often)
    total, rank = len(often), failing.rho.mean(axis=0)
    return Selection(
        indices=chosen.tolist(),
        frequency=often[chosen].round(4).tolist(),
        clean_frequency=clean_often[chosen].round(4).tolist(),
        mean_rank=rank[chosen].round(2).tolist(),
        again=resampled[:, chosen].mean(axis=0).round(4).tolist(),
        by_chance=round(len(chosen) / total, 4),
        jaccard=round(float(np.mean(common / np.maximum(union, 1))), 4),
        jaccard_by_chance=round(overlap_by_chance(total, len(chosen)), 4) if len(chosen) else 0.0,
        implied_k=int(np.ceil(np.median(failing.rho[:, chosen].max(axis=1)))) if len(chosen) else 0,
        n_spans=len(failing.rho),
        n_clean=len(clean.rho) if clean is not None else 0,
        n_problems=len(np.unique(failing.problem)),
    )
