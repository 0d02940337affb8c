"""Lines and cells of the evaluation's Markdown tables: one way to write a figure with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def row(*cells: str) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def header(*cells: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(*cells), "|" + "---|" * len(cells)]


def interval(value: float, ends: Any, scale: float = 100.0, digits: int = 1, *, sign: str = "", unit: str = "") -> str:
    """``61.1 [58.1, 64.1]``; with ``sign="+"`` every number is signed."""
    low, high = (scale * end for end in ends)
    return f"{scale * value:{sign}.{digits}f}{unit} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def p_of(c: Mapping[str, Any]) -> str:
    """``p = 0.031`` of a paired comparison, ``p < 0.001`` below that."""
    return f"p {'<' if c['accuracy_p'] < 0.001 else '='} {max(c['accuracy_p'], 0.001):.3f}"
