"""Questions in, outcomes out: each answer paid for once, in the order of the questions, in constant memory.

    for outcome in ask_all(questions, config):
        ...

Finished answers are read from the ledger; only the others are asked for. A run that was killed is simply started again.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import islice
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

from neureasoner.data_builders.endpoint.attempts import Road, is_lost
from neureasoner.data_builders.endpoint.caller import Caller, Lost, make_client
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.desk import Desk
from neureasoner.data_builders.endpoint.ledger import BATCH, BUSY, MINE, Ledger
from neureasoner.data_builders.endpoint.prices import price_of
from neureasoner.data_builders.endpoint.progress import Watch
from neureasoner.data_builders.endpoint.requests import Answer, Outcome, Question, Request
from neureasoner.data_builders.endpoint.scrub import Scrubber
from neureasoner.data_builders.endpoint.tally import Purse, Stopped, Tally
from neureasoner.errors import UserError

T = TypeVar("T")
BLOCK = 500
DRAIN = 30.0  # seconds that answers under way are waited for when the run must stop: they may be paid for already
LOOK = (0.05, 1.0)  # seconds between looks at a key that another process asks for: at first, at most


class Session:
    """An open ledger and an endpoint. ``answer`` takes one request, ``travel`` one question."""

    def __init__(self, config: EndpointConfig, caller: Caller, desk: Desk, tally: Tally):
        self.config, self.caller, self.desk, self.tally = config, caller, desk, tally
        self._asking: dict[str, asyncio.Future[Answer | None]] = {}

    async def answer(self, key: str, request: Request) -> tuple[Answer, bool]:
        """The answer, and whether this run paid for it. Raises Lost, Stopped or UserError."""
        while (other := self._asking.get(key)) is not None:
            # the same request twice in one run: the second waits for the first
            there = await asyncio.shield(other)
            if there is not None:
                return there, False
        future = self._asking[key] = asyncio.get_running_loop().create_future()
        answer: Answer | None = None
        try:
            answer, fresh = await self._claim_and_call(key, request)
            return answer, fresh
        finally:
            del self._asking[key]
            future.set_result(answer)

    async def _claim_and_call(self, key: str, request: Request) -> tuple[Answer, bool]:
        pause = LOOK[0]
        while (state := await self.desk.write(lambda ledger: ledger.claim(key))) != MINE:
            if isinstance(state, Answer):
                return state, False
            if state == BATCH:
                raise self.caller.halt("some of these requests are in a batch that was not collected; collect it first")
            assert state == BUSY
            if self.caller.fatal is not None:
                raise self.caller.fatal
            await asyncio.sleep(pause)
            pause = min(2 * pause, LOOK[1])
        kept = False

        def keep(answer: Answer) -> asyncio.Future[Answer]:
            # handed in without a pause for thought, so that no cancellation can come between
            nonlocal kept
            kept = True
            return self.desk.write(lambda ledger: self._keep(ledger, key, request, answer))

        try:
            return await self.caller.call(request, keep), True
        finally:
            if not kept:
                self.desk.write(lambda ledger: ledger.release(key))

    @staticmethod
    def _keep(ledger: Ledger, key: str, request: Request, answer: Answer) -> Answer:
        ledger.put(key, request.model, answer)
        return ledger.answered([key])[key]  # what stands there is what every later run will read

    async def travel(self, road: Road[T], first: Answer | None) -> Road[T]:
        """One question to its end. ``first``: the answer to its first request if the ledger has it."""
        answer, fresh = first, False
        while road.request is not None:
            if answer is None:
                try:
                    answer, fresh = await self.answer(road.key, road.request)
                except Lost as e:
                    road.lose(str(e))
                    break
            self.tally.answers += fresh
            self.tally.reused += not fresh
            kind = road.step(answer, fresh)
            if kind and fresh:
                self.tally.faults[kind] += 1
            answer = None
        return road


@asynccontextmanager
async def session(config: EndpointConfig, tally: Tally | None = None, offline: bool = False) -> AsyncIterator[Session]:
    """Open the ledger and the client. ``offline``: no key is needed, since nothing will be asked."""
    tally = tally if tally is not None else Tally()
    purse = Purse(price_of(config), config.max_cost, tally)
    key = "" if offline else config.key()
    scrub = Scrubber(key)
    async with AsyncExitStack() as stack:
        client = make_client(config, key)
        stack.push_async_callback(client.close)
        desk = Desk(lambda: Ledger(config.ledger, scrub.text))
        stack.push_async_callback(desk.close)
        await desk.open()
        yield Session(config, Caller(config, client, scrub, tally, purse), desk, tally)


async def roads_of(questions: Iterable[Question[T]], s: Session) -> AsyncIterator[Road[T]]:
    """Each question's road, as far as the ledger alone leads it. Asks nothing."""
    source = iter(questions)
    while block := list(islice(source, BLOCK)):
        roads = [Road(q, s.config.retries) for q in block]
        on_the_way = roads
        while on_the_way:
            there = await s.desk.answered([r.key for r in on_the_way])
            on_the_way = [r for r in on_the_way if r.key in there]
            for road in on_the_way:
                road.step(there[road.key], fresh=False)
            on_the_way = [r for r in on_the_way if r.request is not None]
        for road in roads:
            yield road


class _Run(Generic[T]):
    """The tasks of one ``ask``: a window over the questions, as wide as memory is meant to be."""

    def __init__(self, s: Session, questions: Iterable[Question[T]], ordered: bool):
        self.s, self.questions, self.ordered = s, iter(questions), ordered
        self.width = max(64, 4 * s.config.concurrency)
        self.tasks: deque[asyncio.Task[Road[T]]] = deque()
        self.ended = False

    async def fill(self) -> None:
        """Take in further questions; those that the ledger answers need no call."""
        room = self.width - len(self.tasks)
        if self.ended or self.s.tally.stopped or room < self.width // 4:
            return
        taken = list(islice(self.questions, room))
        self.ended = len(taken) < room
        roads = [Road(q, self.s.config.retries) for q in taken]
        there = await self.s.desk.answered([r.key for r in roads])
        for road in roads:
            self.tasks.append(asyncio.create_task(self.s.travel(road, there.get(road.key))))

    async def next(self) -> Road[T] | None:
        """The next finished question; None when it was stopped short. Raises what a task raised."""
        halt = asyncio.ensure_future(self.s.caller.stop.wait())
        try:
            watched = [self.tasks[0]] if self.ordered else list(self.tasks)
            await asyncio.wait([*watched, halt], return_when=asyncio.FIRST_COMPLETED)
        finally:
            halt.cancel()
        if self.s.caller.fatal is not None:
            await self.drain()
            raise self.s.caller.fatal
        task = next(t for t in watched if t.done())
        self.tasks.remove(task)
        try:
            return task.result()
        except Stopped:
            return None
        except Exception:
            # a mistake in reading: no further call, but what is under way may be paid for already
            self.s.caller.halt("stopped by an error")
            await self.drain()
            raise

    async def drain(self) -> None:
        """Let calls that are under way come in; what they answer goes to the ledger."""
        end = asyncio.get_running_loop().time() + DRAIN
        while self.s.caller.flying and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End every task."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def ask(
    questions: Iterable[Question[T]],
    config: EndpointConfig,
    *,
    progress: Watch | None = None,
    total: int | None = None,
    ordered: bool = True,
    tally: Tally | None = None,
) -> AsyncIterator[Outcome[T]]:
    """Answer ``questions`` (taken lazily). Outcomes come in the order of the questions unless ``ordered`` is False.

    ``progress`` is called after each outcome; ``total``: how many questions there are, where that is known; ``tally``:
    filled with the run's counts. Raises UserError when the endpoint will answer nothing more, and Stopped, after the
    last finished outcome, when ``max_cost`` is reached. What ``read`` raises besides Malformed goes through.
    """
    tally = tally if tally is not None else Tally()
    tally.total = total
    async with session(config, tally) as s:
        run = _Run(s, questions, ordered)
        try:
            await run.fill()
            while run.tasks:
                road = await run.next()
                if road is not None:
                    outcome = road.outcome()
                    tally.ended()
                    tally.failed += outcome.value is None
                    tally.lost += is_lost(outcome)
                    if progress is not None:
                        progress(tally)
                    yield outcome
                await run.fill()
        finally:
            await run.close()
    if tally.stopped:
        raise Stopped(tally.stopped, tally)


def ask_all(questions: Iterable[Question[T]], config: EndpointConfig, **options: Any) -> Iterator[Outcome[T]]:
    """``ask`` for code that is not asynchronous. The calls go on in a thread of their own while an outcome is used."""
    out: Queue[tuple[str, Any]] = Queue(maxsize=64)
    closed = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not closed.is_set():
            with suppress(Full):
                out.put(item, timeout=0.1)
                return True
        return False

    async def work() -> None:
        outcomes = ask(questions, config, **options)
        try:
            async for outcome in outcomes:
                # the loop must go on turning while the reader is slow, or answers under way would time out
                if out.full():
                    if not await asyncio.to_thread(put, ("outcome", outcome)):
                        return
                else:
                    out.put(("outcome", outcome))
                if closed.is_set():
                    return
        finally:
            await outcomes.aclose()  # type: ignore[attr-defined]

    def main() -> None:
        try:
            asyncio.run(watched())
            put(("end", None))
        except BaseException as e:
            put(("error", e))

    async def watched() -> None:
        task = asyncio.create_task(work())
        while not task.done():
            await asyncio.wait([task], timeout=0.1)
            if closed.is_set():
                task.cancel()
        if not task.cancelled():
            task.result()

    thread = threading.Thread(target=main, name="asking", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = out.get(timeout=0.5)
            except Empty:
                if not thread.is_alive() and out.empty():
                    raise UserError("the thread that asks ended without a word") from None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()
