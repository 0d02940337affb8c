"""DePass forwards: chosen neurons or heads pushed through the frozen map one by one (arXiv 2510.18462; core.md §2).

The reference for ``depass.py``, which is many times faster for whole blocks, and the only way to the nonlinear sharing
rule of the paper's code (``mode="softmax"``).

Legend: ``N`` sequence tokens, ``n`` target tokens, ``C`` chosen components, ``P`` parts carried together, ``D`` hidden
size, ``F`` neurons, ``H`` query heads, ``hd`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from neureasoner.errors import UserError
from neureasoner.probes.attribution.direct import check_targets
from neureasoner.probes.attribution.frozen import FrozenBlock, Recording, default_chunk, norm_scale, tiles
from neureasoner.sites import Layout, Site

MODES = ("linear", "softmax")
TEMPERATURE = 0.1  # of the softmax over parts, as in the paper's code


def propagate(
    model: Any,
    ids: Sequence[int],
    targets: Sequence[int],
    site: str | Site,
    mode: str = "linear",
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit contributions ``(parts [n, C], rest [n])`` of the components of ``site``, such as ``neuron:3[1,5]``.

    The part of a component is its write at all positions; ``rest`` is the remaining state, and all biases downstream
    go to it. ``parts.sum(-1) + rest`` is the logit of ``ids[t]`` at ``t - 1``. ``mode`` is how parts share a neuron
    above them (core.md §2.3): ``linear``, in proportion to their gates; ``softmax``, by a softmax over their gates at
    temperature 0.1, gates of exactly 0 left out.

    Linear shares do not depend on the other parts, so ``chunk`` parts at a time are carried (default: up to 16, as a
    fixed memory budget allows). Softmax shares do, so there all parts are carried at once.

    Memory: O(model + chunk * N * D), with all C + 1 parts as the chunk in softmax mode. dtype as ``decompose``.

    Raises UserError for another kind of site, a layer, index or target out of range, an unknown mode, a chunk below 1
    or one in softmax mode.
    """
    layout = Layout.of(model)
    site = layout.check(site)
    if site.layer is None or site.kind not in ("neuron", "head"):
        raise UserError(f"site '{site}' is neither neurons nor heads; write it like neuron:3[1,5] or head:3")
    if mode not in MODES:
        raise UserError(f"mode '{mode}' is unknown; use {' or '.join(MODES)}")
    if chunk is not None and (mode == "softmax" or chunk < 1):
        raise UserError(f"chunk must be at least 1 and is for linear mode only, got {chunk} in {mode} mode")
    check_targets(ids, targets)
    with torch.no_grad():
        recording = Recording(model, ids[: max(targets) + 1], site.layer)
        at = torch.as_tensor(targets, device=recording.ids.device)
        readers, n = recording.readers(at), max(targets)
        size = layout.intermediate_size if site.kind == "neuron" else layout.n_heads
        chosen = torch.as_tensor(range(size) if site.indices is None else site.indices, device=at.device)
        writes, whole = _writes(recording, site, n)

        def contributions(parts: torch.Tensor, with_rest: bool) -> torch.Tensor:
            """``parts [P, N, D]`` at the block -> ``[n, P]`` at the logits."""
            parts = _push(recording, site, parts, with_rest, mode)
            return torch.einsum("pnd,nd->np", parts[:, at - 1], readers)

        if mode == "softmax":
            parts = writes(chosen)
            out = contributions(torch.cat([parts, (whole - parts.sum(0))[None]]), True)
            return out[:, :-1], out[:, -1]
        chunk = chunk or default_chunk(layout, n)
        rest, done = whole.clone(), []
        for piece in chosen.split(chunk):
            parts = writes(piece)
            rest -= parts.sum(0)
            done.append(contributions(parts, False))
        return torch.cat(done, dim=1), contributions(rest[None], True)[:, 0]


def _writes(recording: Recording, site: Site, n: int) -> tuple[Any, torch.Tensor]:
    """A function from component indices ``[P]`` to their writes ``[P, n, D]``, and the whole state they are part of.

    Neurons are part of the state after the block's MLP, heads of the one after its attention.
    """
    assert site.layer is not None
    block, x, y = recording.block(site.layer), recording.entering[site.layer][:n], recording.middle[site.layer][:n]
    if site.kind == "head":
        z, out = block.heads(x), block.o[0].unflatten(1, (block.n_heads, block.head_dim))
        return lambda i: torch.einsum("nph,dph->pnd", z[:, i], out[:, i]), y
    a = torch.cat([block.neurons(y[b:e]) for b, e in tiles(n, block.n_neurons)])  # [n, F]
    above = recording.entering.get(site.layer + 1, recording.last)[:n]
    return lambda i: a[:, i].T[:, :, None] * block.down[0][:, i].T[:, None], above


def _push(recording: Recording, site: Site, parts: torch.Tensor, with_rest: bool, mode: str) -> torch.Tensor:
    """Carry ``parts [P, N, D]`` from the block to the final norm. ``with_rest``: the last one is the rest."""
    assert site.layer is not None
    n = parts.shape[1]
    if site.kind == "head":
        parts = _push_mlp(recording.block(site.layer), recording.middle[site.layer][:n], parts, with_rest, mode)
    for i in range(site.layer + 1, recording.layout.n_layers):
        block, x, y = recording.block(i), recording.entering[i][:n], recording.middle[i][:n]
        parts = parts + block.attend(x, parts)
        if with_rest:
            parts[-1] += block.attend_constant()
        parts = _push_mlp(block, y, parts, with_rest, mode)
    return parts


def _push_mlp(block: FrozenBlock, y: torch.Tensor, parts: torch.Tensor, with_rest: bool, mode: str) -> torch.Tensor:
    """Parts ``[P, N, D]`` after the MLP, each with its share of every neuron and, the rest, the biases."""
    if mode == "linear":
        out = parts + block.mlp(y, parts)
        if with_rest:
            out[-1] += block.mlp_constant(y)
        return out
    scale, out = norm_scale(block.norms[1], y), parts.clone()
    (weight, bias), (down, down_bias) = block.gate, block.down
    for begin, end in tiles(len(y), len(parts) * block.n_neurons):
        gates = linear(scale[begin:end] * parts[:, begin:end], weight)  # [P, rows, F]
        if bias is not None:
            gates[-1] += bias
        shares = (gates / TEMPERATURE).masked_fill(gates == 0, -torch.inf).softmax(0)
        # where all gates are 0, that is a softmax over nothing; the neuron is silu(0) = 0 and nothing is to be shared
        shares = shares.masked_fill(gates == 0, 0.0)
        out[:, begin:end] += linear(shares * block.neurons(y[begin:end]), down)
    if down_bias is not None:
        out[-1] += down_bias
    return out
