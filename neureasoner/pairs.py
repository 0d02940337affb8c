"""Pairs of a failing and a clean continuation, the rows of ``pairs.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neureasoner.errors import UserError
from neureasoner.traces import Trace, read_records, trace_from_dict


@dataclass
class Pair:
    """Two continuations. ``failing`` and ``clean`` are whole traces that agree up to ``prefix`` response tokens.

    ``steps``: how many steps each continuation holds. ``tries``: continuations drawn until a clean one. For
    ``level == "instance"`` the traces answer different problems (``failing`` the hard one), ``prefix`` is 0.
    """

    id: str
    level: str
    prefix: int
    steps: int
    tries: int
    failing: Trace
    clean: Trace


def pair_from_dict(row: dict[str, Any]) -> Pair:
    """Inverse of ``dataclasses.asdict``. Raises UserError naming what is missing."""
    missing = {"id", "level", "prefix", "steps", "tries", "failing", "clean"} - set(row)
    if missing:
        raise UserError(f"not a pair: missing keys {sorted(missing)}")
    return Pair(**{**row, "failing": trace_from_dict(row["failing"]), "clean": trace_from_dict(row["clean"])})


def read_pairs(path: str | Path) -> list[Pair]:
    """Read ``pairs.jsonl``. Raises UserError with the line number of the first bad row, or for an empty file."""
    return read_records(path, pair_from_dict, "pairs")
