"""From judged traces to labelled decisions at separators, and the split by problem (core.md §1.7.2).

A sample is a separator. Its label is 1 (failing), 0 (clean) or DROPPED; dropped separators are scored (an alarm
there is a late one) but neither trained on nor counted.

- **intra**: 1 at the separator that closes the first wrong step, 0 before it and in clean traces, dropped after it.
- **inter**, loop ``[s0, s1)``: dropped at ``s0`` and ``s0 + 1``, 1 from ``s0 + 2`` to its end, 0 before it and in clean
  traces, dropped after it.
- **instance**: one sample a trace, at the K-th separator: 1 easy (at least 7 of 8 samples of the problem right, and
  NoThinking right where it is known), 0 hard (at most 3 of 8), else dropped. With other sample counts the same rates.
- **instance, as an exit**: one sample a separator that ``data closings`` forecast: 1 where closing the thinking was
  right as often as leaving it alone, or more often (so also where neither ever was), 0 where it cost something.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neureasoner.errors import UserError
from neureasoner.pairs import Pair
from neureasoner.traces import Labels, Step, Trace, read_records

DROPPED = -1
EASY, HARD, SOLVED_NOTHINKING = 7 / 8, 3 / 8, 0.5
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Closing:
    """What closing the thinking at a separator costs: ``n`` continuations closed there, ``n_left`` left alone.

    first    K of the stage: no separator before the one that closes the K-th step was looked at
    step     index of the step that the separator closes; ``token``: response tokens up to it
    right_*  how many were right; ``tokens_*``: their mean number of further tokens, the closing text included
    answered whether the answer stood already (``Labels.answer_token``)
    """

    trace: str
    problem: str
    family: str
    difficulty: int
    first: int
    step: int
    token: int
    n: int
    n_left: int
    right_closed: int
    right_left: int
    tokens_closed: float
    tokens_left: float
    answered: bool

    @property
    def label(self) -> int:
        """1 where closing costs no right answer, else 0."""
        return int(self.right_closed * self.n_left >= self.right_left * self.n)


def closing_from_dict(row: dict[str, Any]) -> Closing:
    """Inverse of ``asdict``. Raises UserError for a missing or unknown key."""
    try:
        return Closing(**row)
    except TypeError as e:
        raise UserError(f"a forecast has other keys ({e}); run data closings again") from None


def read_closings(path: str | Path) -> list[Closing]:
    """The file of ``data closings``. Raises UserError for a separator that stands in it twice."""
    rows = read_records(path, closing_from_dict, "forecasts")
    seen: set[tuple[str, int]] = set()
    for row in rows:
        if (row.trace, row.step) in seen:
            raise UserError(f"{path}: step {row.step} of trace '{row.trace}' is forecast twice; keep one of the rows")
        seen.add((row.trace, row.step))
    return rows


def closings_of(rows: Sequence[Closing], traces: Sequence[Trace]) -> list[list[Closing]]:
    """The forecasts of each trace, by step. Raises UserError where they are not of these traces."""
    index = {t.id: i for i, t in enumerate(traces)}
    if len(index) < len(traces):
        raise UserError("closings are told by trace id, and the traces have some id twice; give each its own")
    out: list[list[Closing]] = [[] for _ in traces]
    for row in rows:
        i = index.get(row.trace)
        ends = [] if i is None else bounds_of(traces[i])[1:]
        if i is None or row.step >= len(ends) or ends[row.step] != row.token:
            raise UserError(
                f"closings: trace '{row.trace}' has no separator that closes step {row.step} at token {row.token}; "
                "name the traces that data closings read"
            )
        out[i].append(row)
    return [sorted(found, key=lambda c: c.step) for found in out]


def hopeless_problems(rows: Iterable[Closing], traces: Iterable[Trace]) -> set[str]:
    """Problems never solved, neither in a trace nor in a continuation of one."""
    rows, traces = list(rows), list(traces)
    solved = {t.problem.id for t in traces if labels_of(t).correct}
    solved |= {row.problem for row in rows if row.right_closed or row.right_left}
    return {t.problem.id for t in traces} - solved


@dataclass(frozen=True)
class Sample:
    """A separator of ``traces[trace]``: ``bounds`` up to it, the step it closes, its label."""

    trace: int
    step: int
    bounds: tuple[int, ...]
    label: int


def labels_of(trace: Trace) -> Labels:
    """The trace's labels. Raises UserError if it was never judged."""
    if trace.labels is None:
        raise UserError(f"trace '{trace.id}' has no labels; run data judge on these traces first")
    return trace.labels


def closed_steps(trace: Trace) -> list[Step]:
    """Steps a separator closed: those at which a decision falls."""
    return [s for s in trace.steps if s.closed]


def bounds_of(trace: Trace) -> list[int]:
    """``[0, end of step 0, …]`` of the closed steps."""
    return [0, *(s.token_end for s in closed_steps(trace))]


def onset(trace: Trace, level: str) -> int | None:
    """First step at which an alarm is right (intra, inter), or None for a clean trace."""
    labels = labels_of(trace)
    if level == "intra":
        return labels.intra.step if labels.intra.has_error else None
    if not labels.inter.is_stagnant or labels.inter.steps is None:
        return None
    return labels.inter.steps[0] + 2


def is_clean(trace: Trace, level: str) -> bool:
    """Whether the judge found nothing of the kind. A failure it could not place is neither clean nor failing."""
    labels = labels_of(trace)
    return not (labels.intra.has_error if level == "intra" else labels.inter.is_stagnant)


def step_label(trace: Trace, level: str, step: int) -> int:
    """Label of the separator closing ``step`` for intra or inter."""
    labels = labels_of(trace)
    if is_clean(trace, level):
        return 0
    if level == "intra":
        wrong = labels.intra.step
        return DROPPED if wrong is None or step > wrong else int(step == wrong)
    if labels.inter.steps is None:
        return DROPPED
    first, end = labels.inter.steps
    return 0 if step < first else 1 if first + 2 <= step < end else DROPPED


def solving_rates(traces: Iterable[Trace]) -> dict[str, tuple[float, int]]:
    """Problem id -> (share of its traces that are correct, their number)."""
    right: dict[str, list[bool]] = defaultdict(list)
    for t in traces:
        right[t.problem.id].append(labels_of(t).correct)
    return {k: (sum(v) / len(v), len(v)) for k, v in right.items()}


def instance_labels(traces: Sequence[Trace], nothinking: Sequence[Trace] = ()) -> dict[str, int]:
    """Problem id -> 1 easy, 0 hard, DROPPED between."""
    without = solving_rates(nothinking)
    out = {}
    for problem, (rate, _) in solving_rates(traces).items():
        solved = without.get(problem, (1.0, 0))[0] >= SOLVED_NOTHINKING
        out[problem] = 1 if rate >= EASY and solved else 0 if rate <= HARD else DROPPED
    return out


def samples(
    traces: Sequence[Trace],
    level: str,
    window: int,
    easy: dict[str, int] | None = None,
    closings: Sequence[Sequence[Closing]] | None = None,
) -> list[Sample]:
    """All decisions of a level, in order of trace and step. ``window`` is K for instance, else unused.

    With ``closings``, those of each trace, the decisions are the separators forecast (``closings_of``).
    """
    out = []
    for i, trace in enumerate(traces):
        bounds = bounds_of(trace)
        if closings is not None:
            out += [Sample(i, c.step, tuple(bounds[: c.step + 2]), c.label) for c in closings[i]]
            continue
        if level == "instance":
            if len(bounds) > window:
                label = (easy or {}).get(trace.problem.id, DROPPED)
                out.append(Sample(i, window - 1, tuple(bounds[: window + 1]), label))
            continue
        for step in range(len(bounds) - 1):
            out.append(Sample(i, step, tuple(bounds[: step + 2]), step_label(trace, level, step)))
    return out


def split_problems(traces: Iterable[Trace], validation: float, test: float, seed: int) -> dict[str, str]:
    """Problem id -> split. Problems are put in the order of a seeded hash, so the same file gives the same split."""
    ids = {t.problem.id for t in traces}
    order = sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    n_test, n_val = (max(1, round(share * len(order))) for share in (test, validation))
    if n_test + n_val >= len(order):
        raise UserError(f"{len(order)} problems are too few to split into train, validation and test; sample more")
    names = ["test"] * n_test + ["validation"] * n_val + ["train"] * (len(order) - n_test - n_val)
    return dict(zip(order, names, strict=True))


def failure(trace: Trace, level: str) -> tuple[int, int] | None:
    """``(first step, one past last)`` of the judged failure of a level, or None."""
    labels = labels_of(trace)
    if level == "intra":
        step = labels.intra.step if labels.intra.has_error else None
        return None if step is None else (step, step + 1)
    return labels.inter.steps if labels.inter.is_stagnant else None


def instance_pairs(traces: Sequence[Trace], nothinking: Sequence[Trace], first_steps: int) -> Iterator[Pair]:
    """Pair easy with hard problems of a family, first K steps each; easy and hard as in core.md §1.7.2."""
    easy = instance_labels(traces, nothinking)
    sides: dict[tuple[str, int], list[Trace]] = {}
    for trace in traces:
        if len(closed_steps(trace)) >= first_steps and easy[trace.problem.id] in (0, 1):
            sides.setdefault((trace.problem.family, easy[trace.problem.id]), []).append(trace)
    for name in sorted({f for f, _ in sides}):
        for i, (hard, simple) in enumerate(zip(sides.get((name, 0), []), sides.get((name, 1), []), strict=False)):
            yield Pair(f"{name}-{i}/instance", "instance", 0, first_steps, 1, hard, simple)
