"""What a run has done so far, and what it may still spend."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from neureasoner.data_builders.endpoint.prices import Price
from neureasoner.data_builders.endpoint.requests import Usage
from neureasoner.errors import UserError

RECENT = 60.0


class Stopped(UserError):
    """The run ended early on purpose. All finished outcomes were given out; ``tally`` sums the run up."""

    def __init__(self, reason: str, tally: Tally):
        super().__init__(reason)
        self.tally = tally


@dataclass
class Tally:
    """Counts of one run. ``faults``: failed calls and unusable answers by kind; ``lost``: questions never answered."""

    total: int | None = None
    done: int = 0
    failed: int = 0
    lost: int = 0
    calls: int = 0
    answers: int = 0
    reused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    paid: Usage = field(default_factory=Usage)
    cost: float | None = None
    stopped: str = ""
    started: float = field(default_factory=time.monotonic)
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=5000), repr=False)
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=5000), repr=False)

    def called(self) -> None:
        """Count a call that is sent."""
        self.calls += 1
        self._times.append(time.monotonic())

    def ended(self) -> None:
        """Count a question that is done."""
        self.done += 1
        self._ends.append(time.monotonic())

    @property
    def requests_per_minute(self) -> float:
        """Calls a minute, over the last minute."""
        return self._speed(self._times) * 60

    @property
    def eta(self) -> float | None:
        """Seconds until all is done, at the pace of the last minute; None when that is not known."""
        speed = self._speed(self._ends)
        return None if self.total is None or not speed else max(0, self.total - self.done) / speed

    def _speed(self, times: deque[float]) -> float:
        """How many a second, over the last minute or what there is of it."""
        now = time.monotonic()
        while times and times[0] < now - RECENT:
            times.popleft()
        if not times:
            return 0.0
        since = times[0] if len(times) == times.maxlen else max(self.started, now - RECENT)
        return len(times) / max(now - since, 0.1)

    def summary(self) -> dict[str, Any]:
        """Plain values for a summary file."""
        return {
            "questions": self.done, "failed": self.failed, "lost": self.lost, "calls": self.calls,
            "answers": self.answers, "from_ledger": self.reused, "faults": dict(sorted(self.faults.items())),
            "input_tokens": self.paid.input, "cached_input_tokens": self.paid.cached_input,
            "output_tokens": self.paid.output, "cost": None if self.cost is None else round(self.cost, 6),
            "stopped": self.stopped, "seconds": round(time.monotonic() - self.started, 1),
        }  # fmt: skip


class Purse:
    """The run's money. What is under way is held at its worst price until it is known."""

    def __init__(self, price: Price | None, limit: float, tally: Tally):
        self._price, self._limit, self._tally = price, limit, tally
        self._held = self._unsure = 0.0
        self._holders = 0
        self._news = asyncio.Event()
        if price is not None:
            tally.cost = 0.0

    async def hold(self, worst: Usage) -> float:
        """Set money aside for one call. Raises Stopped when it can no longer be paid for, whatever comes back."""
        if not self._limit or self._price is None:
            return 0.0
        most = self._price.cost(worst)
        while True:
            if self._tally.stopped:
                raise Stopped(self._tally.stopped, self._tally)
            spent = (self._tally.cost or 0.0) + self._unsure
            if spent + self._held + most <= self._limit:
                self._held += most
                self._holders += 1
                return most
            if not self._holders:
                self._tally.stopped = (
                    f"stopped at key 'max_cost' ({self._limit:g} USD): {spent:.4f} USD spent, the next call may cost "
                    f"{most:.4f}; everything answered is kept, a larger 'max_cost' goes on from here"
                )
                self._news.set()
                continue
            # what is under way will turn out cheaper than its worst, and may leave room
            self._news.clear()
            await self._news.wait()

    def settle(self, held: float, usage: Usage | None, charged: bool = False) -> None:
        """A call ended: its true price takes the place of what was held. ``charged``: perhaps paid, nobody knows."""
        if held:
            self._holders -= 1
            self._held = self._held - held if self._holders else 0.0  # sums of fractions never quite come back to 0
        if usage is not None:
            self._tally.paid = self._tally.paid + usage
            if self._price is not None:
                self._tally.cost = (self._tally.cost or 0.0) + self._price.cost(usage)
        elif charged:
            self._unsure += held
        self._news.set()
