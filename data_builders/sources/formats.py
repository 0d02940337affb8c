"""Formats of corpora: from a raw row to question, thought, answer part and gold answer.

Two shapes cover what is published. A *conversation* is a list of turns (ShareGPT's from/value: Bespoke-Stratos,
Sky-T1, OpenThoughts; or role/content), *columns* are named fields (question, response, perhaps the reasoning and the
gold answer). The thought tags inside the response are independent of the shape (``thoughts.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neureasoner.config import closest
from neureasoner.data_builders.grading.answers import gold_of_chain
from neureasoner.data_builders.sources.rows import Unreadable, tidy
from neureasoner.data_builders.sources.thoughts import (
    Thought,
    split_thought,
    split_untagged,
    thought_from_columns,
)
from neureasoner.errors import UserError

# Column names of published corpora, the most telling first; compared without case.
KNOWN: dict[str, tuple[str, ...]] = {
    "question": ("question", "problem", "prompt", "instruction", "query", "input"),
    "response": (
        "response", "trace", "output", "completion", "generation", "generations", "model_response",
        "deepseek_solution", "deepseek_attempt", "attempt", "solution", "answer",
    ),
    "reasoning": (
        "reasoning", "reasoning_content", "deepseek_reasoning", "thinking", "thought", "think",
        "deepseek_thinking_trajectory", "thinking_trajectory", "thinking_trajectories", "cot",
    ),
    "answer": (
        "gold", "gold_answer", "ground_truth", "expected_answer", "reference_answer", "final_answer", "final",
        "answer", "target",
    ),
    "id": ("id", "uuid", "unique_id"),
    "conversation": ("conversations", "messages", "conversation", "dialog"),
}  # fmt: skip
EXPECTED = (
    "expected 'conversations' (from/value) or 'messages' (role/content), "
    "or columns such as question + response (+ reasoning, answer)"
)
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass
class Parsed:
    """What a row says, before ids and selection."""

    question: str
    thought: Thought
    answer: str | None
    meta: dict[str, Any] = field(default_factory=dict)


def text_of(value: Any) -> str:
    """Text of a cell: a string, a number, the first text of a list (of texts, or of content parts).

    Raises Unreadable for halves of surrogate pairs: no file can hold them as text.
    """
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(v, Mapping) and "text" in v for v in value):
            value = "".join(str(v["text"]) for v in value)
        else:
            value = next((v for v in value if isinstance(v, str) and v.strip()), None)
    if value is None or isinstance(value, bool):
        return ""
    text = str(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unreadable("not valid Unicode (half of a surrogate pair)") from None
    return text


def _turns(value: Any, keys: tuple[str, str] | None) -> list[tuple[str, str, str]]:
    """(role, text, reasoning) of every turn. Raises Unreadable."""
    if isinstance(value, Mapping) and all(isinstance(v, (list, tuple)) for v in value.values()):
        # a list of structs, read as a struct of lists
        names = list(value)
        value = [dict(zip(names, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    if not isinstance(value, (list, tuple)) or not value:
        raise Unreadable("the conversation is empty or no list")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise Unreadable("a turn that is no object")
        pair = keys or (("from", "value") if "from" in turn else ("role", "content"))
        if pair[0] not in turn or pair[1] not in turn:
            raise Unreadable(f"a turn without '{pair[0]}' and '{pair[1]}'")
        role = _ROLES.get(str(turn[pair[0]]).lower())
        if role is None:
            raise Unreadable("a turn of an unknown role")
        turns.append((role, text_of(turn[pair[1]]), text_of(turn.get("reasoning_content"))))
    return turns


@dataclass(frozen=True)
class Format:
    """How to read a row. ``kind``: sharegpt, messages, conversation (either) or columns. ``names``: role -> column."""

    kind: str
    names: Mapping[str, str]
    untagged: str = "set_aside"

    def read(self, row: Mapping[str, Any]) -> Parsed:
        """Raises Unreadable with the reason, which quotes nothing of the row."""
        meta: dict[str, Any] = {}
        if self.kind == "columns":
            question, response, reasoning = (self._cell(row, r) for r in ("question", "response", "reasoning"))
        else:
            question, response, reasoning, meta = self._exchange(row)
        question = tidy(question)
        if not question:
            raise Unreadable("no question")
        answer = self._cell(row, "answer").strip() or None
        if answer is None and self.kind == "columns" and "answer" not in self.names:
            answer = gold_of_chain(response)
        return Parsed(question, self._thought(response, reasoning), answer, meta)

    def row_id(self, row: Mapping[str, Any]) -> str:
        """The row's own id; '' if it has none."""
        name = self.names.get("id")
        value = row.get(name) if name else None
        return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""

    def _cell(self, row: Mapping[str, Any], role: str) -> str:
        name = self.names.get(role)
        return text_of(row.get(name)) if name else ""

    def _exchange(self, row: Mapping[str, Any]) -> tuple[str, str, str, dict[str, Any]]:
        keys = {"sharegpt": ("from", "value"), "messages": ("role", "content")}.get(self.kind)
        turns = _turns(row.get(self.names.get("conversation", "")), keys)
        system = any(role == "system" for role, *_ in turns) or bool(row.get("system"))
        spoken = [turn for turn in turns if turn[0] != "system"]
        if [role for role, *_ in spoken] != ["user", "assistant"]:
            raise Unreadable("not one question and one response")
        # The system prompts of these corpora ask for the tags that are converted here: dropped, and said.
        return spoken[0][1], spoken[1][1], spoken[1][2], {"system_dropped": True} if system else {}

    def _thought(self, response: str, reasoning: str) -> Thought:
        if reasoning.strip():
            return thought_from_columns(reasoning, response)
        if not response.strip():
            raise Unreadable("no response")
        thought = split_thought(response)
        if thought is not None:
            return thought
        if self.untagged == "split":
            return split_untagged(response)
        raise Unreadable("no thought tags in the response")


def _named(columns: Sequence[str], wanted: Mapping[str, str], where: str) -> dict[str, str]:
    for role, name in wanted.items():
        if name not in columns:
            raise UserError(
                f"{where}: column '{name}' ({role}) is not there{closest(name, columns)}; found {_list(columns)}"
            )
    return dict(wanted)


def _list(columns: Sequence[str]) -> str:
    return ", ".join(columns[:30]) or "no columns"


def candidates(columns: Sequence[str], wanted: Mapping[str, str], untagged: str, where: str = "") -> list[Format]:
    """The formats that the columns allow, conversations first. Raises UserError for a named column that is missing."""
    names, lower = _named(columns, wanted, where), {c.lower(): c for c in reversed(columns)}
    taken = set(names.values())

    def find(role: str, free: bool = True) -> str | None:
        return next((lower[k] for k in KNOWN[role] if k in lower and not (free and lower[k] in taken)), None)

    for role in ("id", "conversation", "question", "reasoning"):
        if role not in names and (found := find(role)):
            names[role] = found
            taken.add(found)
    formats = []
    if "conversation" in names and not {"question", "response", "reasoning"} & set(wanted):
        gold = names.get("answer") or find("answer")
        formats.append(Format("conversation", _without_none({**names, "answer": gold}), untagged))
    if "question" in names:
        response = names.get("response") or find("response")
        taken.add(response or "")
        columns_of = {**names, "response": response, "answer": names.get("answer") or find("answer")}
        if response or "reasoning" in names:
            formats.append(Format("columns", _without_none(columns_of), untagged))
    return formats


def _without_none(names: Mapping[str, str | None]) -> dict[str, str]:
    return {k: v for k, v in names.items() if v}


def detect(
    rows: Sequence[Mapping[str, Any]],
    where: str,
    kind: str = "auto",
    wanted: Mapping[str, str] | None = None,
    untagged: str = "set_aside",
) -> Format:
    """The format that reads most of the first rows; the earlier candidate where two read as many.

    Raises UserError naming the columns found and those expected when no row fits, and the commonest reason.
    """
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    formats = candidates(columns, wanted or {}, untagged, where)
    if kind in ("sharegpt", "messages"):
        formats = [Format(kind, f.names, untagged) for f in formats if f.kind == "conversation"]
    elif kind == "columns":
        formats = [f for f in formats if f.kind == "columns"]
    best, most, reasons = None, 0, Counter[str]()
    for candidate in formats:
        fits = 0
        for row in rows:
            try:
                candidate.read(row)
                fits += 1
            except Unreadable as e:
                reasons[str(e)] += 1
        if fits > most:
            best, most = candidate, fits
    if best is None:
        why = f"; most often: {reasons.most_common(1)[0][0]}" if reasons else ""
        hint = " (untagged: split takes plain chains of thought)" if "no thought tags" in why else ""
        raise UserError(f"{where}: no row fits a known format{why}{hint}; found columns {_list(columns)}; {EXPECTED}")
    return best
