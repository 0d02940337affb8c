"""Calling as fast as the endpoint grants, and no faster: two budgets, and a door that opens when both have room.

``Pace`` is pure: the clock is an argument. ``Gate`` waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from neureasoner.data_builders.endpoint.budget import UNKNOWN, Budget, Mark
from neureasoner.data_builders.endpoint.limits import Limits

PAUSE = 1.0  # seconds of quiet after a 429 that names no time


@dataclass
class Ticket:
    """One call that may be made. ``marks``: its place in both budgets."""

    tokens: float
    sent_at: float
    marks: tuple[Mark, Mark]
    live: bool = True


class Pace:
    """When the next call may go. All times come from outside, so that hours can be tried in a moment."""

    def __init__(self, requests_per_minute: float = 0.0, tokens_per_minute: float = 0.0):
        self.requests, self.tokens = Budget(), Budget(learn_ratio=True)
        self._own = (Budget(requests_per_minute), Budget(tokens_per_minute))
        self.quiet_until, self._cut_at = float("-inf"), float("-inf")
        # the first call goes alone: its reply tells the limits. Where it tells none, each reply opens the door a bit
        self.width, self.flying = 1, 0
        self._went: deque[float] = deque(maxlen=200)

    def wait(self, tokens: float, now: float) -> float:
        """Seconds until a call of so many tokens may go; 0: now."""
        if self.flying >= self.width and not (self.requests.told or self.tokens.told):
            return 1.0  # a reply will come sooner and end the wait
        own = max(self._own[0].wait(1.0, now), self._own[1].wait(tokens, now))
        return max(self.quiet_until - now, self.requests.wait(1.0, now), self.tokens.wait(tokens, now), own, 0.0)

    def go(self, tokens: float, now: float) -> Ticket:
        """Count a call that is sent now."""
        self.flying += 1
        self._own[0].take(1.0, now)
        self._own[1].take(tokens, now)
        return Ticket(tokens, now, (self.requests.take(1.0, now), self.tokens.take(tokens, now)))

    def land(self, ticket: Ticket, now: float, limits: Limits | None = None, refused: str = "") -> float:
        """A call came back (``limits`` None: without a reply). ``refused``: it was a 429, and which budget it names.

        Returns for how many seconds everybody keeps quiet.
        """
        if ticket.live:
            ticket.live, self.flying = False, self.flying - 1
        if limits is None:
            return 0.0
        if not refused:
            self.requests.learn(limits.requests, ticket.marks[0], 1.0, ticket.sent_at, now)
            self.tokens.learn(limits.tokens, ticket.marks[1], ticket.tokens, ticket.sent_at, now)
            self._went.append(now)
            self.width += 1
            if not self.flying:
                self.requests.settle()
                self.tokens.settle()
            return 0.0
        pause = PAUSE if limits.retry_after is None else limits.retry_after
        self.quiet_until = max(self.quiet_until, now + pause)
        if ticket.sent_at > self._cut_at:  # calls that were under way at the last cut say nothing new
            self._cut_at = now
            recent = len(self._went) / max(now - self._went[0], 0.05) if self._went else 0.0
            left = UNKNOWN if limits.tokens.remaining is None else limits.tokens.remaining
            if "token" in refused or left < ticket.tokens * self.tokens.ratio:
                self.tokens.cut(recent * ticket.tokens, now)
            else:
                self.requests.cut(recent, now)
        return pause


class Gate:
    """Waits until ``Pace`` lets a call go; first come, first served."""

    def __init__(self, pace: Pace):
        self.pace = pace
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()

    async def enter(self, tokens: float) -> Ticket:
        """Wait for one's turn."""
        async with self._turn:
            while (wait := self.pace.wait(tokens, time.monotonic())) > 0:
                self._news.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), wait)
            return self.pace.go(tokens, time.monotonic())

    def leave(self, ticket: Ticket, limits: Limits | None = None, refused: str = "") -> float:
        """Report how a call ended. See ``Pace.land``."""
        pause = self.pace.land(ticket, time.monotonic(), limits, refused)
        self._news.set()
        return pause
