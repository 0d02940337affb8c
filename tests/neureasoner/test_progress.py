"""The bar of long work on a terminal, and its lines in a log file, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from neureasoner import progress
from neureasoner.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    yield now


def shown(clock: list[float], terminal: bool, seconds: float) -> str:
    """What ten updates, ``seconds`` apart, leave on the console."""
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    with Progress(console=console, get_time=lambda: clock[0], auto_refresh=False) as bar:
        task = bar.add_task("sampling", total=10)
        for i in range(10):
            clock[0] += seconds
            bar.update(task, advance=1, so_far=f"{i + 1} right [red]")
    return out.getvalue()


def test_a_log_file_gets_a_line_every_thirty_seconds(clock: list[float]) -> None:
    lines = shown(clock, False, 20).splitlines()
    assert lines[:2] == [
        "sampling: 2 of 10, 0:40, 2:40 left, 2 right [red]",
        "sampling: 4 of 10, 1:20, 2:00 left, 4 right [red]",
    ]
    assert sum(line.startswith("sampling:") for line in lines) == 5
    assert "10/10" in lines[-1], "what stands in the end is Rich's own"


def test_slow_work_still_knows_the_time_left(clock: list[float]) -> None:
    assert "sampling: 3 of 10, 6:00, 14:00 left" in shown(clock, False, 120)


def test_quick_work_writes_nothing_more_and_a_terminal_no_lines(clock: list[float]) -> None:
    assert "sampling:" not in shown(clock, False, 1)
    assert "sampling:" not in shown(clock, True, 100)


def test_what_is_not_known_is_left_out(clock: list[float]) -> None:
    out = StringIO()
    with Progress(console=Console(file=out, width=200), get_time=lambda: clock[0], auto_refresh=False) as bar:
        task = bar.add_task("importing", total=None)
        clock[0] += 31
        bar.advance(task, 7)
    assert "importing: 7, 0:31\n" in out.getvalue()
