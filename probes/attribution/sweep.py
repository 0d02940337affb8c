"""DePass scores of several blocks from one recorded forward pass and one way down (core.md §2.4).

The cotangents that ``depass.decompose`` carries down to its block pass all blocks above, so those are scored on the
way: all L blocks of a model cost about what the lowest one costs alone.

Legend: ``n`` target tokens, ``K`` targets of one chunk, ``N`` positions, ``D`` hidden size, ``F`` neurons, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neureasoner.probes.attribution.depass import _per_head, _through_own_mlp
from neureasoner.probes.attribution.direct import Scores, check_layers, check_targets
from neureasoner.probes.attribution.frozen import Recording, default_chunk
from neureasoner.sites import Layout


def depass_sweep(model: Any, ids: Sequence[int], targets: Sequence[int], layers: Sequence[int]) -> dict[int, Scores]:
    """``depass_scores`` of each of ``layers``, by layer: ``(neurons [n, F], heads [n, H])``. Errors as there.

    Memory: O(model + (L - lowest + chunk) * N * D), and the scores.
    """
    check_layers(Layout.of(model), layers)
    check_targets(ids, targets)
    with torch.no_grad():
        recording = Recording(model, ids[: max(targets) + 1], min(layers))
        at = torch.as_tensor(targets, device=recording.ids.device)
        order = at.argsort()  # as in decompose: neighbours have prefixes of like length
        chunk = default_chunk(recording.layout, max(targets))
        done = [_sweep_chunk(recording, at[part], set(layers)) for part in order.split(chunk)]
        back = order.argsort()
        whole = lambda layer, i: torch.cat([d[layer][i] for d in done])[back]  # noqa: E731
        return {layer: (whole(layer, 0), whole(layer, 1)) for layer in layers}


def _sweep_chunk(recording: Recording, targets: torch.Tensor, layers: set[int]) -> dict[int, Scores]:
    """``depass_sweep`` for targets whose cotangents fit memory together."""
    n = int(targets.max())
    readers = recording.readers(targets)
    cotangents = readers.new_zeros(len(targets), n, readers.shape[-1])  # [K, n, D], of the state after a block
    cotangents[torch.arange(len(targets), device=targets.device), targets - 1] = readers
    out: dict[int, Scores] = {}
    for i in range(recording.layout.n_layers - 1, min(layers) - 1, -1):
        block, x, y = recording.block(i), recording.entering[i][:n], recording.middle[i][:n]
        if i in layers:
            neurons, through_mlp = _through_own_mlp(block, y, cotangents)
            cotangents += through_mlp
            heads = torch.einsum("knhc,nhc->kh", _per_head(block, cotangents), block.heads(x))
            out[i] = neurons, heads
        else:
            cotangents += block.mlp_adjoint(y, cotangents)
        if i > min(layers):
            cotangents += block.attend_adjoint(x, cotangents)
    return out
