"""DePass, linear mode: what every neuron and head of a block contributes to a logit (arXiv 2510.18462; core.md §2.4).

With norms, attention and gates frozen, everything above a block is a linear map. So one product with its transpose per
target token, from the logit down to the block, scores all components at once; no component is propagated.

Legend: ``N`` sequence tokens, ``n`` target tokens, ``K`` targets of one chunk, ``D`` hidden size, ``F`` neurons, ``H``
query heads, ``hd`` head size, ``L`` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from neureasoner.errors import UserError
from neureasoner.probes.attribution.direct import check_targets
from neureasoner.probes.attribution.frozen import FrozenBlock, Recording, default_chunk, norm_scale, tiles


@dataclass
class Decomposition:
    """Contributions to the logits of target tokens, in two exact partitions of each logit.

    ``neurons.sum(-1) + neuron_rest = logits`` splits the state after the block's MLP, ``heads.sum(-1) + head_rest =
    logits`` the state after its attention. They overlap: what a head contributes through the MLP of its own block is
    part of that head and of the neurons that pass it on, so neurons and heads are not to be added to each other.
    ``neuron_rest`` is the residual stream after attention, ``head_rest`` the one entering the block; both include all
    biases downstream. Rests are computed like the parts, not as a difference, so that the sums test something.
    """

    neurons: torch.Tensor  # [n, F]
    heads: torch.Tensor  # [n, H]
    neuron_rest: torch.Tensor  # [n]
    head_rest: torch.Tensor  # [n]
    logits: torch.Tensor  # [n], of ids[t] at t - 1, by the recorded forward pass


def depass_scores(
    model: Any, ids: Sequence[int], targets: Sequence[int], layer: int, chunk: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attribution by DePass, reading A of core.md §1.2.1: ``(neurons [n, F], heads [n, H])``, in logits.

    Arguments, cost and errors as ``decompose``.
    """
    parts = decompose(model, ids, targets, layer, chunk)
    return parts.neurons, parts.heads


def decompose(
    model: Any, ids: Sequence[int], targets: Sequence[int], layer: int, chunk: int | None = None
) -> Decomposition:
    """Split the logit of ``ids[t]`` at ``t - 1`` for every ``t`` of ``targets`` (>= 1) over block ``layer``.

    The score of a component sums its writes at all positions before ``t``: attention above can carry each of them to
    ``t - 1``. A head's score includes what it does through the MLP of its own block.

    Time: one forward pass, then for each target about one pass through the blocks above. ``chunk`` targets share one
    recomputation of attention and gates (default: up to 16, as a fixed memory budget allows); it does not change the
    results. Memory: O(model + (L - layer + chunk) * N * D), and a constant for temporary tensors.
    Values are float64 for a float64 model, else float32, on the model's device.

    Raises UserError for a layer or target out of range, a chunk below 1, and a model that is not supported.
    """
    check_targets(ids, targets)
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk must be at least 1, got {chunk}")
    with torch.no_grad():
        # a target at t reads the tokens before it; its own id only picks a row of the LM head
        recording = Recording(model, ids[: max(targets) + 1], layer)
        at = torch.as_tensor(targets, device=recording.ids.device)
        chunk = chunk or default_chunk(recording.layout, max(targets))
        order = at.argsort()  # neighbours have prefixes of like length, so a chunk wastes little on its short ones
        done = [_decompose_chunk(recording, at[part], layer) for part in order.split(chunk)]
        back = order.argsort()
        return Decomposition(*(torch.cat([getattr(d, f.name) for d in done])[back] for f in fields(Decomposition)))


def _decompose_chunk(recording: Recording, targets: torch.Tensor, layer: int) -> Decomposition:
    """``decompose`` for targets whose cotangents fit memory together."""
    n = int(targets.max())  # positions from here on cannot reach any of these targets
    readers = recording.readers(targets)
    cotangents = readers.new_zeros(len(targets), n, readers.shape[-1])  # [K, n, D], of the state after a block
    cotangents[torch.arange(len(targets), device=targets.device), targets - 1] = readers
    constants = readers.new_zeros(len(targets))  # what biases above the block contribute
    for i in range(recording.layout.n_layers - 1, layer, -1):
        block, x, y = recording.block(i), recording.entering[i][:n], recording.middle[i][:n]
        constants += _dot(cotangents, block.mlp_constant(y))
        cotangents += block.mlp_adjoint(y, cotangents)
        constants += _dot(cotangents, block.attend_constant().expand(n, -1))
        cotangents += block.attend_adjoint(x, cotangents)
    block, x, y = recording.block(layer), recording.entering[layer][:n], recording.middle[layer][:n]
    down_bias, out_bias = (y.new_zeros(1) if b is None else b for b in (block.down[1], block.o[1]))
    neurons, through_mlp = _through_own_mlp(block, y, cotangents)
    neuron_rest = constants + _dot(cotangents, y + down_bias)
    constants += _dot(cotangents, block.mlp_constant(y))
    cotangents += through_mlp  # now of the state after attention
    heads = torch.einsum("knhc,nhc->kh", _per_head(block, cotangents), block.heads(x))
    # the value bias of this block is in its heads
    head_rest = constants + _dot(cotangents, x + out_bias)
    logits = (readers * recording.last[targets - 1]).sum(-1)
    return Decomposition(neurons, heads, neuron_rest, head_rest, logits)


def _dot(cotangents: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """``[K, n, D]`` and ``[n, D]`` -> ``[K]``."""
    return cotangents.flatten(1) @ state.flatten()


def _per_head(block: FrozenBlock, cotangents: torch.Tensor) -> torch.Tensor:
    """Cotangents of the input of ``o_proj``: ``[K, n, D]`` -> ``[K, n, H, hd]``."""
    return (cotangents @ block.o[0]).unflatten(-1, (block.n_heads, block.head_dim))


def _through_own_mlp(
    block: FrozenBlock, y: torch.Tensor, cotangents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(neuron scores [K, F], mlp_adjoint [K, n, D])`` for cotangents ``[K, n, D]`` of the state after the MLP.

    Both start from ``cotangents @ W_down``, the largest product, so they are made together.
    """
    scores, out = cotangents.new_zeros(len(cotangents), block.n_neurons), torch.empty_like(cotangents)
    for begin, end in tiles(len(y), len(cotangents) * block.n_neurons):
        readers = cotangents[:, begin:end] @ block.down[0]
        c, gate = block.gates(y[begin:end])
        readers *= c
        out[:, begin:end] = readers @ block.gate[0]
        scores += (readers * gate).sum(1)
    return scores, out * norm_scale(block.norms[1], y)
