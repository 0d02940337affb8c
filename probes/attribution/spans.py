"""Which tokens show a failure, and which clean tokens to hold against them (core.md §1.2.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from neureasoner.errors import UserError
from neureasoner.probes.config import LocateConfig
from neureasoner.probes.features import LEVELS
from neureasoner.probes.labels import closed_steps, is_clean, labels_of
from neureasoner.traces import Step, Trace

SIMILAR = 0.5  # character 3-gram Jaccard of a repeated attempt
Span = tuple[Trace, list[int]]  # a trace and target positions in its response


def _trigrams(text: str) -> set[str]:
    flat = re.sub(r"\s+", " ", text.strip().lower())
    return {flat[i : i + 3] for i in range(max(1, len(flat) - 2))}


def _check_steps(trace: Trace, level: str, steps: Sequence[int]) -> None:
    """A label may be of an older segmentation than the trace; an index error would not say so."""
    for step in steps:
        if not 0 <= step < len(trace.steps):
            raise UserError(
                f"trace '{trace.id}': its {level} label names step {step}, but its thinking has {len(trace.steps)} "
                "steps; run data judge on these traces again"
            )


def loop_openings(trace: Trace) -> list[int]:
    """Steps that open a repeated attempt: the judge's, else the loop's first and those like an earlier one (§1.2.2).

    Raises UserError for a loop that reaches beyond the trace's steps.
    """
    label = labels_of(trace).inter
    if label.attempts or label.steps is None:
        _check_steps(trace, "inter", label.attempts)
        return label.attempts
    first, end = label.steps
    _check_steps(trace, "inter", range(first, end))
    grams = {
        i: _trigrams(trace.response[trace.steps[i].char_start : trace.steps[i].char_end]) for i in range(first, end)
    }
    like = lambda a, b: len(a & b) / max(1, len(a | b)) >= SIMILAR  # noqa: E731
    return [i for i in range(first, end) if i == first or any(like(grams[i], grams[j]) for j in range(first, i))]


def _tokens(steps: Sequence[Step], drop_separator: bool) -> list[int]:
    """Response positions of ``steps``, without closing separators if asked (a step keeps at least one token)."""
    out: list[int] = []
    for s in steps:
        end = s.token_end - 1 if drop_separator and s.closed and s.token_end - s.token_start > 1 else s.token_end
        out.extend(range(s.token_start, end))
    return out


def spans(
    traces: Sequence[Trace], level: str, config: LocateConfig, easy: dict[str, int]
) -> tuple[list[Span], list[Span]]:
    """Failing spans and matched clean ones, at most ``max_traces`` each, in a seeded order.

    Clean spans match the failing ones: as many steps of a clean trace (intra, inter), the first K steps of a hard
    problem (instance). Traces without a closed step, or with fewer than K (instance), give no span.

    Raises UserError for a label that names a step its trace does not have.
    """
    rng = np.random.default_rng([config.seed, LEVELS.index(level)])
    failing: list[tuple[Trace, list[Step]]] = []
    clean: list[tuple[Trace, list[Step]]] = []
    counts: list[int] = []
    for i in rng.permutation(len(traces)):
        trace = traces[i]
        steps = closed_steps(trace)
        if level == "instance":
            side = {1: failing, 0: clean}.get(easy[trace.problem.id])
            if side is not None and len(steps) >= config.first_steps:
                side.append((trace, steps[: config.first_steps]))
            continue
        if is_clean(trace, level):
            if steps:
                clean.append((trace, steps))
            continue
        wrong = [labels_of(trace).intra.step] if level == "intra" else list(loop_openings(trace))
        placed = [w for w in wrong if w is not None]
        _check_steps(trace, level, placed)
        if placed:
            failing.append((trace, [trace.steps[w] for w in placed]))
            counts.append(len(placed))
    failing, clean = failing[: config.max_traces], clean[: config.max_traces]
    if level != "instance" and counts:
        matched = []
        for trace, steps in clean:
            n = min(int(rng.choice(counts)), len(steps))
            matched.append((trace, [steps[j] for j in sorted(rng.choice(len(steps), n, replace=False))]))
        clean = matched
    build = lambda side: [(t, at) for t, s in side if (at := _tokens(s, config.exclude_separators))]  # noqa: E731
    return build(failing), build(clean)
