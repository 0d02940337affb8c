"""Whether a table can be written from what the stages of a recipe will leave behind, told before any of them runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from neureasoner.commands import COMMANDS
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import ARMS
from neureasoner.evaluation.combination import name_of, subsets
from neureasoner.evaluation.combination_config import CombineConfig
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.reproduce.consistency import SIZES
from neureasoner.evaluation.reproduce.tables import NEEDS, need
from neureasoner.inference.plan import PLAN_FILE, Plan
from neureasoner.model_files import SHIPPED
from neureasoner.run import Stage


def check_planned(table: str, read: Mapping[str, Stage], listed: Sequence[Stage]) -> None:
    """Raises UserError for a stage, of those that the table reads, whose settings leave out what the table shows.

    ``listed``: all stages of the recipe. What only an earlier stage of it will tell (the rules of a checkpoint that it
    assembles, problems that it makes) is left to the end.
    """
    for label, stage in read.items():
        arms = planned_arms(stage) if table in NEEDS else None
        if arms is not None:
            need(table, label, arms)
        if table == "figure5":
            _check_votes(stage, listed)


def planned_arms(stage: Stage) -> list[str] | None:
    """The arms that a stage `evaluate` or `combine` will run; None where that is not known yet."""
    config = stage.config
    if isinstance(config, EvaluateConfig):
        named = config.arms or [a.name for a in ARMS.values() if a.default]
        return [n for name in named for n in (name, *(ARMS[name].needs if name in ARMS else ()))]
    assert isinstance(config, CombineConfig)
    parts = list(config.parts)
    if not parts:
        plan = SHIPPED.get(config.model, Path(config.model).expanduser()) / PLAN_FILE
        if not plan.is_file():
            return None
        parts = [*Plan.load(plan).names, *config.rules]
    return [*(name_of(on, parts) for on in subsets(parts, config.arms)), *config.variants]


def _check_votes(stage: Stage, listed: Sequence[Stage]) -> None:
    """Figure 5 holds votes over samples, and over programs there are none."""
    from neureasoner.evaluation.benchmarks.load import benchmark_of
    from neureasoner.evaluation.problems import is_program
    from neureasoner.traces import read_problems

    config: EvaluateConfig = stage.config
    where = f"stage '{stage.label}'"
    if config.samples < SIZES[0]:
        raise UserError(
            f"{where} draws {config.samples} samples a problem; a vote needs at least {SIZES[0]}: set samples=64"
        )
    file, benchmark = Path(config.problems), COMMANDS["evaluation benchmark"]
    makers = [s for s in listed if s.out == file.parent and s.command is benchmark]
    code = any(benchmark_of(s.config).kind == "code" for s in makers)
    if code or (file.is_file() and any(map(is_program, read_problems(file)))):
        raise UserError(f"{where}: {file} asks for programs, which have no majority; choose other problems")
