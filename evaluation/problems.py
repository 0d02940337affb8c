"""Problem files as the stages of evaluation read them: certain to be gradable before anything is generated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from neureasoner.artifacts import read_json, write_json
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.answers import TESTS, option_letter
from neureasoner.data_builders.grading.grade import MAX_GIVEN
from neureasoner.data_builders.grading.options import listed_options
from neureasoner.data_builders.grading.verifier import MathVerifier
from neureasoner.errors import UserError
from neureasoner.evaluation.benchmarks.load import Cells, math_gold
from neureasoner.evaluation.benchmarks.registry import BENCHMARKS, Benchmark
from neureasoner.evaluation.config import CAP, PAPER
from neureasoner.traces import Problem, read_problems

C = TypeVar("C")


def source_of(problems: str | Path) -> dict[str, Any]:
    """What `evaluation benchmark` recorded beside the file (name, release, template, source); empty if it did not."""
    mark = Path(problems).parent / "stage.json"
    found = read_json(mark) if mark.is_file() else {}
    return dict(found["summary"]) if found.get("name") == "evaluation benchmark" else {}


def is_program(problem: Problem) -> bool:
    """Whether the answer to a problem is a program."""
    return problem.family not in FAMILIES and problem.answer.startswith(TESTS)


def check_golds(problems: Sequence[Problem], file: str | Path) -> None:
    """Raises UserError naming file and problem where no response could be right, as `evaluation benchmark` tells it:
    an empty or broken gold answer, one that the benchmark cannot have, no option, a missing test set; or no sandbox.

    Of families that no benchmark has, what a gold answer may be is not known; the generators' are left to them.
    """
    if any(map(is_program, problems)):
        from neureasoner.evaluation.benchmarks.code import sandbox

        sandbox()
    kind = str(source_of(file).get("kind", "math"))
    for p in problems:
        if p.family not in FAMILIES:
            known = BENCHMARKS.get(p.family) or Benchmark(p.family, kind, {})
            try:
                _check_gold(p, known, f"{file}, problem '{p.id}'")
            except UserError as e:
                raise UserError(f"{e}; correct it or take the problem out") from None


def _check_gold(problem: Problem, benchmark: Benchmark, where: str) -> None:
    if is_program(problem):
        from neureasoner.evaluation.benchmarks.suites import find

        try:
            find(problem.answer)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        return
    if benchmark.kind == "code":
        raise UserError(f"{where}: unanswerable: the gold answer '{problem.answer[:40]}' names no tests")
    if len(problem.answer) > MAX_GIVEN:
        raise UserError(
            f"{where}: unanswerable: a gold answer of {len(problem.answer)} characters; at most {MAX_GIVEN} count"
        )
    if re.search(r"\d", problem.answer):
        benchmark = replace(benchmark, gold="")  # a file of one's own may well say 1/2 or 18 dollars
    math_gold(Cells({"answer": problem.answer}, {"answer": "answer"}, where), benchmark)
    letters = listed_options(problem.question) if benchmark.kind == "option" else ""
    if letters and (option_letter(problem.answer) or "none") not in letters:
        raise UserError(
            f"{where}: unanswerable: the gold answer '{problem.answer[:40]}' names none of the options "
            f"{', '.join(letters)}"
        )


def gradable_problems(file: str | Path, limit: int = 0) -> list[Problem]:
    """The problems of a file, once it is certain that each can be graded; ``limit`` 0: all. Raises UserError."""
    problems = read_problems(file)[: limit or None]
    known = {*FAMILIES, *BENCHMARKS, str(source_of(file).get("benchmark", ""))}
    for p in problems:
        if p.family not in known:
            raise UserError(
                f"unknown problem family '{p.family}'; known: {', '.join(FAMILIES)}, and benchmarks as `neureasoner "
                "evaluation benchmark` writes them, with their stage.json"
            )
    check_golds(problems, file)
    if any(p.family not in FAMILIES and not is_program(p) for p in problems):
        MathVerifier()  # raises where math-verify is missing
    return problems


def capped(config: C, problems: Sequence[Problem]) -> C:
    """Settings whose ``max_new_tokens`` 0 is decided: 512 where a generator made all problems, else the paper's cap."""
    settings: Any = config
    if settings.max_new_tokens:
        return config
    exact = all(p.family in FAMILIES for p in problems)
    decided: C = replace(settings, max_new_tokens=CAP if exact else PAPER["max_new_tokens"])
    return decided


def containment(out: str, problems: Sequence[Problem]) -> dict[str, Any]:
    """``{"sandbox": what holds programs here}`` where there are any, kept in ``out``; else nothing.

    Raises UserError if those of earlier parts of the same run were held otherwise.
    """
    if not any(map(is_program, problems)):
        return {}
    from neureasoner.evaluation.benchmarks.code import sandbox

    found, file = asdict(sandbox().containment), Path(out) / "sandbox.json"
    before = read_json(file)["level"] if file.is_file() else found["level"]
    if before != found["level"]:
        raise UserError(
            f"{out}: programs ran at the level '{before}' of the sandbox so far, and would run at '{found['level']}' "
            "here; choose another --out"
        )
    write_json(file, found)
    return {"sandbox": found}


def check_apart(
    problems: Sequence[Problem], validation: Sequence[Problem], file: str, validation_file: str, what: str
) -> None:
    """Raises UserError where a question is in both: ``what`` would be chosen on what is measured."""
    shared = {p.question for p in validation} & {p.question for p in problems}
    if shared:
        raise UserError(
            f"{file}: {len(shared)} questions are also in {validation_file}, such as '{min(shared)[:60]}'; "
            f"{what} would be chosen on what is measured"
        )
