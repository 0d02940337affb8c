"""Samples on disk: every (arm, problem, sample, vote, seed) once, whatever is killed, repeated or run side by side.

A *part* is one sample of one batch of problems. It is written to a temporary file, flushed and renamed, so it is there
as a whole or not at all; a run that is started again generates the parts that are not there. What a part must hold is
known before it is generated, and a part that holds anything else is refused, never merged. When all parts are there
they become ``traces/<arm>.jsonl``, in one order whoever wrote them, and are dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from neureasoner.errors import UserError
from neureasoner.traces import Trace, read_traces, write_rows

Job = tuple[int, int]  # (sample, batch)


class Key(NamedTuple):
    """What one response is. Two responses with one key are one response; a repeat has another sample, vote or seed."""

    arm: str
    problem: str
    sample: int
    vote: int
    seed: int


def key_of(trace: Trace) -> Key:
    """The key that a trace carries."""
    meta = trace.meta
    return Key(
        str(meta.get("arm", "")),
        trace.problem.id,
        int(meta.get("sample", 0)),
        int(meta.get("vote", 0)),
        int(meta.get("seed", 0)),
    )


def check_once(keys: Iterable[Key], where: str | Path) -> None:
    """Raises UserError if a response occurs twice: repeats are never merged, and never taken for votes."""
    twice = next((key for key, n in Counter(keys).items() if n > 1), None)
    if twice is not None:
        raise UserError(
            f"{where}: {twice.arm}, problem '{twice.problem}', sample {twice.sample}, vote {twice.vote}, seed "
            f"{twice.seed} is there twice; delete the file and run again"
        )


class SampleStore:
    """The samples of one arm in an output folder. ``jobs`` says which keys belong to each part, in order."""

    def __init__(self, out: str | Path, arm: str, jobs: Mapping[Job, Sequence[Key]]):
        self.arm, self.jobs = arm, jobs
        self.folder = Path(out) / "parts" / arm
        self.file = Path(out) / "traces" / f"{arm}.jsonl"

    @property
    def whole(self) -> bool:
        """Whether all parts were there and have become one file."""
        return self.file.is_file()

    def path(self, job: Job) -> Path:
        """The file of a part."""
        return self.folder / f"{job[0]:03d}-{job[1]:05d}.jsonl"

    def missing(self) -> list[Job]:
        """Parts that still have to be generated."""
        return [] if self.whole else [job for job in self.jobs if not self.path(job).is_file()]

    def read(self, job: Job) -> list[Trace] | None:
        """The traces of a part, None if it is not there. Raises UserError if it is not what it should be."""
        path = self.path(job)
        if not path.is_file():
            return None
        traces = read_traces(path)
        self._check(job, traces, path)
        return traces

    def write(self, job: Job, traces: Sequence[Trace]) -> None:
        """Keep a part. Raises UserError if it is not what it should be."""
        path = self.path(job)
        self._check(job, traces, path)
        write_rows(path, traces)

    def _check(self, job: Job, traces: Sequence[Trace], path: Path) -> None:
        found, wanted = [key_of(t) for t in traces], list(self.jobs[job])
        check_once(found, path)
        if found != wanted:
            strange = next((k for k in found if k not in set(wanted)), None)
            what = f"{strange} does not belong there" if strange else f"{len(found)} of {len(wanted)} samples, in order"
            raise UserError(f"{path}: {what}; delete the file and run again")

    def merge(self) -> None:
        """Put the parts into one file, then drop them; both can be killed and done again."""
        if not self.whole:
            left = self.missing()
            if left:
                raise UserError(f"{self.folder}: {len(left)} of {len(self.jobs)} parts are missing ({listed(left)})")
            write_rows(self.file, self._rows())
        for job in self.jobs:
            self.path(job).unlink(missing_ok=True)
        for torn in (*self.folder.glob(".*.tmp"), *self.file.parent.glob(f".{self.file.name}.*.tmp")):
            torn.unlink(missing_ok=True)  # of a process that was killed while it wrote
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _rows(self) -> Iterator[Trace]:
        for job in self.jobs:
            traces = self.read(job)
            if traces is None:  # never a shorter file: somebody else may have merged and dropped it just now
                raise UserError(f"{self.path(job)}: went away while parts were put together; run again")
            yield from traces

    def traces(self) -> list[Trace]:
        """All of them, once whole. Raises UserError if one is missing, strange or there twice."""
        traces = read_traces(self.file)
        found = [key_of(t) for t in traces]
        check_once(found, self.file)
        lost = {k for keys in self.jobs.values() for k in keys} ^ set(found)
        if lost:
            raise UserError(f"{self.file}: {min(lost)} is missing or does not belong there; delete it and run again")
        return traces


def listed(jobs: Sequence[Job], most: int = 6) -> str:
    """``sample 0: batches 3, 7; sample 1: batches 0, …`` for a message."""
    rows: dict[int, list[str]] = {}
    for sample, batch in jobs[:most]:
        rows.setdefault(sample, []).append(str(batch))
    text = "; ".join(f"sample {s}: batches {', '.join(b)}" for s, b in rows.items())
    return text + (", …" if len(jobs) > most else "")
