"""Which traces are worth looking at, what became of them, and what the viewer needs of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from neureasoner.evaluation.arms import FULL, VANILLA, VOTE
from neureasoner.evaluation.runner import ANSWER
from neureasoner.traces import Trace

BUDGET = 24_000_000  # characters of responses in one page
KINDS = {
    "to_right": "flipped to right",
    "to_wrong": "flipped to wrong",
    "false_alarm": "false alarm",
    "missed": "missed",
    "right": "right",
    "wrong": "wrong",
    "acted": "with an intervention",
    "error": "with a wrong step",
    "circle": "with a circle",
    "cut": "cut off",
}
OF_STEPS = ("false_alarm", "missed", "error", "circle")  # what only a judge of the steps can tell
UNJUDGED = "not judged step by step (only final answers were graded), so no wrong step, circle or false alarm is known"


def is_right(trace: Trace) -> bool:
    """Graded by the judge; an unfinished trace is wrong."""
    return bool(trace.labels and trace.labels.correct and trace.finished)


def steps_judged(trace: Trace) -> bool:
    """Whether a judge looked at the steps; the answers to a benchmark's problems are graded and nothing else."""
    return trace.labels is not None and trace.labels.judge != ANSWER


def interventions(trace: Trace) -> list[dict[str, Any]]:
    """Events that were carried out."""
    return [e for e in trace.events if not e.get("suppressed")]


def _failures(trace: Trace) -> dict[str, int]:
    """First step of each failure that the judge found, by the rule that should see it."""
    labels, found = trace.labels, dict[str, int]()
    if labels and labels.intra.has_error:
        found["intra"] = labels.intra.step or 0
    if labels and labels.inter.is_stagnant:
        found["inter"] = labels.inter.steps[0] if labels.inter.steps else 0
    return found


def false_alarms(trace: Trace) -> list[str]:
    """Rules that stepped in with nothing to see: no wrong step (no circle) had begun by then.

    Closing the thinking is a false alarm where the answer is wrong in the end and had not stood there yet. Where no
    step was judged, none is known.
    """
    if trace.labels is None or not steps_judged(trace):
        return []
    failures, out = _failures(trace), []
    for e in interventions(trace):
        if e["rule"] in ("intra", "inter"):
            if failures.get(e["rule"], e["step"] + 1) > e["step"]:
                out.append(e["rule"])
        elif e["rule"] == "instance" and not is_right(trace):
            stood = trace.labels.answer_token
            if stood is None or stood > e["token"]:
                out.append(e["rule"])
    return sorted(set(out))


def misses(trace: Trace) -> list[str]:
    """Rules that watched, and did not step in at the failure that the judge found or after it.

    Nothing is missed by an arm that watches nothing.
    """
    watching = {s["rule"] for s in trace.meta.get("scores", [])} | {e["rule"] for e in trace.events}
    acted = [(e["rule"], e["step"]) for e in interventions(trace)]
    return [
        rule
        for rule, first in _failures(trace).items()
        if rule in watching and not any(r == rule and step >= first for r, step in acted)
    ]


def kinds_of(trace: Trace) -> list[str]:
    """The ``KINDS`` a trace has by itself (a flip needs another trace beside it)."""
    failures = _failures(trace)
    has = {
        "false_alarm": false_alarms(trace),
        "missed": misses(trace),
        "right": is_right(trace),
        "wrong": not is_right(trace),
        "acted": interventions(trace),
        "error": "intra" in failures,
        "circle": "inter" in failures,
        "cut": not trace.finished,
    }
    return [kind for kind, value in has.items() if value]


def fits(kind: str, trace: Trace, other: Trace | None) -> bool:
    """Whether a trace is of a kind; ``other`` is the same problem and sample in the arm beside it."""
    if kind in ("to_right", "to_wrong"):
        return other is not None and is_right(trace) != is_right(other) and is_right(trace) == (kind == "to_right")
    return kind in kinds_of(trace)


def main_pair(names: Sequence[str]) -> tuple[str, str]:
    """The arms shown side by side at first: vanilla and full, or what comes nearest."""
    base = VANILLA if VANILLA in names else next(iter(names), "")
    rest = [n for n in names if n not in (base, VOTE)]
    return base, FULL if FULL in rest else (rest or [base])[-1]


def paired(traces: Mapping[str, Sequence[Trace]], arm: str = FULL, base: str = VANILLA) -> list[tuple[Trace, Trace]]:
    """(the base's trace, the arm's trace) of the same problem and sample."""
    other = {(t.problem.id, t.meta.get("sample", 0)): t for t in traces.get(base, [])}
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


def first_samples(traces: Mapping[str, Sequence[Trace]]) -> dict[str, list[Trace]]:
    """The first sample of every arm but votes, which is what a page shows."""
    return {n: [t for t in rows if t.meta.get("sample", 0) == 0] for n, rows in traces.items() if n != VOTE}


def pick(traces: Mapping[str, Sequence[Trace]], cap: int, budget: int = BUDGET) -> list[str]:
    """Problems to embed: as many as fit under ``cap`` traces and ``budget`` characters, the kinds taking turns.

    One sample of every arm counts. The most telling come first; the first one is kept whatever its size.
    """
    first = first_samples(traces)
    base, arm = main_pair(list(first))
    room = cap // max(1, len(first))
    kinds: dict[int, list[str]] = {}
    pairs = sorted(((interest(v, f), f.problem.id) for v, f in paired(first, arm, base)), key=lambda x: x[0])
    for (kind, _), problem in pairs:
        kinds.setdefault(kind, []).append(problem)
    queues, chosen = [kinds[k] for k in sorted(kinds)], list[str]()
    while len(chosen) < room and any(queues):
        for queue in queues:
            if queue and len(chosen) < room:
                chosen.append(queue.pop(0))
    for rows in first.values():  # without a pair of arms: simply the first ones
        chosen += [t.problem.id for t in rows if t.problem.id not in chosen][: max(0, room - len(chosen))]
    return _affordable(first, chosen, budget)


def _affordable(first: Mapping[str, Sequence[Trace]], chosen: list[str], budget: int) -> list[str]:
    sizes = dict.fromkeys(chosen, 0)
    for rows in first.values():
        for t in rows:
            if t.problem.id in sizes:
                sizes[t.problem.id] += len(t.response)
    kept, spent = list[str](), 0
    for problem in chosen:
        spent += sizes[problem]
        if kept and spent > budget:
            break
        kept.append(problem)
    return kept


def _runs(tokens: Sequence[int]) -> list[list[int]]:
    """Half-open runs of neighbouring token numbers."""
    runs: list[list[int]] = []
    for t in tokens:
        if runs and runs[-1][1] == t:
            runs[-1][1] = t + 1
        else:
            runs.append([t, t + 1])
    return runs


def view(trace: Trace) -> dict[str, Any]:
    """What the viewer shows of one trace. ``span`` and ``forced`` are characters of ``text``, ``forced_tokens`` tokens.

    steps   [first character, end, mark, first token, end]
    events  [rule, step after which it acted + 1, score, threshold, token]
    scores  [rule, step, token, score], as the controller logged them
    """
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
        "kinds": kinds_of(trace),
        "judged": steps_judged(trace),
        "alarms": false_alarms(trace),
        "misses": misses(trace),
        "steps": [
            [
                s.char_start,
                s.char_end,
                "block" if i in blocks else "loop" if i in loop else "",
                s.token_start,
                s.token_end,
            ]
            for i, s in enumerate(trace.steps)
        ],
        "wrong": intra.step if intra and intra.has_error else None,
        "span": list(intra.span) if intra and intra.span else None,
        "why": intra.explanation if intra else "",
        "circles": bool(inter and inter.is_stagnant),
        "loop": list(inter.span) if inter and inter.span else None,
        "forced": trace.meta.get("forced_chars", []),
        "forced_tokens": _runs(trace.meta.get("forced", [])),
        "events": [
            [e["rule"], e["step"] + 1, round(e.get("score", 1.0), 3), round(e.get("threshold", 0.0), 3), e["token"]]
            for e in acts
        ],
        "scores": [[s["rule"], s["step"], s["token"], round(s["score"], 4)] for s in trace.meta.get("scores", [])],
    }


def thresholds(traces: Mapping[str, Sequence[Trace]]) -> dict[str, dict[str, float]]:
    """Per arm and rule, the threshold its events name."""
    return {
        arm: {e["rule"]: round(e["threshold"], 4) for t in rows for e in t.events if "threshold" in e}
        for arm, rows in traces.items()
    }
