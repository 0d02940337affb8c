"""The rows of a training file as ``input_ids`` and ``labels`` (core.md §1.9); what trains says ``encoding``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from neureasoner.data_builders.encoding import IGNORE, TooLong, encode_row
from neureasoner.data_builders.layouts import Reconstruction
from neureasoner.errors import UserError


def encode(
    row: Reconstruction,
    tokenizer: Any,
    trigger_ids: Mapping[str, list[int]],
    mask_failure: bool = False,
    max_length: int | None = None,
) -> dict[str, list[int]]:
    """``{"input_ids", "labels"}`` of one row: -100 exactly on prompt and trigger, and on the failure if asked for."""
    encoded = encode_row(row, tokenizer, trigger_ids, mask_failure, max_length)
    return {"input_ids": encoded.input_ids, "labels": encoded.labels}


def encode_all(
    rows: Iterable[Reconstruction],
    tokenizer: Any,
    trigger_ids: Mapping[str, list[int]],
    mask_failure: bool = False,
    max_length: int | None = None,
    too_long: str = "error",
    say: Callable[[str], None] = print,
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Encode rows; ``too_long="drop"`` leaves those out that do not fit, and says how many. Returns (rows, counts).

    Counts: ``rows``, ``dropped``, one per level, ``tokens``, ``trained`` (tokens with a label), ``longest``.
    """
    encoded: list[dict[str, list[int]]] = []
    counts: Counter[str] = Counter()
    for row in rows:
        try:
            item = encode(row, tokenizer, trigger_ids, mask_failure, max_length)
        except TooLong as e:
            if too_long != "drop":
                raise UserError(f"{e}; raise max_length, or set too_long: drop") from None
            counts["dropped"] += 1
            continue
        encoded.append(item)
        counts.update({"rows": 1, row.level: 1, "tokens": len(item["input_ids"])})
        counts["trained"] += sum(label != IGNORE for label in item["labels"])
        counts["longest"] = max(counts["longest"], len(item["input_ids"]))
    if counts["dropped"]:
        total = counts["rows"] + counts["dropped"]
        say(f"{counts['dropped']} of {total} rows are longer than {max_length} tokens: dropped")
    if not encoded:
        raise UserError(f"no row fits into max_length {max_length}; raise it")
    if not counts["trained"]:
        raise UserError(f"none of the {counts['tokens']} tokens has a label, so nothing would be trained")
    return encoded, counts
