"""One request to the endpoint until it is answered: pace, tries, fallbacks, money. Knows nothing of questions."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from neureasoner.data_builders.endpoint import wire
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.faults import AGAIN, FATAL, LIMITED, REFUSED, Fault, classify
from neureasoner.data_builders.endpoint.limits import Limits, read_limits
from neureasoner.data_builders.endpoint.rate import Gate, Pace, Ticket
from neureasoner.data_builders.endpoint.requests import Answer, Request, Usage
from neureasoner.data_builders.endpoint.scrub import Scrubber
from neureasoner.data_builders.endpoint.tally import Purse, Tally
from neureasoner.errors import UserError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LONGEST_DELAY = 60.0  # seconds between two tries of one call
LONGEST_QUIET = 900.0  # an endpoint that wants to be left alone for longer is better asked on another day
MANY = 25  # requests lost one after the other, without an answer in between: something is wrong with the endpoint
_CAP_WORDS = ("max_completion_tokens",)
_FORM_WORDS = ("response_format", "text.format", "json_object", "schema", "structured", "grammar", "guided")


class Lost(Exception):
    """A request that was given up. The message is the reason."""


def make_client(config: EndpointConfig, key: str) -> AsyncOpenAI:
    """The SDK's client; its own retries are off, since two policies of retrying would multiply. Raises UserError."""
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise UserError("asking an endpoint needs the openai package: pip install 'neureasoner[openai]'") from None
    return AsyncOpenAI(api_key=key or "none", base_url=config.url, max_retries=0, timeout=config.timeout)


class Caller:
    """Asks one endpoint. ``stop`` is set by the first fatal fault, and no call is sent after it."""

    def __init__(self, config: EndpointConfig, client: AsyncOpenAI, scrub: Scrubber, tally: Tally, purse: Purse):
        self.config, self.stop = config, asyncio.Event()
        self.fatal: UserError | None = None
        self.flying = 0
        self.latencies: deque[float] = deque(maxlen=1000)
        self.client, self.scrub, self.purse = client, scrub, purse
        self._tally = tally
        self.gate = Gate(Pace(config.requests_per_minute, config.tokens_per_minute))
        self._slots = asyncio.Semaphore(config.concurrency)
        structured = "schema" if config.structured == "auto" else config.structured
        self.shape = wire.Shape(structured)
        self._proven = False  # the present shape was accepted with a schema
        self._lost_in_a_row = 0
        self._scout: asyncio.Event | None = None

    def halt(self, reason: str) -> UserError:
        """Stop the run: no further call is sent. Returns the error to raise."""
        if self.fatal is None:
            self.fatal = UserError(f"{self.config.url}: {reason}; the answers that came in are kept in the ledger")
            self.stop.set()
        return self.fatal

    async def call(self, request: Request, keep: Callable[[Answer], Awaitable[Answer]] | None = None) -> Answer:
        """The endpoint's answer. Raises Lost, Stopped (no money left) or UserError (nothing will be answered).

        A call counts as under way until ``keep`` is done with its answer, so that a killed process loses no more paid
        answers than ``concurrency``.
        """
        # the first request finds out what the server takes; the others need not run into the same refusals
        scout = self._scout is None
        if self._scout is None:
            self._scout = asyncio.Event()
        elif not self._scout.is_set():
            await self._scout.wait()
        try:
            return await self._call(request, keep)
        finally:
            if scout:
                self._scout.set()

    async def _call(self, request: Request, keep: Callable[[Answer], Awaitable[Answer]] | None) -> Answer:
        trial: wire.Shape | None = None
        failed = limited = 0
        while True:
            shape = trial or self.shape
            async with self._slots:
                answer, fault = await self._once(request, shape)
                if answer is not None and keep is not None:
                    answer = await keep(answer)
            if answer is not None:
                if request.schema is not None and not self._proven:
                    self.shape, self._proven = shape, True
                self._lost_in_a_row = 0
                return answer
            assert fault is not None
            if fault.kind != REFUSED and self._scout is not None:
                self._scout.set()  # waiting for a slow or broken first call would help nobody
            if fault.kind == FATAL:
                raise self.halt(fault.reason)
            if fault.kind == LIMITED:
                limited += 1
                if limited >= 4 * self.config.tries:
                    raise self._lost(fault)
                if limited > 1:  # the gate keeps everybody quiet for as long as was asked; that was not enough
                    await asyncio.sleep(self._delay(limited - 1, fault))
                continue
            if fault.kind == REFUSED:
                trial = self._other_shape(request, shape, fault)
                if trial is None:
                    raise self._lost(fault)
                continue
            failed += 1
            if failed >= self.config.tries:
                raise self._lost(fault)
            await asyncio.sleep(self._delay(failed, fault))

    def _delay(self, failed: int, fault: Fault) -> float:
        # with jitter, or all that failed together would come back together
        delay = self.config.backoff * 2 ** (failed - 1) * random.uniform(0.5, 1.0)
        asked = fault.limits.retry_after if fault.limits is not None else None
        return min(max(delay, asked or 0.0), LONGEST_DELAY)

    def _lost(self, fault: Fault) -> Lost | UserError:
        reached_nobody = fault.kind == AGAIN and fault.count != "body"
        # a long run of prompts that are each too long is the data's fault, not the endpoint's
        if reached_nobody or (fault.kind == REFUSED and "context" not in fault.words and not self._tally.answers):
            self._lost_in_a_row += 1
        if self._lost_in_a_row >= MANY:
            return self.halt(f"{MANY} requests in a row failed, the last with: {fault.reason}")
        return Lost(fault.reason)

    def _other_shape(self, request: Request, shape: wire.Shape, fault: Fault) -> wire.Shape | None:
        """What to try after a 400: another name for the cap, or a weaker demand on the answer's form."""
        if shape.cap != "max_tokens" and any(w in fault.words for w in _CAP_WORDS):
            self.shape = replace(self.shape, cap="max_tokens")
            return replace(shape, cap="max_tokens")
        weaker = shape.weaker() if request.schema is not None and self.config.structured == "auto" else None
        if weaker is None or "context" in fault.words:
            return None
        if self._proven and shape.structured == self.shape.structured:
            # others were answered in this form, so the fault may lie with this one's schema, or with anything else
            return weaker if any(w in fault.words for w in _FORM_WORDS) else None
        # a server may say 400 without saying why; when a weaker demand is answered, that was it
        return weaker

    async def _once(self, request: Request, shape: wire.Shape) -> tuple[Answer | None, Fault | None]:
        if self.fatal is not None:
            raise self.fatal
        worst = wire.worst(request)
        held = await self.purse.hold(worst)
        usage: Usage | None = None
        charged, ticket, limits, refused = False, None, None, ""
        try:
            ticket = await self.gate.enter(wire.estimate(request) + worst.output)
            if self.fatal is not None:
                raise self.fatal
            charged = True  # from here on, who is cut off does not know
            answer, fault, limits = await self._send(request, shape, ticket)
            usage = answer.usage if answer is not None else None
            charged = fault is not None and fault.charged
            if fault is not None:
                self._tally.faults[fault.count] += 1
                if fault.kind == LIMITED:
                    refused = fault.words or "429"
            return answer, fault
        finally:
            self.purse.settle(held, usage, charged)
            if ticket is not None:
                quiet = self.gate.leave(ticket, limits, refused)
                if quiet > LONGEST_QUIET:
                    self.halt(f"429, and not to be asked again for {quiet / 60:.0f} minutes; start again then")

    async def _send(
        self, request: Request, shape: wire.Shape, ticket: Ticket
    ) -> tuple[Answer | None, Fault | None, Limits | None]:
        import httpx2

        body = wire.build(request, self.config.api, shape)
        self._tally.called()
        self.flying += 1
        begin = time.monotonic()
        try:
            # the SDK's timeout is for one read; an answer that drips in must end as well
            async with asyncio.timeout(self.config.timeout):
                reply: Any = await self.client.post(
                    wire.PATHS[self.config.api],
                    cast_to=httpx2.Response,
                    body=body,
                    options={"headers": {"X-Client-Request-Id": f"{request.key}-{self._tally.calls}"}},
                )
        except Exception as e:
            fault = classify(e, self.scrub, self.config.key_env)
            return None, fault, fault.limits
        finally:
            self.flying -= 1
        self.latencies.append(time.monotonic() - begin)
        limits = read_limits(reply.headers)
        try:
            parsed = wire.load(reply.content)
            return wire.read_body(parsed, self.config.api), None, limits
        except wire.BadBody as e:
            return None, Fault(AGAIN, "body", self.scrub.error(str(e)), limits, charged=True), limits
