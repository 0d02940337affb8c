"""Bias vectors: one float32 vector per block, added to the residual stream after it (core.md §4.1).

Legend: ``L`` blocks, ``D`` hidden size, ``B`` batch, ``T`` tokens. Block ``l`` then gives ``h_l + b_l`` at every
position, prompt and padding included, which is what a bias of its ``down_proj`` would do. Nothing of Transformers is
edited: the vector is a parameter of a small module inside the block, and a forward hook adds it.

Usage::

    vectors = BiasVectors(model)            # zeros: the model is unchanged
    vectors.freeze_rest()                   # L * D parameters are left to train
    ...
    values = vectors.stack()                # [L, D]
    vectors.detach()
    direction_of(values, "positive = as trained", name, fingerprint(model)).save("runs/vectors/direction")
    with bias_vectors(model, Direction.load("runs/vectors/direction")):
        model.generate(...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.sites import Layout, Site

NAME = "bias_vector"


class BiasVector(nn.Module):
    """``h [B, T, D] -> h + bias``. The bias stays float32 in a model of any type: in bfloat16, numbers between 0.5 and
    1 lie 4e-3 apart, and an update of 1e-3 would round away. It is cast where it is added."""

    def __init__(self, width: int, device: Any = None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.bias.to(hidden.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> BiasVector:
        """``model.to(bfloat16)`` moves the bias, and does not round it."""
        exact = self.bias.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != torch.float32:
            self.bias = nn.Parameter(exact.to(self.bias.device), self.bias.requires_grad)
        return self


def _add(block: nn.Module, _: Any, output: Any) -> Any:
    """The hook. It finds the vector through the block, so that a copy of the model adds its own."""
    vector: Any = getattr(block, NAME)
    return (vector(output[0]), *output[1:]) if isinstance(output, tuple) else vector(output)


class BiasVectors:
    """The vectors of one model, in place until ``detach``. ``values``: ``[L, D]``, default zeros.

    Take the model's fingerprint before: the vectors become parameters of it. Raises UserError for an architecture that
    is not supported, a model that has vectors already, or values of another shape or that are not finite.
    """

    def __init__(self, model: Any, values: torch.Tensor | None = None):
        layout = Layout.of(model)
        if any(hasattr(block, NAME) for block in layout.layers):
            raise UserError("this model has bias vectors already; detach them first")
        shape = (layout.n_layers, layout.hidden_size)
        values = torch.zeros(shape) if values is None else _checked(values, shape)
        self.model, self.blocks = model, list(layout.layers)
        self._handles = []
        for block, value in zip(self.blocks, values, strict=True):
            vector = BiasVector(layout.hidden_size, next(block.parameters()).device)
            vector.bias.data.copy_(value)
            block.add_module(NAME, vector)
            self._handles.append(block.register_forward_hook(_add))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """One ``[D]`` parameter a block. Their names end in ``bias``, which Transformers' Trainer never decays."""
        return [getattr(block, NAME).bias for block in self.blocks]

    def freeze_rest(self) -> None:
        """Leave only the vectors to train."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def stack(self) -> torch.Tensor:
        """Their values now: ``[L, D]``, float32, on the CPU."""
        return torch.stack([p.detach().to("cpu", torch.float32) for p in self.parameters])

    def set(self, values: torch.Tensor) -> None:
        """Overwrite the values with ``[L, D]``. Raises UserError as the constructor."""
        shape = (len(self.blocks), self.parameters[0].shape[0])
        for parameter, value in zip(self.parameters, _checked(values, shape), strict=True):
            parameter.data.copy_(value)

    def detach(self) -> None:
        """Take the vectors and their hooks away; the model is what it was."""
        for handle in self._handles:
            handle.remove()
        for block in self.blocks:
            delattr(block, NAME)


def direction_of(
    values: torch.Tensor, meaning: str, model: str = "", fingerprint: str = "", info: Mapping[str, Any] | None = None
) -> Direction:
    """Vectors ``[L, D]`` as a Direction with the sites ``residual:0`` to ``residual:L-1``. ``fingerprint``: of the
    model without them."""
    return Direction({f"residual:{i}": v for i, v in enumerate(values)}, meaning, model, fingerprint, dict(info or {}))


def stacked(direction: Direction, n_layers: int) -> torch.Tensor:
    """A direction's residual vectors as ``[L, D]``; blocks it does not name get zeros.

    Raises UserError for a site that is no residual one, or of a block beyond ``n_layers``.
    """
    sites = {name: Site.parse(name) for name in direction.sites}
    for name, site in sites.items():
        if site.kind != "residual":
            raise UserError(f"direction '{direction.meaning}': site '{name}' is no residual:LAYER, so no bias vector")
        if site.layer is not None and site.layer >= n_layers:
            raise UserError(f"direction '{direction.meaning}': site '{name}', but the model has {n_layers} blocks")
    width = len(next(iter(direction.values.values())))
    values = torch.zeros(n_layers, width)
    for name, site in sites.items():
        values[site.layer] = direction.values[name]
    return values


@contextmanager
def bias_vectors(model: Any, values: torch.Tensor | Direction) -> Iterator[BiasVectors]:
    """While active, add ``values`` (``[L, D]`` or a direction, which is checked against the model)."""
    if isinstance(values, Direction):
        values.check(model)
        values = stacked(values, Layout.of(model).n_layers)
    vectors = BiasVectors(model, values)
    try:
        yield vectors
    finally:
        vectors.detach()


def _checked(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if tuple(values.shape) != shape:
        raise UserError(f"bias vectors must be [blocks, hidden size] = {list(shape)}, got {list(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise UserError("bias vectors hold NaN or infinity")
    return values.to(torch.float32)
