"""Sampling a batch with stock Transformers ``generate``, watched or not. B rows; prompts are padded on the left.

``generate_batch`` is the one place that calls ``model.generate``: a plain run and a watched run differ only in the
controller, so a plan that never fires gives the same tokens. In both, rows that have ended are not read on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from neureasoner.errors import UserError
from neureasoner.inference.controller import Controller
from neureasoner.inference.narrowing import finished_rows_leave
from neureasoner.inference.rows import RowState
from neureasoner.sampling import generation_config, left_padded
from neureasoner.steps import Separators, StepSegmenter
from neureasoner.thinking import opens_thinking
from neureasoner.traces import Step, Trace

if TYPE_CHECKING:
    from neureasoner.traces import Problem

OnText = Callable[[str, bool], None]


@dataclass
class Generation:
    """One response.

    response_ids     every generated or forced token, EOS included
    text             their decoded text, as in ``Trace.response``
    forced           per token: was it forced (forced tokens are counted as generated)
    events           the controller's log: step, token, rule, score, threshold, action, suppressed; an effect on tensors
                     or logits has row, strength and tokens (how many it acted on; the whole prompt counts as one)
    scores           every score a rule gave: step, token, rule, score
    finished         ended by EOS, not by the token limit
    thinking_tokens  leading tokens that belong to the thinking
    seconds          its share of the batch's wall time, by the tokens it and its probes have
    probe_tokens     tokens read beside the response to decide about it (not in ``response_ids``)
    series           recorded sites, float32 [T - 1, C] (the last token is never read), when asked for
    """

    prompt_ids: list[int]
    response_ids: list[int]
    text: str
    events: list[dict[str, Any]]
    forced: list[bool]
    finished: bool
    thinking_tokens: int
    steps: list[Step]
    seconds: float
    scores: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, np.ndarray] = field(default_factory=dict)
    probe_tokens: int = 0

    @property
    def triggers(self) -> int:
        """Interventions that were carried out."""
        return sum(not e["suppressed"] for e in self.events)

    def to_trace(self, id: str, problem: Problem, **meta: Any) -> Trace:
        """As the record the other rooms read; the forced tokens' positions go into ``meta``."""
        meta = {
            "thinking_tokens": self.thinking_tokens,
            "forced": [t for t, f in enumerate(self.forced) if f],
            "seconds": round(self.seconds, 4),
            "probe_tokens": self.probe_tokens,
            **meta,
        }
        return Trace(
            id=id,
            problem=problem,
            prompt_ids=list(self.prompt_ids),
            response_ids=list(self.response_ids),
            response=self.text,
            steps=self.steps,
            finished=self.finished,
            events=self.events,
            meta=meta,
        )


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
    controller: Controller | None = None,
    controller_seed: int | None = None,
    indices: Sequence[int] | None = None,
    problems: Sequence[Any] | None = None,
    on_text: OnText | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
) -> list[Generation]:
    """Sample one response per prompt, in one batch. Without a controller this is plain ``generate``, no hooks.

    The global random state is left as it was; the result depends on ``seed`` and the batch. ``controller_seed``
    (default ``seed``) drives random triggers, by ``indices`` of the rows. ``on_text(text, forced)`` streams one row.
    ``strengths``: a factor for each prompt, by the names of the rules of strength ``per_row``.
    """
    if not prompt_ids or any(not ids for ids in prompt_ids):
        raise UserError("a prompt is empty; give every prompt at least one token")
    if on_text is not None and len(prompt_ids) != 1:
        raise UserError("streaming shows one response; set batch_size to 1 or stream off")
    config = generation_config(model, tokenizer, max_new_tokens, temperature, top_p)
    device = model.device
    ids, mask = left_padded(prompt_ids, int(config.pad_token_id), device)
    begin = time.perf_counter()
    watching: Any = nullcontext(None)
    if controller is not None:
        watching = controller.watch(
            prompt_ids,
            indices=indices,
            problems=problems,
            eos_ids=config.eos_token_id,
            seed=seed if controller_seed is None else controller_seed,
            strengths=strengths,
        )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), watching as watch:
        torch.manual_seed(seed)
        narrowing: Any = nullcontext()
        if watch is None or watch.narrows:
            told = None if watch is None else watch.narrow
            narrowing = finished_rows_leave(model, len(prompt_ids), config.eos_token_id, told)
        with narrowing:
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([watch] if watch is not None else []),
                streamer=None if on_text is None else _Streamer(tokenizer, on_text, watch),
            )
    seconds, ends = time.perf_counter() - begin, set(config.eos_token_id)
    done = [
        _finish(tokenizer, list(prompt), new, ends, watch, i)
        for i, (prompt, new) in enumerate(zip(prompt_ids, output[:, ids.shape[1] :].tolist(), strict=True))
    ]
    read = [len(g.response_ids) + g.probe_tokens for g in done]
    for g, own in zip(done, read, strict=True):
        g.seconds = seconds * own / sum(read)
    return done


def _finish(tokenizer: Any, prompt: list[int], new: list[int], ends: set[int], watch: Any, i: int) -> Generation:
    """Cut a row at its EOS and put its record together."""
    stop = next((t for t, token in enumerate(new) if token in ends), None)
    ids = new if stop is None else new[: stop + 1]
    row: RowState | None = watch.rows[i] if watch is not None else None
    forced = [] if row is None else row.forced[: len(ids)]
    separators = Separators.of(tokenizer)
    segmenter = StepSegmenter(separators, in_thinking=opens_thinking(prompt, tokenizer), ends=ends)
    for token in ids:
        segmenter.push(token)
    text, offsets = separators.offsets(ids)
    return Generation(
        prompt_ids=prompt,
        response_ids=ids,
        text=text,
        events=[] if row is None else row.events,
        forced=forced + [False] * (len(ids) - len(forced)),
        finished=stop is not None,
        thinking_tokens=segmenter.thinking_tokens,
        steps=segmenter.steps(offsets),
        seconds=0.0,
        scores=[] if row is None else row.scores,
        series={} if watch is None else {s: v.copy() for s, v in watch.recorded(i).items()},
        probe_tokens=0 if row is None else row.probe_tokens,
    )


class _Streamer(BaseStreamer):
    """Passes new text on as soon as it is whole characters, with whether the controller forced it."""

    def __init__(self, tokenizer: Any, on_text: OnText, watch: Any):
        self.tokenizer, self.on_text, self.watch = tokenizer, on_text, watch
        self.ids: list[int] = []
        self.begin, self.read = 0, 0
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """First the prompt, then one token a call."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            if token == self.tokenizer.eos_token_id:
                return self._flush(last=True)
            if self.read < len(self.ids) and self._forced(self.read) != self._forced(len(self.ids)):
                self._flush(last=True)  # a held-back piece of a character does not join the forced text
            self.ids.append(int(token))
            self._flush(last=False)

    def _forced(self, t: int) -> bool:
        return self.watch is not None and self.watch.rows[0].forced[t : t + 1] == [True]

    def end(self) -> None:
        """Show what was held back."""
        self._flush(last=True)

    def _flush(self, last: bool) -> None:
        as_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        old = self.tokenizer.decode(self.ids[self.begin : self.read], **as_is)
        new = self.tokenizer.decode(self.ids[self.begin :], **as_is)
        if len(new) <= len(old) or (new.endswith("\ufffd") and not last):
            return
        self.on_text(new[len(old) :], self._forced(self.read))
        self.begin, self.read = self.read, len(self.ids)
