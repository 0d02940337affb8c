"""The road from a question to its outcome: an answer, what was wrong with it, the next request, and so on.

Each step follows from the answers alone, so the same ledger leads every run, forecast and batch down the same road.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from neureasoner.data_builders.endpoint.requests import Answer, Malformed, Outcome, Question, Request, Usage
from neureasoner.data_builders.endpoint.wire import verdict

T = TypeVar("T")
LOST = "no answer: "  # begins the last problem of an outcome that a later run may still answer


def is_lost(outcome: Outcome[T]) -> bool:
    """Whether the endpoint failed to answer (as against: it answered, and nothing it said could be read)."""
    return outcome.value is None and bool(outcome.problems) and outcome.problems[-1].startswith(LOST)


@dataclass
class Road(Generic[T]):
    """One question on its way. ``request`` is what to ask next; None at the end."""

    question: Question[T]
    retries: int
    request: Request | None = field(init=False)
    value: T | None = None
    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    paid: Usage = field(default_factory=Usage)
    spent: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.request = self.question.request
        self.key = self.request.key  # computed once: hashing a long prompt takes its time

    def step(self, answer: Answer, fresh: bool) -> str:
        """Read the answer to ``request``. Returns the kind of problem ("" for none). ``fresh``: paid by this run.

        What ``read`` raises besides Malformed is a mistake in the program and goes through.
        """
        assert self.request is not None
        self.keys.append(self.key)
        self.spent = self.spent + answer.usage
        if fresh:
            self.paid = self.paid + answer.usage
        problem = verdict(answer)
        kind = problem.partition(":")[0].replace(" ", "_")
        if not problem:
            try:
                self.value = self.question.read(answer.text)
            except Malformed as e:
                problem, kind = str(e) or "it cannot be read", "malformed"
        if not problem:
            self.request = None
            return ""
        self.problems.append(problem)
        if len(self.problems) > self.retries:
            self.request = None
        else:
            self.request = self.request.corrected(answer.refusal or answer.text, problem)
            self.key = self.request.key
        return kind

    def lose(self, reason: str) -> None:
        """Give the question up for this run."""
        self.problems.append(LOST + reason)
        self.request = None

    def outcome(self) -> Outcome[T]:
        """The end of the road."""
        return Outcome(self.question.id, self.value, tuple(self.problems), tuple(self.keys), self.paid, self.spent)
