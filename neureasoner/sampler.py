"""The sampler: every text that any stage draws from a model comes through ``sample``.

It is Transformers' sampling loop (same tokens as ``generate`` at the same seed) over a stock model, with these rules:

- Settings are ``Sampling`` and nothing else; the model folder's ``generation_config`` gives its end tokens only.
- A row ends with the first of ``ends``, which belongs to it. Rows that have ended leave the batch: the model reads
  those still writing. The draws of the others stay as they were, because numbers are drawn for all rows, as
  ``generate`` draws them.
- Random numbers come from a generator of the run's own, so the global state is left alone and runs in other threads do
  not share it. Hooks see forward passes of their own run only (``sites.called_by``).

Legend: B rows, L rows still read, W columns of the prompts (padded on the left), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from neureasoner.caches import new_cache, select
from neureasoner.errors import UserError
from neureasoner.forward import next_logits
from neureasoner.models import input_device
from neureasoner.sampling import Sampling, left_padded
from neureasoner.sites import called_by

COLUMNS = 1024  # room for tokens is made in pieces of so many: a cap may be far more than is ever written
LEAST = 1 / 8  # share of the rows read that has to have ended before they leave: leaving copies the cache of the others

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Watcher(Protocol):
    """What may stand between the model and the draw: the controller's state of one generation.

    Called as Transformers calls a logits processor. ``narrows``: rows may leave the batch, of which ``narrow(kept,
    live)`` tells: which of the rows read last stay, and which of the B rows they are, ``[L]`` each.
    """

    narrows: ClassVar[bool]

    def begin(self, run: Run) -> None:
        """Before the first forward pass."""

    def narrow(self, kept: torch.Tensor, live: torch.Tensor) -> None:
        """Before the first forward pass without the rows that left."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``input_ids [B, columns so far]``, ``scores [B, V]`` -> scores."""
        ...


@dataclass
class Drawn:
    """A row's own tokens, the one that ended it included; ``logprobs``: of each, as it was drawn, when asked for."""

    ids: list[int]
    finished: bool
    logprobs: list[float] = field(default_factory=list)


class Run:
    """One generation under way.

    ids     tokens of every row, ``[B, room]``, of which ``length`` columns are written
    mask    0 where padding stands, else 1, of the same shape
    live    rows the model still reads, ``[L]``, in order
    cache   keys and values of all columns but the last, for the live rows
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, pad: int, seed: int):
        if not prompts or any(not p for p in prompts):
            raise UserError("a prompt is empty; give every prompt at least one token")
        self.model, self.sampling, self.device = model, sampling, input_device(model)
        self.pad = pad if 0 <= pad < model.get_input_embeddings().num_embeddings else 0  # read, though masked
        self.ids, self.mask = left_padded(prompts, self.pad, self.device)
        self.rows, self.width = self.ids.shape
        self.pads = self.width - self.mask.sum(1)
        self.length, self.limit = self.width, self.width + sampling.max_new_tokens
        self.live = torch.arange(self.rows, device=self.device)
        self.done = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        self.counts = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        self.generator = torch.Generator(self.device).manual_seed(int(seed) % 2**64)
        self.cache: Any = None
        self._narrowed: tuple[torch.Tensor, torch.Tensor] | None = None  # mask and pads of the live rows

    def read(self) -> torch.Tensor:
        """Read what the cache does not hold yet; logits of the next token, float32 ``[B, V]``, 0 in rows that left."""
        seen = self.cache.get_seq_length()
        mask, pads = self._narrowed or (self.mask, self.pads)
        ids = self.ids[:, seen : self.length]
        columns = torch.arange(seen, self.length, device=self.device)
        positions = (columns - pads[:, None]).clamp(min=0)
        if self._narrowed is not None:
            ids = ids[self.live]
        logits = next_logits(self.model, ids, mask[:, : self.length], positions, self.cache).to(self.device)
        if self._narrowed is None:
            return logits
        whole = logits.new_zeros(self.rows, logits.shape[1])
        whole[self.live] = logits
        return whole

    def read_prompts(self) -> torch.Tensor:
        """The first ``read``, with equal prompts read once and their keys and values copied."""
        first: dict[tuple[int, ...], int] = {}
        padded = [tuple(row) for row in torch.cat([self.ids, self.mask], 1).tolist()]
        at = [first.setdefault(row, len(first)) for row in padded]
        if len(first) == self.rows:
            return self.read()
        rows = torch.tensor([at.index(i) for i in range(len(first))], device=self.device)
        columns = torch.arange(self.length, device=self.device)
        positions = (columns - self.pads[rows, None]).clamp(min=0)
        ids = self.ids[rows, : self.length]
        logits = next_logits(self.model, ids, self.mask[rows, : self.length], positions, self.cache).to(self.device)
        copies = torch.tensor(at, device=self.device)
        select(self.cache, copies)
        return logits[copies]

    def peek(self, scores: torch.Tensor) -> torch.Tensor:
        """The tokens ``[B]`` that would be drawn from these scores ``[B, V]`` now; nothing is drawn.

        A row's draw does not depend on the other rows' scores, so one may be forced and the others draw what is said.
        """
        twin = torch.Generator(self.device)
        twin.set_state(self.generator.get_state())
        return self.sampling.choose(self.sampling.warped(scores), twin)

    def draw(self, warped: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Choose and write the next column, ``[B]``; rows that have ended get padding."""
        if self.length == self.ids.shape[1]:
            self._grow(min(COLUMNS, self.limit - self.length))
        column = self.sampling.choose(warped, self.generator).masked_fill(self.done, self.pad)
        self.ids[:, self.length] = column
        self.length += 1
        self.counts += ~self.done
        self.done = self.done | torch.isin(column, ends)
        return column

    def _grow(self, columns: int) -> None:
        room = torch.full((self.rows, columns), self.pad, device=self.device)
        self.ids = torch.cat([self.ids, room], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(room)], dim=1)
        if self._narrowed is not None:
            self._narrowed = self.mask[self.live], self._narrowed[1]

    def narrow(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Let the rows that have ended leave, if they are enough; which stay and which those are (see ``Watcher``)."""
        kept = (~self.done[self.live]).nonzero()[:, 0]
        if not 0 < len(kept) <= (1 - LEAST) * len(self.live) or len(kept) == len(self.live):
            return None
        self.live = self.live[kept]
        self._narrowed = self.mask[self.live], self.pads[self.live]
        select(self.cache, kept)
        return kept, self.live


@dataclass
class Sampled:
    """All rows, and the run as it ended: its cache holds every column but the last, for the rows not left."""

    rows: list[Drawn]
    run: Run


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    ends: Sequence[int],
    pad: int,
    seed: int = 0,
    watch: Watcher | None = None,
    processors: Sequence[Processor] = (),
    stop: Callable[[torch.Tensor], torch.Tensor] | None = None,
    cache: Any = None,
    narrow: bool = True,
    logprobs: bool = False,
    on_column: Callable[[list[int]], None] | None = None,
    owner: object | None = None,
) -> Sampled:
    """Draw one response per prompt (token ids), in one batch. Raises UserError for an empty prompt.

    ends        ids that end a row (``sampling.eos_ids``); ``pad`` fills rows up
    watch       see ``Watcher``; ``processors`` come after it and change the scores ``[B, V]`` before they are warped
    stop        rows ``[B]`` to end beside ``ends``, asked after every column with all columns so far ``[B, columns]``
    cache       keys and values of all columns but the last, for prompts of one length; a new one is made otherwise
    narrow      whether rows that have ended leave the batch and the cache
    logprobs    keep each token's log-probability in the distribution it was drawn from (before top-k, top-p, min-p it
                is that of the whole vocabulary at this temperature)
    on_column   gets each new column (padding in rows that have ended) as soon as it is drawn
    owner       whose forward passes these are, for hooks set under ``sites.called_by(owner)``; None: the caller's

    The result depends on ``seed`` and the batch. A model in training mode is set to evaluation and back.
    """
    run = Run(model, prompts, sampling, pad, seed)
    if cache is not None and (held := cache.get_seq_length()) != run.width - 1:
        raise ValueError(f"the cache holds {held} columns, the prompts without their last token have {run.width - 1}")
    run.cache = new_cache(model) if cache is None else cache
    end_ids = torch.tensor(list(ends), dtype=torch.long, device=run.device)

    def mine() -> AbstractContextManager[None]:
        return nullcontext() if owner is None else called_by(owner)

    kept: list[torch.Tensor] = []
    chain: list[Processor] = [*([watch] if watch is not None else []), *processors]
    was_training = bool(model.training)
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            if watch is not None:
                watch.begin(run)
            while True:
                with mine():  # a watch reads every row's prompt
                    begins = run.length == run.width and watch is None and cache is None
                    scores = run.read_prompts() if begins else run.read()
                _check_numbers(scores, run.done)
                for processor in chain:
                    scores = processor(run.ids[:, : run.length], scores)
                warped = sampling.warped(scores)
                column = run.draw(warped, end_ids)
                if logprobs:
                    kept.append(torch.log_softmax(warped, -1).gather(-1, column[:, None])[:, 0])
                if on_column is not None:
                    on_column(column.tolist())
                if stop is not None:
                    run.done = run.done | stop(run.ids[:, : run.length])
                if run.length == run.limit or bool(run.done.all()):
                    break
                left = run.narrow() if narrow and (watch is None or watch.narrows) else None
                if left is not None and watch is not None:
                    watch.narrow(*left)
    finally:
        if was_training:
            model.train()
    return Sampled(_rows(run, set(ends), kept), run)


def _check_numbers(scores: torch.Tensor, done: torch.Tensor) -> None:
    """Raises UserError for scores ``[B, V]`` that nothing can be drawn from, in rows that are not ``done``; the greedy
    token would be the same for ever. A maximum shows both NaN and infinity."""
    if not bool(((scores.amax(-1) < torch.inf) | done).all()):
        raise UserError(
            "the model's scores are NaN or infinite; in float16 values overflow (load with dtype bfloat16 or float32), "
            "else its weights are damaged or a plan steers it too strongly"
        )


def _rows(run: Run, ends: set[int], kept: Sequence[torch.Tensor]) -> list[Drawn]:
    """Each row's own tokens."""
    new = run.ids[:, run.width : run.length].tolist()
    values = torch.stack(list(kept), 1).tolist() if kept else [[]] * run.rows
    rows = []
    for ids, logprobs, n in zip(new, values, run.counts.tolist(), strict=True):
        rows.append(Drawn(ids[:n], ids[n - 1] in ends, logprobs[:n]))
    return rows


def sample_all(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
    **how: Any,
) -> list[Drawn]:
    """``sample`` in batches of prompts of like length, in the order given. ``advance(rows done)`` after each batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done: dict[int, Drawn] = {}
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        chosen = order[start : start + batch_size]
        part = sample(model, [prompts[i] for i in chosen], sampling, seed=seed * 100_003 + number, **how)
        done.update(zip(chosen, part.rows, strict=True))
        advance(len(chosen))
    return [done[i] for i in range(len(prompts))]
