"""Which traces are worth looking at, and what the viewer needs of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neureasoner.evaluation.arms import FULL, VANILLA, VOTE
from neureasoner.traces import Trace


def is_right(trace: Trace) -> bool:
    """Graded by the judge; an unfinished trace is wrong."""
    return bool(trace.labels and trace.labels.correct and trace.finished)


def interventions(trace: Trace) -> list[dict[str, Any]]:
    """Events that were carried out."""
    return [e for e in trace.events if not e["suppressed"]]


def paired(traces: Mapping[str, Sequence[Trace]], arm: str = FULL) -> list[tuple[Trace, Trace]]:
    """(vanilla's trace, the arm's trace) of the same problem and sample."""
    other = {(t.problem.id, t.meta.get("sample", 0)): t for t in traces.get(VANILLA, [])}
    keys = [((t.problem.id, t.meta.get("sample", 0)), t) for t in traces.get(arm, [])]
    return [(other[key], t) for key, t in keys if key in other]


def interest(vanilla: Trace, full: Trace) -> tuple[int, int]:
    """Sort key (kind, size). Kinds: 0, 1 right only after an intervention; 2 wrong only after one; 3 right twice."""
    acted, better, worse = bool(interventions(full)), is_right(full), is_right(vanilla)
    if acted and better and not worse:
        repaired = any(e["rule"] in ("intra", "inter") for e in interventions(full))
        return (0 if repaired else 1), len(full.response_ids)
    if acted and worse and not better:
        return 2, len(full.response_ids)
    if acted and better:
        return 3, len(full.response_ids) - len(vanilla.response_ids)
    return (4 if acted else 5), 0


def pick(traces: Mapping[str, Sequence[Trace]], cap: int) -> list[str]:
    """Problems to embed: as many as fit under ``cap`` traces with one sample of every arm, the kinds taking turns.

    The most telling come first.
    """
    arms = [name for name in traces if name != VOTE]
    room = cap // max(1, len(arms))
    kinds: dict[int, list[str]] = {}
    first = {name: [t for t in rows if t.meta.get("sample", 0) == 0] for name, rows in traces.items()}
    pairs = sorted(((interest(v, f), f.problem.id) for v, f in paired(first)), key=lambda x: x[0])
    for (kind, _), problem in pairs:
        kinds.setdefault(kind, []).append(problem)
    queues, chosen = [kinds[k] for k in sorted(kinds)], list[str]()
    while len(chosen) < room and any(queues):
        for queue in queues:
            if queue and len(chosen) < room:
                chosen.append(queue.pop(0))
    for name in arms:  # without a pair of arms: simply the first ones
        chosen += [t.problem.id for t in first[name] if t.problem.id not in chosen][: max(0, room - len(chosen))]
    return chosen


def view(trace: Trace) -> dict[str, Any]:
    """What the viewer shows of one trace; spans are characters of ``text``."""
    labels, p = trace.labels, trace.problem
    intra, inter = (labels.intra, labels.inter) if labels else (None, None)
    acts = interventions(trace)
    blocks = {e["step"] + 1 for e in acts}  # the paragraph that an intervention starts
    loop = range(*inter.steps) if inter and inter.steps else range(0)
    return {
        "id": trace.id,
        "arm": trace.meta.get("arm", ""),
        "problem": p.id,
        "family": p.family,
        "difficulty": p.difficulty,
        "question": p.question,
        "gold": p.answer,
        "text": trace.response,
        "right": is_right(trace),
        "answer": labels.answer if labels else None,
        "tokens": len(trace.response_ids),
        "cut": not trace.finished,
        "steps": [
            [s.char_start, s.char_end, "block" if i in blocks else "loop" if i in loop else ""]
            for i, s in enumerate(trace.steps)
        ],
        "wrong": intra.step if intra and intra.has_error else None,
        "span": list(intra.span) if intra and intra.span else None,
        "why": intra.explanation if intra else "",
        "circles": bool(inter and inter.is_stagnant),
        "forced": trace.meta.get("forced_chars", []),
        "events": [[e["rule"], e["step"] + 1, round(e["score"], 3), round(e["threshold"], 3)] for e in acts],
    }
