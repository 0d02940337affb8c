"""Lines and cells of the evaluation's Markdown tables: one way to write a figure with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def row(*cells: str) -> str:
    """One line of a Markdown table; what a cell holds ends neither it nor the line."""
    return "| " + " | ".join(" ".join(c.replace("|", "\\|").splitlines()) for c in cells) + " |"


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


def value_of(entry: Any) -> tuple[float, list[float] | None] | None:
    """(value, interval) of a figure of ``probes fit``, or None where it is undefined."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), int | float):
        return None
    ci = [float(e) for e in (entry.get("low"), entry.get("high")) if isinstance(e, int | float)]
    return float(entry["value"]), ci if len(ci) == 2 else None


def figures(arm: Mapping[str, Any]) -> list[str]:
    """Cells of one arm: accuracy and tokens with intervals, what acted in an answer, the share cut off."""
    return [
        interval(arm["accuracy"], arm["accuracy_ci"]),
        interval(arm["tokens_mean"], arm["tokens_ci"], 1, 0),
        f"{arm['triggers_per_trace']:.2f}",
        f"{100 * arm['truncated']:.1f}",
    ]
