"""Keys and values of a generation: with room to grow, and in parts, for rows that leave, branches and prefixes.

Transformers' own layers copy everything they hold for every token; ``RoomLayer`` writes into room kept for it.
Layers of another kind (a sliding window) stay as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from neureasoner.errors import UserError

ROOM = 256  # positions by which a full cache grows


class RoomLayer(DynamicLayer):
    """Keys and values of one block, ``[B, heads, room, head size]``, of which the first ``n`` positions are filled."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over dtype, device and sizes of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, heads, T, head size]``; returns all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.n + key_states.shape[2]
        if end > self.keys.shape[2]:
            more = (0, 0, 0, end + ROOM - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, more)
            self.values = torch.nn.functional.pad(self.values, more)
        self.keys[:, :, self.n : end] = key_states
        self.values[:, :, self.n : end] = value_states
        self.n = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Positions filled."""
        return self.n

    def crop(self, *_: Any) -> None:
        """Refused: Transformers' own would take the room for contents."""
        raise RuntimeError("a RoomLayer cannot be cropped; use neureasoner.caches.prefix")


def new_cache(model: Any) -> Cache:
    """An empty cache for ``model``, of the kinds of layers that its config asks for."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if len(cache.layers) != model.config.num_hidden_layers:
        raise UserError(
            f"a cache for {type(model).__name__} has {len(cache.layers)} layers, the model "
            f"{model.config.num_hidden_layers}; this version of transformers makes caches in another way"
        )
    return cache


def select(cache: Cache, rows: torch.Tensor) -> None:
    """Keep these rows, in this order; one may occur several times. In place; the layers' old tensors are let go."""
    index = rows.cpu()  # layers may lie on several devices
    cache.batch_select_indices(index)


def branched(cache: Cache, rows: torch.Tensor) -> Cache:
    """A cache of copies of these rows; ``cache`` stays as it is."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]  # selecting gives the copies tensors of their own
    select(twin, rows)
    return twin


def prefix(model: Any, cache: Any, row: int, start: int, n: int, copies: int) -> Cache | None:
    """A cache of ``copies`` equal rows that holds ``n`` columns of one row of ``cache``, from ``start`` on; or None.

    A causal cache of a prefix is a prefix of the cache. None where the model has thrown keys away (a sliding window),
    or nothing is left: then the prefix has to be read again.
    """
    if n < 1 or any(type(layer) not in (RoomLayer, DynamicLayer) for layer in cache.layers):
        return None
    kept = new_cache(model)
    for i, layer in enumerate(cache.layers):
        keys, values = (
            x[row : row + 1, :, start : start + n].expand(copies, -1, -1, -1) for x in (layer.keys, layer.values)
        )
        kept.update(keys, values, i)
    return kept
