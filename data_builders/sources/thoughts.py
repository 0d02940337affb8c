"""Where the thinking ends and the answer begins, in each convention that corpora use."""

from __future__ import annotations

from dataclasses import dataclass

from neureasoner.data_builders.sources.rows import Unreadable, tidy
from neureasoner.traces import THINK_CLOSE, THINK_OPEN

THOUGHT = ("<|begin_of_thought|>", "<|end_of_thought|>")
SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
STYLES = (THOUGHT, (THINK_OPEN, THINK_CLOSE))
_TAGS = (*THOUGHT, *SOLUTION, THINK_OPEN, THINK_CLOSE)
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "</s>")


@dataclass(frozen=True)
class Thought:
    """A response in two parts. ``closed``: the thought's end was written; ``finished``: the answer's end too."""

    thinking: str
    solution: str
    closed: bool
    finished: bool


def _without_end(text: str) -> str:
    """The text without the tokens by which models end a turn."""
    text = text.rstrip()
    while text.endswith(_ENDS):
        text = text.removesuffix(next(e for e in _ENDS if text.endswith(e))).rstrip()
    return text


def _no_tags(*parts: str) -> None:
    for part in parts:
        for tag in _TAGS:
            if tag in part:
                raise Unreadable(f"a stray {tag}")


def _solution(text: str) -> tuple[str, bool]:
    """The answer part without its tags, and whether it is whole."""
    begin, end = SOLUTION
    before, opened, text_after = text.partition(begin)
    if not opened:
        text, closed, rest = text.partition(end)
        return text + rest, bool(text.strip())
    if before.strip():
        raise Unreadable("text between the thought and the solution")
    text, closed, rest = text_after.partition(end)
    if rest.strip():
        raise Unreadable("text after the solution")
    return text, bool(closed and text.strip())


def split_thought(text: str) -> Thought | None:
    """Split a response at its tags; None if it holds none.

    A response may lack the opening tag (chat templates write it into the prompt). Raises Unreadable for text before
    the thought, several thoughts, an empty thought, or tags of two conventions.
    """
    text = _without_end(text)
    style = next(((a, b) for a, b in STYLES if a in text or b in text), None)
    if style is None:
        return None
    opening, closing = style
    if text.count(opening) > 1 or text.count(closing) > 1:
        raise Unreadable("more than one thought")
    before, opened, after = text.partition(opening)
    if opened and before.strip():
        raise Unreadable("text before the thought")
    thinking, closed, rest = (after if opened else text).partition(closing)
    solution, whole = _solution(rest) if closed else ("", False)
    return whole_thought(thinking, solution, bool(closed), whole)


def whole_thought(thinking: str, solution: str, closed: bool = True, finished: bool = True) -> Thought:
    """A thought from its two parts, tidied. Raises Unreadable for an empty thought or a tag inside."""
    thinking, solution = tidy(thinking), tidy(solution)
    _no_tags(thinking, solution)
    if not thinking:
        raise Unreadable("the thought is empty")
    return Thought(thinking, solution, closed, closed and finished and bool(solution))


def thought_from_columns(reasoning: str, response: str) -> Thought:
    """A thought whose reasoning came apart from its answer; either may still carry its tags.

    Without an answer the thought counts as cut off. Raises Unreadable.
    """
    inner = split_thought(reasoning)
    if inner is not None:
        if inner.solution:
            raise Unreadable("the reasoning holds a solution of its own")
        reasoning = inner.thinking
    outer = split_thought(response) if any(tag in response for style in STYLES for tag in style) else None
    if outer is not None:
        response = outer.solution  # the response repeats the thought
    solution, whole = _solution(_without_end(response))
    return whole_thought(reasoning, solution, closed=bool(solution.strip()), finished=whole)


def split_untagged(text: str) -> Thought:
    r"""A plain chain of thought: the last paragraph is the answer, what comes before is the thinking.

    Where the last ``\boxed`` stands earlier, the answer begins with its paragraph. A chain without blank lines is
    split at its last line. Whether a plain chain was cut off cannot be told. Raises Unreadable for a single line.
    """
    text = tidy(_without_end(text))
    for separator in ("\n\n", "\n"):
        boxed = text.rfind("\\boxed")
        cut = text.rfind(separator, 0, boxed) if boxed >= 0 else -1
        cut = cut if cut >= 0 else text.rfind(separator)
        if cut >= 0:
            return whole_thought(text[:cut], text[cut:])
    raise Unreadable("a response of one line has no thought")
