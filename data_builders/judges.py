"""Judges: trace -> labels. ``ExactJudge`` recomputes every claim; any other judge answers in the same schema.

The criteria are those of core.md §1.3: the intra judge looks at local validity only, the inter judge at progress only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from neureasoner.data_builders.families import Review, extract_answer, family, score
from neureasoner.traces import INTER, INTRA, InterLabel, IntraLabel, Labels, Problem, Trace

BLOCK_STARTS = (INTRA, INTER, "[FAILURE")
MIN_LOOP = 3
LONG_NUMBER = re.compile(r"\d{19,}")


class Judge(Protocol):
    """trace -> Labels. Implementations: ``ExactJudge`` here, ``LLMJudge`` in llm_judges."""

    name: str

    def judge(self, trace: Trace) -> Labels: ...


def review_steps(problem: Problem, texts: Sequence[str]) -> list[Review]:
    """Review every thinking paragraph. Trigger blocks are not reasoning and are passed over."""
    # Numbers beyond 18 digits are made unreadable: int() refuses very long ones, and no honest step holds any.
    shown = [
        "" if t.lstrip().startswith(BLOCK_STARTS) else LONG_NUMBER.sub(lambda m: "#" * len(m[0]), t.strip())
        for t in texts
    ]
    f = family(problem.family)
    return f.review(f.parse(problem.question), shown)


def find_loop(reviews: Sequence[Review]) -> tuple[int, int, list[int]] | None:
    """First stretch with three or more paragraphs that revisit -> (first, one past last, the revisiting steps).

    Two revisits belong to one stretch when at most one other paragraph lies between them.
    """
    seen: set[Any] = set()
    revisits = []
    for i, r in enumerate(reviews):
        if r.key is not None:
            if r.key in seen:
                revisits.append(i)
            seen.add(r.key)
    run: list[int] = []
    for i in revisits:
        if run and i - run[-1] > 2:
            if len(run) >= MIN_LOOP:
                break
            run = []
        run.append(i)
    return (run[0], run[-1] + 1, run) if len(run) >= MIN_LOOP else None


class ExactJudge:
    """Computes the labels with the problem family's own reviewer; no key, no network."""

    name = "exact"

    def judge(self, trace: Trace) -> Labels:
        """Labels of one trace. A trace that did not finish is never correct."""
        texts = [trace.response[s.char_start : s.char_end] for s in trace.steps]
        reviews = review_steps(trace.problem, texts)
        answer = extract_answer(trace.response) if trace.finished else None
        solved = next((i for i, r in enumerate(reviews) if r.solves), None)
        return Labels(
            correct=score(trace.problem, answer),
            answer=answer,
            intra=self._intra(trace, reviews),
            inter=self._inter(trace, reviews),
            answer_token=None if solved is None else trace.steps[solved].token_end,
            judge=self.name,
        )

    @staticmethod
    def _intra(trace: Trace, reviews: list[Review]) -> IntraLabel:
        for i, (step, r) in enumerate(zip(trace.steps, reviews, strict=True)):
            if r.error:
                at = trace.response.find(r.quote, step.char_start, step.char_end)
                span = (at, at + len(r.quote)) if at >= 0 else (step.char_start, step.char_end)
                return IntraLabel(True, r.quote, r.error, r.why, span, i)
        return IntraLabel()

    @staticmethod
    def _inter(trace: Trace, reviews: list[Review]) -> InterLabel:
        loop = find_loop(reviews)
        if loop is None:
            return InterLabel()
        first, end, revisits = loop
        severity = "low" if len(revisits) == MIN_LOOP else "medium" if len(revisits) <= 2 * MIN_LOOP else "high"
        return InterLabel(
            is_stagnant=True,
            loop_detected_at=f"Paragraph {first + 1}",
            loop_theme="equation_shuffling",
            severity=severity,
            explanation=f"{len(revisits)} paragraphs make an attempt or a check that was made before",
            span=(trace.steps[first].char_start, trace.steps[end - 1].char_end),
            steps=(first, end),
            attempts=revisits,
        )


class _Seen(NamedTuple):
    """What the summary needs of one judged trace."""

    family: str
    difficulty: int
    correct: bool
    finished: bool
    error: str  # "" for none
    circling: bool
    thinking: int  # tokens
    after: int  # of them, after the answer first appeared
    tokens: int


class Summary:
    """Counts over judged traces, which need not be kept: accuracy by family and difficulty, wrong steps, circles,
    overthinking."""

    def __init__(self) -> None:
        self.seen: list[_Seen] = []

    def add(self, trace: Trace) -> None:
        """Count a judged trace; one without labels counts for nothing."""
        if (labels := trace.labels) is None:
            return
        thinking = trace.thinking_end
        after = 0 if labels.answer_token is None else max(0, thinking - labels.answer_token)
        error = (labels.intra.error_type or "none") if labels.intra.has_error else ""
        self.seen.append(
            _Seen(
                trace.problem.family, trace.problem.difficulty, labels.correct, trace.finished, error,
                labels.inter.is_stagnant, thinking, after, len(trace.response_ids),
            )
        )  # fmt: skip

    def result(self) -> dict[str, Any]:
        """The counts, rounded. Overthinking is measured on the easiest quarter."""
        seen = self.seen
        rate = lambda flags: round(sum(flags) / len(flags), 4) if flags else None  # noqa: E731
        by: dict[str, list[bool]] = {}
        for s in seen:
            by.setdefault(f"{s.family} {s.difficulty}", []).append(s.correct)
        lowest = sorted(s.difficulty for s in seen)[: max(1, len(seen) // 4)][-1] if seen else 0
        easy = [s for s in seen if s.difficulty <= lowest]
        thinking = sum(s.thinking for s in easy)
        return {
            "n": len(seen),
            "accuracy": rate([s.correct for s in seen]),
            "accuracy_by": {k: rate(v) for k, v in sorted(by.items())},
            "unfinished": rate([not s.finished for s in seen]),
            "wrong_step": rate([bool(s.error) for s in seen]),
            "error_types": dict(Counter(s.error for s in seen if s.error)),
            "circling": rate([s.circling for s in seen]),
            "circling_search": rate([s.circling for s in seen if s.family == "countdown"]),
            "overthinking_easiest": round(sum(s.after for s in easy) / thinking, 4) if thinking else None,
            "tokens_mean": round(sum(s.tokens for s in seen) / max(1, len(seen)), 1),
        }
