"""Trigger tokens: adding ``<INTRA>`` and ``<INTER>`` to a model, and their ids where they are not added (core.md §1.9).

Qwen matrices are larger than their tokenizers, so a new token usually finds a spare row and nothing is resized. Both of
its rows, input and output, start at the mean of the rows in use, or at the mean of the rows of a description's tokens;
with tied embeddings they are one row. A trigger that was not added splits into several pieces: label masks and forced
decoding take its list of ids either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from neureasoner.data_builders.encoding import trigger_ids
from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["INITS", "add_triggers", "grow", "trigger_ids"]

INITS = ("mean", "description", "keep")


def add_triggers(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: Sequence[str] = (INTRA, INTER),
    init: str = "mean",
    descriptions: Mapping[str, str] | None = None,
) -> dict[str, list[int]]:
    """Add the triggers as special tokens and give their rows a value; returns ``{token: [id]}``.

    Changes ``model`` and ``tokenizer`` in place. A second call changes nothing. The matrix grows only if it has no
    spare rows. ``init="mean"`` sets both rows to the mean of the rows the tokenizer used before, ``"description"`` to
    the mean of the rows of the tokens of ``descriptions[token]``, ``"keep"`` leaves spare rows as they are.
    Raises UserError for an unknown ``init``, a missing description, and a tokenizer that splits a trigger. Matrices
    split by ZeRO-3 are gathered for it.
    """
    if init not in INITS:
        raise UserError(f"trigger_init {init!r} is not one of {', '.join(INITS)}")
    known, size = len(tokenizer), _rows(model.get_input_embeddings().weight)
    vocabulary = tokenizer.get_vocab()
    new = [t for t in tokens if t not in vocabulary]
    sources = _sources(tokenizer, new, init, descriptions or {}, min(known, size))
    special = set(tokenizer.all_special_tokens)
    if any(t not in special for t in tokens):
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [t for t in tokens if t not in special]},
            replace_extra_special_tokens=False,
        )
    ids = trigger_ids(tokenizer, tokens)
    for token, value in ids.items():
        if len(value) != 1:
            raise UserError(f"the tokenizer does not keep {token!r} whole; set add_triggers to false")
    grow(model, tokenizer)
    if init != "keep" and sources:
        _set_rows(model, {ids[t][0]: source for t, source in sources.items()})
    return ids


def grow(model: PreTrainedModel, tokenizer: Any) -> None:
    """Give the model a row for every token of the tokenizer; those it lacked start at the mean of the others."""
    size = _rows(model.get_input_embeddings().weight)
    if len(tokenizer) > size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        _set_rows(model, dict.fromkeys(range(size, len(tokenizer)), slice(size)))


def _set_rows(model: PreTrainedModel, rows: Mapping[int, slice | list[int]]) -> None:
    """Set rows of both matrices (and of the head's bias) to the mean of others."""
    import torch

    embed, head = model.get_input_embeddings().weight, cast(Any, model.get_output_embeddings())
    parameters: list[Any] = [embed]
    if head is not None and head.weight is not embed:
        parameters.append(head.weight)
    if getattr(head, "bias", None) is not None:
        parameters.append(head.bias)
    with torch.no_grad(), _gathered(parameters):
        means = {row: [p[source].mean(0, dtype=torch.float32) for p in parameters] for row, source in rows.items()}
        for row, values in means.items():
            for parameter, value in zip(parameters, values, strict=True):
                parameter[row] = value.to(parameter.dtype)


def _sources(
    tokenizer: Any, new: Sequence[str], init: str, descriptions: Mapping[str, str], used: int
) -> dict[str, slice | list[int]]:
    """Which rows each new token is the mean of."""
    if init != "description":
        return {t: slice(used) for t in new}
    found: dict[str, slice | list[int]] = {}
    for token in new:
        ids = tokenizer(descriptions.get(token, ""), add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"trigger_init 'description': {token} has no description; give one in trigger_descriptions")
        found[token] = list(ids)
    return found


def _rows(matrix: Any) -> int:
    """Rows of a matrix, also of one that ZeRO-3 has split (its own shape is then empty)."""
    return int(getattr(matrix, "ds_shape", matrix.shape)[0])


def _gathered(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """Whole parameters inside, which rank 0's values leave; under anything but ZeRO-3 they are whole anyway."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)  # type: ignore[no-any-return]
