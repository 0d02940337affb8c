"""Judges: trace -> labels. ``ExactJudge`` recomputes every claim; any other judge answers in the same schema.

The criteria are those of core.md §1.3: the intra judge looks at local validity only, the inter judge at progress only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

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


def summarise(traces: Sequence[Trace]) -> dict[str, Any]:
    """Counts over judged traces: accuracy by family and difficulty, wrong steps, circles, overthinking."""
    judged = [(t, t.labels) for t in traces if t.labels is not None]
    rate = lambda flags: round(sum(flags) / len(flags), 4) if flags else None  # noqa: E731
    by: dict[str, list[bool]] = {}
    for t, labels in judged:
        by.setdefault(f"{t.problem.family} {t.problem.difficulty}", []).append(labels.correct)
    search = [labels.inter.is_stagnant for t, labels in judged if t.problem.family == "countdown"]
    lowest = sorted((t.problem.difficulty for t, _ in judged))[: max(1, len(judged) // 4)][-1] if judged else 0
    after = total = 0
    for t, labels in judged:
        if t.problem.difficulty <= lowest:
            total += t.thinking_end
            after += 0 if labels.answer_token is None else max(0, t.thinking_end - labels.answer_token)
    return {
        "n": len(judged),
        "accuracy": rate([labels.correct for _, labels in judged]),
        "accuracy_by": {k: rate(v) for k, v in sorted(by.items())},
        "unfinished": rate([not t.finished for t, _ in judged]),
        "wrong_step": rate([labels.intra.has_error for _, labels in judged]),
        "error_types": dict(Counter(labels.intra.error_type for _, labels in judged if labels.intra.has_error)),
        "circling": rate([labels.inter.is_stagnant for _, labels in judged]),
        "circling_search": rate(search),
        "overthinking_easiest": round(after / total, 4) if total else None,
        "tokens_mean": round(sum(len(t.response_ids) for t, _ in judged) / max(1, len(judged)), 1),
    }
