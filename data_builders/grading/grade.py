"""Is the final answer right? The family's own scorer, or mathematical equality with the gold answer."""

from __future__ import annotations

import atexit
import re
import threading
from functools import cache

from neureasoner.data_builders.families import FAMILIES, extract_answer, score
from neureasoner.data_builders.grading.answers import final_answer, quick
from neureasoner.data_builders.grading.verifier import MathVerifier
from neureasoner.traces import THINK_CLOSE, Problem

MAX_GIVEN = 300  # characters of a final answer; a longer one is none
TIMEOUT = 5.0  # seconds of algebra for one answer

_END = re.compile(r"(?:<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</s>|<end_of_turn>)\s*\Z")  # a trace's text ends with it
_lock = threading.Lock()


def answer_of(problem: Problem, response: str) -> str | None:
    r"""The answer a response gives after its thinking: as the problem's family reads it, else the last ``\boxed`` or
    what follows ``####``. None if there is none."""
    if problem.family in FAMILIES:
        return extract_answer(response)
    answer, marked = final_answer(_END.sub("", response.rpartition(THINK_CLOSE)[2]))
    return answer if marked else None


def grade(problem: Problem, given: str | None) -> bool:
    """Is the answer right? Whatever the answer holds, this ends: algebra runs in a process that is killed in time.

    Raises UserError where that needs math-verify and it is missing.
    """
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
