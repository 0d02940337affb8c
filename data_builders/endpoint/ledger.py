"""The ledger: one SQLite file in which every answer is kept under its request's key. An answer is paid for once.

Several processes may share a ledger. Before it asks, a process claims the key; a claim holds while its process lives
(same machine: the process exists; elsewhere: it gave a sign of life lately), so a killed process blocks nobody.
Keep the file on a local disk: SQLite's write-ahead log does not work over network file systems.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from neureasoner.data_builders.endpoint.requests import Answer, Usage
from neureasoner.errors import UserError

APPLICATION, SCHEMA = 0x4E525331, 1  # SQLite's own fields for "whose file is this" and "which version"
SILENCE = 120.0  # seconds without a sign of life after which a process on another machine is taken for dead
MINE, BUSY, BATCH = "mine", "busy", "batch"
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT NOT NULL, refusal TEXT NOT NULL,
    input INTEGER NOT NULL, output INTEGER NOT NULL, cached_input INTEGER NOT NULL, answered_by TEXT NOT NULL,
    batch INTEGER NOT NULL, created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS workers (
    id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, born TEXT NOT NULL, beat REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, worker TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS claims_of ON claims (worker);
CREATE TABLE IF NOT EXISTS batches (
    tag TEXT PRIMARY KEY, id TEXT NOT NULL, file TEXT NOT NULL, state TEXT NOT NULL, endpoint TEXT NOT NULL,
    model TEXT NOT NULL, requests INTEGER NOT NULL, failed INTEGER NOT NULL, error TEXT NOT NULL, created REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Total:
    """What the ledger holds of one model."""

    answers: int
    usage: Usage
    batch_usage: Usage


def _host() -> str:
    """This machine, and within it this space of process numbers (containers have their own)."""
    try:
        return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process began, as the system writes it; "" where that is not told; None when there is no such process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        state, *rest = stat.rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return None if state in "ZX" else rest[18]  # a zombie no longer works


class Ledger:
    """One process's door to the file. Not for several threads at once."""

    def __init__(self, path: str | Path, scrub: Callable[[str], str] = lambda text: text):
        self.path, self._scrub = Path(path), scrub
        self.worker, self._host = uuid.uuid4().hex, _host()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror}; choose a folder you may write to") from None
        with self._explained():
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            if "not a database" in str(e):
                raise UserError(f"{self.path}: this file is no ledger; choose another 'ledger'") from None
            raise UserError(f"ledger {self.path}: {e}; the answers kept so far are safe") from None

    def _open(self) -> None:
        db = self._db
        for attempt in range(50):  # switching to WAL does not wait for another process that does the same
            try:
                db.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or attempt == 49:
                    raise
                time.sleep(0.1)
        # FULL: an answer that was reported as kept survives a power cut, not only a killed process. It was paid for,
        # and answers that come in together share one commit, so the disk is asked for far fewer syncs than calls.
        db.execute("PRAGMA synchronous = FULL")
        with self.transaction():
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application != APPLICATION and (tables or application):
                raise UserError(f"{self.path}: this file is no ledger; choose another 'ledger'")
            if application == APPLICATION and version != SCHEMA:
                raise UserError(f"{self.path}: ledger of version {version}; this program reads version {SCHEMA}")
            if not tables:
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION}")
                db.execute(f"PRAGMA user_version = {SCHEMA}")
            me = (self.worker, self._host, os.getpid(), _born(os.getpid()) or "", time.time())
            db.execute("INSERT INTO workers VALUES (?, ?, ?, ?, ?)", me)
            for (worker,) in db.execute("SELECT id FROM workers").fetchall():
                self._alive(worker)  # buries the dead, with their claims

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are kept together or not at all."""
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    def answered(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers that are there."""
        keys, found = list(keys), {}
        with self._explained():
            for at in range(0, len(keys), 500):
                some = keys[at : at + 500]
                marks = ",".join("?" * len(some))
                for key, *row in self._db.execute(
                    "SELECT key, text, finish_reason, refusal, input, output, cached_input, answered_by"
                    f" FROM answers WHERE key IN ({marks})",
                    some,
                ):
                    text, finish, refusal, given, made, cached, by = row
                    found[key] = Answer(text, finish, refusal, Usage(given, made, cached), by)
        return found

    def claim(self, key: str) -> Answer | str:
        """The answer if there is one; else MINE (ask now), BUSY (a living process asks) or BATCH (a batch holds it)."""
        there = self.answered([key]).get(key)
        if there is not None:
            return there
        row = self._db.execute("SELECT worker FROM claims WHERE key = ?", (key,)).fetchone()
        if row is not None and row[0] != self.worker:
            if row[0].startswith("batch:"):
                return BATCH
            if self._alive(row[0]):
                return BUSY
        self._db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?)", (key, self.worker))
        return MINE

    def _alive(self, worker: str) -> bool:
        row = self._db.execute("SELECT host, pid, born, beat FROM workers WHERE id = ?", (worker,)).fetchone()
        if row is not None:
            host, pid, born, beat = row
            if worker == self.worker:
                return True
            now = _born(pid) if host == self._host else None
            alive = now is not None and now == born if host == self._host else time.time() - beat < SILENCE
            if alive:
                return True
        self._forget(worker)
        return False

    def _forget(self, worker: str) -> None:
        self._db.execute("DELETE FROM claims WHERE worker = ?", (worker,))
        self._db.execute("DELETE FROM workers WHERE id = ?", (worker,))

    def put(self, key: str, model: str, answer: Answer, batch: bool = False) -> None:
        """Keep an answer and give up the claim. The first answer of a key stays: what was read once is read again."""
        u = answer.usage
        texts = [self._scrub(t) for t in (answer.text, answer.finish_reason, answer.refusal)]
        self._db.execute(
            "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, model, *texts, u.input, u.output, u.cached_input, self._scrub(answer.model), int(batch), time.time()),
        )
        self._db.execute("DELETE FROM claims WHERE key = ?", (key,))

    def release(self, key: str) -> None:
        """Give up a claim: the request failed."""
        self._db.execute("DELETE FROM claims WHERE key = ? AND worker = ?", (key, self.worker))

    def beat(self) -> None:
        """Give a sign of life."""
        me = (self.worker, self._host, os.getpid(), _born(os.getpid()) or "", time.time())
        self._db.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?)", me)

    def totals(self) -> dict[str, Total]:
        """Answers and tokens of each model, over the whole file."""
        sums: dict[str, Total] = {}
        with self._explained():
            for model, batch, n, given, made, cached in self._db.execute(
                "SELECT model, batch, count(*), sum(input), sum(output), sum(cached_input)"
                " FROM answers GROUP BY model, batch ORDER BY model, batch"
            ):
                before = sums.get(model, Total(0, Usage(), Usage()))
                usage = Usage(given, made, cached)
                sums[model] = Total(
                    before.answers + n,
                    before.usage + (Usage() if batch else usage),
                    before.batch_usage + (usage if batch else Usage()),
                )
        return sums

    def execute(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """Run one statement (the batches keep their own table)."""
        with self._explained():
            return self._db.execute(statement, values).fetchall()

    def close(self) -> None:
        """Give up all claims and close the file."""
        try:
            with self.transaction():
                self._forget(self.worker)
        finally:
            self._db.close()
