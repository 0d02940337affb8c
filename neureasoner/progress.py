"""How long work shows how far it is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Any, TypeVar

import rich.progress as bars

T = TypeVar("T")
EVERY = 30.0  # seconds between two lines of a log file


class SoFar(bars.ProgressColumn):
    """What the work found so far: the task's field ``so_far``, if it has one."""

    def render(self, task: bars.Task) -> Any:
        """The field as a cell."""
        from rich.text import Text

        return Text(str(task.fields.get("so_far", "")))


class Progress(bars.Progress):
    """Rich's Progress with description, bar, count, times and ``so_far``.

    A console that is no terminal, as under a batch system, has no use for a bar: it gets a line of the task that moves,
    no more often than every 30 seconds.
    """

    def __init__(self, *columns: Any, **options: Any):
        standard = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            SoFar(),
        )
        # Rich forgets what is older than 30 seconds, a batch may take longer, and then no time left was known
        options.setdefault("speed_estimate_period", 600)
        super().__init__(*(columns or standard), **options)
        self._said = monotonic()

    def advance(self, task_id: bars.TaskID, advance: float = 1) -> None:
        """Rich's, and a line in a log file."""
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: bars.TaskID, **changes: Any) -> None:
        """Rich's, and a line in a log file."""
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: bars.TaskID) -> None:
        if self.disable or self.console.is_terminal or monotonic() - self._said < EVERY:
            return
        self._said = monotonic()
        task = next(t for t in self.tasks if t.id == task_id)
        self.console.print(line(task), markup=False, highlight=False, soft_wrap=True)


def line(task: bars.Task) -> str:
    """``sampling: 120 of 4000, 3:10, 1:42:00 left, 43% right``; what is not known is left out."""
    parts = [f"{task.completed:,.0f}" + ("" if task.total is None else f" of {task.total:,.0f}")]
    if task.elapsed is not None:
        parts.append(duration(task.elapsed))
    if task.time_remaining is not None:
        parts.append(f"{duration(task.time_remaining)} left")
    if so_far := task.fields.get("so_far"):
        parts.append(str(so_far))
    return f"{task.description.strip()}: {', '.join(parts)}"


def duration(seconds: float | None) -> str:
    """``1:02:03``, or a dash when it is not known."""
    if seconds is None:
        return "–"
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """The ``total`` items, one after the other, under a bar."""
    with Progress() as bar:
        yield from bar.track(items, total, description=description)
