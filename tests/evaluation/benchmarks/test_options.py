"""The option a response ends on."""

from __future__ import annotations

import pytest

from neureasoner.data_builders.grading.answers import chosen_option
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.traces import Problem

GOLDEN = [
    (r"So it is \boxed{B}.", "B"),
    (r"\boxed{\text{C}}", "C"),
    (r"\boxed{(D)}", "D"),
    (r"\boxed{\text{(B) 5 m}}", "B"),
    (r"\boxed{A. the first}", "A"),
    (r"\boxed{A} ... no: \boxed{C}", "C"),
    (r"Answer: (B), so \boxed{5}", None),  # what is boxed counts, and it names no option
    (r"\boxed{Apple}", None),
    (r"\boxed{}", None),
    ("Answer: (B)", "B"),
    ("**Answer:** C", "C"),
    ("Answer: **(D)**", "D"),
    ("Answer: $A$", "A"),
    ("The answer is B.", "B"),
    ("the correct answer is option (C).", "C"),
    ("Therefore the answer must be D, not A.", "D"),
    ("Answer: A\nWait, no.\nAnswer: B", "B"),  # the last mention
    ("Option A is wrong, option B too, so the answer is C, unlike option D.", "C"),
    ("I rule out option A and choose option B", "B"),
    ("All told:\n(D)", "D"),
    ("All told:\n**C.**", "C"),
    ("The answer is a number", None),
    ("The answer is Argon", None),
    ("The answer is, I think, 5", None),
    ("A good question. I do not know", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), GOLDEN)
def test_the_letter_a_response_ends_on(text: str, letter: str | None) -> None:
    assert chosen_option(text) == letter


def test_options_are_graded_after_the_thinking() -> None:
    problem = Problem("q/1", "quiz", 1, "Which?", "B")
    response = "Maybe the answer is A.\n</think>\n\nAnswer: (B)<|im_end|>"
    assert answer_of(problem, response) == "B"
    assert grade(problem, "B") is True
    assert grade(problem, answer_of(problem, "Answer: (A)")) is False
    assert grade(problem, answer_of(problem, "I do not know")) is False
