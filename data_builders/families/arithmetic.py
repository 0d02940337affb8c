"""Multi-step arithmetic: one expression with ``+ - *``, products before sums."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from neureasoner.data_builders.families.base import (
    ROUGHLY,
    SLOWLY,
    Narration,
    Review,
    calculate,
    check_key,
    equations,
    pick_checks,
    pick_step,
    slow_check,
    write_equation,
    wrong_conclusion,
    wrong_equation,
)
from neureasoner.errors import UserError

QUESTION = re.compile(r"Calculate (\d+(?: [-+*] \d+)+)\.")
EXPRESSION = re.compile(r"\d+(?: [-+*] \d+)*")
# (number of operations, products, largest term, largest first factor, largest second factor)
GRADES = [(2, 1, 20, 9, 9), (3, 1, 40, 12, 9), (3, 2, 60, 15, 9), (4, 2, 99, 20, 9), (5, 2, 150, 30, 9)]


@dataclass(frozen=True)
class Expression:
    """Alternating numbers and operators; ``numbers`` is one longer than ``ops``."""

    numbers: tuple[int, ...]
    ops: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.numbers[0]) + "".join(f" {o} {n}" for o, n in zip(self.ops, self.numbers[1:], strict=True))

    def legal(self, i: int) -> bool:
        """May operation i be carried out now without changing the value?"""
        if self.ops[i] == "*":
            return i == 0 or self.ops[i - 1] != "*"
        return "*" not in self.ops and i == 0

    def reduce(self, i: int) -> Expression:
        c = calculate(self.numbers[i], self.ops[i], self.numbers[i + 1])
        assert c is not None
        return self.put(i, c)

    def put(self, i: int, c: int) -> Expression:
        return Expression((*self.numbers[:i], c, *self.numbers[i + 2 :]), self.ops[:i] + self.ops[i + 1 :])

    def next(self) -> int:
        return self.ops.index("*") if "*" in self.ops else 0

    def value(self) -> int:
        e = self
        while e.ops:
            e = e.reduce(e.next())
        return e.numbers[0]


def read_expression(text: str) -> Expression:
    parts = text.split()
    return Expression(tuple(int(p) for p in parts[::2]), tuple(parts[1::2]))


class Arithmetic:
    name = "arithmetic"
    levels = len(GRADES)

    def generate(self, rng: Random, difficulty: int) -> tuple[str, str]:
        n_ops, n_products, top, factor, second = GRADES[difficulty - 1]
        while True:
            at: set[int] = set()
            while len(at) < n_products:
                i = rng.randrange(n_ops)
                if i - 1 not in at and i + 1 not in at:  # no chains of three factors
                    at.add(i)
                if n_products == 2 and n_ops == 3 and at == {1}:
                    at = set()
            ops = ["*" if i in at else rng.choice("+-") for i in range(n_ops)]
            numbers = []
            for i in range(n_ops + 1):
                if i in at:
                    numbers.append(rng.randint(2, factor))
                elif i - 1 in at:
                    numbers.append(rng.randint(2, second))
                else:
                    numbers.append(rng.randint(2, top))
            e = Expression(tuple(numbers), tuple(ops))
            if self._positive(e):
                return f"Calculate {e}.", str(e.value())

    @staticmethod
    def _positive(e: Expression) -> bool:
        while e.ops:
            e = e.reduce(e.next())
            if min(e.numbers) < 0:
                return False
        return True

    def parse(self, question: str) -> Expression:
        m = QUESTION.search(question)
        if not m:
            raise UserError(f"not an arithmetic question (expected 'Calculate 2 + 3 * 4.'): {question!r}")
        return read_expression(m[1])

    def score(self, question: str, answer: str, given: str) -> bool:
        value = self.parse(question).value()
        return given.strip().lstrip("+").replace(",", "") == str(value)

    def one_line(self, task: Expression) -> list[str]:
        lines, e = [], task
        while e.ops:
            i = e.next()
            lines.append(write_equation(e.numbers[i], e.ops[i], e.numbers[i + 1]))
            e = e.reduce(i)
        return lines

    def narrate(self, task: Expression, rng: Random) -> Narration:
        value = task.value()
        out = [rng.choice([f"I need the value of {task}.", f"Let me work out {task}.", f"The task is {task}."])]
        if "*" in task.ops:
            out.append(rng.choice(["Products come first, then left to right.", "First the products, then the rest."]))
            terms = [i for i, o in enumerate(task.ops) if o != "*"]
            if terms and rng.random() < 0.25:
                i = rng.choice(terms)
                out.append(
                    f"Maybe {write_equation(task.numbers[i], task.ops[i], task.numbers[i + 1])} helps. "
                    "But a product is still open, so I drop that."
                    if calculate(task.numbers[i], task.ops[i], task.numbers[i + 1]) >= 0  # type: ignore[operator]
                    else "Maybe I can group the terms. That gets messy, so I drop it."
                )
        else:
            out.append("There are no products, so I go from left to right.")
        e, steps = task, list[tuple[int, str, int]]()
        while e.ops:
            i = e.next()
            a, op, b = e.numbers[i], e.ops[i], e.numbers[i + 1]
            steps.append((a, op, b))
            e = e.reduce(i)
            out.append(f"{write_equation(a, op, b)}. " + (f"Now I have {e}." if e.ops else f"So the value is {e}."))
        for kind in pick_checks(rng, ["line", "back", "slow", "rough"]):
            out.append(self._check(kind, task, value, pick_step(rng, steps)))
        out.append(rng.choice([f"I am sure now. The answer is {value}.", f"So the answer is {value}."]))
        return Narration(out, ", ".join(self.one_line(task)) + f". The answer is \\boxed{{{value}}}.")

    def _check(self, kind: str, task: Expression, value: int, step: tuple[int, str, int]) -> str:
        if kind == "line":
            return "Let me check. " + ", ".join(self.one_line(task)) + ". It agrees."
        if kind == "slow":
            return slow_check(*step)
        e = task
        while "*" in e.ops:
            e = e.reduce(e.next())
        if kind == "back":
            lines, at = [], value
            for o, n in reversed(list(zip(e.ops, e.numbers[1:], strict=True))):
                inverse = "-" if o == "+" else "+"
                lines.append(write_equation(at, inverse, n))
                at = int(calculate(at, inverse, n) or 0)
            if not lines:
                return f"Going back, {value} is just the product. It fits."
            return f"Going back from {value}: " + ", ".join(lines) + f". It starts with {at}, that fits."
        tens = [round(n, -1) for n in e.numbers]
        lines, at = [], tens[0]
        for o, n in zip(e.ops, tens[1:], strict=True):
            lines.append(write_equation(at, o, n))
            at = int(calculate(at, o, n) or 0)
        about = ", ".join(lines) if lines else str(at)
        return f"{ROUGHLY}, {about}. That is near {value}."

    def review(self, task: Expression, paragraphs: list[str]) -> list[Review]:
        current, value, known, out = task, task.value(), set(task.numbers), []
        passed = {str(task)}
        for text in paragraphs:
            r, eqs = Review(), equations(text)
            back = re.match(rf"Back to ({EXPRESSION.pattern})\.", text)
            if back and back[1] in passed:
                current = read_expression(back[1])
            elif back:
                r.error, r.quote, r.why = "hallucination", back[0], "there was no such expression before"
            free = text.startswith((SLOWLY, ROUGHLY))
            r.key = check_key(text, eqs)
            if text.startswith("Maybe"):
                r.key = ("route", text)
            for q in eqs:
                bad = wrong_equation(q, None if free else known)
                if bad and not r.error:
                    r.error, r.quote, r.why = bad.error, bad.quote, bad.why
                known.update((q.c, int(calculate(q.a, q.op, q.b) or 0)))
            if eqs:
                r.result = eqs[-1].c
            if eqs and r.key is None and not free:
                current = self._derive(text, current, r)
                known.update(current.numbers)
                passed.add(str(current))
            claim = re.search(r"(?:The answer is|the answer is|So the value is) (-?\d+)", text)
            if claim and not r.error and current.ops:
                r.error, r.quote, r.why = "dropped_case", claim[0], f"{current} is not finished"
            elif claim and not r.error and int(claim[1]) != current.numbers[0]:
                r.error, r.quote = "hallucination", claim[0]
                r.why = f"the steps gave {current.numbers[0]}"
            if not r.error:
                wrong_conclusion(text, eqs, r)
            r.solves = bool(claim and int(claim[1]) == value)
            out.append(r)
        return out

    @staticmethod
    def _derive(text: str, current: Expression, r: Review) -> Expression:
        """Follow one derivation step; note in ``r`` what is wrong; return the expression the text goes on with."""
        eqs = equations(text)
        expected = current
        for q in eqs:
            places = [
                i
                for i, o in enumerate(expected.ops)
                if (expected.numbers[i], o, expected.numbers[i + 1]) == (q.a, q.op, q.b)
            ]
            legal = [i for i in places if expected.legal(i)]
            if legal:
                expected = expected.put(legal[0], q.c)
            elif not r.error:
                r.error, r.quote = "logic_non_sequitur", q.text
                r.why = f"{q.a} {q.op} {q.b} is not the next part of {current}"
        said = re.search(r"Now I have (" + EXPRESSION.pattern + r")\.", text)
        final = re.search(r"So the value is (-?\d+)", text)
        if said:
            stated = read_expression(said[1])
            if str(stated) != str(expected) and not r.error:
                new = [n for n in stated.numbers if n not in expected.numbers]
                fewer = len(stated.numbers) < len(expected.numbers)
                r.error = "hallucination" if new else "dropped_case" if fewer else "logic_non_sequitur"
                r.quote, r.why = said[0], f"it should read {expected}"
            return stated
        if final:
            if expected.ops and not r.error:
                r.error, r.quote, r.why = "dropped_case", final[0], f"{expected} is not finished"
            return Expression((int(final[1]),), ())
        return expected
