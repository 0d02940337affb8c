"""How often a model answers right: the same measurement for choosing a learning rate and for the table of arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neureasoner.errors import UserError
from neureasoner.prompts import encode_text, prompt_text
from neureasoner.sampler import sample_all
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.traces import Problem, read_problems
from neureasoner.training.bias_config import QUESTION
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
    begun = encode_text(tokenizer, prefix) if prefix else []
    ends = eos_ids(model, tokenizer)
    done = sample_all(
        model,
        [encode_text(tokenizer, prompt_of(tokenizer, p, template)) + begun for p, _ in jobs],
        Sampling(max_new_tokens, temperature, top_p=1.0),
        batch_size=batch_size,
        seed=seed,
        advance=advance,
        ends=ends,
        pad=pad_id(tokenizer, ends),
    )
    return [
        Answered(
            problem=p.id,
            family=p.family,
            difficulty=p.difficulty,
            sample=s,
            correct=is_right(p, prefix + text_of(tokenizer, row.ids), row.finished, answer),
            tokens=len(begun) + len(row.ids) if row.finished else max_new_tokens,
            truncated=not row.finished,
        )
        for (p, s), row in zip(jobs, done, strict=True)
    ]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """A response as text, special tokens shown."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
