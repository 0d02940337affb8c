"""Chains of small sums that a plain language model works out step by step after a few examples, and their exact judge.

A chain is a start (``Start with 7.``) and one line a step (``Add 5: 7 + 5 = 12.``). What is to be done (``Add 5:``)
is dictated, the rest of the line is the model's. A line is right if it does what was dictated, continues from the
result on the line before (right or wrong), and calculates right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

RIGHT, ARITHMETIC, BROKEN, OTHER, UNREADABLE = "right", "arithmetic", "broken", "other operation", "unreadable"
SIGNS = {"add": "+", "subtract": "-", "multiply by": "*"}
LINE = re.compile(r"([A-Za-z ]+?) (\d+): (\d+) ([-+*]) (\d+) = (\d+)\.")


@dataclass(frozen=True)
class Chain:
    """Where it starts and what is dictated, ``(operation, operand)`` with operations of ``SIGNS``."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def opening(self) -> str:
        """The first line."""
        return f"Start with {self.start}.\n"

    def dictated(self, step: int) -> str:
        """How the line of ``step`` begins."""
        operation, operand = self.steps[step]
        return f"{operation.capitalize()} {operand}:"


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a line (or ``RIGHT``), and the number the next line has to continue from."""

    kind: str
    value: int | None


def apply(value: int, operation: str, operand: int) -> int:
    """``value`` after one step."""
    return {"add": value + operand, "subtract": value - operand, "multiply by": value * operand}[operation]


def draw(rng: random.Random, steps: int, largest: int) -> Chain:
    """A chain of ``steps`` whose results stay between 1 and ``largest``."""
    value = start = rng.randint(3, 20)
    out: list[tuple[str, int]] = []
    while len(out) < steps:
        operation = rng.choice(list(SIGNS))
        operand = rng.randint(2, 3) if operation == "multiply by" else rng.randint(2, 12)
        after = apply(value, operation, operand)
        if 1 <= after <= largest:
            out.append((operation, operand))
            value = after
    return Chain(start, tuple(out))


def solved(chain: Chain) -> str:
    """The chain with right lines, as an example; ends with a blank line."""
    value, text = chain.start, chain.opening
    for step, (operation, operand) in enumerate(chain.steps):
        after = apply(value, operation, operand)
        text += f"{chain.dictated(step)} {value} {SIGNS[operation]} {operand} = {after}.\n"
        value = after
    return text + "\n"


def judge(chain: Chain, lines: Sequence[str]) -> list[Verdict]:
    """Verdicts on the lines of a response, in order; lines beyond the last step are left out."""
    value: int | None = chain.start
    out = []
    for (operation, operand), line in zip(chain.steps, lines, strict=False):
        match = LINE.fullmatch(line.strip())
        if match is None:
            out.append(Verdict(UNREADABLE, None))
            value = None
            continue
        word, asked, left, sign, right, result = match.groups()
        if (word.lower(), int(asked), sign, int(right)) != (operation, operand, SIGNS[operation], operand):
            kind = OTHER
        elif int(left) != value:
            kind = BROKEN
        else:
            kind = RIGHT if apply(int(left), operation, operand) == int(result) else ARITHMETIC
        value = int(result)
        out.append(Verdict(kind, value))
    return out


def first_wrong(verdicts: Sequence[Verdict]) -> int | None:
    """Index of the first line that is not right, or None."""
    return next((i for i, v in enumerate(verdicts) if v.kind != RIGHT), None)
