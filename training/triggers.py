"""Trigger tokens: adding ``<INTRA>`` and ``<INTER>`` to a model, and their ids where they are not added (core.md §1.9).

Qwen matrices are larger than their tokenizers, so a new token usually finds a spare row and nothing is resized. Both of
its rows, input and output, start at the mean of the rows in use, or at the mean of the rows of a description's tokens;
with tied embeddings they are one row. Two triggers that would start as one vector are moved apart a little. A trigger
that was not added splits into several pieces: label masks and forced decoding take its list of ids either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from neureasoner.data_builders.encoding import trigger_ids
from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA
from neureasoner.training.identity import gathered, part
from neureasoner.training.sft_config import INITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["INITS", "add_tokens", "add_triggers", "grow", "start_rows", "trigger_ids"]


def add_triggers(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: Sequence[str] = (INTRA, INTER),
    init: str = "mean",
    descriptions: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Add the triggers as special tokens and give their rows a value; returns ``{token: [id]}``.

    Changes ``model`` and ``tokenizer`` in place: ``add_tokens`` and ``start_rows``. A second call changes nothing.
    Raises UserError for an unknown ``init``.
    """
    if init not in INITS:
        raise UserError(f"trigger_init {init!r} is not one of {', '.join(INITS)}")
    new = add_tokens(tokenizer, tokens)
    start_rows(model, tokenizer, tokens, new, init, descriptions, seed)
    return trigger_ids(tokenizer, tokens)


def add_tokens(tokenizer: Any, tokens: Sequence[str] = (INTRA, INTER)) -> list[str]:
    """Make each text one special token of the tokenizer; returns those that were no token before.

    Raises UserError for a tokenizer that splits one all the same.
    """
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    new = [t for t in tokens if t not in vocabulary]
    if any(t not in special for t in tokens):
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [t for t in tokens if t not in special]},
            replace_extra_special_tokens=False,
        )
    for token, ids in trigger_ids(tokenizer, tokens).items():
        if len(ids) != 1:
            raise UserError(f"the tokenizer does not keep {token!r} whole; set add_triggers to false")
    return new


def start_rows(
    model: PreTrainedModel,
    tokenizer: Any,
    tokens: Sequence[str],
    new: Sequence[str],
    init: str = "mean",
    descriptions: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Give the rows of ``new`` tokens a value; returns those of ``tokens`` that were one vector and were moved apart.

    The matrix grows only if it has no spare rows. ``init="mean"`` sets both rows to the mean of the rows the tokenizer
    used before, ``"description"`` to the mean of the rows of the tokens of ``descriptions[token]``, ``"keep"`` leaves
    spare rows as they are. Rows that are then one vector differ by a small step of ``seed``, which adds up to nothing.
    Raises UserError for a missing description. Matrices split by ZeRO-3 are gathered for it.
    """
    ids = trigger_ids(tokenizer, tokens)
    used = min(len(tokenizer) - len(new), _rows(model.get_input_embeddings().weight))
    sources = _sources(tokenizer, new, init, descriptions or {}, used)
    grow(model, tokenizer)
    if init != "keep" and sources:
        _set_rows(model, {ids[t][0]: source for t, source in sources.items()})
    apart = part(model, [ids[t][0] for t in tokens], seed)
    return [t for t in tokens if ids[t][0] in apart]


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
    with torch.no_grad(), gathered(parameters):
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
