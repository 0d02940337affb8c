"""One call of a stock model, by what its ``forward`` takes: Transformers renames arguments between minor versions.

``forward`` swallows what it does not know (``**kwargs``), so a name that went away would change results without a word:
a mask not applied, a cache not read. Each name is looked up in the signature, and one that is missing is an error.

Legend: B rows, T tokens read, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

from neureasoner.errors import UserError

if TYPE_CHECKING:
    import torch

CACHE_NAMES = ("cache", "past_key_values")  # from 5.24 on, and before


@cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _class_of(model: Any) -> type:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter takes anything
    return type(base)


def check_arguments(model: Any, *names: str) -> None:
    """Raises UserError naming an argument that the model's ``forward`` does not take."""
    kind = _class_of(model)
    missing = [n for n in names if n not in _parameters(kind)]
    if missing:
        import transformers

        raise UserError(
            f"{kind.__name__}.forward of transformers {transformers.__version__} takes no '{missing[0]}', so it would "
            "be ignored; install a version that this release was tested with (`neureasoner doctor` lists them)"
        )


def cache_argument(model: Any) -> str:
    """What this model's ``forward`` calls its cache. Raises UserError where it is called something else."""
    found = next((n for n in CACHE_NAMES if n in _parameters(_class_of(model))), None)
    if found is None:
        check_arguments(model, CACHE_NAMES[0])
    return str(found)


def next_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """Read ``ids [B, T]`` on top of ``cache``; float32 logits of the token after the last, ``[B, V]``.

    ``mask [B, columns of the cache + T]``: 0 where padding stands. ``positions [B, T]``. The cache grows in place.
    """
    check_arguments(model, "input_ids", "attention_mask", "position_ids", "use_cache")
    more: dict[str, Any] = {cache_argument(model): cache}
    if "logits_to_keep" in _parameters(_class_of(model)):  # else the logits of every token are made: slow, not wrong
        more["logits_to_keep"] = 1
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **more)
    if cache.get_seq_length() != mask.shape[1]:
        raise RuntimeError(
            f"{type(model).__name__} read {mask.shape[1]} columns, but its cache holds {cache.get_seq_length()}; "
            "was the cache given to it under another name?"
        )
    return out.logits[:, -1].float()  # type: ignore[no-any-return]


def read(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden states after the final norm, ``[B, T, D]``, of one pass over ``ids [B, T]`` without cache or LM head."""
    given = {"attention_mask": mask, "position_ids": positions}
    named = {k: v for k, v in given.items() if v is not None}
    check_arguments(model.model, "input_ids", "use_cache", *named)
    return model.model(input_ids=ids, use_cache=False, **named).last_hidden_state  # type: ignore[no-any-return]
