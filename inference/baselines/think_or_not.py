"""Think or Not, online (core.md §5.1): the thinking ends as soon as the answers it would give agree.

At the end of every chunk of thinking, and before the first token, the running generation is branched: its cache is
copied, the thinking is closed there, a stub asks for the answer, and the copy is dropped. Legend as in ``branch.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from neureasoner.errors import UserError
from neureasoner.inference.baselines.branch import Branch, Same, boxed_answers
from neureasoner.inference.baselines.decoder import Decoder, DecoderWatch
from neureasoner.inference.plan import Action, Plan, Rule, Trigger
from neureasoner.inference.rows import RowState
from neureasoner.steps import Separators
from neureasoner.thinking import UNOPENED
from neureasoner.traces import OPENED, THINK_CLOSE

MAX_ENTROPY = 1 / (math.e * math.log(2))  # the largest log2(n) / n over real n: 0.53074
MIN_MASS = 0.5  # of the only candidate: its entropy is 0 whatever its probability
CLOSE = f"{THINK_CLOSE}\n\n"  # a chunk ends with a blank line, so the end of the thinking opens a line
OPTION_STUB = "The correct option letter is:"
BOXED_STUB = "The correct answer is: \\boxed{"


def answer_entropy(probabilities: Sequence[float]) -> float:
    """H2(p) / n in bits of n candidates' probabilities, normalised first; n counts those of probability 0 too."""
    p = np.asarray(probabilities, dtype=np.float64)
    p = p / p.sum()
    kept = p[p > 0]
    return float(-(kept * np.log2(kept)).sum() / len(p))


def plainly_same(a: str, b: str) -> bool:
    """Equal but for white space."""
    return "".join(a.split()) == "".join(b.split())


class ThinkOrNotWatch(DecoderWatch):
    """``since[i]``: response tokens of row i at its last probe."""

    narrows = False  # probes copy rows of the cache by their place in the batch

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.since = [0] * len(self.rows)

    def _start(self) -> None:
        """The first probe, before any thinking."""
        for unopened in (False, True):
            self._probe([(i, row) for i, row in self.open_rows() if (row.begins == UNOPENED) is unopened], unopened)

    def _act(self) -> None:
        """Probe the rows that have just closed a long enough chunk."""
        self._probe([(i, row) for i, row in self.open_rows() if row.closed and self._long_enough(i, row)])

    def _long_enough(self, i: int, row: RowState) -> bool:
        texts = self.controller.separators.texts
        chunk = b"".join(texts[t] for t in row.tokens[self.since[i] :] if t < len(texts))
        return len(chunk.decode("utf-8", errors="replace").strip()) >= self.decoder.min_chars

    def _probe(self, due: list[tuple[int, RowState]], unopened: bool = False) -> None:
        """Ask these rows for their answer; close the thinking of those that are sure. ``unopened``: open it first."""
        if not due:
            return
        run = self.sampler
        branch = Branch(self.controller.model, run.cache, run.mask[:, : run.length], [i for i, _ in due])
        said, read = self.decoder.ask(branch, self.eos, unopened)
        rule = self.decoder.plan.rule("sure")
        for (i, row), p, tokens in zip(due, said, read.tolist(), strict=True):
            self.since[i] = len(row.tokens)
            row.probe_tokens += tokens
            if not sum(p) or (len(p) == 1 and p[0] < MIN_MASS):
                continue  # no answer, or a single unlikely one, says nothing
            # Sureness runs from 0 to 1, and as everywhere a rule fires above its threshold.
            sureness, threshold = 1 - answer_entropy(p) / MAX_ENTROPY, 1 - self.decoder.ratio
            if row.judge(rule, sureness, threshold):
                self.force(row, rule, sureness, threshold)


class ThinkOrNot(Decoder):
    """See ``think_or_not``."""

    kind = ThinkOrNotWatch

    def __init__(self, model: Any, tokenizer: Any, options: str, ratio: float, min_chars: int, stub: str, same: Same):
        self.options, self.ratio, self.min_chars, self.same = options, ratio, min_chars, same
        super().__init__(
            model, tokenizer, Plan("think_or_not", (Rule("sure", Trigger(oracle="sure"), Action(force=CLOSE)),))
        )
        self.stub_ids, self.opened_stub_ids = (
            Action(force=opened + CLOSE + stub).ids(tokenizer) for opened in ("", OPENED)
        )
        self.separators = Separators.of(tokenizer)
        texts = [t.decode("utf-8", errors="replace").strip() for t in self.separators.texts]
        self.letters = [[i for i, text in enumerate(texts) if text == letter] for letter in options]
        for letter, ids in zip(options, self.letters, strict=True):
            if not ids:
                raise UserError(f"think_or_not: option {letter!r} is no single token of this tokenizer")

    def ask(self, branch: Branch, eos: set[int], unopened: bool = False) -> tuple[list[list[float]], np.ndarray]:
        """Probabilities of each branch's candidate answers, and the tokens read for them, [N]."""
        stub = self.opened_stub_ids if unopened else self.stub_ids
        if self.options:
            p = branch.read([stub] * branch.mask.shape[0]).exp()
            letters = torch.stack([p[:, ids].sum(-1) for ids in self.letters], 1)
            return letters.tolist(), np.full(len(letters), len(stub))
        barred = eos | set(self.tokenizer.all_special_ids) | self.separators.closing
        answers, read = boxed_answers(branch, stub, self.separators.texts, barred, self.same)
        return [[p for answer, p in row if THINK_CLOSE not in answer] for row in answers], read


def think_or_not(
    model: Any,
    tokenizer: Any,
    options: str = "",
    ratio: float = 0.1,
    min_chars: int | None = None,
    stub: str | None = None,
    same: Same = plainly_same,
) -> ThinkOrNot:
    """Think or Not for questions with ``options`` (such as ``ABCD``) or, without, for answers in a box.

    ratio      share of the largest entropy below which the thinking is closed
    min_chars  shortest chunk between two probes; by default 120 with options, 200 without
    stub       what asks for the answer, after the closed thinking; without options it ends in an open ``\\boxed{``
    same       which boxed answers are one candidate

    A copy of the rows that are probed together, times 5 for boxed answers, must fit into memory beside the cache.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"think_or_not: ratio must lie in (0, 1], got {ratio}")
    if options and (len(options) < 2 or len(set(options)) < len(options)):
        raise UserError(f"think_or_not: options must be two or more different letters, got {options!r}")
    if min_chars is None:
        min_chars = 120 if options else 200
    if min_chars < 1:
        raise UserError(f"think_or_not: min_chars must be at least 1, got {min_chars}")
    stub = stub or (OPTION_STUB if options else BOXED_STUB)
    if not options and not stub.endswith("{"):
        raise UserError(f"think_or_not: without options the stub must end in an open brace, got {stub!r}")
    return ThinkOrNot(model, tokenizer, options, ratio, min_chars, stub, same)
