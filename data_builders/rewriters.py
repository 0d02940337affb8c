"""Rewriters: a correct trace -> the same trace with one failure, the trigger block and a repair (core.md §1.8).

``ExactRewriter`` computes: the failure is one wrong claim of a chosen kind (or a loop over attempts already made), the
diagnosis says what is wrong, the correction goes back, does it slowly and right, and goes on to the right answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from neureasoner.data_builders.families import family, score
from neureasoner.data_builders.families.arithmetic import Expression, read_expression
from neureasoner.data_builders.families.base import Equation, calculate, equations, extract_answer, split_sum
from neureasoner.data_builders.families.countdown import Chain, Countdown, Target
from neureasoner.data_builders.families.words import Story
from neureasoner.data_builders.judges import review_steps
from neureasoner.data_builders.layouts import (
    LOOP_LENGTHS,
    STYLE,
    InterBlock,
    IntraBlock,
    Reconstruction,
    compose,
    validate_inter,
    validate_intra,
)
from neureasoner.traces import THINK_CLOSE, Problem

INTRA_LINES = (
    "Something in my last step is off. I find it, say why and fix it.",
    "There is an error a little above. I locate it, say why and fix it.",
)
INTER_LINES = (
    "I go in circles between tries I made before. I sum up and change the route.",
    "These tries repeat each other. I sum up and take another route.",
)


class Rejected(ValueError):
    """A reference that this rewriter cannot turn into the asked variant, or a result that failed its validation."""


@dataclass(frozen=True)
class Reference:
    """A correct, faultless trace as paragraphs. ``ending``: ``</think>``, a blank line and the answer paragraph."""

    id: str
    problem: Problem
    paragraphs: tuple[str, ...]
    ending: str
    source: str

    @property
    def response(self) -> str:
        return "\n\n".join(self.paragraphs) + "\n" + self.ending


class Rewriter(Protocol):
    """Reference -> Reconstruction. Raises Rejected. Implementations: exact here; a language model later."""

    name: str

    def intra(self, reference: Reference, rng: Random) -> Reconstruction: ...

    def inter(self, reference: Reference, rng: Random) -> Reconstruction: ...


def reference_from(name: str, problem: Problem, response: str, source: str) -> Reference:
    """Split a response into a Reference. Raises Rejected when it has no closed thinking."""
    thinking, close, answer = response.partition(THINK_CLOSE)
    if not close:
        raise Rejected("the thinking is not closed")
    return Reference(name, problem, tuple(p for p in thinking.strip().split("\n\n") if p), close + answer, source)


@dataclass(frozen=True)
class Slip:
    """A wrong version of one paragraph: its text, the wrong words, what they should be and why, the repaired text."""

    wrong: str
    quote: str
    analysis: str
    correction: str
    kind: str


def misread(rng: Random, value: int) -> int:
    """A wrong number that looks like the right one: one digit off by one or two, or a lost or extra ten."""
    digits = list(str(abs(value)))
    while True:
        if rng.random() < 0.25 and value > 19:
            wrong = value + rng.choice([-10, 10])
        else:
            i = rng.randrange(len(digits))
            d = (int(digits[i]) + rng.choice([-2, -1, 1, 2])) % 10
            wrong = int("".join([*digits[:i], str(d), *digits[i + 1 :]]))
        if wrong != value and wrong > 0:
            return wrong


def explain(q: Equation | tuple[int, str, int], said: int) -> str:
    """Diagnosis of a miscalculation: the operation in small parts, then the right value against the wrong one."""
    a, op, b = (q.a, q.op, q.b) if isinstance(q, Equation) else q
    return ", ".join(split_sum(a, op, b)) + f". So it is {calculate(a, op, b)}, not {said}."


def wrong_result(rng: Random, q: Equation) -> tuple[int, str]:
    """A wrong value for an equation and the kind of slip it is."""
    flipped = {"+": q.a - q.b, "-": q.a + q.b}.get(q.op)
    if flipped is not None and flipped > 0 and flipped != q.c and rng.random() < 0.2:
        return flipped, "sign_error"
    return misread(rng, q.c), "algebra_simplification_error"


def slip_arithmetic(task: Expression, before: Sequence[str], text: str, rng: Random) -> Slip:
    """One wrong derivation step: a wrong value, or a wrong copy of what is left."""
    shown = [m[1] for p in before for m in re.finditer(r"Now I have (.+?)\.$", p)]
    expression = read_expression(shown[-1]) if shown else task
    q = equations(text)[0]
    place = expression.next()
    rest = expression.put(place, q.c)
    correction = f"Back to {expression}. {text}"
    if rest.ops and rng.random() < 0.25:
        i = rng.randrange(len(rest.numbers))
        if rng.random() < 0.4 and len(rest.ops) > 1 and rest.ops[-1] != "*":
            bad, kind = Expression(rest.numbers[:-1], rest.ops[:-1]), "dropped_case"
        else:
            changed = (*rest.numbers[:i], misread(rng, rest.numbers[i]), *rest.numbers[i + 1 :])
            bad, kind = Expression(changed, rest.ops), "mistaken_assumption"
        quote = f"Now I have {bad}."
        return Slip(f"{q.text}. {quote}", quote, f"It should read {rest}, not {bad}.", correction, kind)
    c, kind = wrong_result(rng, q)
    bad = expression.put(place, c)
    said = f"{q.a} {q.op} {q.b} = {c}"
    tail = f"Now I have {bad}." if bad.ops else f"So the value is {bad}."
    return Slip(f"{said}. {tail}", said, explain(q, c), correction, kind)


def slip_words(task: Story, before: Sequence[str], text: str, rng: Random) -> Slip:
    """One wrong change of the story: a wrong value (carried on), or a wrong total."""
    totals = [m[1] for p in before for m in re.finditer(r"Now it is (\d+)\.$", p)]
    correction = f"Back to {totals[-1] if totals else task.start}. {text}"
    eqs = equations(text)
    if rng.random() < 0.15:
        c = misread(rng, eqs[-1].c)
        quote = f"Now it is {c}."
        wrong = re.sub(r"Now it is \d+\.$", quote, text)
        return Slip(wrong, quote, f"It should read {eqs[-1].c}, not {c}.", correction, "mistaken_assumption")
    q = rng.choice(eqs)
    c, kind = wrong_result(rng, q)
    said = f"{q.a} {q.op} {q.b} = {c}"
    if q is eqs[0] and len(eqs) == 2:
        total = eqs[1].a + c
        wrong = f"The bags hold {said}. Then {eqs[1].a} + {c} = {total}. Now it is {total}."
    else:
        wrong = re.sub(r"Now it is \d+\.$", f"Now it is {c}.", text.replace(q.text, said))
    return Slip(wrong, said, explain(q, c), correction, kind)


def slip_countdown(task: Target, before: Sequence[str], text: str, rng: Random) -> Slip:
    """One wrong attempt: a wrong value carried on, often a seeming hit; an uneven division; a value below zero."""
    eqs = equations(text)
    opener = text[: eqs[0].start].strip()
    i = rng.randrange(len(eqs))
    q = eqs[i]
    kind, op = "", q.op
    if i == len(eqs) - 1 and q.c != task.target and rng.random() < 0.5:
        c, kind = task.target, "mistaken_assumption"
    elif q.a > q.b > 1 and q.a % q.b and rng.random() < 0.3:
        c, kind, op = q.a // q.b, "invalid_division", "/"
    elif q.a < q.b and rng.random() < 0.15:
        c, kind, op = q.b - q.a, "domain_violation", "-"
    else:
        c, kind = wrong_result(rng, q)
    said, lines, value = f"{q.a} {op} {q.b} = {c}", [e.text for e in eqs[:i]], c
    lines.append(said)
    for e in eqs[i + 1 :]:
        step = calculate(value, e.op, e.b)
        if step is None or step < 0:
            raise Rejected("the wrong value cannot be carried on")
        lines.append(f"{value} {e.op} {e.b} = {step}")
        value = step
    verdict = f"That is {task.target}." if value == task.target else f"Not {task.target}."
    if kind == "invalid_division":
        analysis = f"{q.a} is not divisible by {q.b}."
    elif kind == "domain_violation":
        analysis = f"{q.b} is larger than {q.a}, so {q.a} - {q.b} is below zero."
    else:
        analysis = explain(q, c)
    wrong = f"{opener} {', '.join(lines)}. {verdict}"
    return Slip(wrong, said, analysis, f"Again {text[eqs[0].start :]}", kind)


SLIPS: dict[str, Any] = {"arithmetic": slip_arithmetic, "words": slip_words, "countdown": slip_countdown}
REDOABLE = {
    "arithmetic": lambda p, r: r.key is None and bool(equations(p)),
    "words": lambda p, r: r.key is None and bool(equations(p)) and "Now it is" in p,
    "countdown": lambda p, r: r.key is not None and r.key[0] == "attempt" and ("Not " in p or "That is" in p),
}


class ExactRewriter:
    """Rule-based rewriter for the embedded families; no key, no network. Every result is validated and reviewed."""

    name = "exact"

    def intra(self, reference: Reference, rng: Random) -> Reconstruction:
        """Make one step from the third on wrong, diagnose it, do it again, go on. Raises Rejected."""
        problem, paragraphs = reference.problem, reference.paragraphs
        reviews = review_steps(problem, paragraphs)
        redoable = REDOABLE[problem.family]
        places = [i for i in range(2, len(paragraphs)) if redoable(paragraphs[i], reviews[i])]
        if not places:
            raise Rejected("no step after the second that could go wrong")
        j = rng.choice(places)
        task = family(problem.family).parse(problem.question)
        slip = SLIPS[problem.family](task, paragraphs[:j], paragraphs[j], rng)
        block = IntraBlock(rng.choice(INTRA_LINES), slip.quote, slip.analysis)
        parts = compose(paragraphs[:j], [slip.wrong], block, [slip.correction, *paragraphs[j + 1 :]], reference.ending)
        control = {"error_length": "short", "error_type": slip.kind, "style": STYLE}
        row = Reconstruction(
            f"{reference.id}/intra", problem, "intra", problem.question, **parts, control=control,
            reference_id=reference.id, source=reference.source,
        )  # fmt: skip
        reasons = validate_intra(
            paragraphs, row.response, _grader(problem), keep=min(4, j), failure_span=row.failure_span
        )
        after = [*paragraphs[:j], slip.wrong, "", slip.correction, *paragraphs[j + 1 :]]
        self._reviewed(problem, after, {j}, reasons)
        return row

    def inter(self, reference: Reference, rng: Random) -> Reconstruction:
        """Insert a loop over what was done before, sum it up, pivot, and finish. Raises Rejected."""
        if reference.problem.family == "countdown":
            return self._inter_search(reference, rng)
        return self._inter_checks(reference, rng)

    def _inter_search(self, reference: Reference, rng: Random) -> Reconstruction:
        problem, paragraphs = reference.problem, reference.paragraphs
        task = Countdown().parse(problem.question)
        reviews = review_steps(problem, paragraphs)
        tries = [i for i, r in enumerate(reviews) if r.key and r.key[0] == "attempt"]
        final = next((i for i in tries if reviews[i].solves), None)
        failed = [i for i in tries if "Not " in paragraphs[i] and (final is None or i < final)]
        if final is None or len(failed) < 2:
            raise Rejected("fewer than two failed attempts before the solution")
        j = rng.randint(failed[1] + 1, final)
        made = [i for i in failed if i < j]
        size = rng.choice(LOOP_LENGTHS)
        loop = [self._reworded(paragraphs[rng.choice(made[-3:])], rng) for _ in range(size)]
        chain: Chain = tuple((q.a, q.op, q.b) for q in equations(paragraphs[final]))
        inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}
        lines, need = [], task.target
        for _, op, b in reversed(chain[1:]):
            got = calculate(need, inverse[op], b)
            lines.append(f"{need} {inverse[op]} {b} = {got}")
            need = int(got or 0)
        a, op, b = chain[0]
        last = chain[-1]
        tried = [equations(paragraphs[i]) for i in made[-2:]]
        block = InterBlock(
            rng.choice(INTER_LINES),
            " and ".join(f"{e[0].a} {e[0].op} {e[0].b} ended at {e[-1].c}" for e in tried) + ".",
            f"None of these reaches {task.target}, and trying them again changes nothing.",
            f"I work back from {task.target} instead. The last step could be {last[1]} {last[2]}.",
        )
        back = f"Work back: {', '.join(lines)}. {a} {op} {b} = {need}. That works."
        solution = Countdown.write_attempt(task, chain, "So")
        after = [back, solution, *paragraphs[final + 1 :]]
        return self._inter_row(reference, paragraphs[:j], loop, block, after, "equivalent_reformulations")

    def _inter_checks(self, reference: Reference, rng: Random) -> Reconstruction:
        problem, paragraphs = reference.problem, reference.paragraphs
        reviews = review_steps(problem, paragraphs)
        checks = [i for i, r in enumerate(reviews) if r.key and r.key[0] == "check"]
        solved = next((i for i, r in enumerate(reviews) if r.solves), None)
        value = extract_answer(reference.ending)
        if not checks or solved is None or checks[0] < solved:
            raise Rejected("no check to repeat")
        j = checks[-1] + 1
        size = rng.choice(LOOP_LENGTHS)
        loop = [paragraphs[rng.choice(checks)] for _ in range(size)]
        block = InterBlock(
            rng.choice(INTER_LINES),
            f"I checked the value {value} and then made the same checks again.",
            "The checks agree, and another one adds nothing.",
            "I stop checking and give the answer.",
        )
        return self._inter_row(reference, paragraphs[:j], loop, block, paragraphs[j:], "bounds")

    @staticmethod
    def _reworded(text: str, rng: Random) -> str:
        opener = rng.choice(["Try", "Maybe", "What about", "Next", "Now"])
        return f"{opener} {text[equations(text)[0].start :]}"

    def _inter_row(
        self, reference: Reference, before: Sequence[str], loop: list[str], block: InterBlock, after: Sequence[str],
        theme: str,
    ) -> Reconstruction:  # fmt: skip
        problem = reference.problem
        parts = compose(before, loop, block, after, reference.ending)
        control: dict[str, Any] = {"loop_length_paragraphs": len(loop), "loop_theme": theme, "style": STYLE}
        row = Reconstruction(
            f"{reference.id}/inter", problem, "inter", problem.question, **parts, control=control,
            reference_id=reference.id, source=reference.source,
        )  # fmt: skip
        reasons = validate_inter(
            reference.paragraphs, row.response, _grader(problem), loop_paragraphs=len(loop),
            keep=min(4, len(before)), failure_span=row.failure_span,
        )  # fmt: skip
        self._reviewed(problem, [*before, *loop, "", block.pivot, *after], set(), reasons)
        return row

    @staticmethod
    def _reviewed(problem: Problem, texts: Sequence[str], wrong: set[int], reasons: list[str]) -> None:
        """The exact judge must find the injected error and no other; raise Rejected with all that is wrong."""
        found = {i for i, r in enumerate(review_steps(problem, texts)) if r.error}
        if found != wrong:
            reasons = [*reasons, f"wrong steps at {sorted(found)} instead of {sorted(wrong)}"]
        if reasons:
            raise Rejected("; ".join(reasons))


def _grader(problem: Problem) -> Any:
    return lambda response: score(problem, extract_answer(response))
