"""The Batch API: half the price, within a day. The same ledger, and ``ask`` afterwards finds the answers there.

Every step is written down before the next is taken, so a killed run goes on where it was: a batch file is made whole or
not at all, its requests are claimed by the batch, and a batch that was created without our hearing of it is found again
by the tag it carries.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from neureasoner.data_builders.endpoint import wire
from neureasoner.data_builders.endpoint.asker import Session, roads_of, session
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.faults import AGAIN, LIMITED, classify
from neureasoner.data_builders.endpoint.ledger import MINE, Ledger
from neureasoner.data_builders.endpoint.prices import price_of
from neureasoner.data_builders.endpoint.progress import Watch
from neureasoner.data_builders.endpoint.requests import Question, Request
from neureasoner.data_builders.endpoint.tally import Stopped, Tally
from neureasoner.errors import UserError

R = TypeVar("R")
REQUESTS, BYTES = 50_000, 200_000_000  # the API's limits for one batch
GROUP = 500
ALONE = "batches"  # claimed like a request: two processes that resume the same batch would submit it twice
OVER = ("completed", "failed", "expired", "cancelled")
TAG = "neureasoner"  # the name of the tag among a batch's metadata


def run_batches(
    questions: Callable[[], Iterable[Question[Any]]],
    config: EndpointConfig,
    *,
    poll: float = 30.0,
    progress: Watch | None = None,
    max_requests: int = REQUESTS,
    max_bytes: int = BYTES,
) -> Tally:
    """Answer questions by batches until no batch brings anything new; then ``ask`` reads them, and asks what is left.

    ``questions`` is called once a round: an answer that cannot be read is asked again in the next round's batch. Safe
    to kill and start again at any time. Raises UserError when the endpoint refuses, Stopped at ``max_cost``.
    """
    tally = Tally()

    async def work() -> None:
        async with session(config, tally) as s:
            await _Batches(s, poll, progress, max_requests, max_bytes).run(questions)

    asyncio.run(work())
    return tally


class _Batches:
    def __init__(self, s: Session, poll: float, progress: Watch | None, max_requests: int, max_bytes: int):
        self.s, self.poll, self.progress = s, poll, progress
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self.client, self.tally, self.config = s.caller.client, s.tally, s.config
        self.price = price_of(s.config)
        self.folder = Path(f"{s.config.ledger}.batches")
        self.path = wire.PATHS[s.config.api]
        self.promised = 0.0  # the worst that the open batches can cost

    async def run(self, questions: Callable[[], Iterable[Question[Any]]]) -> None:
        """Rounds of submitting and collecting."""
        if await self._do(lambda ledger: ledger.claim(ALONE)) != MINE:
            raise UserError(f"another process handles the batches of {self.config.ledger}; let it finish")
        await self._resume()
        await self._collect_all()
        while True:
            before, self.tally.stopped = self.tally.answers, ""  # what a round left over, the next may spend
            submitted = await self._submit(questions())
            if not submitted:
                break
            await self._collect_all()
            if self.tally.answers == before:
                break  # all of them failed; asked one by one, they will say why
        if self.tally.stopped:
            raise Stopped(self.tally.stopped, self.tally)

    async def _do(self, job: Callable[[Ledger], R]) -> R:
        return await self.s.desk.write(job)

    async def _set(self, tag: str, **values: object) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        await self._do(
            lambda ledger: ledger.execute(f"UPDATE batches SET {names} WHERE tag = ?", (*values.values(), tag))
        )

    async def _rows(self, *states: str) -> list[tuple[Any, ...]]:
        marks = ",".join("?" * len(states))
        return await self._do(
            lambda ledger: ledger.execute(f"SELECT tag, id, file, state FROM batches WHERE state IN ({marks})", states)
        )

    async def _api(self, call: Callable[[], Awaitable[R]]) -> R:
        """One call of the API, tried again as long as that makes sense. Raises UserError."""
        for attempt in range(1, self.config.tries + 1):
            try:
                return await call()
            except Exception as e:
                import httpx2
                import openai

                if not isinstance(e, (openai.OpenAIError, httpx2.HTTPError, TimeoutError)):
                    raise
                fault = classify(e, self.s.caller.scrub, self.config.key_env)
                self.tally.faults[fault.count] += 1
                if fault.kind not in (AGAIN, LIMITED) or attempt == self.config.tries:
                    raise self.s.caller.halt(fault.reason) from None
                asked = fault.limits.retry_after if fault.limits is not None else None
                await asyncio.sleep(max(self.config.backoff * 2 ** (attempt - 1), min(asked or 0.0, 60.0)))
        raise AssertionError("tries is at least 1")

    # submitting

    async def _submit(self, questions: Iterable[Question[Any]]) -> int:
        """Put everything that is open into batches. Returns how many requests."""
        count = 0
        async for chunk in self._chunks(questions):
            tag, lines, model = chunk
            await self._prepare(tag, lines, model)
            await self._send(tag, "", "prepared")
            count += len(lines)
        return count

    async def _open(self, questions: Iterable[Question[Any]]) -> AsyncIterator[tuple[str, Request]]:
        """Requests that nobody has answered or asked, claimed for this process."""
        group: list[tuple[str, Request]] = []
        met: set[str] = set()
        async for road in roads_of(questions, self.s):
            if road.request is None or road.key in met:
                continue
            met.add(road.key)
            if not self._affords(road.request):
                break
            group.append((road.key, road.request))
            if len(group) >= GROUP:
                for pair in await self._claim(group):
                    yield pair
                group = []
        for pair in await self._claim(group):
            yield pair

    async def _claim(self, group: list[tuple[str, Request]]) -> list[tuple[str, Request]]:
        return await self._do(lambda ledger: [pair for pair in group if ledger.claim(pair[0]) == MINE])

    def _affords(self, request: Request) -> bool:
        if not self.config.max_cost or self.price is None:
            return True
        worst, spent = self.price.cost(wire.worst(request), batch=True), self.tally.cost or 0.0
        if spent + self.promised + worst > self.config.max_cost:
            self.tally.stopped = (
                f"stopped at key 'max_cost' ({self.config.max_cost:g} USD): {spent:.4f} USD spent, the next request of "
                "a batch may cost more than is left; everything answered is kept"
            )
            return False
        self.promised += worst
        return True

    async def _chunks(self, questions: Iterable[Question[Any]]) -> AsyncIterator[tuple[str, dict[str, str], str]]:
        """Tag, lines by key, model; as large as the API takes."""
        lines: dict[str, str] = {}
        size, model = 0, ""
        async for key, request in self._open(questions):
            body = wire.build(request, self.config.api, self.s.caller.shape)
            row = {"custom_id": key, "method": "POST", "url": "/v1" + self.path, "body": body}
            line = json.dumps(row) + "\n"
            # one batch has one model, by the API's rule
            if lines and (
                len(lines) >= self.max_requests or size + len(line) > self.max_bytes or request.model != model
            ):
                yield uuid.uuid4().hex, lines, model
                lines, size = {}, 0
            lines[key], size, model = line, size + len(line), request.model
        if lines:
            yield uuid.uuid4().hex, lines, model

    async def _prepare(self, tag: str, lines: dict[str, str], model: str) -> None:
        """Write the file, then, in one transaction, the batch and its claims."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{tag}.jsonl"
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(lines.values())
            f.flush()
            os.fsync(f.fileno())

        def write(ledger: Ledger) -> None:
            row = (tag, "", "", "prepared", self.path, model, len(lines), 0, "", time.time())
            ledger.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            for key in lines:
                ledger.execute("UPDATE claims SET worker = ? WHERE key = ?", (f"batch:{tag}", key))

        await self._do(write)

    async def _send(self, tag: str, file: str, state: str) -> None:
        """Upload and create, from wherever ``state`` says that it stands."""
        if not file:
            upload = await self._api(
                lambda: self.client.files.create(file=self.folder / f"{tag}.jsonl", purpose="batch")
            )
            file = upload.id
            await self._set(tag, file=file, state="uploaded")
        found = await self._find(tag) if state == "creating" else ""
        await self._set(tag, state="creating")
        for attempt in range(1, self.config.tries + 1):
            if found:
                break
            try:
                batch = await self._create(file, tag)
                found = batch.id
            except Exception as e:
                import openai

                if not isinstance(e, openai.OpenAIError):
                    raise
                fault = classify(e, self.s.caller.scrub, self.config.key_env)
                self.tally.faults[fault.count] += 1
                if fault.kind not in (AGAIN, LIMITED) or attempt == self.config.tries:
                    raise self.s.caller.halt(fault.reason) from None
                # the reply was lost, not necessarily the batch
                await asyncio.sleep(self.config.backoff * 2 ** (attempt - 1))
                found = await self._find(tag)
        await self._set(tag, id=found, state="submitted")
        self.tally.calls += 1

    def _create(self, file: str, tag: str) -> Awaitable[Any]:
        endpoint: Any = "/v1" + self.path
        return self.client.batches.create(
            input_file_id=file, endpoint=endpoint, completion_window="24h", metadata={TAG: tag}
        )

    async def _find(self, tag: str) -> str:
        """The id of the batch that carries our tag ("" when there is none)."""

        async def look() -> str:
            async for batch in self.client.batches.list(limit=100):
                if (batch.metadata or {}).get(TAG) == tag:
                    return batch.id
            return ""

        return await self._api(look)

    async def _resume(self) -> None:
        """Take up what an earlier run left: batches that were prepared or half submitted, and files of no batch."""
        for tag, _, file, state in await self._rows("prepared", "uploaded", "creating"):
            if not file and not (self.folder / f"{tag}.jsonl").exists():
                await self._end(tag, "dropped", 0, "its file is gone")
                continue
            await self._send(tag, file, state)
        known = {f"{row[0]}.jsonl" for row in await self._rows("submitted")}
        for path in self.folder.glob("*.jsonl") if self.folder.is_dir() else ():
            # a young file may belong to another process that is about to write its batch down
            if path.name not in known and time.time() - path.stat().st_mtime > 3600:
                path.unlink(missing_ok=True)

    # collecting

    async def _collect_all(self) -> None:
        while rows := await self._rows("submitted"):
            for tag, name, _, _ in rows:
                batch = await self._api(lambda name=name: self.client.batches.retrieve(name))  # type: ignore[misc]
                if batch.status in OVER:
                    await self._collect(tag, batch)
            if self.progress is not None:
                self.progress(self.tally)
            if await self._rows("submitted"):
                await asyncio.sleep(self.poll)
        self.promised = 0.0

    async def _collect(self, tag: str, batch: Any) -> None:
        failed = 0
        rows = await self._do(lambda ledger: ledger.execute("SELECT model FROM batches WHERE tag = ?", (tag,)))
        model = str(rows[0][0])
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            path = self.folder / f"{tag}.{file}.part"
            self.folder.mkdir(parents=True, exist_ok=True)
            await self._api(lambda file=file, path=path: self._download(file, path))  # type: ignore[misc]
            with open(path, encoding="utf-8", newline="\n") as f:
                while group := list(islice(f, GROUP)):
                    failed += await self._do(partial(self._keep, tag=tag, model=model, lines=group))  # type: ignore[misc]
            path.unlink()
        reasons = [str(e.message) for e in (batch.errors.data or [])] if batch.errors else []
        reason = self.s.caller.scrub.error("; ".join(reasons))
        await self._end(tag, "collected", failed, reason)
        if batch.status == "failed":
            raise UserError(f"batch {batch.id} was refused: {reason or 'no reason given'}")

    async def _download(self, file: str, path: Path) -> None:
        async with self.client.files.with_streaming_response.content(file) as response:
            await response.stream_to_file(path)

    def _keep(self, ledger: Ledger, tag: str, model: str, lines: list[str]) -> int:
        """Put answers into the ledger. Returns how many lines held none."""
        failed, worker = 0, f"batch:{tag}"
        for line in lines:
            try:
                row = wire.load(line)
                key = row["custom_id"]
                # only what this batch was asked for: a reply cannot answer other requests
                if not ledger.execute("SELECT 1 FROM claims WHERE key = ? AND worker = ?", (str(key), worker)):
                    continue
                status = row["response"]["status_code"]
                if status != 200:
                    raise wire.BadBody(f"http_{status}")
                answer = wire.read_body(row["response"]["body"], self.config.api)
            except (wire.BadBody, KeyError, TypeError) as e:
                failed += 1
                self.tally.faults[str(e) if str(e).startswith("http_") else "batch"] += 1
                continue
            ledger.put(key, model, answer, batch=True)
            self.tally.answers += 1
            self.tally.paid = self.tally.paid + answer.usage
            if self.price is not None:
                self.tally.cost = (self.tally.cost or 0.0) + self.price.cost(answer.usage, batch=True)
        return failed

    async def _end(self, tag: str, state: str, failed: int, error: str) -> None:
        """Close a batch: requests without an answer are free again."""

        def write(ledger: Ledger) -> None:
            ledger.execute("DELETE FROM claims WHERE worker = ?", (f"batch:{tag}",))
            ledger.execute(
                "UPDATE batches SET state = ?, failed = ?, error = ? WHERE tag = ?", (state, failed, error, tag)
            )

        await self._do(write)
        (self.folder / f"{tag}.jsonl").unlink(missing_ok=True)
