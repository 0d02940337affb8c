"""AlphaOne (core.md §5.2): slow thinking up to the alpha moment, fast after it.

Legend: B rows, V vocabulary, t response tokens so far, M = alpha * N_think the alpha moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from neureasoner.errors import UserError
from neureasoner.inference.baselines.decoder import Decoder, DecoderWatch
from neureasoner.inference.decode import Generation
from neureasoner.inference.plan import Action, Plan, Rule, Trigger
from neureasoner.inference.rows import RowState
from neureasoner.traces import THINK_CLOSE


def mean_thinking(vanilla: Iterable[Generation]) -> float:
    """N_think: the mean number of thinking tokens of vanilla runs on the same questions."""
    lengths = [g.thinking_tokens for g in vanilla]
    if not lengths:
        raise UserError("alpha_one: N_think needs at least one vanilla run")
    return float(np.mean(lengths))


class AlphaWatch(DecoderWatch):
    """Before M: after a blank line a coin of p = 1 - t/M forces the word. From M on: the word becomes ``</think>``.

    Nothing happens outside the thinking, so at most one ``</think>`` is forced.
    """

    def _act(self) -> None:
        """The slow phase."""
        slow = self.decoder.plan.rule("slow")
        for _, row in self.open_rows():
            share = len(row.tokens) / self.decoder.moment
            if share < 1 and self._text(row.tokens[-3:]).endswith(b"\n\n"):
                score = 1.0 - row.coin(slow)  # a coin below p = 1 - share
                if row.judge(slow, score, share):
                    self.force(row, slow, score, share)

    def _force(self, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The fast phase: where the word is about to be drawn, ``</think>`` is put in its place. scores [B, V]."""
        late = [(i, row) for i, row in self.open_rows() if len(row.tokens) >= self.decoder.moment]
        if late:
            drawn = self.sampler.peek(scores).tolist()
            for i, row in late:
                if self._completes(row, drawn[i]):
                    self.force(row, self.decoder.plan.rule("fast"))
        return super()._force(scores)

    def _text(self, tokens: Sequence[int]) -> bytes:
        texts = self.controller.separators.texts
        return b"".join(texts[i] if i < len(texts) else b"" for i in tokens)

    def _completes(self, row: RowState, token: int) -> bool:
        """Whether the word ends within ``token``. One spelled in pieces is recognised at its last piece."""
        before = self._text(row.tokens[-len(self.decoder.word) :])
        return any(m.end() > len(before) for m in self.decoder.pattern.finditer(before + self._text([token])))


class AlphaOne(Decoder):
    """See ``alpha_one``."""

    kind = AlphaWatch

    def __init__(self, model: Any, tokenizer: Any, moment: float, word: str, close: str):
        self.moment, self.word = moment, word
        self.pattern = re.compile(rb"(?<![A-Za-z])" + re.escape(word.encode()) + rb"(?![A-Za-z])")
        slow = Rule("slow", Trigger(random=1.0, max=None), Action(force=word))
        fast = Rule("fast", Trigger(oracle="word", immediate=True), Action(force=close))
        super().__init__(model, tokenizer, Plan("alpha_one", (slow, fast)))


def alpha_one(
    model: Any, tokenizer: Any, n_think: float, alpha: float = 1.4, word: str = "Wait", close: str = THINK_CLOSE
) -> AlphaOne:
    """AlphaOne with the alpha moment at ``alpha * n_think`` response tokens; ``n_think`` from ``mean_thinking``."""
    for key, value in (("n_think", n_think), ("alpha", alpha)):
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"alpha_one: {key} must be above 0, got {value}")
    return AlphaOne(model, tokenizer, alpha * n_think, word, close)
