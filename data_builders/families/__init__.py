"""The embedded problem families: arithmetic, countdown, words."""

from __future__ import annotations

from neureasoner.data_builders.families.arithmetic import Arithmetic
from neureasoner.data_builders.families.base import Family, Narration, Review, extract_answer
from neureasoner.data_builders.families.countdown import Countdown
from neureasoner.data_builders.families.words import Words
from neureasoner.errors import UserError
from neureasoner.traces import Problem

LONGEST_ANSWER = 200  # characters

FAMILIES: dict[str, Family] = {f.name: f for f in (Arithmetic(), Countdown(), Words())}


def family(name: str) -> Family:
    """Look a family up. Raises UserError listing the known ones."""
    if name not in FAMILIES:
        raise UserError(f"unknown problem family '{name}'; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def score(problem: Problem, given: str | None) -> bool:
    """Grade a final answer with the family's own scorer. A missing answer is wrong, and so is an absurdly long one."""
    fits = given is not None and len(given) <= LONGEST_ANSWER
    return fits and family(problem.family).score(problem.question, problem.answer, str(given))


__all__ = ["FAMILIES", "Family", "Narration", "Review", "extract_answer", "family", "score"]
