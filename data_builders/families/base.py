"""What a problem family is: it makes problems, writes correct thoughts about them, and reviews anybody's thoughts.

The three abilities are independent on purpose. ``generate`` writes a question; ``parse`` reads the question back (so a
problem file needs nothing but the question); ``review`` recomputes every claim from the question and knows nothing of
how the text was made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

EQUATION = re.compile(r"(?<![\d.])(-?\d+) ([-+*/]) (\d+) = (-?\d+)(?!\d)")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")

SLOWLY, ROUGHLY = "Slowly", "Roughly"


@dataclass
class Narration:
    """A correct solution in first person: thinking paragraphs (no separators) and the answer paragraph after it."""

    paragraphs: list[str]
    answer: str


@dataclass
class Review:
    """What a paragraph does, and what is wrong with it.

    ``key``: identity of the attempt or check it makes (None: it makes none); equal keys mean a revisit.
    ``error``: error type of core.md §1.3, or "" when nothing is wrong; ``quote``: the wrong words, verbatim.
    ``result``: the value the paragraph arrives at; ``solves``: it states the right answer, for the first time or again.
    """

    key: tuple[Any, ...] | None = None
    error: str = ""
    quote: str = ""
    why: str = ""
    result: int | None = None
    solves: bool = False


class Family(Protocol):
    """Protocol of the three families. ``levels`` is the number of difficulties, from 1."""

    name: str
    levels: int

    def generate(self, rng: Random, difficulty: int) -> tuple[str, str]:
        """-> (question, answer)."""

    def parse(self, question: str) -> Any:
        """Question -> task. Raises UserError when the text is not of this family."""

    def score(self, question: str, answer: str, given: str) -> bool:
        """Is the given final answer right? Recomputed from the question, not compared with one stored expression."""

    def narrate(self, task: Any, rng: Random) -> Narration:
        """A correct trace with habits: routes tried and given up, checks whatever the difficulty; no attempt twice."""

    def review(self, task: Any, paragraphs: list[str]) -> list[Review]:
        """One Review per paragraph."""


@dataclass(frozen=True)
class Equation:
    """``a op b = c`` as written, with its place in the paragraph."""

    a: int
    op: str
    b: int
    c: int
    text: str
    start: int

    @property
    def holds(self) -> bool:
        return calculate(self.a, self.op, self.b) == self.c


def calculate(a: int, op: str, b: int) -> int | None:
    """Integer arithmetic; None where the operation leaves the integers."""
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    return a // b if b and a % b == 0 else None


def equations(text: str) -> list[Equation]:
    """All equations written in a text, in order."""
    return [Equation(int(m[1]), m[2], int(m[3]), int(m[4]), m[0], m.start()) for m in EQUATION.finditer(text)]


def write_equation(a: int, op: str, b: int) -> str:
    """``a op b = c`` with the right c."""
    return f"{a} {op} {b} = {calculate(a, op, b)}"


def extract_answer(response: str) -> str | None:
    """The last ``\\boxed{...}`` after the thinking; None if there is none."""
    found = BOXED.findall(response.rsplit("</think>", 1)[-1])
    return found[-1].strip() if found else None


def wrong_equation(equation: Equation, known: set[int] | None) -> Review | None:
    """Review of one equation: false arithmetic, division that leaves the integers, or a number from nowhere."""
    if known is not None:
        for n in (equation.a, equation.b):
            if n not in known:
                return Review(error="hallucination", quote=equation.text, why=f"{n} does not come from anywhere")
    if equation.op == "/" and calculate(equation.a, "/", equation.b) is None:
        return Review(
            error="domain_violation", quote=equation.text, why=f"{equation.a} is not divisible by {equation.b}"
        )
    if not equation.holds:
        right = calculate(equation.a, equation.op, equation.b)
        return Review(
            error="calculation", quote=equation.text, why=f"{equation.a} {equation.op} {equation.b} is {right}"
        )
    return None


def check_key(text: str, eqs: list[Equation]) -> tuple[Any, ...] | None:
    """Identity of the check a paragraph makes (None: it makes none), for families whose answer is one number."""
    if text.startswith(SLOWLY):
        return ("check", "slow", *(q.text for q in eqs[:1]))
    starts = {"Let me check": "line", ROUGHLY: "rough", "Going back": "back"}
    return next((("check", kind) for start, kind in starts.items() if text.startswith(start)), None)


def wrong_conclusion(text: str, eqs: list[Equation], r: Review) -> None:
    """Note a check whose conclusion is not what its last equation gave."""
    said = re.search(r"(?:So it is|It starts with) (-?\d+)", text)
    if said and eqs and int(said[1]) != eqs[-1].c:
        r.error, r.quote, r.why = "logic_non_sequitur", said[0], f"the last equation gave {eqs[-1].c}"


def split_sum(a: int, op: str, b: int) -> list[str]:
    """The same operation in small parts: b by its decimal places (sums, differences), a by its places (products)."""
    parts = lambda n: [int(d) * 10**i for i, d in reversed(list(enumerate(reversed(str(n))))) if d != "0"] or [0]  # noqa: E731
    if op in "+-":
        lines, value = [], a
        for p in parts(b):
            lines.append(write_equation(value, op, p))
            value = int(calculate(value, op, p) or 0)
        return lines
    if op == "*":
        if b > a:
            a, b = b, a
        products = [(p, p * b) for p in parts(a)]
        lines = [f"{p} * {b} = {v}" for p, v in products]
        value = products[0][1]
        for _, v in products[1:]:
            lines.append(write_equation(value, "+", v))
            value += v
        return lines
    return [write_equation(a, op, b)]


def slow_check(a: int, op: str, b: int) -> str:
    """A check that takes one operation apart."""
    return f"{SLOWLY}, {a} {op} {b}: " + ", ".join(split_sum(a, op, b)) + f". So it is {calculate(a, op, b)}."


def pick_checks(rng: Random, kinds: list[str]) -> list[str]:
    """One to three different checks, whatever the difficulty."""
    n = min(len(kinds), rng.choices([1, 2, 3], [0.3, 0.4, 0.3])[0])
    picked = rng.sample(kinds, n)
    if "slow" in kinds and "slow" not in picked and rng.random() < 0.4:
        # Going slowly is what a repair does, so it has to be learned better than anything else.
        picked[rng.randrange(n)] = "slow"
    return picked


def pick_step(rng: Random, steps: list[tuple[int, str, int]]) -> tuple[int, str, int]:
    """The operation to go over slowly: half the time the longest one, else any."""
    if rng.random() < 0.5:
        return rng.choice(steps)
    return max(steps, key=lambda t: len(str(t[0])) + len(str(t[2])) + (t[1] == "*"))
