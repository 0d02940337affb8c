"""Which rows of a corpus stay: finished, free of foreign markup, not in a benchmark, answered right. In that order,
so that the dearest test (algebra) sees the fewest rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from neureasoner.data_builders.grading.answers import final_answer
from neureasoner.data_builders.grading.verifier import Verifier
from neureasoner.data_builders.layouts import is_trigger_like
from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.data_builders.sources.decontaminate import BenchmarkIndex, Match
from neureasoner.data_builders.sources.rows import SourceRow

# Text that the trigger SFT or a chat template gives a meaning of its own: as tokens it would not be text any more.
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|eot_id|begin_of_text|end_of_text|start_header_id|end_header_id)\|>"
    r"|<｜[^｜\n]{1,40}｜>|<(?:start|end)_of_turn>"
)


@dataclass(frozen=True)
class Removal:
    """A row that was read and not kept. ``detail`` quotes no more of it than the words shared with a benchmark."""

    row: SourceRow
    reason: str
    detail: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What removed.jsonl says of it."""
        where: dict[str, Any] = {k: self.row.meta[k] for k in ("file", "line") if k in self.row.meta}
        return {"id": self.row.id, **where, "reason": self.reason, **self.detail}


def forbidden_text(row: SourceRow) -> str | None:
    """trigger_text or control_tokens, if any part of the row holds some."""
    for part in (row.question, row.thinking, row.solution):
        if ("<" in part or "[" in part) and is_trigger_like(part):
            return "trigger_text"
        if "<" in part and _CONTROL.search(part):
            return "control_tokens"
    return None


def overlap(row: SourceRow, index: BenchmarkIndex, scan_response: bool) -> tuple[Match, str] | None:
    """The first overlap of a row with the benchmarks and the part of the row it stands in."""
    parts = [("question", row.question)]
    if scan_response:
        parts += [("thinking", row.thinking), ("solution", row.solution)]
    for name, text in parts:
        match = index.match(text, whole=name == "question")
        if match:
            return match, name
    return None


class Selector:
    """Splits rows into those kept and those removed. ``select(rows)`` keeps the order and fills ``meta``."""

    def __init__(self, config: ImportConfig, index: BenchmarkIndex | None, verifier: Verifier | None):
        self.config, self.index, self.verifier = config, index, verifier

    def select(self, rows: Sequence[SourceRow]) -> tuple[list[SourceRow], list[Removal]]:
        """(kept, removed), each in the order of ``rows``."""
        removed: dict[int, Removal] = {}
        for i, row in enumerate(rows):
            removal = self._at_sight(row)
            if removal:
                removed[i] = removal
        self._verify(rows, removed)
        kept = [row for i, row in enumerate(rows) if i not in removed]
        return kept, [removed[i] for i in sorted(removed)]

    def _at_sight(self, row: SourceRow) -> Removal | None:
        config = self.config
        if config.unfinished == "drop" and not row.finished:
            return Removal(row, "unfinished", {"part": "answer" if row.closed else "thought"})
        if config.trigger_text == "drop":
            reason = forbidden_text(row)
            if reason:
                return Removal(row, reason)
        if self.index is not None:
            found = overlap(row, self.index, config.scan_response)
            if found:
                match, part = found
                detail: dict[str, Any] = {"benchmark_item": match.item, "match": match.kind, "part": part}
                detail["hash" if match.private else "words"] = match.words
                return Removal(row, "benchmark", detail)
        return None

    def _verify(self, rows: Sequence[SourceRow], removed: dict[int, Removal]) -> None:
        if self.verifier is None:
            return
        drop = self.config.select == "correct"
        asked = []
        for i, row in enumerate(rows):
            if i in removed:
                continue
            if row.solution:
                predicted, boxed = final_answer(row.solution)
                row.meta["predicted"] = predicted if boxed else None
            if row.answer is None:
                row.meta["verdict"] = "no_gold"
                if drop and self.config.gold_missing == "drop":
                    removed[i] = Removal(row, "no_gold")
            elif not row.solution:
                row.meta["verdict"] = "no_answer"
                if drop:
                    removed[i] = Removal(row, "no_answer")
            else:
                asked.append(i)
        verdicts = self.verifier.check([(rows[i].answer or "", rows[i].solution) for i in asked])
        for i, verdict in zip(asked, verdicts, strict=True):
            rows[i].meta["verdict"] = verdict.state
            if drop and verdict.state != "correct":
                removed[i] = Removal(rows[i], verdict.state, {"why": verdict.why} if verdict.why else {})
