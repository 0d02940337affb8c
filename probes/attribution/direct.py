"""Direct attribution: what a block's neurons and heads write at a token itself (core.md §1.2.1, reading B).

Legend: ``n`` target tokens, ``F`` neurons, ``H`` query heads, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neureasoner.errors import UserError
from neureasoner.forward import read
from neureasoner.sites import Layout, own

Scores = tuple[torch.Tensor, torch.Tensor]  # (neurons [n, F], heads [n, H]) of one block


def check_targets(ids: Sequence[int], targets: Sequence[int]) -> None:
    """Raises UserError unless there are targets and each is an index into ``ids`` with a token before it."""
    if not len(targets) or min(targets) < 1 or max(targets) >= len(ids):
        raise UserError(f"attribution needs targets from 1 to {len(ids) - 1}")


def check_layers(layout: Layout, layers: Sequence[int]) -> None:
    """Raises UserError naming the first of ``layers`` that the model does not have."""
    for layer in layers:
        if not 0 <= layer < layout.n_layers:
            raise UserError(f"layer {layer} is out of range; this model has layers 0 to {layout.n_layers - 1}")


def direct_scores(model: Any, ids: Sequence[int], targets: Sequence[int], layer: int) -> Scores:
    """Direct attribution, reading B of core.md §1.2.1: ``(neurons [n, F], heads [n, H])``.

    The score of a component for the token at ``t`` is its write at ``t - 1`` in block ``layer``, scaled by the frozen
    final norm of ``t - 1``, times the LM head's row of the token. ``targets`` are indices into ``ids`` (>= 1).
    Values are float64 for a float64 model, else float32.
    """
    return direct_sweep(model, ids, targets, [layer])[layer]


def direct_sweep(model: Any, ids: Sequence[int], targets: Sequence[int], layers: Sequence[int]) -> dict[int, Scores]:
    """``direct_scores`` of several blocks from one forward pass, by layer."""
    layout = Layout.of(model)
    check_layers(layout, layers)
    check_targets(ids, targets)
    device = next(model.parameters()).device
    at = torch.as_tensor(targets, device=device) - 1
    tokens = torch.as_tensor(ids, device=device)
    norm: Any = layout.final_norm
    head: Any = layout.lm_head
    # half precision would round scores that differ to equal ones, and ranks are all that is used of them
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    got: dict[tuple[str, int], torch.Tensor] = {}

    def keep(name: str, layer: int) -> Any:
        return lambda _, args: got.__setitem__((name, layer), args[0][0].index_select(0, at).to(dtype))

    writers: dict[int, tuple[Any, Any]] = {}  # (down_proj, o_proj)
    for layer in layers:
        block: Any = layout.layers[layer]
        writers[layer] = block.mlp.down_proj, block.self_attn.o_proj
    handles = [norm.register_forward_pre_hook(own(keep("h", -1)))]
    try:
        for layer, (down, out) in writers.items():
            handles += [
                down.register_forward_pre_hook(own(keep("a", layer))),
                out.register_forward_pre_hook(own(keep("z", layer))),
            ]
        with torch.inference_mode():
            read(model, tokens[None])
            last = got["h", -1]
            frozen = norm.weight.to(dtype) * torch.rsqrt(last.square().mean(-1, keepdim=True) + norm.variance_epsilon)
            reader = frozen * head.weight[tokens[at + 1]].to(dtype)  # s_f * w_y, [n, D]
            scores = {}
            for layer, (down, out) in writers.items():
                neurons = got["a", layer] * (reader @ down.weight.to(dtype))
                heads = got["z", layer] * (reader @ out.weight.to(dtype))
                scores[layer] = neurons, heads.unflatten(-1, (layout.n_heads, layout.head_dim)).sum(-1)
    finally:
        for handle in handles:
            handle.remove()
    return scores
