"""How often a model answers right: the same measurement for choosing a learning rate and for the table of arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neureasoner.data_builders.encoding import prompt_text
from neureasoner.errors import UserError
from neureasoner.sampling import eos_ids
from neureasoner.traces import Problem, read_problems
from neureasoner.training.bias_config import QUESTION
from neureasoner.training.policy import sample_all
from neureasoner.training.rewards import is_right


@dataclass(frozen=True)
class Answered:
    """One attempt at one problem. A truncated one is wrong and costs the whole cap in ``tokens``."""

    problem: str
    family: str
    difficulty: int
    sample: int
    correct: bool
    tokens: int
    truncated: bool


def prompt_of(tokenizer: Any, problem: Problem, template: str = QUESTION) -> str:
    """The text up to the first token of the response: the filled template as the user's turn."""
    return prompt_text(tokenizer, template.replace(QUESTION, problem.question))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt; its template has written whatever special tokens it wants."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def choose_problems(path: str, kinds: Sequence[str] = (), limit: int = 0) -> list[Problem]:
    """Problems of these ``FAMILY:DIFFICULTY``. Raises UserError listing what the file holds if none is left."""
    problems = read_problems(path)
    chosen = [p for p in problems if not kinds or f"{p.family}:{p.difficulty}" in kinds][: limit or None]
    if not chosen:
        held = sorted({f"{p.family}:{p.difficulty}" for p in problems})
        raise UserError(f"{path}: holds no problem of {', '.join(kinds)}; it holds {', '.join(held)}")
    return chosen


def measure(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    template: str = QUESTION,
    prefix: str = "",
    answer: str = "boxed",
    advance: Callable[[int], None] = lambda _: None,
) -> list[Answered]:
    """One record per problem and sample. ``prefix`` begins every response, and its tokens are counted."""
    jobs = [(p, s) for p in problems for s in range(samples)]
    begun = encode(tokenizer, prefix) if prefix else []
    done = sample_all(
        model,
        [encode(tokenizer, prompt_of(tokenizer, p, template)) + begun for p, _ in jobs],
        batch_size=batch_size,
        seed=seed,
        advance=advance,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        temperature=temperature,
    )
    return [
        Answered(
            problem=p.id,
            family=p.family,
            difficulty=p.difficulty,
            sample=s,
            correct=is_right(p, prefix + text_of(tokenizer, ids), finished, answer),
            tokens=len(begun) + len(ids) if finished else max_new_tokens,
            truncated=not finished,
        )
        for (p, s), ids, finished in zip(jobs, done.ids, done.finished, strict=True)
    ]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """A response as text, special tokens shown."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
