"""Programs graded: run in the sandbox on every test, what comes out compared here (core.md §1.11).

Comparison as in LiveCodeBench: outputs are equal line by line up to white space at their ends, or number by number; a
function's value is equal as JSON. A suite's ``tolerance`` allows for more.
"""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

from neureasoner.evaluation.benchmarks.suites import Suite, arguments, find
from neureasoner.evaluation.sandbox import Limits, Run, Sandbox

LIMITS = Limits(cpu_seconds=6.0, wall_seconds=18.0)  # of one test; LiveCodeBench allows six seconds
MAX_PROGRAM = 200_000  # characters
# Possessive, so that no text of a model or of its program takes longer than its length.
_BLOCK = re.compile(r"```[ \t]*+([\w+.-]*+)[^\n]*+(?:\n(.*?)(?:```|\Z)|\Z)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:[eE][-+]?\d{1,4})?", re.ASCII)
_PYTHON = {"", "python", "python3", "py", "py3"}


@dataclass(frozen=True)
class Graded:
    """``state``: passed, wrong (a test came out wrong), or how the program ended (crashed, timeout, memory, …)."""

    state: str
    test: int = 0  # the first failing one, from 1
    tests: int = 0
    level: str = ""  # containment


def program_of(text: str) -> str | None:
    """The last code block of an answer that could be Python; None without one."""
    found = [m[2] for m in _BLOCK.finditer(text) if m[1].lower() in _PYTHON and (m[2] or "").strip()]
    return found[-1] if found else None


@cache
def _sandbox(accept: str) -> Sandbox:
    return Sandbox(accept, LIMITS)


def sandbox() -> Sandbox:
    """The sandbox of this machine. ``NEUREASONER_SANDBOX=limits`` accepts the weaker level. Raises Unsafe."""
    return _sandbox(os.environ.get("NEUREASONER_SANDBOX") or "namespaces")


def grade_program(answer: str, program: str) -> bool:
    """Whether a program passes every test of the suite that a problem's ``answer`` names."""
    return len(program) <= MAX_PROGRAM and judge(program, find(answer), sandbox()).state == "passed"


def judge(program: str, suite: Suite, box: Sandbox, limits: Limits | None = None) -> Graded:
    """Run the tests in turn, each in a sandbox of its own, up to the first that fails."""
    level = box.containment.level
    for number, (given, wanted) in enumerate(suite.tests, 1):
        if suite.function:
            run = box.call(program, suite.function, arguments(given), limits)
        else:
            run = box.run(program, given, limits)
        state = run.status if run.status != "finished" else "passed" if _right(run, wanted, suite) else "wrong"
        if state != "passed":
            return Graded(state, number, len(suite.tests), level)
    return Graded("passed", 0, len(suite.tests), level)


def _right(run: Run, wanted: str, suite: Suite) -> bool:
    if not suite.function:
        return same_output(run.stdout.decode("utf-8", "replace"), wanted, suite.tolerance)
    try:
        return same_value(json.loads(run.value or b""), json.loads(wanted), suite.tolerance)
    except (ValueError, RecursionError):
        return False


def same_output(given: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Equal texts: as many lines, each equal up to surrounding white space, or equal number by number."""
    a, b = (text.strip().split("\n") for text in (given, wanted))
    return len(a) == len(b) and all(_same_line(x.strip(), y.strip(), tolerance) for x, y in zip(a, b, strict=True))


def _same_line(given: str, wanted: str, tolerance: float) -> bool:
    if given == wanted:
        return True
    a, b = given.split(), wanted.split()
    return len(a) == len(b) > 0 and all(_same_number(x, y, tolerance) for x, y in zip(a, b, strict=True))


def _same_number(given: str, wanted: str, tolerance: float) -> bool:
    if not (_NUMBER.fullmatch(given) and _NUMBER.fullmatch(wanted)):
        return given == wanted and tolerance > 0
    try:
        if Decimal(given) == Decimal(wanted):
            return True
    except InvalidOperation:
        return False
    return tolerance > 0 and math.isclose(float(given), float(wanted), rel_tol=tolerance, abs_tol=tolerance)


def same_value(given: Any, wanted: Any, tolerance: float = 0.0) -> bool:
    """Equal JSON values. ``true`` is no number, and NaN equals nothing."""
    if isinstance(given, list) and isinstance(wanted, list):
        pairs = zip(given, wanted, strict=False)
        return len(given) == len(wanted) and all(same_value(x, y, tolerance) for x, y in pairs)
    if isinstance(given, dict) and isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(same_value(given[k], wanted[k], tolerance) for k in wanted)
    if isinstance(given, bool) is not isinstance(wanted, bool):
        return False
    if tolerance > 0 and isinstance(given, int | float) and isinstance(wanted, int | float):
        with suppress(OverflowError):  # a whole number beyond every float
            return math.isclose(given, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return bool(given == wanted)
