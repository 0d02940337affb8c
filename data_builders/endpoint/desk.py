"""The ledger for many tasks at once: one thread does the disk's work, and what comes in together is kept together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from neureasoner.data_builders.endpoint.ledger import Ledger
from neureasoner.data_builders.endpoint.requests import Answer

R = TypeVar("R")
HEARTBEAT = 20.0
_Job = tuple[Callable[[Ledger], Any], bool, "asyncio.Future[Any]"]


class Desk:
    """An asynchronous front of a ledger.

    While one transaction is on its way to the disk, further jobs gather; the next transaction takes them all. A job
    that was handed in is done even when the task that waits for it is cancelled: an answer that arrived is kept.
    """

    def __init__(self, make: Callable[[], Ledger]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._jobs: list[_Job] = []
        self._work: asyncio.Task[None] | None = None
        self._beat: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the file. Raises UserError."""
        self._ledger = await asyncio.get_running_loop().run_in_executor(self._thread, self._make)
        self._beat = asyncio.create_task(self._beating())

    async def _beating(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            await self.write(lambda ledger: ledger.beat())

    def write(self, job: Callable[[Ledger], R]) -> asyncio.Future[R]:
        """Do ``job`` inside a transaction; the future is done when it is on the disk."""
        return self._add(job, True)

    def _add(self, job: Callable[[Ledger], R], writes: bool) -> asyncio.Future[R]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.append((job, writes, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._working())
        return cast("asyncio.Future[R]", future)

    async def answered(self, keys: Iterable[str]) -> dict[str, Answer]:
        """See ``Ledger.answered``."""
        keys = list(keys)
        return await self._add(lambda ledger: ledger.answered(keys), False)

    async def _working(self) -> None:
        loop = asyncio.get_running_loop()
        while self._jobs:
            jobs, self._jobs = self._jobs, []
            try:
                results = await loop.run_in_executor(self._thread, self._do, jobs)
            except Exception as e:
                for _, _, future in jobs:
                    if not future.done():
                        future.set_exception(e)
                        future.exception()  # seen here: a task that was cancelled no longer asks for it
                continue
            for (_, _, future), result in zip(jobs, results, strict=True):
                if not future.done():
                    future.set_result(result)

    def _do(self, jobs: list[_Job]) -> list[Any]:
        if not any(writes for _, writes, _ in jobs):
            return [job(self._ledger) for job, _, _ in jobs]
        with self._ledger.transaction():
            return [job(self._ledger) for job, _, _ in jobs]

    async def close(self) -> None:
        """Finish what was handed in, give up all claims, close the file."""
        if self._beat is not None:
            self._beat.cancel()
        while self._work is not None and not self._work.done():
            await asyncio.wait([self._work])
        try:
            if self._beat is not None:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._ledger.close)
        finally:
            self._thread.shutdown(wait=True)
