"""One imported trace, and the ``<think>`` form its text has (core.md §1.8).

The response follows the convention of ``rewriters.reference_from``: the prompt has opened ``<think>``; paragraphs are
joined by one blank line; then ``\\n</think>\\n\\n`` and the answer part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neureasoner.errors import UserError
from neureasoner.traces import THINK_CLOSE, Problem, read_jsonl

if TYPE_CHECKING:
    from neureasoner.data_builders.rewriters import Reference

_BLANK_LINES = re.compile(r"\n{2,}")


class Unreadable(ValueError):
    """A row that cannot be turned into a SourceRow; the message is the reason and holds none of the row's text."""


def tidy(text: str) -> str:
    """One blank line between paragraphs, no white space at the ends of lines; an indented first line stays as it is."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip(" \t") for line in lines)).strip()


@dataclass
class SourceRow:
    """A question and one response to it.

    ``closed``: the thought was ended; ``finished``: the answer part too. ``answer``: the gold one, where the corpus
    has it. ``meta``: where the row stood (``file``, ``line``), ``predicted``, ``verdict`` and the columns kept.
    """

    id: str
    question: str
    thinking: str
    solution: str
    answer: str | None
    source: str
    closed: bool = True
    finished: bool = True
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def response(self) -> str:
        """What the model wrote after ``<think>``. An unfinished thought is not closed."""
        return f"{self.thinking}\n{THINK_CLOSE}\n\n{self.solution}" if self.closed else self.thinking

    @property
    def paragraphs(self) -> list[str]:
        """The steps of the thinking: its paragraphs (core.md §0.5)."""
        return self.thinking.split("\n\n")

    def problem(self) -> Problem:
        """The question as a Problem whose family is the corpus. Its answer is the gold one, else the row's own."""
        answer = self.answer if self.answer is not None else str(self.meta.get("predicted") or "")
        return Problem(self.id, self.source, 0, self.question, answer)

    def reference(self) -> Reference:
        """The row as a Reference for a rewriter. Raises Rejected where the thinking is not closed."""
        from neureasoner.data_builders.rewriters import reference_from

        return reference_from(self.id, self.problem(), self.response, self.source)

    def line(self) -> bytes:
        """The row as one line of jsonl."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode("utf-8", "replace")


def read_sources(path: str | Path) -> Iterator[SourceRow]:
    """Stream references.jsonl, one row in memory at a time. Raises UserError naming the line of a bad row."""
    for number, row in read_jsonl(path):
        try:
            yield SourceRow(**row)
        except TypeError as e:
            raise UserError(f"{path}, line {number}: not a row of `data import` ({e})") from None
