"""Which components a block's scores single out over spans of tokens: ranks and selection (core.md §1.2.3, §1.2.4).

Legend: ``n`` target tokens, ``F`` neurons, ``H`` query heads, ``C`` components of one type (F or H), ``R`` spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of every component for every token, 1 is the largest score. ``[n, C]`` -> ``[n, C]``; ties by index."""
    order = np.argsort(-scores, axis=1, kind="stable")
    out = np.empty_like(order)
    np.put_along_axis(out, order, np.arange(1, scores.shape[1] + 1)[None], axis=1)
    return out


def worst_rank(scores: np.ndarray, quantile: float = 1.0) -> np.ndarray:
    """``rho [C]``: the quantile of a component's ranks over the span; 1.0 is its worst rank.

    At 1.0, ``rho <= K`` is the literal intersection of all TopK sets (core.md §1.2.3).
    """
    r = ranks(np.asarray(scores))
    return r.max(axis=0).astype(np.float64) if quantile >= 1 else np.quantile(r, quantile, axis=0)


def joint_worst_rank(neurons: np.ndarray, heads: np.ndarray, quantile: float = 1.0) -> np.ndarray:
    """``rho [F + H]`` with both types in one ranking, each type's scores z-scored first (core.md §1.2.4)."""
    z = [(s - s.mean()) / (s.std() or 1.0) for s in (np.asarray(neurons), np.asarray(heads))]
    return worst_rank(np.concatenate(z, axis=1), quantile)


@dataclass
class Selection:
    """Chosen components, best first, with the figures that chose them. All lists are aligned with ``indices``.

    ``implied_k``: the K at which the literal intersection of a median failing span would hold them all.
    """

    indices: list[int]
    frequency: list[float]
    clean_frequency: list[float]
    mean_rank: list[float]
    implied_k: int
    n_spans: int
    n_clean: int


def _frequency(rho: np.ndarray, size: int) -> np.ndarray:
    """Share of spans ``[C]`` that put a component among their first ``size``. ``rho [R, C]``."""
    return (ranks(-rho) <= size).mean(axis=0) if len(rho) else np.zeros(rho.shape[1])


def select(failing: np.ndarray, clean: np.ndarray | None, size: int) -> Selection:
    """Components chosen most often over failing spans. ``failing [R, C]``, ``clean [R', C]`` are worst ranks.

    With ``clean`` (the contrast) the order is by selection frequency on failing minus clean spans, else always-on
    components win; ties by mean worst rank, likewise as a difference, so that there is an answer even if no component
    is ever selected.
    """
    size = min(size, failing.shape[1])
    often, rank = _frequency(failing, size), failing.mean(axis=0)
    contrast = clean is not None and len(clean) > 0
    clean_often = _frequency(clean, size) if contrast and clean is not None else np.zeros_like(often)
    clean_rank = clean.mean(axis=0) if contrast and clean is not None else np.zeros_like(rank)
    order = np.lexsort((np.arange(len(often)), rank - clean_rank, -(often - clean_often).round(12)))[:size]
    return Selection(
        indices=[int(i) for i in order],
        frequency=[round(float(often[i]), 4) for i in order],
        clean_frequency=[round(float(clean_often[i]), 4) for i in order],
        mean_rank=[round(float(rank[i]), 2) for i in order],
        implied_k=int(np.ceil(np.median(failing[:, order].max(axis=1)))),
        n_spans=len(failing),
        n_clean=len(clean) if contrast and clean is not None else 0,
    )
