"""What a run will cost and how long it will take, before it is started.

What the ledger holds already is not counted again, and what it cost is used as a measurement. ``probe`` asks a few of
the open questions for real; their answers go into the ledger, so that nothing is paid for twice.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from neureasoner.data_builders.endpoint import wire
from neureasoner.data_builders.endpoint.asker import Session, roads_of, session
from neureasoner.data_builders.endpoint.attempts import Road
from neureasoner.data_builders.endpoint.budget import UNKNOWN
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.prices import price_of
from neureasoner.data_builders.endpoint.requests import Question, Request, Usage
from neureasoner.data_builders.endpoint.tally import Tally
from neureasoner.progress import duration

ASSUMED_OUTPUT = 500  # tokens of an answer, where nothing was measured and nothing else is said
ENOUGH = 8  # measured questions below which a mean says little
Count = Callable[[str], int]


@dataclass(frozen=True)
class Forecast:
    """What is still to be asked. ``margin``: relative, for the cost, with 95 % confidence; None where it is assumed."""

    questions: int
    answered: int
    requests: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    batch_cost: float | None
    seconds: float | None
    measured: int
    margin: float | None
    probe_cost: float | None = None

    def __str__(self) -> str:
        basis = f"measured on {self.measured} questions" if self.measured else "output assumed, nothing measured"
        if self.margin is not None:
            basis += f", ±{100 * self.margin:.0f} %"
        money = "unknown (no price for this model)"
        if self.cost is not None and self.batch_cost is not None:
            money = f"{self.cost:.2f} USD ({self.batch_cost:.2f} as a batch)"
        rows = {
            "questions": f"{self.questions:,}, of which {self.answered:,} are answered in the ledger",
            "requests": f"{self.requests:,}",
            "input tokens": f"{self.input_tokens:,}",
            "output tokens": f"{self.output_tokens:,}",
            "cost": money,
            "time": duration(self.seconds)
            if self.seconds is not None
            else "unknown (no limit known, nothing measured)",
            "basis": basis,
        }
        return "\n".join(f"{name + ':':15} {text}" for name, text in rows.items())


@dataclass
class _Sample:
    """Measured questions: estimated input of the first request, and what the whole road used."""

    rows: list[tuple[float, float, float, int]]

    def add(self, size: float, road: Road[Any]) -> None:
        self.rows.append((size, road.spent.input, road.spent.output, len(road.keys)))

    def predict(self, column: int, n: int, sizes: float) -> tuple[float, float]:
        """Sum over ``n`` questions whose estimates sum to ``sizes``, and its standard error.

        The regression estimator of survey sampling: the mean, corrected for the open questions' being longer or
        shorter than the measured ones.
        """
        m = len(self.rows)
        mean_x = sum(r[0] for r in self.rows) / m
        mean_y = sum(r[column] for r in self.rows) / m
        xx = sum((r[0] - mean_x) ** 2 for r in self.rows)
        xy = sum((r[0] - mean_x) * (r[column] - mean_y) for r in self.rows)
        slope = xy / xx if xx > 1e-9 and m >= ENOUGH else 0.0
        left = sum((r[column] - mean_y - slope * (r[0] - mean_x)) ** 2 for r in self.rows)
        error = math.sqrt(left / max(m - 2, 1) / m) * n
        return max(0.0, n * mean_y + slope * (sizes - n * mean_x)), error


def forecast(
    questions: Iterable[Question[Any]],
    config: EndpointConfig,
    *,
    probe: int = 0,
    count: Count | None = None,
    assumed_output: int = ASSUMED_OUTPUT,
    seed: int = 0,
) -> Forecast:
    """Forecast a run. ``count`` counts a text's tokens (None: four bytes each); ``probe``: so many questions are asked.

    Without ``probe`` no key is needed and nothing is sent. Raises UserError as ``ask`` does.
    """
    return asyncio.run(_forecast(questions, config, probe, count, assumed_output, seed))


def _size(request: Request, count: Count | None) -> float:
    if count is None:
        return wire.estimate(request)
    # four for the wrapping of each turn, as chat templates have it
    return sum(count(wire.clean(m.content)) + 4 for m in request.messages)


async def _forecast(
    questions: Iterable[Question[Any]],
    config: EndpointConfig,
    probe: int,
    count: Count | None,
    assumed_output: int,
    seed: int,
) -> Forecast:
    rng, tally, sample = random.Random(seed), Tally(), _Sample([])
    picked: list[Question[Any]] = []
    total = pending = 0
    sizes = 0.0
    async with session(config, tally, offline=not probe) as s:
        async for road in roads_of(questions, s):
            total += 1
            size = _size(road.question.request, count)
            if road.request is None:
                if len(sample.rows) < 10_000:
                    sample.add(size, road)
                continue
            pending, sizes = pending + 1, sizes + size
            # a fair sample of a stream whose length nobody knows (reservoir sampling)
            if len(picked) < probe:
                picked.append(road.question)
            elif probe and (at := rng.randrange(pending)) < probe:
                picked[at] = road.question
        if picked:
            fresh = await _probe(picked, s)
            # a fair sample of what is open says more than what happened to be answered before
            sample = _Sample([]) if len(fresh) >= ENOUGH else sample
            for road in fresh:
                size = _size(road.question.request, count)
                sample.add(size, road)
                pending, sizes = pending - 1, sizes - size
        return _sum_up(s, sample, total, pending, sizes, assumed_output, bool(picked))


async def _probe(picked: list[Question[Any]], s: Session) -> list[Road[Any]]:
    roads = [Road(q, s.config.retries) for q in picked]
    results = await asyncio.gather(*(s.travel(r, None) for r in roads), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [r for r in roads if r.keys]


def _sum_up(
    s: Session, sample: _Sample, total: int, pending: int, sizes: float, assumed: int, probed: bool
) -> Forecast:
    measured = len(sample.rows)
    margin: float | None = None
    price = price_of(s.config)
    if measured:
        (given, off_in), (made, off_out), (calls, _) = (sample.predict(c, pending, sizes) for c in (1, 2, 3))
        if measured >= ENOUGH:
            weigh = (price.input, price.output) if price is not None and price.output else (1.0, 1.0)
            whole = weigh[0] * given + weigh[1] * made
            margin = 1.96 * (weigh[0] * off_in + weigh[1] * off_out) / whole if whole else 0.0
    else:
        given, made, calls = sizes, float(pending * min(assumed, s.config.max_tokens or assumed)), float(pending)
    usage = Usage(round(given), round(made))
    return Forecast(
        questions=total,
        answered=total - pending,
        requests=round(calls),
        input_tokens=usage.input,
        output_tokens=usage.output,
        cost=None if price is None else price.cost(usage),
        batch_cost=None if price is None else price.cost(usage, batch=True),
        seconds=_seconds(s, calls, given),
        measured=measured,
        margin=margin,
        probe_cost=s.tally.cost if probed else None,
    )


def _seconds(s: Session, calls: float, given: float) -> float | None:
    """The slowest of: answers as slow as measured, the limit on requests, the limit on tokens."""
    if not calls:
        return 0.0
    pace, bounds = s.caller.gate.pace, []
    if s.caller.latencies:
        bounds.append(calls * sum(s.caller.latencies) / len(s.caller.latencies) / s.config.concurrency)
    tokens = (given + calls * s.config.max_tokens) * pace.tokens.ratio
    for rate, amount in ((pace.requests.rate, calls), (pace.tokens.rate, tokens)):
        if rate != UNKNOWN:
            bounds.append(amount / rate)
    if s.config.requests_per_minute:
        bounds.append(calls / s.config.requests_per_minute * 60)
    if s.config.tokens_per_minute:
        bounds.append((given + calls * s.config.max_tokens) / s.config.tokens_per_minute * 60)
    return max(bounds) if bounds else None
