"""Problems and traces: the records that travel between the rooms, and their jsonl form.

Offsets: a span is half open. Character offsets count in ``Trace.response``; token offsets count in
``Trace.response_ids`` (0 is the first generated token). Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from neureasoner.artifacts import write_lines
from neureasoner.errors import UserError

R = TypeVar("R")
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
INTRA, INTER = "<INTRA>", "<INTER>"
# What closes the thinking of an easy question (core.md §1.10). The original NoThinking sentence has "I think" in it.
FINISHED = f"Okay, I have finished thinking.\n{THINK_CLOSE}\n\n"
# What stands before a thinking that the prompt does not open.
OPENED = f"{THINK_OPEN}\n"
# What NoThinking adds after the opened thinking (core.md §5.9); which texts a prompt needs: ``neureasoner.thinking``.
NO_THINKING = f"Okay, I think I have finished thinking.\n{THINK_CLOSE}\n\n"


@dataclass
class Problem:
    """One question with a verifiable answer. ``difficulty`` is 1 (easiest) upwards within its family."""

    id: str
    family: str
    difficulty: int
    question: str
    answer: str


@dataclass
class Step:
    """A paragraph of the thinking text with the separator that closes it.

    ``closed`` is False for a last paragraph that generation cut off (or that ``</think>`` ended without a separator).
    """

    char_start: int
    char_end: int
    token_start: int
    token_end: int
    closed: bool = True


@dataclass
class IntraLabel:
    """Answer of an intra judge (core.md §1.3), plus where the wrong step lies.

    ``error_type``: calculation, logic_non_sequitur, domain_violation, hallucination, dropped_case or none.
    ``span``: characters of the quoted error in the response; ``step``: index of the step that holds it.
    """

    has_error: bool = False
    first_error_step: str | None = None
    error_type: str = "none"
    explanation: str = ""
    span: tuple[int, int] | None = None
    step: int | None = None


@dataclass
class InterLabel:
    """Answer of an inter judge (core.md §1.3), plus the loop's extent.

    ``steps``: first and one-past-last step of the loop; ``attempts``: the opening steps of its repeated attempts.
    ``loop_theme``: modular_checks, bounds_restatement, equation_shuffling or none.
    """

    is_stagnant: bool = False
    loop_detected_at: str | None = None
    loop_theme: str = "none"
    severity: str = "none"
    explanation: str = ""
    span: tuple[int, int] | None = None
    steps: tuple[int, int] | None = None
    attempts: list[int] = field(default_factory=list)


@dataclass
class Labels:
    """Everything a judge says of one trace. ``answer_token``: first thinking token after which the gold one stood."""

    correct: bool
    answer: str | None
    intra: IntraLabel
    inter: InterLabel
    answer_token: int | None = None
    judge: str = "exact"


@dataclass
class Trace:
    """A problem and one response to it. ``response_ids`` holds every generated or forced token, EOS included."""

    id: str
    problem: Problem
    prompt_ids: list[int]
    response_ids: list[int]
    response: str
    steps: list[Step]
    finished: bool
    labels: Labels | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def thinking_end(self) -> int:
        """Number of leading response tokens that belong to the thinking (``</think>`` excluded)."""
        return int(self.meta.get("thinking_tokens", len(self.response_ids)))


def problem_from_dict(row: dict[str, Any]) -> Problem:
    """Check one row of a problem file. Raises UserError naming the missing or ill-typed key."""
    for f in fields(Problem):
        if f.name not in row:
            raise UserError(f"key '{f.name}' is missing (a problem needs id, family, difficulty, question, answer)")
    try:
        difficulty = int(row["difficulty"])
    except (TypeError, ValueError):
        raise UserError(f"key 'difficulty' must be a whole number, got {row['difficulty']!r}") from None
    return Problem(str(row["id"]), str(row["family"]), difficulty, str(row["question"]), str(row["answer"]))


def _tuple(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))


def trace_from_dict(row: dict[str, Any]) -> Trace:
    """Inverse of ``dataclasses.asdict`` for a Trace. Raises UserError naming a missing key."""
    try:
        labels = row.get("labels")
        if labels is not None:
            intra, inter = dict(labels["intra"]), dict(labels["inter"])
            intra["span"] = _tuple(intra.get("span"))
            inter["span"], inter["steps"] = _tuple(inter.get("span")), _tuple(inter.get("steps"))
            labels = Labels(**{**labels, "intra": IntraLabel(**intra), "inter": InterLabel(**inter)})
        return Trace(
            id=row["id"],
            problem=problem_from_dict(row["problem"]),
            prompt_ids=row["prompt_ids"],
            response_ids=row["response_ids"],
            response=row["response"],
            steps=[Step(**s) for s in row["steps"]],
            finished=row["finished"],
            labels=labels,
            events=row.get("events", []),
            meta=row.get("meta", {}),
        )
    except KeyError as e:
        raise UserError(f"key {e} is missing from a trace") from None
    except TypeError as e:
        raise UserError(f"a trace has a key that does not belong: {e}") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object). Raises UserError with the line number for a malformed row."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number}: not UTF-8 text") from None
            except json.JSONDecodeError as e:
                raise UserError(f"{path}, line {number}: not JSON ({e.msg})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def read_records(path: str | Path, build: Callable[[dict[str, Any]], R], what: str) -> list[R]:
    """Read a jsonl file of records. Raises UserError with the line of the first bad row, or for an empty file."""
    return list(stream_records(path, build, what))


def stream_records(path: str | Path, build: Callable[[dict[str, Any]], R], what: str) -> Iterator[R]:
    """The records of a jsonl file, one in memory at a time. Raises as ``read_records``, when it comes to the row."""
    empty = True
    for number, row in read_jsonl(path):
        try:
            record = build(row)
        except UserError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
        empty = False
        yield record
    if empty:
        raise UserError(f"{path}: holds no {what}")


def read_problems(path: str | Path) -> list[Problem]:
    """Read a problem file (jsonl: id, family, difficulty, question, answer)."""
    problems = read_records(path, problem_from_dict, "problems")
    seen: set[str] = set()
    for p in problems:
        if p.id in seen:
            raise UserError(f"{path}: problem id '{p.id}' occurs twice; ids must be unique")
        seen.add(p.id)
    return problems


def read_traces(path: str | Path) -> list[Trace]:
    """Read a trace file (jsonl, one Trace a line)."""
    return read_records(path, trace_from_dict, "traces")


def stream_traces(path: str | Path) -> Iterator[Trace]:
    """As ``read_traces``, one trace in memory at a time."""
    return stream_records(path, trace_from_dict, "traces")


def write_rows(path: str | Path, rows: Iterable[Any]) -> None:
    """Write dataclass instances or mappings as jsonl, atomically, one after the other as they come."""
    values = (asdict(r) if is_dataclass(r) and not isinstance(r, type) else r for r in rows)
    write_lines(path, (json.dumps(v, ensure_ascii=False) + "\n" for v in values))
