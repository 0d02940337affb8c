"""Asking a running generation what it would answer now, on copies of its cache.

Legend: B rows of the generation, N branches, P columns of the cache, S tokens read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neureasoner.caches import branched, select
from neureasoner.forward import next_logits

Same = Callable[[str, str], bool]


class Branch:
    """N copies of rows of a generation, to be read on; the generation itself is not touched.

    cache, mask  as the generation's last forward left them: the cache, and 0 where it holds padding, else 1 [B, P]
    rows         which of its rows to copy; one may occur several times
    """

    def __init__(self, model: Any, cache: Any, mask: torch.Tensor, rows: Sequence[int]):
        self.model = model
        index = torch.tensor(list(rows), device=mask.device)
        self.cache, self.mask = branched(cache, index), mask[index]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these branches, in this order; one may occur several times."""
        index = torch.tensor(list(rows), device=self.mask.device)
        self.mask = self.mask[index]
        select(self.cache, index)

    @torch.no_grad()
    def read(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read S more tokens in every branch, ids [N, S]; log-probabilities of the next one, [N, V] float32."""
        given = torch.tensor(ids, device=self.mask.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(given.shape)], dim=1)
        places = (self.mask.long().cumsum(-1) - 1)[:, -given.shape[1] :]
        return torch.log_softmax(next_logits(self.model, given, self.mask, places, self.cache), -1)


@dataclass(frozen=True)
class Beam:
    """An answer being written: its row, its text, its open braces (the stub's is the first), log-probability."""

    row: int
    text: bytes = b""
    depth: int = 1
    logp: float = 0.0

    def extended(self, text: bytes, logp: float) -> tuple[Beam, str | None]:
        """The beam with one more token; the answer, if the token holds the brace that closes it. What the token has
        before that brace belongs to the answer, what comes after it does not."""
        depth, escaped = self.depth, (len(self.text) - len(self.text.rstrip(b"\\"))) % 2 == 1
        for n, byte in enumerate(text):
            if not escaped and byte in b"{}":
                depth += 1 if byte == ord("{") else -1
                if not depth:
                    return self, (self.text + text[:n]).decode("utf-8", errors="replace").strip()
            escaped = byte == ord("\\") and not escaped
        return Beam(self.row, self.text + text, depth, self.logp + logp), None


def boxed_answers(
    branch: Branch,
    stub: Sequence[int],
    texts: Sequence[bytes],
    barred: set[int],
    same: Same,
    width: int = 5,
    steps: int = 10,
) -> tuple[list[list[tuple[str, float]]], np.ndarray]:
    """Beam search for the answers that close the stub's open brace (core.md §5.1 step 3).

    Per branch: at most ``width`` (answer, probability), the likeliest first, equal answers (``same``) as one with their
    sum; and the tokens read, [N]. ``texts``: bytes of every token; ``barred``: tokens that end an answer unfinished.
    Empty answers are none.
    """
    rows = branch.mask.shape[0]
    found: list[dict[str, float]] = [{} for _ in range(rows)]
    read = np.full(rows, len(stub))
    beams = [Beam(i) for i in range(rows)]
    logp = branch.read([list(stub)] * rows)
    for step in range(steps):
        values, tokens = (t.tolist() for t in logp.topk(min(width, logp.shape[1]), -1))
        grown: list[list[tuple[Beam, int, int]]] = [[] for _ in range(rows)]
        for place, beam in enumerate(beams):
            for value, token in zip(values[place], tokens[place], strict=True):
                if token in barred or token >= len(texts):
                    continue
                longer, answer = beam.extended(texts[token], value)
                if answer is None:
                    grown[beam.row].append((longer, place, token))
                elif answer:
                    found[beam.row][answer] = found[beam.row].get(answer, 0.0) + float(np.exp(beam.logp + value))
        kept = [k for row in grown for k in sorted(row, key=lambda k: -k[0].logp)[:width]]
        if not kept or step == steps - 1:
            break
        beams = [k[0] for k in kept]
        branch.select([k[1] for k in kept])
        logp = branch.read([[k[2]] for k in kept])
        np.add.at(read, [b.row for b in beams], 1)
    return [_merged(answers, same)[:width] for answers in found], read


def _merged(answers: Mapping[str, float], same: Same) -> list[tuple[str, float]]:
    """Equal answers as one, under the likeliest's name; the likeliest first."""
    classes: dict[str, float] = {}
    for answer, p in sorted(answers.items(), key=lambda a: -a[1]):
        home = next((known for known in classes if same(known, answer)), answer)
        classes[home] = classes.get(home, 0.0) + p
    return sorted(classes.items(), key=lambda a: -a[1])
