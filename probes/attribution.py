"""Which neurons and heads of one block write the tokens of a span: scores, ranks and selection (core.md §1.2).

Legend: ``N`` sequence tokens, ``n`` target tokens, ``F`` neurons, ``H`` query heads, ``hd`` head size, ``D`` hidden
size, ``C`` components of one type (F or H), ``R`` spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neureasoner.errors import UserError
from neureasoner.sites import Layout


def check_targets(ids: Sequence[int], targets: Sequence[int]) -> None:
    """Raises UserError unless there are targets and each is an index into ``ids`` with a token before it."""
    if not len(targets) or min(targets) < 1 or max(targets) >= len(ids):
        raise UserError(f"attribution needs targets from 1 to {len(ids) - 1}")


def direct_scores(
    model: Any, ids: Sequence[int], targets: Sequence[int], layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Direct attribution, reading B of core.md §1.2.1: ``(neurons [n, F], heads [n, H])``.

    The score of a component for the token at ``t`` is its write at ``t - 1`` in block ``layer``, scaled by the frozen
    final norm of ``t - 1``, times the LM head's row of the token. ``targets`` are indices into ``ids`` (>= 1).
    """
    layout = Layout.of(model)
    if not 0 <= layer < layout.n_layers:
        raise UserError(f"layer {layer} is out of range; this model has layers 0 to {layout.n_layers - 1}")
    check_targets(ids, targets)
    device = next(model.parameters()).device
    at = torch.as_tensor(targets, device=device) - 1
    tokens = torch.as_tensor(ids, device=device)
    block: Any = layout.layers[layer]
    norm: Any = layout.final_norm
    head: Any = layout.lm_head
    down, out = block.mlp.down_proj, block.self_attn.o_proj
    got: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: got.__setitem__(name, args[0][0].index_select(0, at))

    handles = [m.register_forward_pre_hook(keep(k)) for k, m in (("a", down), ("z", out), ("h", norm))]
    try:
        with torch.inference_mode():
            model.model(input_ids=tokens[None], use_cache=False)
            frozen = norm.weight * torch.rsqrt(got["h"].square().mean(-1, keepdim=True) + norm.variance_epsilon)
            reader = frozen * head.weight[tokens[at + 1]]  # s_f * w_y, [n, D]
            neurons = got["a"] * (reader @ down.weight)
            heads = (got["z"] * (reader @ out.weight)).unflatten(-1, (layout.n_heads, layout.head_dim)).sum(-1)
    finally:
        for handle in handles:
            handle.remove()
    return neurons, heads


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
