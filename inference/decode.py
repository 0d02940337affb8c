"""A batch of responses, watched or not: the sampler with a plan's controller in it.

A plain run and a watched run differ in the controller only, so a plan that never fires gives the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from neureasoner.errors import UserError
from neureasoner.inference.controller import Controller
from neureasoner.inference.rows import RowState
from neureasoner.prompts import check_ids
from neureasoner.responses import Response, read_response
from neureasoner.sampler import sample
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.sites import called_by
from neureasoner.traces import Trace

if TYPE_CHECKING:
    from neureasoner.traces import Problem

OnText = Callable[[str, bool], None]


@dataclass
class Generation(Response):
    """A response and what the controller did to it.

    events        the controller's log: step, token, rule, score, threshold, action, suppressed; an effect on tensors
                  or logits has row, strength and tokens (how many it acted on; the whole prompt counts as one)
    forced        per token: was it forced (forced tokens are counted as generated)
    scores        every score a rule gave: step, token, rule, score
    seconds       its share of the batch's wall time, by the tokens it and its probes have
    probe_tokens  tokens read beside the response to decide about it (not in ``response_ids``)
    series        recorded sites, float32 [T - 1, C] (the last token is never read), when asked for
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    probe_tokens: int = 0
    series: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def triggers(self) -> int:
        """Interventions that were carried out."""
        return sum(not e["suppressed"] for e in self.events)

    def to_trace(self, id: str, problem: Problem, **meta: Any) -> Trace:
        """As the record the other rooms read; the forced tokens' positions go into ``meta``."""
        own = {
            "forced": [t for t, f in enumerate(self.forced) if f],
            "seconds": round(self.seconds, 4),
            "probe_tokens": self.probe_tokens,
        }
        trace = super().to_trace(id, problem, **(own | meta))
        trace.events = self.events
        return trace


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    controller: Controller | None = None,
    controller_seed: int | None = None,
    indices: Sequence[int] | None = None,
    problems: Sequence[Any] | None = None,
    on_text: OnText | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
    only: Sequence[bool] | None = None,
    **sampling: Any,
) -> list[Generation]:
    """Sample one response per prompt, in one batch; ``sampling`` as in ``Sampling``. No controller, no hooks.

    The result depends on ``seed`` and the batch. ``controller_seed`` (default ``seed``) drives random triggers, by
    ``indices`` of the rows. ``on_text(text, forced)`` streams one row. ``strengths``: a factor for each prompt, by the
    names of the rules of strength ``per_row``. ``only``: the rows to write; the others end with their first token, and
    those that are written draw what they draw beside them.
    """
    check_ids(prompt_ids, int(model.get_input_embeddings().num_embeddings))
    if on_text is not None and len(prompt_ids) != 1:
        raise UserError("streaming shows one response; set batch_size to 1 or stream off")
    ends = eos_ids(model, tokenizer)
    begin = time.perf_counter()
    owner, watch = object(), None
    with ExitStack() as stack:
        if controller is not None:
            with called_by(owner):  # the hooks act in this generation's forward passes, whoever else asks the model
                watch = stack.enter_context(
                    controller.watch(
                        prompt_ids,
                        indices=indices,
                        problems=problems,
                        eos_ids=ends,
                        seed=seed if controller_seed is None else controller_seed,
                        strengths=strengths,
                    )
                )
        if watch is not None and only is not None:
            for state, wanted in zip(watch.rows, only, strict=True):
                state.done = not wanted
        streamer = None if on_text is None else _Streamer(tokenizer, on_text, watch, ends)
        drawn = sample(
            model,
            prompt_ids,
            Sampling(**sampling),
            ends=ends,
            pad=pad_id(tokenizer, ends),
            seed=seed,
            watch=watch,
            stop=None if only is None else _leave(only),
            on_column=None if streamer is None else lambda column: streamer.put(column[0]),
            owner=owner,
        ).rows
        if streamer is not None:
            streamer.flush(last=True)
    seconds = time.perf_counter() - begin
    done = []
    for i, (prompt, row) in enumerate(zip(prompt_ids, drawn, strict=True)):
        response = read_response(tokenizer, prompt, row.ids, ends)
        done.append(Generation(**vars(response), **({} if watch is None else _seen(watch, i, len(row.ids)))))
        done[-1].forced += [False] * (len(row.ids) - len(done[-1].forced))
    read = [len(g.response_ids) + g.probe_tokens for g in done]
    for g, own in zip(done, read, strict=True):
        g.seconds = seconds * own / sum(read)
    return done


def _leave(only: Sequence[bool]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ends the rows that are not to be written."""
    rest = ~torch.tensor(list(only), dtype=torch.bool)
    return lambda ids: rest.to(ids.device)


def _seen(watch: Any, i: int, n: int) -> dict[str, Any]:
    """What the controller knows of row ``i`` with ``n`` tokens."""
    row: RowState = watch.rows[i]
    return {
        "events": row.events,
        "forced": row.forced[:n],
        "scores": row.scores,
        "probe_tokens": row.probe_tokens,
        "series": {s: v.copy() for s, v in watch.recorded(i).items()},
    }


class _Streamer:
    """Passes new text on as soon as it is whole characters, with whether the controller forced it."""

    def __init__(self, tokenizer: Any, on_text: OnText, watch: Any, ends: Sequence[int]):
        self.tokenizer, self.on_text, self.watch, self.ends = tokenizer, on_text, watch, set(ends)
        self.ids: list[int] = []
        self.begin, self.read = 0, 0

    def put(self, token: int) -> None:
        """One token more; one that ends the response is not shown."""
        if token in self.ends:
            return
        if self.read < len(self.ids) and self._forced(self.read) != self._forced(len(self.ids)):
            self.flush(last=True)  # a held-back piece of a character does not join the forced text
        self.ids.append(token)
        self.flush(last=False)

    def _forced(self, t: int) -> bool:
        return self.watch is not None and self.watch.rows[0].forced[t : t + 1] == [True]

    def flush(self, last: bool) -> None:
        """Show what is new; with ``last`` also what may be a piece of a character."""
        as_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        old = self.tokenizer.decode(self.ids[self.begin : self.read], **as_is)
        new = self.tokenizer.decode(self.ids[self.begin :], **as_is)
        if len(new) <= len(old) or (new.endswith("\ufffd") and not last):
            return
        self.on_text(new[len(old) :], self._forced(self.read))
        self.begin, self.read = self.read, len(self.ids)
