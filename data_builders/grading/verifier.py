"""Whether a response's answer equals the gold one: quick comparisons here, algebra in processes that can be killed."""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import IO, NamedTuple, Protocol

from neureasoner.data_builders.grading.answers import (
    MAX_ANSWER,
    final_answer,
    gold_answer,
    option_letter,
    plain,
    whole_number,
)
from neureasoner.data_builders.grading.options import boxed_letters, stated_option
from neureasoner.errors import UserError

_START = 120.0  # seconds a worker may take to import its libraries
_RETIRE = 4000  # comparisons after which a worker is replaced, so that caches inside sympy never add up

Pair = tuple[str, str]


class Verdict(NamedTuple):
    """``state``: correct, wrong, no_answer (nothing to compare), unverifiable (hang, error, unreadable gold)."""

    state: str
    why: str = ""


class Verifier(Protocol):
    """(gold cell, answer part) pairs -> verdicts, in order."""

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]: ...


def quick(gold: str, predicted: str, boxed: bool) -> bool | None:
    """Equal (True), different (False), or undecided without algebra (None). Decides only what cannot be wrong."""
    if max(len(gold), len(predicted)) > MAX_ANSWER:
        return None
    if boxed and plain(gold) and plain(gold) == plain(predicted):
        return True
    letter = option_letter(gold)
    if letter is not None:
        named = boxed_letters(predicted) if boxed else stated_option(predicted)
        return named == letter if named else None
    a, b = whole_number(gold), whole_number(predicted)
    return None if a is None or b is None else a == b


class _Worker:
    """One process and the pair it works on."""

    def __init__(self, command: Sequence[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        assert self.process.stdin and self.process.stdout
        self.stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout
        self.buffer, self.job, self.ready, self.done = b"", -1, False, 0
        self.deadline = time.monotonic() + _START

    def send(self, job: int, pair: Pair, timeout: float) -> None:
        self.job, self.deadline = job, time.monotonic() + timeout
        self.stdin.write(json.dumps(pair).encode() + b"\n")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


class MathVerifier:
    """Compares answers with math-verify in worker processes.

    Usage::

        with MathVerifier(workers=2, timeout=10) as verifier:
            verdicts = verifier.check([("1/2", r"So it is \\boxed{0.5}.")])

    A comparison that takes longer than ``timeout`` seconds, kills its process or throws is unverifiable; nothing a
    response contains stops the run. Uses no signals, so it works in any thread. Raises UserError if math-verify is
    not installed. POSIX only (it waits on pipes).
    """

    def __init__(self, workers: int = 1, timeout: float = 10.0, command: Sequence[str] | None = None):
        if command is None and importlib.util.find_spec("math_verify") is None:
            raise UserError("comparing free answers needs math-verify; `pip install math-verify`")
        self.timeout = timeout
        self.command = command or [sys.executable, "-m", "neureasoner.data_builders.grading.verify_worker"]
        self._n = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Verdicts of (gold cell, answer part) pairs, in order."""
        verdicts: list[Verdict | None] = []
        hard: list[tuple[int, Pair]] = []
        for gold_cell, solution in pairs:
            gold, (predicted, boxed) = gold_answer(gold_cell), final_answer(solution)
            same = quick(gold, predicted, boxed)
            if same is not None:
                verdicts.append(Verdict("correct" if same else "wrong"))
            elif not predicted.strip():
                verdicts.append(Verdict("no_answer", "no text in the answer"))
            elif len(gold) > MAX_ANSWER or len(predicted) > MAX_ANSWER:
                verdicts.append(Verdict("unverifiable", "an answer too long to compare"))
            else:
                hard.append((len(verdicts), (gold, f"\\boxed{{{predicted}}}" if boxed else predicted)))
                verdicts.append(None)
        if hard:
            for place, verdict in self._compare(hard):
                verdicts[place] = verdict
        return [v or Verdict("unverifiable") for v in verdicts]

    def _compare(self, hard: Sequence[tuple[int, Pair]]) -> list[tuple[int, Verdict]]:
        waiting, out, failed_starts = deque(hard), list[tuple[int, Verdict]](), 0
        while len(out) < len(hard):
            while len(self._workers) < min(self._n, len(hard) - len(out)):
                self._workers.append(_Worker(self.command))
            for worker in list(self._workers):
                if worker.ready and worker.job < 0 and waiting:
                    try:
                        worker.send(*waiting[0], self.timeout)
                        waiting.popleft()
                    except OSError:  # it died while it had nothing to do
                        self._drop(worker)
            for worker, readable in self._wait():
                line = self._receive(worker) if readable else ""
                if line is None:
                    continue
                if line == "":  # it died, or its time is up
                    if worker.job >= 0:
                        out.append((worker.job, Verdict("unverifiable", "crash" if readable else "timeout")))
                    else:
                        failed_starts += 1
                    self._drop(worker)
                elif not worker.ready:
                    worker.ready, failed_starts = True, 0
                else:
                    out.append((worker.job, Verdict(*json.loads(line))))
                    worker.job, worker.done = -1, worker.done + 1
                    if worker.done >= _RETIRE:
                        self._drop(worker)
            if failed_starts > 3:
                raise UserError("the process that compares answers does not start; is math-verify installed whole?")
        return out

    def _drop(self, worker: _Worker) -> None:
        worker.stop()
        self._workers.remove(worker)

    def _wait(self) -> list[tuple[_Worker, bool]]:
        """Workers with something to read (True) or past their deadline (False)."""
        busy = [w for w in self._workers if w.job >= 0 or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            rest = min((w.deadline for w in busy), default=0.0) - time.monotonic()
            found = [key.data for key, _ in selector.select(max(0.0, rest))]
        now = time.monotonic()
        return [(w, True) for w in found] + [(w, False) for w in busy if w not in found and now >= w.deadline]

    @staticmethod
    def _receive(worker: _Worker) -> str | None:
        """A whole line, None if it is not all here yet, '' at the end of the stream."""
        data = os.read(worker.stdout.fileno(), 65536)
        if not data:
            return ""
        worker.buffer += data
        line, found, rest = worker.buffer.partition(b"\n")
        if not found:
            return None
        worker.buffer = rest
        return line.decode()
