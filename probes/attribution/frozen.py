"""One recorded forward pass, and the linear map left of it when its non-linear pieces are frozen (core.md §2.3).

Frozen are the denominators of all norms, the attention probabilities, and ``c = sigmoid(gate) * up`` of every neuron,
so that ``W_down(c * gate)`` is the MLP. Everything is computed here from the weights and not by the model's own
modules: attention kernels do not give their probabilities, and stock norms and softmax drop to float32 in a float64
model, which would hide errors of the map behind rounding. Hooks on the model's modules therefore have no effect.

Legend: ``N`` tokens, ``D`` hidden size, ``F`` neurons, ``H`` query heads, ``Hkv`` key/value heads, ``g = H / Hkv``
query heads per key/value head, ``hd`` head size, ``P`` parts carried together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from neureasoner.errors import UserError
from neureasoner.sites import Layout

CELLS = 2**22  # values of one temporary tensor of a tile: 16 MiB in float32, and faster on a CPU than larger ones
STATE_CELLS = 2**25  # values of all parts or targets carried together: 128 MiB in float32
MOST = 16  # carried together; beyond, nothing is left to save


def tiles(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Bounds that cut ``n`` rows of ``width`` values into pieces of at most ``CELLS`` values (at least one row)."""
    step = max(1, CELLS // max(1, width))
    return ((begin, min(begin + step, n)) for begin in range(0, n, step))


def default_chunk(layout: Layout, n: int) -> int:
    """How many parts or targets of ``n`` tokens are carried together."""
    width = max(layout.hidden_size, layout.n_heads * layout.head_dim)
    return max(1, min(MOST, STATE_CELLS // (n * width)))


class FrozenBlock:
    """The map of one decoder block. ``x [N, D]`` enters the block, ``y [N, D]`` is its state after attention.

    ``x`` and ``y`` are true states and decide what is frozen; ``parts [P, N, D]`` are what the map is applied to.
    """

    def __init__(self, layout: Layout, layer: int, cos: torch.Tensor, sin: torch.Tensor):
        block: Any = layout.layers[layer]
        attention, mlp = block.self_attn, block.mlp
        self.cos, self.sin = cos, sin  # [N, hd]
        self.n_heads, self.n_kv, self.head_dim = layout.n_heads, layout.n_kv_heads, layout.head_dim
        self.group = self.n_heads // self.n_kv
        self.scaling = attention.scaling
        self.window: int | None = getattr(attention, "sliding_window", None)
        self.q, self.k, self.v, self.o = (
            self._weights(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self.gate, self.up, self.down = (self._weights(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)  # Qwen3

    def _weights(self, module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = module.bias
        return module.weight.to(self.cos.dtype), None if bias is None else bias.to(self.cos.dtype)

    # Attention

    def probabilities(self, x: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Attention probabilities, some query rows at a time: ``(begin, end, A [Hkv, g * (end - begin), end])``.

        Never the whole ``[H, N, N]``, and no keys after the last query of the rows.
        """
        normed, n = norm_scale(self.norms[0], x) * x, len(x)
        q = self._rotated(linear(normed, *self.q), self.head_norms[0]).unflatten(0, (self.n_kv, self.group))
        k = self._rotated(linear(normed, *self.k), self.head_norms[1])
        at = torch.arange(n, device=x.device)
        for begin, end in tiles(n, self.n_heads * n):
            scores = q[:, :, begin:end].flatten(1, 2) @ k[:, :end].mT * self.scaling
            hidden = at[:end] > at[begin:end, None]
            if self.window is not None:
                hidden |= at[:end] <= at[begin:end, None] - self.window
            scores = scores.unflatten(1, (self.group, end - begin)).masked_fill(hidden, -torch.inf)
            yield begin, end, scores.softmax(-1).flatten(1, 2)

    def _rotated(self, flat: torch.Tensor, norm: Any) -> torch.Tensor:
        """Queries or keys, normed (Qwen3) and rotated to their positions: ``[N, heads * hd]`` -> ``[heads, N, hd]``."""
        heads = flat.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        if norm is not None:
            heads = norm_scale(norm, heads) * heads
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cos[: len(flat)] + torch.cat((-second, first), dim=-1) * self.sin[: len(flat)]

    def _mix(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Values ``[P, N, Hkv * hd]`` mixed over positions by every query head: ``[P, N, H * hd]``."""
        p, n = values.shape[:2]
        v = values.unflatten(-1, (self.n_kv, self.head_dim)).permute(2, 1, 0, 3).flatten(2)  # [Hkv, N, P * hd]
        out = v.new_empty(self.n_kv, self.group, n, p * self.head_dim)
        for begin, end, a in self.probabilities(x):
            out[:, :, begin:end] = (a @ v[:, :end]).unflatten(1, (self.group, end - begin))
        return out.unflatten(-1, (p, self.head_dim)).permute(3, 2, 0, 1, 4).flatten(2)

    def attend(self, x: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """What attention adds to each part, value and output biases aside. ``[P, N, D]`` -> ``[P, N, D]``."""
        return linear(self._mix(x, linear(norm_scale(self.norms[0], x) * parts, self.v[0])), self.o[0])

    def attend_adjoint(self, x: torch.Tensor, cotangents: torch.Tensor) -> torch.Tensor:
        """The transpose of ``attend``. ``[P, N, D]`` -> ``[P, N, D]``."""
        p, n = cotangents.shape[:2]
        heads = (cotangents @ self.o[0]).unflatten(-1, (self.n_kv, self.group, self.head_dim))
        heads = heads.permute(2, 3, 1, 0, 4).flatten(3)  # [Hkv, g, N, P * hd]
        values = heads.new_zeros(self.n_kv, n, p * self.head_dim)
        for begin, end, a in self.probabilities(x):
            # contracting over g * rows also sums the query heads that share a key/value head
            values[:, :end] += a.mT @ heads[:, :, begin:end].flatten(1, 2)
        flat = values.unflatten(-1, (p, self.head_dim)).permute(2, 1, 0, 3).flatten(2)
        return (flat @ self.v[0]) * norm_scale(self.norms[0], x)

    def attend_constant(self) -> torch.Tensor:
        """What attention adds whatever its input, ``[D]``: rows of A sum to 1, so every head passes its value bias."""
        weight, bias = self.o
        out = torch.zeros_like(weight[:, 0]) if bias is None else bias.clone()
        if self.v[1] is not None:
            per_kv_head = self.v[1].unflatten(0, (self.n_kv, self.head_dim))
            out += weight @ per_kv_head.repeat_interleave(self.group, dim=0).flatten()
        return out

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """The input of ``o_proj``, value biases included: ``[N, H, hd]``."""
        values = linear(norm_scale(self.norms[0], x) * x, *self.v)
        return self._mix(x, values[None])[0].unflatten(-1, (self.n_heads, self.head_dim))

    # MLP

    def gates(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(c, gate)``, both ``[rows, F]``, for any rows of ``y``. The neurons are ``c * gate``."""
        normed = norm_scale(self.norms[1], y) * y
        gate = linear(normed, *self.gate)
        return torch.sigmoid(gate) * linear(normed, *self.up), gate

    def neurons(self, y: torch.Tensor) -> torch.Tensor:
        """The input of ``down_proj`` for any rows of ``y``: ``[rows, F]``."""
        c, gate = self.gates(y)
        return c * gate

    def mlp(self, y: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to each part, biases aside. ``[P, N, D]`` -> ``[P, N, D]``."""
        scale, out = norm_scale(self.norms[1], y), torch.empty_like(parts)
        for begin, end in tiles(len(y), len(parts) * self.n_neurons):
            gates = linear(scale[begin:end] * parts[:, begin:end], self.gate[0])
            out[:, begin:end] = linear(self.gates(y[begin:end])[0] * gates, self.down[0])
        return out

    def mlp_adjoint(self, y: torch.Tensor, cotangents: torch.Tensor) -> torch.Tensor:
        """The transpose of ``mlp``. ``[P, N, D]`` -> ``[P, N, D]``."""
        out = torch.empty_like(cotangents)
        for begin, end in tiles(len(y), len(cotangents) * self.n_neurons):
            readers = cotangents[:, begin:end] @ self.down[0]
            readers *= self.gates(y[begin:end])[0]
            out[:, begin:end] = readers @ self.gate[0]
        return out * norm_scale(self.norms[1], y)

    def mlp_constant(self, y: torch.Tensor) -> torch.Tensor:
        """What the frozen MLP adds whatever the part, through its gate and output biases: ``[N, D]``."""
        out = torch.zeros_like(y) if self.down[1] is None else self.down[1].expand_as(y).clone()
        if self.gate[1] is not None:
            for begin, end in tiles(len(y), self.n_neurons):
                out[begin:end] += linear(self.gates(y[begin:end])[0] * self.gate[1], self.down[0])
        return out

    @property
    def n_neurons(self) -> int:
        """``F``."""
        return self.down[0].shape[1]


def norm_scale(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """What an RMSNorm multiplies ``x`` by, in the dtype of ``x``; same shape as ``x``."""
    return norm.weight.to(x.dtype) * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


class Recording:
    """The true states of one sequence from block ``layer`` upwards, and the frozen map above.

    ``entering[l]`` and ``middle[l]``, ``[N, D]``, are the states before and after attention of block ``l``, ``last`` is
    the state before the final norm. Keeps O((L - layer) * N * D) values. Computes in float64 if the model is float64,
    else in float32, whatever the weights are stored in. Call under ``torch.no_grad``.

    Raises UserError for an architecture, activation or layer that is not supported.
    """

    def __init__(self, model: Any, ids: Sequence[int], layer: int):
        self.layout = layout = Layout.of(model)
        if not 0 <= layer < layout.n_layers:
            raise UserError(f"layer {layer} is out of range; this model has layers 0 to {layout.n_layers - 1}")
        if model.config.hidden_act != "silu":
            raise UserError(f"DePass needs the activation 'silu'; this model has '{model.config.hidden_act}'")
        weight = model.model.embed_tokens.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.ids = torch.as_tensor(ids, device=weight.device)
        x = weight[self.ids].to(dtype)
        positions = torch.arange(len(ids), device=weight.device)
        self.cos, self.sin = (t[0] for t in model.model.rotary_emb(x[None], positions[None]))
        self.entering: dict[int, torch.Tensor] = {}
        self.middle: dict[int, torch.Tensor] = {}
        for i in range(layout.n_layers):
            block = self.block(i)
            y = x + block.attend(x, x[None])[0] + block.attend_constant()
            if i >= layer:
                self.entering[i], self.middle[i] = x, y
            x = y + block.mlp(y, y[None])[0] + block.mlp_constant(y)
        self.last = x

    def block(self, layer: int) -> FrozenBlock:
        """The frozen map of block ``layer``. Made anew each time: it holds a copy of half-precision weights."""
        return FrozenBlock(self.layout, layer, self.cos, self.sin)

    def readers(self, targets: torch.Tensor) -> torch.Tensor:
        """What the logit of ``ids[t]`` reads from the last state at ``t - 1``, ``[n, D]``: frozen norm, LM head row."""
        head: Any = self.layout.lm_head
        rows = head.weight[self.ids[targets]].to(self.last.dtype)
        return norm_scale(self.layout.final_norm, self.last[targets - 1]) * rows
