"""The line that shows a run: how far, how much, how fast, how long still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from neureasoner.data_builders.endpoint.tally import Tally
from neureasoner.progress import duration

Watch = Callable[[Tally], None]


def describe(tally: Tally) -> str:
    """One line: counts, cost, rate, time left, failures."""
    total = "" if tally.total is None else f"/{tally.total:,}"
    parts = [f"{tally.done:,}{total}"]
    if tally.reused:
        parts.append(f"{tally.reused:,} answers from the ledger")
    if tally.cost is not None:
        parts.append(f"{tally.cost:.2f} USD")
    parts += [f"{tally.requests_per_minute:.0f} requests/min", f"ETA {duration(tally.eta)}"]
    if tally.failed:
        parts.append(f"{tally.failed:,} failed")
    if tally.faults:
        parts.append(", ".join(f"{kind} {n:,}" for kind, n in tally.faults.most_common(3)))
    return " · ".join(parts)


@contextmanager
def live(label: str = "asking", console: Any = None) -> Iterator[Watch]:
    """A live progress line on the terminal; yields what ``ask`` takes as ``progress``."""
    from rich.progress import BarColumn, SpinnerColumn, TextColumn

    from neureasoner.progress import Progress, SoFar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), SoFar())
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task(label, total=None)
        yield lambda tally: bar.update(task, completed=tally.done, total=tally.total, so_far=describe(tally))
