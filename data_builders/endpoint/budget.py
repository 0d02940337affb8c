"""This side's copy of one of the endpoint's counters: requests, or tokens.

Each reply tells how much was left when its call was counted. The copy predicted that number when the call was sent; the
difference corrects the copy, as far as it is more than calls overtaking each other can explain.

Two kinds of counters are told apart by their own headers. A bucket fills steadily: limit · reset / used is always the
same time, the period. A window is given back all at once: now + reset is always the same moment.

Where nothing is told, a 429 cuts the rate (multiplicative decrease), and it then grows slowly (additive increase).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from neureasoner.data_builders.endpoint.limits import Told

RESERVE, RESERVE_SECONDS = 0.01, 0.05  # of the limit, and of the rate: kept free for what the copy cannot know
CUT, GROWTH = 0.8, 0.01  # after a 429: the rate is cut to so much, then grows by so much of itself a second
JITTER = 0.1  # seconds by which calls may overtake each other on their way
SLACK = 0.03  # seconds after a window's end until it is believed
PERIODS = (60.0, 1.0, 3600.0, 86400.0)  # what endpoints use, likeliest first
UNKNOWN = float("inf")


@dataclass(frozen=True)
class Mark:
    """One call's place in a budget: what was spent up to it, what the copy held then, and how sure that was."""

    sent: float = 0.0
    level: float = UNKNOWN
    corrected: float = 0.0
    near: float = 0.0  # spent within JITTER before it: perhaps counted later
    epoch: int = 0


class Budget:
    """One counter. ``per_minute``: a limit of the user's own; such a budget is told nothing, and is kept as it is."""

    def __init__(self, per_minute: float = 0.0, learn_ratio: bool = False):
        self.rate = per_minute / 60 or UNKNOWN
        # a limit of one's own is spread evenly: two seconds' worth may go at once, never a minute's
        self.limit = max(1.0, self.rate * 2)
        self.level, self.at = self.limit, 0.0
        self.ratio = 1.0  # what the endpoint counts for each unit that is estimated here
        self.told = False
        self.window_end: float | None = None  # None: a bucket
        self._learn_ratio = learn_ratio
        self._sent = self._corrected = self._growth = 0.0
        self._share = 1.0  # of a told rate: what is made use of
        self._epoch = 0
        self._recent: deque[tuple[float, float]] = deque()
        self._shortest, self._longest = 0.0, UNKNOWN  # bounds of the period
        self._end: float | None = None
        self._strange = 0
        self._before: tuple[float, float, Mark] | None = None
        self._lowest = UNKNOWN  # told in this window

    def advance(self, now: float) -> None:
        """Let the counter fill up to ``now``."""
        passed, self.at = max(0.0, now - self.at), max(now, self.at)
        if self.limit == UNKNOWN:
            return
        if self._growth:
            self.rate += self._growth * passed
            self.limit = max(1.0, self.rate / 4)
        self._share = min(1.0, self._share + GROWTH * passed)
        if self.window_end is None:
            self.level = min(self.limit, self.level + self.rate * self._share * passed)
        elif now >= self.window_end + SLACK:
            # when the next window ends is not known yet; the next reply tells
            self.level, self.window_end, self._end = self.limit, UNKNOWN, None
            self._epoch, self._lowest = self._epoch + 1, UNKNOWN

    def wait(self, cost: float, now: float) -> float:
        """Seconds until ``cost`` may be spent; 0: now."""
        self.advance(now)
        if self.limit == UNKNOWN:
            return 0.0
        reserve = 0.0
        if self.told:
            pace = self.rate if self.window_end is None else 0.0
            reserve = min(RESERVE * self.limit + RESERVE_SECONDS * pace, 0.1 * self.limit)
        need = min(cost * self.ratio + reserve, self.limit)
        if self.level >= need - 1e-9:
            return 0.0
        if self.window_end is not None:
            return min(max(self.window_end + SLACK - now, 1e-3), 1.0)
        return (need - self.level) / max(self.rate * self._share, 1e-9)

    def take(self, cost: float, now: float) -> Mark:
        """Spend."""
        while self._recent and self._recent[0][0] < now - JITTER:
            self._recent.popleft()
        near = self._sent - self._recent[0][1] if self._recent else 0.0
        self._recent.append((now, self._sent))
        self._sent += cost
        if self.limit != UNKNOWN:
            self.level -= cost * self.ratio
        return Mark(self._sent, self.level, self._corrected, near * self.ratio, self._epoch)

    def learn(self, told: Told, mark: Mark, cost: float, sent_at: float, now: float) -> None:
        """Correct the copy by what the reply to a call told."""
        if told.limit is None or told.remaining is None or told.limit <= 0:
            return
        self.advance(now)
        used = max(told.limit - told.remaining, 0.0)
        reset = 60.0 * used / told.limit if told.reset is None else told.reset
        if self.window_end is not None and (mark.epoch != self._epoch or sent_at + reset < now - 1.0):
            return  # about a window that is over
        first, self.told, self._growth = not self.told, True, 0.0
        self._learn_kind(told.limit, used, reset, sent_at)
        self.limit = told.limit
        if first:
            if self._learn_ratio and used > 0:
                # the first call goes alone: all that is used is its own, or somebody else's, and then this is careful
                self.ratio = min(max(used / cost, 0.05), 20.0)
            self.level = min(told.remaining - (self._sent - mark.sent) * self.ratio, self.limit)
        if mark.epoch == self._epoch:
            self._lowest = min(self._lowest, told.remaining)
        if not first and mark.level != UNKNOWN and mark.epoch == self._epoch:
            if self._learn_ratio:
                self._learn_count(told.remaining, mark, sent_at)
            self._correct(told.remaining, mark)
        self._before = (told.remaining, sent_at, mark)

    def settle(self) -> None:
        """No call is under way: of a window, the lowest number told is what is left, whoever overtook whom before."""
        if self.window_end is not None and self._lowest != UNKNOWN:
            self.level = max(self.level, min(self._lowest, self.limit))

    def _correct(self, remaining: float, mark: Mark) -> None:
        off, done = remaining - mark.level, self._corrected - mark.corrected
        step = max(off - mark.near - done, 0.0) + min(off - done, 0.0)
        self._corrected += step
        self.level = min(self.level + step, self.limit)

    def _learn_count(self, remaining: float, mark: Mark, sent_at: float) -> None:
        """How much the endpoint counts for one estimated unit, from two replies clear of brim and bottom."""
        if self._before is None:
            return
        then_left, then, before = self._before
        spent = mark.sent - before.sent
        if spent <= mark.near + before.near or mark.epoch != before.epoch:
            return
        if max(remaining, then_left) > 0.95 * self.limit:
            return
        filled = self.rate * (sent_at - then) if self.window_end is None else 0.0
        counted = (then_left - remaining + filled) / spent
        self.ratio += 0.05 * (min(max(counted, 0.05), 20.0) - self.ratio)

    def _learn_kind(self, limit: float, used: float, reset: float, sent_at: float) -> None:
        blur = 1.0 if reset == int(reset) else 0.002  # headers are rounded
        end = sent_at + reset
        # loose, since a call's way to the endpoint takes its time; buckets are told by their period, not by this
        same_end = self._end is not None and abs(end - self._end) <= blur + JITTER + 0.25 * reset
        if self.window_end is not None:
            if self._end is None or same_end:
                self.window_end = self._end = end if self._end is None else max(end, self._end)
                self._strange = 0
                return
            self._strange += 1
            if self._strange < 5:
                return
            # the end moves while the window is open: a bucket after all
            self.window_end, self._end, self._strange = None, end, 0
            self._shortest, self._longest = 0.0, UNKNOWN
        shortest = limit * max(reset - blur, 0.0) / max(used, 1.0)
        longest = limit * (reset + blur) / (used - 1) if used > 1 else UNKNOWN
        low, high = max(shortest, self._shortest), min(longest, self._longest)
        if low > high * 1.02:
            if same_end:
                self.window_end = self._end = max(end, self._end or end)
                return
            low, high, self._end = shortest, longest, end  # the endpoint changed its mind
        self._shortest, self._longest = low, high
        self._end = end if self._end is None or not same_end else self._end
        known = [p for p in PERIODS if low * 0.98 <= p <= high * 1.02]
        period = known[0] if known else high if high != UNKNOWN else max(low, 60.0)
        self.rate = limit / max(period, 1e-3)

    def cut(self, recent: float, now: float) -> None:
        """A 429 in spite of the copy. Without a told limit, the rate is guessed from what went through lately."""
        self.advance(now)
        if self.told:
            self.level, self._share = min(self.level, 0.0), max(self._share * CUT, 0.3)
            return
        base = recent if self.rate == UNKNOWN else min(self.rate, recent or self.rate)
        self.rate = max(base * CUT, 1 / 60)
        self._growth = self.rate * GROWTH
        self.limit, self.level = max(1.0, self.rate / 4), 0.0
