"""Verifiable rewards: +1 for a right final answer, -1 for everything else (core.md §4.2).

**Truncation.** A response that did not end by itself is wrong: it gets -1 whatever it holds, and its tokens stay in the
loss. Masking it away instead would teach nothing about running over, and hide a model that learns to.

A right answer is what the problem's own scorer says (embedded families), or mathematical equality with the gold answer
(math-verify in a process that can be killed), as in the rollouts and the evaluation.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import cast

import torch

from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.errors import UserError
from neureasoner.traces import THINK_CLOSE, Problem

RIGHT, WRONG = 1.0, -1.0
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

Reward = Callable[[Problem, str, bool], float]  # (problem, response text, did it end by itself)


def given_answer(problem: Problem, response: str, form: str = "boxed") -> str | None:
    r"""The final answer after the thinking: ``boxed`` as in the rollouts (the last ``\boxed``, or after ``####``), or
    ``tagged``, the last ``<answer>…</answer>``. None if there is none."""
    if form == "boxed":
        return answer_of(problem, response)
    found = TAGGED.findall(response.rpartition(THINK_CLOSE)[2])
    return found[-1].strip() if found else None


def is_right(problem: Problem, response: str, finished: bool, form: str = "boxed") -> bool:
    """Whether the response ended by itself and its answer is right."""
    return finished and grade(problem, given_answer(problem, response, form))


def verified(form: str = "boxed") -> Reward:
    """The reward of core.md §4.2: right +1, else -1."""
    return lambda problem, response, finished: RIGHT if is_right(problem, response, finished, form) else WRONG


def coin() -> Reward:
    """The control: +1 or -1 with equal chance, whatever the response. Drawn from torch's global generator."""
    return lambda *_: RIGHT if int(torch.randint(0, 2, ())) else WRONG


def named(name: str, form: str = "boxed") -> Reward:
    """``verified``, ``random``, or ``MODULE:FUNCTION``, imported. Raises UserError for one that cannot be had."""
    if ":" not in name:
        return coin() if name == "random" else verified(form)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as e:  # whatever the module does when it is imported
        raise UserError(
            f"key 'reward': {name} cannot be imported ({type(e).__name__}: {e}); a file of the current folder "
            "needs PYTHONPATH=."
        ) from e
    if not callable(found):
        raise UserError(f"key 'reward': {name} is no function")
    return cast(Reward, found)


def scored(
    reward: Reward, problems: Sequence[Problem], responses: Sequence[str], finished: Sequence[bool]
) -> list[float]:
    """One finite number a response. Raises UserError naming the problem where ``reward`` throws or gives none."""
    values = []
    for problem, response, ended in zip(problems, responses, finished, strict=True):
        try:
            value = float(reward(problem, response, ended))
        except UserError:
            raise
        except Exception as e:
            raise UserError(
                f"the reward failed on problem '{problem.id}': {type(e).__name__}: {e}; the response began "
                f"{response[:80]!r}"
            ) from e
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"the reward of problem '{problem.id}' is {value}; it must be a finite number")
        values.append(value)
    return values


def _gold(problem: Problem, form: str) -> str:
    return f"<answer>{problem.answer}</answer>" if form == "tagged" else f"\\boxed{{{problem.answer}}}"


def check_reward(reward: Reward, problems: Sequence[Problem], form: str = "boxed") -> None:
    """Ask ``reward`` of a gold answer, and of nothing, to the first problem. Raises UserError where it throws."""
    scored(reward, [*problems[:1]] * 2, [_gold(problems[0], form), ""], [True, False])


def check_gold(problems: Sequence[Problem], form: str = "boxed") -> None:
    """Give every problem its own gold answer as response. Raises UserError for one that this would not reward."""
    for problem in problems:
        (value,) = scored(verified(form), [problem], [_gold(problem, form)], [True])
        if value != RIGHT:
            raise UserError(
                f"problem '{problem.id}': its own answer {problem.answer!r} would not be rewarded; correct the "
                "problem file, or leave the problem out"
            )
