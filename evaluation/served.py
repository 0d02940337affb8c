"""Responses from an OpenAI-compatible server, for arms that need no hooks: stands where a SteeredModel would stand.

The server applies its own chat template and samples with the seed it is sent, so its responses are a draw of their own,
not those of the same weights here. Every answer is in a ledger beside the output folder: a killed run asks for nothing
twice. Tokens are those the server counts. Its seconds say more about its other users than about the model, so none are
recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neureasoner.data_builders.asking import endpoint_of
from neureasoner.data_builders.endpoint.asker import session
from neureasoner.data_builders.endpoint.caller import Lost
from neureasoner.data_builders.endpoint.requests import Answer, Message, Request
from neureasoner.data_builders.endpoint.tally import Stopped
from neureasoner.errors import UserError
from neureasoner.inference.decode import Generation
from neureasoner.inference.steered import encode_prompt
from neureasoner.models import load_tokenizer
from neureasoner.responses import read_response
from neureasoner.thinking import CLOSED, thinking_state
from neureasoner.traces import NO_THINKING, OPENED, THINK_CLOSE, Problem, Trace

# vLLM and SGLang go on with a last message that they are told not to close; others refuse the keys.
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}


@dataclass
class Drawn(Generation):
    """A response that a server drew; ``counted``: its tokens as the server counts them (0: it does not say)."""

    counted: int = field(default=0, kw_only=True)

    def to_trace(self, id: str, problem: Problem, **meta: Any) -> Trace:
        """As ``Generation.to_trace``, with the server's count."""
        return super().to_trace(id, problem, tokens=self.counted, served=True, **meta)


class Served:
    """A model behind an endpoint. ``tokenizer``: name of the model whose tokenizer splits its responses into steps."""

    def __init__(self, endpoint: Mapping[str, Any], out: str, tokenizer: str):
        self.config = endpoint_of(endpoint, out)
        if self.config.api != "chat":
            raise UserError("key 'endpoint' must use the chat API here; leave out 'api'")
        self.config.key()  # a missing key should not be found out after the other arms have run
        self.tokenizer = load_tokenizer(tokenizer)

    def generate(
        self,
        prompts: Sequence[Problem | Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        nothinking: bool = False,
        **_: Any,
    ) -> list[Drawn]:
        """One response per problem, in order. Raises UserError when the server does not answer them all.

        ``nothinking`` hands the closed thinking over as the beginning of the answer, which vLLM and SGLang go on with:
        with ``<think>``, because the template's own is left out there. A template that closes the thinking itself is
        left to do so.
        """
        params = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens, "seed": seed}
        requests, states = [], []
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, Problem):
                raise UserError("a server is asked by chat, so the model named with it needs a chat template")
            states.append(thinking_state(encode_prompt(self.tokenizer, prompt), self.tokenizer))
            handed = nothinking and states[-1] != CLOSED
            closed = [Message("assistant", OPENED + NO_THINKING)] if handed else []
            messages = (Message("user", prompt.question), *closed)
            told = params | (CONTINUE if handed else {})
            requests.append(Request(self.config.model, messages, params=told, take=i))
        answers = asyncio.run(self._ask(requests))
        thinks = [state != CLOSED and not nothinking for state in states]
        return [self._drawn(answer, own) for answer, own in zip(answers, thinks, strict=True)]

    async def _ask(self, requests: Sequence[Request]) -> list[Answer]:
        async with session(self.config) as s:
            # all of them come in before the first fault is told: what is under way may be paid for already
            found = await asyncio.gather(*(s.answer(r.key, r) for r in requests), return_exceptions=True)
        lost = [e for e in found if isinstance(e, BaseException)]
        for e in lost:
            if not isinstance(e, Lost | Stopped):
                raise e
        if lost:
            raise UserError(
                f"{self.config.url}: {len(lost)} of {len(found)} responses did not come ({lost[0]}); the others are "
                "kept, run the same command again"
            )
        return [pair[0] for pair in found if not isinstance(pair, BaseException)]

    def _drawn(self, answer: Answer, thinks: bool) -> Drawn:
        finished = answer.finish_reason != "length"
        ends = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        ids = self.tokenizer.encode(answer.text, add_special_tokens=False) + (ends if finished else [])
        # a server with a reasoning parser keeps the thinking to itself
        thinks = thinks and THINK_CLOSE in answer.text
        response = read_response(self.tokenizer, [], ids, ends, finished, in_thinking=thinks)
        return Drawn(**vars(response), forced=[False] * len(ids), counted=answer.usage.output)
