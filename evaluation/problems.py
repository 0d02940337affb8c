"""Problem files as the stages of evaluation read them: certain to be gradable before anything is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json, write_json
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.answers import TESTS
from neureasoner.data_builders.grading.verifier import MathVerifier
from neureasoner.errors import UserError
from neureasoner.evaluation.benchmarks.registry import BENCHMARKS
from neureasoner.traces import Problem, read_problems


def source_of(problems: str | Path) -> dict[str, Any]:
    """What `evaluation benchmark` recorded beside the file (name, release, template, source); empty if it did not."""
    mark = Path(problems).parent / "stage.json"
    found = read_json(mark) if mark.is_file() else {}
    return dict(found["summary"]) if found.get("name") == "evaluation benchmark" else {}


def is_program(problem: Problem) -> bool:
    """Whether the answer to a problem is a program."""
    return problem.family not in FAMILIES and problem.answer.startswith(TESTS)


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
    if any(is_program(p) for p in problems):
        from neureasoner.evaluation.benchmarks.code import sandbox
        from neureasoner.evaluation.benchmarks.suites import find

        sandbox()
        for p in filter(is_program, problems):
            find(p.answer)
    if any(p.family not in FAMILIES and not is_program(p) for p in problems):
        MathVerifier()  # raises where math-verify is missing
    return problems


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
