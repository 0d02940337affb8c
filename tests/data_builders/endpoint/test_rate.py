"""The pace against endpoints of several kinds, in a time of its own: hours pass in a moment."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, field

import pytest

from neureasoner.data_builders.endpoint.limits import Limits, Told, read_limits, seconds
from neureasoner.data_builders.endpoint.rate import Pace


@dataclass
class Counter:
    """One limit of an endpoint. The oracle: it decides, and it counts what it granted and what was used."""

    limit: float
    period: float = 60.0
    kind: str = "bucket"
    whole_seconds: bool = False
    capacity: float = 0.0
    used: float = 0.0
    before: float = 0.0  # used before the present window began
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.capacity = self.capacity or self.limit
        self.level = self.capacity

    def advance(self, now: float) -> None:
        if self.kind == "bucket":
            self.level = min(self.capacity, self.level + (now - self.at) * self.limit / self.period)
        elif int(now // self.period) != int(self.at // self.period):
            self.before, self.level = self.used, self.capacity
        self.at = now

    def granted(self, now: float) -> float:
        if self.kind == "bucket":
            return self.capacity + now * self.limit / self.period
        # a window that is under way when the last call goes has granted what was taken from it
        return self.capacity * int(now // self.period) + self.used - self.before

    def told(self, now: float) -> Told:
        reset = (self.capacity - self.level) * self.period / self.limit
        if self.kind == "window":
            reset = self.period - now % self.period
        return Told(self.capacity, math.floor(self.level), math.ceil(reset) if self.whole_seconds else round(reset, 3))


@dataclass
class Result:
    seconds: float
    rejected: int
    share: float


def simulate(
    counters: dict[str, Counter],
    n: int,
    concurrency: int,
    latency: float,
    tokens: float = 100.0,
    counted: float = 1.0,
    headers: bool = True,
    pace: Pace | None = None,
    seed: int = 0,
) -> Result:
    """``n`` calls through a pace to an endpoint with ``counters``; ``counted``: real tokens for each estimated one."""
    rng, pace, now, done, rejected, left = random.Random(seed), pace or Pace(), 0.0, 0, 0, n
    events: list[tuple[float, int, str, object]] = []
    order = slots = 0

    def push(at: float, kind: str, what: object) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (at, order, kind, what))

    last = 0.0
    while done < n:
        while left and slots < concurrency and pace.wait(tokens, now) <= 0:
            ticket = pace.go(tokens, now)
            left, slots = left - 1, slots + 1
            push(now + 0.02 * rng.random(), "arrive", ticket)
        due = events[0][0] if events else math.inf
        if left and slots < concurrency:
            due = min(due, now + max(pace.wait(tokens, now), 1e-4))
        now = due
        if not events or events[0][0] > now:
            continue
        _, _, kind, what = heapq.heappop(events)
        if kind == "arrive":
            cost = {"requests": 1.0, "tokens": tokens * counted * rng.uniform(0.8, 1.2)}
            for counter in counters.values():
                counter.advance(now)
            ok = all(c.level >= cost[name] for name, c in counters.items())
            for name, c in counters.items():
                if ok:
                    c.level -= cost[name]
                    c.used += cost[name]
            last = now if ok else last
            told = {name: c.told(now) for name, c in counters.items()} if headers else {}
            limits = Limits(**told, retry_after=None if ok else 1.0)
            push(now + (latency * rng.uniform(0.5, 1.5) if ok else 0.01), "reply", (what, ok, limits))
        else:
            ticket, ok, limits = what  # type: ignore[misc]
            slots -= 1
            if ok:
                done += 1
            else:
                rejected, left = rejected + 1, left + 1
            pace.land(ticket, now, limits, "" if ok else "requests")
    share = max(c.used / c.granted(last) for c in counters.values())
    return Result(now, rejected, share)


KINDS = {
    "bucket": {"requests": Counter(500)},
    "bucket of whole seconds": {"requests": Counter(500, whole_seconds=True)},
    "bucket of a second": {"requests": Counter(20, period=1.0)},
    "window": {"requests": Counter(500, kind="window")},
    "window of whole seconds": {"requests": Counter(500, kind="window", whole_seconds=True)},
    "a day's": {"requests": Counter(500, period=86400.0)},
    "tokens": {"requests": Counter(5000), "tokens": Counter(40_000)},
    "both": {"requests": Counter(500), "tokens": Counter(52_000)},
}


# how the endpoint counts tokens matters only where it has a budget of them
CASES = [(k, c) for k, v in KINDS.items() for c in ([1.0, 0.4, 2.5] if "tokens" in v else [1.0])]


@pytest.mark.parametrize("latency", [0.2, 2.5])
@pytest.mark.parametrize(("kind", "counted"), CASES)
def test_the_grant_is_used_and_hardly_anything_rejected(kind: str, latency: float, counted: float) -> None:
    counters = {k: Counter(c.limit, c.period, c.kind, c.whole_seconds) for k, c in KINDS[kind].items()}
    result = simulate(counters, 2000, 256, latency, counted=counted)
    assert result.rejected < 20, result
    assert result.share >= 0.95, result


def test_a_limit_that_is_never_told_is_found_and_kept_to() -> None:
    result = simulate({"requests": Counter(20, period=1.0)}, 4000, 64, 0.3, headers=False)
    assert result.share >= 0.7 and result.rejected < 0.05 * 4000, result


def test_a_limit_of_ones_own_is_kept_where_the_endpoint_grants_more() -> None:
    result = simulate({"requests": Counter(5000)}, 200, 64, 0.3, pace=Pace(requests_per_minute=120))
    assert 90 < result.seconds < 105 and not result.rejected
    result = simulate({"tokens": Counter(1e6)}, 200, 64, 0.3, pace=Pace(tokens_per_minute=12_000))
    assert 90 < result.seconds < 105 and not result.rejected


def test_a_simulation_without_a_pace_is_rejected_a_lot() -> None:
    """The oracle bites: calls that nobody holds back are rejected."""

    class Rash(Pace):
        def wait(self, tokens: float, now: float) -> float:
            return 0.0

    assert simulate({"requests": Counter(500)}, 600, 256, 0.2, pace=Rash()).rejected > 200


def test_headers_are_read_in_all_their_spellings() -> None:
    assert [seconds(t) for t in ("20ms", "1.5s", "6m0s", "1h2m3s", "12", "0s")] == [0.02, 1.5, 360, 3723, 12, 0]
    for text in ("", None, "soon", "-1", "1e9", "inf", "nan", "2030-01-01T00:00:00Z", "9" * 400):
        assert seconds(text) is None
    told = read_limits(
        {"x-ratelimit-limit-requests": "10", "x-ratelimit-remaining-requests": "9", "retry-after-ms": "1500"}
    )
    assert told.requests == Told(10, 9, None) and told.retry_after == 1.5 and told.tokens == Told()
    assert read_limits({"retry-after": "7"}).retry_after == 7
    assert read_limits({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}).retry_after == 0
    assert read_limits({"retry-after": "later"}).retry_after is None


@pytest.mark.parametrize(
    "limit",
    ["tokens:2400/1", *(pytest.param(x, marks=pytest.mark.slow) for x in ("requests:20/1", "requests:40/2/window"))],
)
def test_a_real_server_that_tells_its_limit(limit: str, serve, make_config, ask_for) -> None:
    from neureasoner.data_builders.endpoint.asker import ask_all
    from neureasoner.data_builders.endpoint.tally import Tally

    server, tally = serve("--limit", limit, "--latency", "0.05"), Tally()
    outcomes = list(ask_all(ask_for(100), make_config(server, concurrency=32), tally=tally))
    assert all(o.value for o in outcomes)
    calls = server.rows("call")
    # no more than one call in a hundred was rejected, and little of what was granted was left lying
    assert sum(r["status"] == 429 for r in calls) <= 1
    used, granted = calls[-1]["budgets"][limit.partition(":")[0]]
    window = 20 if "window" not in limit else 40
    assert used >= 0.85 * granted - (window if "window" in limit else 0), (used, granted)


def test_calls_that_overtook_each_other_leave_nothing_of_a_window_unused() -> None:
    """When all are back, the lowest number told is what is left; calls seen out of order had made it look like less."""
    pace, now = Pace(), 0.0
    told = lambda left, at: Limits(requests=Told(100, left, 10.0 - at))  # noqa: E731
    pace.land(pace.go(0.0, now), 0.1, told(99, 0.1))
    first = [pace.go(0.0, 0.2 + i / 1000) for i in range(60)]
    order = [*range(20, 40), *range(20), *range(40, 60)]  # the second twenty are counted before the first twenty
    for place, i in enumerate(order):
        pace.land(first[i], 0.4 + place / 1000, told(98 - place, 0.4))
    more = 0
    while pace.wait(0.0, 1.0) == 0:
        pace.go(0.0, 1.0)
        more += 1
    assert 37 <= more <= 39, "39 are left, of which one in a hundred is kept in reserve"
