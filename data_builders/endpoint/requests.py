"""What is asked and what comes back. Plain values, no network.

A ``Request`` is addressed by its content: two requests with the same key have the same answer in the ledger, and any
change of model, prompt, parameters or schema is another request. A ``Question`` is what a job wants to know: the first
request, and how to read an answer. Where the answer cannot be read, the next request shows the model its own answer and
says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")
SHOWN = 4000  # characters of an unreadable answer that the next request shows again


class Malformed(ValueError):
    """An answer that cannot be accepted. The message is what the model is told, and what is counted."""


@dataclass(frozen=True)
class Message:
    """One turn. ``role``: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Request:
    """One call. ``schema``: JSON schema of the answer (None: free text); ``params``: temperature, max_tokens, effort…

    ``take`` tells apart the same words asked again on purpose (the second sample of the same question).
    """

    model: str
    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None = None
    schema_name: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    take: int = 0

    @property
    def key(self) -> str:
        """SHA-256 of everything that can change the answer, as hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def corrected(self, answer: str, reason: str) -> Request:
        """The same conversation, one turn on: the answer, and what was wrong with it."""
        shown = answer if len(answer) <= SHOWN else answer[:SHOWN] + " […]"
        more = (
            Message("assistant", shown or "(nothing)"),
            Message("user", f"This answer cannot be used: {reason}. Answer the whole question again, rightly."),
        )
        return replace(self, messages=(*self.messages, *more))


@dataclass(frozen=True)
class Usage:
    """Tokens of one or more calls. ``cached_input`` is the part of ``input`` that the endpoint's cache served."""

    input: int = 0
    output: int = 0
    cached_input: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input + other.input, self.output + other.output, self.cached_input + other.cached_input)


@dataclass(frozen=True)
class Answer:
    """What one call gave: its text, why it ended, its cost in tokens. ``refusal``: the model declined to answer."""

    text: str
    finish_reason: str = "stop"
    refusal: str = ""
    usage: Usage = field(default_factory=Usage)
    model: str = ""


@dataclass(frozen=True)
class Question(Generic[T]):
    """What a job wants to know. ``read`` turns an answer's text into a value, or raises Malformed.

    ``read`` must be a pure function of the text: answers already in the ledger are read again at every start.
    """

    id: str
    request: Request
    read: Callable[[str], T]


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The end of one question. ``value`` is None when no attempt could be read; ``problems`` has one reason for each.

    ``paid``: what this run paid for; ``spent``: what its answers cost whenever they were asked.
    """

    id: str
    value: T | None
    problems: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    paid: Usage = field(default_factory=Usage)
    spent: Usage = field(default_factory=Usage)
