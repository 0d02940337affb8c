"""``data problems``: write a problem file from the embedded families."""

from __future__ import annotations

from random import Random
from typing import Any

from neureasoner.data_builders.config import ProblemsConfig
from neureasoner.data_builders.corpus import draw, same_question
from neureasoner.data_builders.families import family
from neureasoner.errors import UserError
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem, write_rows


def make_problems(names: list[str], n: int, split: str, seed: int) -> list[Problem]:
    """n different problems; families in turn, difficulties in turn within each family."""
    rng, out, seen = Random(f"{seed}-{split}"), [], set()
    families = [family(name) for name in names]
    for i in range(n):
        f = families[i % len(families)]
        difficulty = (i // len(families)) % f.levels + 1
        for _ in range(1000):
            question, answer = draw(rng, f.name, difficulty, split)
            if same_question(question) not in seen:
                break
        else:
            raise UserError(f"family {f.name}, difficulty {difficulty}: too few different questions for n={n}")
        seen.add(same_question(question))
        out.append(Problem(f"{f.name}-{split}-{seed}-{i}", f.name, difficulty, question, answer))
    return out


def build_problems(config: ProblemsConfig) -> dict[str, Any]:
    """Stage ``data problems``. Writes problems.jsonl (id, family, difficulty, question, answer)."""
    for name in config.family:
        family(name)
    folder = StageFolder(config.out, "data problems", config)
    if folder.done:
        return folder.summary
    problems = make_problems(config.family, config.n, config.split, config.seed)
    write_rows(folder.path / "problems.jsonl", problems)
    return folder.finish({"n": len(problems), "split": config.split, "families": config.family, "seed": config.seed})
