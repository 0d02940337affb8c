"""Is the final answer right? The family's own scorer, or mathematical equality with the gold answer."""

from __future__ import annotations

import atexit
import re
import threading
from functools import cache
from importlib import import_module
from typing import Any

from neureasoner.data_builders.families import FAMILIES, extract_answer, score
from neureasoner.data_builders.grading.answers import (
    TESTS,
    final_answer,
    is_number,
    last_boxed,
    last_number,
    option_letter,
    with_unit,
)
from neureasoner.data_builders.grading.options import LETTERS, chosen_option, shown_options
from neureasoner.data_builders.grading.verifier import MathVerifier, quick
from neureasoner.traces import THINK_CLOSE, Problem

MAX_GIVEN = 300  # characters of a final answer; a longer one is none
BOXED_ONLY = ("math500",)  # benchmarks that are graded by boxed answers alone (core.md §1.11)
TIMEOUT = 5.0  # seconds of algebra for one answer

_END = re.compile(r"(?:<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</s>|<end_of_turn>)\s*\Z")  # a trace's text ends with it
_lock = threading.Lock()


def answer_of(problem: Problem, response: str, final_number: bool = False) -> str | None:
    r"""The answer a response gives after its thinking: as the problem's family reads it, else by its gold answer's
    kind: a program, an option letter, or the last ``\boxed`` or what follows ``####``. None if there is none.

    ``final_number``: where the gold answer is a number, units about a marked one are no part of the answer, and where
    nothing is marked, the last number counts; but not for MATH500 (core.md §1.11). So an evaluation reads; what is
    learnt from must be marked.
    """
    if problem.family in FAMILIES:
        return extract_answer(response)
    said = _END.sub("", response.rpartition(THINK_CLOSE)[2])
    if problem.answer.startswith(TESTS):
        program: str | None = _programs().program_of(said)
        return program
    if problem.family in BOXED_ONLY:
        boxed = last_boxed(said)
        said = "" if boxed is None else f"\\boxed{{{boxed}}}"
    if (letter := option_letter(problem.answer)) is not None:
        shown = shown_options(problem.question)
        return chosen_option(said, shown if letter in shown else LETTERS)
    answer, marked = final_answer(said)
    counts = final_number and is_number(problem.answer) and problem.family not in BOXED_ONLY
    if marked:
        return (with_unit(answer) if counts else None) or answer
    # a box that was never closed holds no answer either
    return last_number(said) if counts and "\\boxed" not in said else None


def _programs() -> Any:
    """Grading of programs: theirs is the sandbox, which needs a room above this one, so only when it is needed."""
    return import_module("neureasoner.evaluation.benchmarks.code")


def grade(problem: Problem, given: str | None) -> bool:
    """Is the answer right? Whatever the answer holds, this ends: algebra runs in a process that is killed in time, a
    program in the sandbox.

    Raises UserError where that needs math-verify, a sandbox or a test set, and it is missing.
    """
    if given is not None and problem.answer.startswith(TESTS) and problem.family not in FAMILIES:
        return bool(_programs().grade_program(problem.answer, given))
    if given is None or len(given) > MAX_GIVEN:
        return False
    if problem.family in FAMILIES:
        return score(problem, given)
    return same_answer(problem.answer, given)


def same_answer(gold: str, given: str) -> bool:
    """Whether two mathematical answers are equal, gold first. What cannot be compared is not equal."""
    if not gold.strip() or not given.strip() or max(len(gold), len(given)) > MAX_GIVEN:
        return False
    same = quick(gold, given, boxed=True)
    if same is not None:
        return same
    with _lock:
        (verdict,) = _verifier().check([(gold, f"\\boxed{{{given}}}")])
    return verdict.state == "correct"


@cache
def _verifier() -> MathVerifier:
    """One process for all; starting it takes a second or two, a comparison in it milliseconds."""
    verifier = MathVerifier(workers=1, timeout=TIMEOUT)
    atexit.register(verifier.close)
    return verifier
