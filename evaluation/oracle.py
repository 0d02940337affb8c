"""The exact judge pulling the triggers: the ceiling that separates the probes' quality from the skill of repair.

Each oracle reads the response so far, at every closed step, under the budgets and cooldowns of the plan's rules:
``intra`` fires while a wrong step since its last intervention stands, ``inter`` while the last steps make a loop that
began after its last intervention, ``instance`` once a step reached the right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from neureasoner.data_builders.families import Review
from neureasoner.data_builders.judges import find_loop, review_steps
from neureasoner.steps import Separators

RULES = ("intra", "inter", "instance")


def new_loop(reviews: Sequence[Review], since: int) -> bool:
    """Whether steps from ``since`` on close a loop; earlier steps count as attempts made, not as revisits."""
    seen: set[Any] = set()
    pruned = []
    for i, r in enumerate(reviews):
        pruned.append(Review() if i < since and r.key in seen else r)
        seen.add(r.key)
    return find_loop(pruned) is not None


class ExactOracles:
    """The oracles of one generation, by rule name; they share one review per row and step. Make new ones for each."""

    def __init__(self) -> None:
        self._reviews: dict[int, tuple[int, list[Review]]] = {}

    def functions(self) -> dict[str, Callable[[Any], bool]]:
        """For ``SteeredModel.generate(oracles=...)``."""
        return {"intra": self.intra, "inter": self.inter, "instance": self.instance}

    def reviews(self, row: Any) -> list[Review]:
        """Reviews of the steps closed so far."""
        kept = self._reviews.get(row.index)
        if kept is None or kept[0] != len(row.tokens):
            text, offsets = Separators.of(row.tokenizer).offsets(row.tokens)
            bounds = row.bounds
            texts = [text[offsets[a] : offsets[b]] for a, b in pairwise(bounds)]
            kept = self._reviews[row.index] = (len(row.tokens), review_steps(row.problem, texts) if texts else [])
        return kept[1]

    @staticmethod
    def _since(row: Any, rule: str) -> int:
        """First step after the rule's last intervention."""
        return max((e["step"] + 1 for e in row.events if e["rule"] == rule and not e["suppressed"]), default=0)

    def intra(self, row: Any) -> bool:
        return any(r.error for r in self.reviews(row)[self._since(row, "intra") :])

    def inter(self, row: Any) -> bool:
        return new_loop(self.reviews(row), self._since(row, "inter"))

    def instance(self, row: Any) -> bool:
        return any(r.solves for r in self.reviews(row))
