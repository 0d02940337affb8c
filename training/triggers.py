"""Trigger tokens: adding ``<INTRA>`` and ``<INTER>`` to a model, and their ids where they are not added (core.md §1.9).

Qwen matrices are larger than their tokenizers, so a new token usually finds a spare row and nothing is resized. Both of
its rows, input and output, start at the mean of the rows in use; with tied embeddings they are one row. A trigger that
was not added splits into several pieces: label masks and forced decoding take its list of ids either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from neureasoner.data_builders.encoding import trigger_ids
from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["INITS", "add_triggers", "trigger_ids"]

INITS = ("mean", "keep")


def add_triggers(
    model: PreTrainedModel, tokenizer: Any, tokens: Sequence[str] = (INTRA, INTER), init: str = "mean"
) -> dict[str, list[int]]:
    """Add the triggers as special tokens and give their rows a value; returns ``{token: [id]}``.

    Changes ``model`` and ``tokenizer`` in place. A second call changes nothing. The matrix grows only if it has no
    spare rows. ``init="mean"`` sets both rows to the mean of the rows the tokenizer used before, ``"keep"`` leaves
    spare rows as they are (new ones then have Transformers' own initialisation).
    """
    import torch

    if init not in INITS:
        raise UserError(f"trigger_init {init!r} is not one of {', '.join(INITS)}")
    embed: Any = model.get_input_embeddings().weight
    if hasattr(embed, "ds_id"):
        raise UserError("embeddings are split by ZeRO-3; use ZeRO-2, or add the triggers and save the model beforehand")
    known, size = len(tokenizer), embed.shape[0]
    vocabulary = tokenizer.get_vocab()
    new = [t for t in tokens if t not in vocabulary]
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
    rows = [ids[t][0] for t in tokens if t in new or ids[t][0] >= size]
    if len(tokenizer) > size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embed, head = model.get_input_embeddings().weight, cast(Any, model.get_output_embeddings())
    if rows and init == "mean":
        used = min(known, size)  # new rows come after these
        matrices = [embed] if head is None or head.weight is embed else [embed, head.weight]
        with torch.no_grad():
            for matrix in matrices:
                matrix[rows] = matrix[:used].mean(0, dtype=torch.float32).to(matrix.dtype)
            if head is not None and getattr(head, "bias", None) is not None:
                head.bias[rows] = head.bias[:used].mean()
    return ids
