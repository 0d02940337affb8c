"""Direct attribution: what a block's neurons and heads write at a token itself (core.md §1.2.1, reading B).

Legend: ``n`` target tokens, ``F`` neurons, ``H`` query heads, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
