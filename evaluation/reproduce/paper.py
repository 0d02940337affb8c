"""The paper's figures (``paper.yaml``), and which of its models to print beside ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from neureasoner.config import closest, read_mapping
from neureasoner.errors import UserError

DEFAULT = "R1-Distill-Qwen-32B"  # the only one that every table has


@cache
def paper() -> dict[str, Any]:
    """The whole file."""
    return read_mapping(Path(__file__).with_name("paper.yaml"))


def ours_in_paper(model: str) -> str:
    """The paper's name of a model (a hub id or a folder of that name); empty if it is another."""
    last = Path(model).name.lower()
    return next((name for name, hub in paper()["models"].items() if last == hub.lower()), "")


def choose(table: str, model: str, wanted: str = "") -> tuple[str, bool]:
    """``(the paper's model to print, whether it is ours)``. Raises UserError for one that the table lacks."""
    there = paper()[table]
    known = [there["model"]] if table == "figure5" else [m for m in there if m in paper()["models"]]
    ours = ours_in_paper(model)
    if wanted and wanted not in known:
        raise UserError(
            f"key 'paper': {table} has no figures of '{wanted}'{closest(wanted, known)} (it has {', '.join(known)})"
        )
    name = wanted or (ours if ours in known else DEFAULT)
    return name, name == ours
