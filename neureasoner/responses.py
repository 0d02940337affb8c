"""A response as a record: its ids read as text, steps and thinking, and the one way from there to a Trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from neureasoner.steps import Separators, StepSegmenter
from neureasoner.thinking import opens_thinking
from neureasoner.traces import Problem, Step, Trace


@dataclass
class Response:
    """What a model wrote after a prompt.

    response_ids     every generated or forced token, the one that ended it included
    text             their decoded text, as in ``Trace.response``
    finished         ended by one of the model's end tokens, not by the token limit
    thinking_tokens  leading tokens that belong to the thinking
    """

    prompt_ids: list[int]
    response_ids: list[int]
    text: str
    finished: bool
    thinking_tokens: int
    steps: list[Step]
    meta: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def to_trace(self, id: str, problem: Problem, **meta: Any) -> Trace:
        """As the record that the other rooms read."""
        return Trace(
            id=id,
            problem=problem,
            prompt_ids=list(self.prompt_ids),
            response_ids=list(self.response_ids),
            response=self.text,
            steps=self.steps,
            finished=self.finished,
            meta={"thinking_tokens": self.thinking_tokens, **self.meta, **meta},
        )


def read_response(
    tokenizer: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    ends: Sequence[int],
    finished: bool | None = None,
    in_thinking: bool | None = None,
) -> Response:
    """Read the ids of a response to a prompt. ``ends``: ids that end one; ``finished``: where its last id does not say.

    A response begins inside the thinking unless the prompt has closed it; ``in_thinking``: where no prompt says so.
    """
    ids, separators = list(response_ids), Separators.of(tokenizer)
    begins = opens_thinking(prompt_ids, tokenizer) if in_thinking is None else in_thinking
    segmenter = StepSegmenter(separators, in_thinking=begins, ends=ends)
    for token in ids:
        segmenter.push(token)
    text, offsets = separators.offsets(ids)
    return Response(
        prompt_ids=list(prompt_ids),
        response_ids=ids,
        text=text,
        finished=bool(ids) and ids[-1] in set(ends) if finished is None else finished,
        thinking_tokens=segmenter.thinking_tokens,
        steps=segmenter.steps(offsets),
    )
