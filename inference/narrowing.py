"""Finished rows leave the batch: a stock ``generate`` that does not read on what has ended.

``generate`` keeps every row until the longest one ends, so with a few long answers most of its work is for rows that
say nothing any more. Here two hooks on the model stand between them: ``generate`` still sees all rows, and draws the
same numbers for them, but the model reads only those still writing. Its cache drops the others for good.

Legend: B rows of the generation, L of them still read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

EVERY = 8  # forwards between two looks at who has ended: a look waits for the device
LEAST = 1 / 8  # share of the rows read that has to have ended before they leave: leaving copies the cache of the others

Told = Callable[[torch.Tensor, torch.Tensor], None]


@contextmanager
def finished_rows_leave(model: Any, rows: int, ends: Sequence[int], told: Told | None = None) -> Iterator[None]:
    """For one ``generate`` call over ``rows`` prompts whose responses end with one of ``ends``.

    ``told(kept, live)`` when some leave, before the forward without them: which of the rows read last stay, and which
    of the B rows they are, ``[L]`` each. Models with another cache than keys and values keep their rows.
    """
    if rows == 1:
        yield
        return
    run = _Narrowing(rows, torch.tensor(list(ends), device=model.device), told)
    handles = [
        model.register_forward_pre_hook(run.before, with_kwargs=True, prepend=True),
        model.register_forward_hook(run.after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Narrowing:
    """The state of one generation. ``done [B]``: has its last token. ``live [L]``: rows read, in order."""

    def __init__(self, rows: int, ends: torch.Tensor, told: Told | None):
        self.rows, self.ends, self.told = rows, ends, told
        self.done = torch.zeros(rows, dtype=torch.bool, device=ends.device)
        self.live = torch.arange(rows, device=ends.device)
        self.forwards = 0

    def before(self, model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Take out of what ``generate`` hands over the rows that have ended."""
        self.forwards += 1
        if self.forwards == 1:  # the prompt
            return None
        self.done |= torch.isin(given["input_ids"][:, -1], self.ends)
        if self.forwards % EVERY == 0:
            self._look(given)
        if len(self.live) == self.rows:
            return None
        return args, {k: v[self.live.to(v.device)] if isinstance(v, torch.Tensor) else v for k, v in given.items()}

    def _look(self, given: dict[str, Any]) -> None:
        kept = (~self.done[self.live]).nonzero()[:, 0]
        if not 0 < len(kept) <= (1 - LEAST) * len(self.live) or not self._can(given):
            return
        self.live = self.live[kept]
        given["past_key_values"].batch_select_indices(kept.cpu())  # layers may lie on several devices
        if self.told is not None:
            self.told(kept, self.live)

    def _can(self, given: dict[str, Any]) -> bool:
        cache = given.get("past_key_values")
        if type(cache) is not DynamicCache or any(
            type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        ):
            return False
        tensors = [v for v in given.values() if isinstance(v, torch.Tensor)]
        return all(v.shape[0] == self.rows for v in tensors)  # positions of image models have another shape

    def after(self, model: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Give ``generate`` its B rows of logits back; those of ended rows are zeros, and lead to padding."""
        if len(self.live) < self.rows:
            logits = output.logits.new_zeros((self.rows, *output.logits.shape[1:]))
            logits[self.live.to(logits.device)] = output.logits
            output.logits = logits
        return output
