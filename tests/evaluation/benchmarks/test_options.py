"""The option a response ends on."""

from __future__ import annotations

import time

import pytest

from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.data_builders.grading.options import chosen_option, shown_options
from neureasoner.traces import Problem

BOXES = [
    (r"So it is \boxed{B}.", "B"),
    (r"\boxed{\text{C}}", "C"),
    (r"\boxed{\textit{B}}", "B"),
    (r"\boxed{(D)}", "D"),
    (r"\boxed{b}", "B"),
    (r"\boxed{(c)}", "C"),
    (r"\boxed{\mathbf{B}.}", "B"),
    (r"\boxed{\text{(B) 5 m}}", "B"),
    (r"\boxed{A. the first}", "A"),
    (r"\boxed{B \text{ (foo)}}", "B"),
    (r"\boxed{Option B}", "B"),
    (r"\boxed{\text{Option B}}", "B"),
    (r"\boxed{\text{The answer is B}}", "B"),
    (r"\boxed{A} ... no: \boxed{C}", "C"),
    (r"The answer is A, no: \boxed{C}", "C"),  # what is boxed counts
    # several letters are no choice, and nothing said before makes one of them
    (r"The answer is A. \boxed{A, B}", None),
    (r"\boxed{A or B}", None),
    (r"\boxed{\text{(A) and (C)}}", None),
    (r"\boxed{A) 5, B) 6}", None),
    # a box without a letter: what the text names, if it does
    (r"Answer: (B), so \boxed{5}", "B"),
    (r"\boxed{Apple}", None),
    (r"\boxed{A point}", None),
    (r"\boxed{C_6H_6}", None),
    (r"\boxed{B = 3\,T}", None),
    (r"\boxed{B(t)}", None),
    (r"\boxed{x + b}", None),
    (r"\boxed{BC}", None),
    (r"\boxed{}", None),
]
STATED = [
    ("Answer: (B)", "B"),
    ("**Answer:** C", "C"),
    ("**Answer: C**", "C"),
    ("Answer: **(D)**", "D"),
    ("Answer: **B. 5 m**", "B"),
    ("Answer: $A$", "A"),
    (r"Answer: \(A\)", "A"),
    (r"The answer is $\text{B}$.", "B"),
    ("The answer is B.", "B"),
    ("the correct answer is option (C).", "C"),
    ("The correct option is B.", "B"),
    ("The correct choice is (B).", "B"),
    ("So the option letter is: B", "B"),
    ("The answer would therefore be B.", "B"),
    ("The answer is therefore A because it floats.", "A"),
    ("The answer is clearly\n\n(B)", "B"),
    ("The answer I choose is (B).", "B"),
    ("option (B) is correct, not option (A)", "B"),
    ("Thus, C is the correct answer.", "C"),
    ("Option B must be the best choice, since A is too small.", "B"),
    ("The answer is B, and A is wrong.", "B"),
    ("Therefore the answer must be D, not A.", "D"),
    ("Answer: A\nWait, no.\nAnswer: B", "B"),  # the last mention
    ("Option A is wrong, option B too, so the answer is C, unlike option D.", "C"),
    ("I rule out option A and choose option B", "B"),
    ("Therefore, option (B).", "B"),
    ("It moves at 5 m/s, which corresponds to option (B).", "B"),
    ("So it's option B!", "B"),
    ("Option B is tempting. Option A is the correct answer because it is short.", "A"),
    ("First the answer is (A), but checking again... So the answer is (C).", "C"),
    ("The correct answer is:\n\n**A. the first**", "A"),
    ("All told:\n(D)", "D"),
    ("All told:\n**C.**", "C"),
    ("### Final answer\nOption B", "B"),
]
NOT_STATED = [  # no letter, or none that is chosen
    "The answer: A careful look shows that nothing moves.",
    "The answer is a number",
    "The answer is Argon",
    "The answer is, I think, 5",
    "The answer is I think 5",
    "The answer is A's area",
    "The answer is A-level physics",
    "The answer is C = 5",
    "The answer is not B.",
    "The answer cannot be B.",
    "The answer is A or B.",
    "The answer is (A) and (C).",
    "The answer is A. No, the answer is A or B.",
    "Is the answer B? I do not know",
    "Could the answer be B?",
    "If the answer is B, the ball would float.",
    "Suppose that the answer is B.",
    "It is not true that the answer is B.",
    "Option A is wrong.",
    "I considered option A and option B.",
    "So option A, option B and option C are wrong.",
    "Neither A nor B is correct.",
    "That does not match option B.",
    "This matches option A, that matches option B.",
    "Option A is correct. Option B is correct.",
    "Option A is correct only if it rains.",
    "Statement B is correct.",
    "I do not choose option B.",
    "The answer choices are: A) 5 and B) 6",
    "Going option by option: A is wrong",
    "A good question. I do not know",
    "",
]


@pytest.mark.parametrize(("text", "letter"), [*BOXES, *STATED, *((text, None) for text in NOT_STATED)])
def test_the_letter_a_response_ends_on(text: str, letter: str | None) -> None:
    assert chosen_option(text) == letter


@pytest.mark.parametrize(("question", "letters"), [
    ("Which?\n\n(A) 1\n(B) 2\n(C) 3\n(D) 4\n\nPut the letter in a box.", "ABCD"),
    ("Parts:\n(A) x\n(B) y\n(C) z\n\nWhich?\n\n(A) x\n(B) y", "AB"),  # the stem has a list of its own
    ("Which? A) 1 B) 2", "ABCDEFGHIJ"), ("(A) alone", "ABCDEFGHIJ"), ("(A) 1\n(C) 2", "ABCDEFGHIJ"), ("", "ABCDEFGHIJ"),
])  # fmt: skip
def test_the_letters_that_a_problem_shows(question: str, letters: str) -> None:
    assert shown_options(question) == letters


@pytest.mark.parametrize(("text", "letter"), [
    (r"The answer is B, with energy \boxed{E}", "B"),  # E is no option of this problem, so it is the energy
    (r"\boxed{e}", None), ("The answer is E.", None), ("The answer is I.", None), ("So it is\nH", None),
    ("The answer is B or E.", None), (r"\boxed{D}", "D"),
])  # fmt: skip
def test_only_letters_that_are_shown_are_found(text: str, letter: str | None) -> None:
    assert chosen_option(text, "ABCD") == letter


def test_options_are_graded_after_the_thinking() -> None:
    problem = Problem("q/1", "quiz", 1, "Which?\n\n(A) 1\n(B) 2", "B")
    response = "Maybe the answer is A.\n</think>\n\nAnswer: (B)<|im_end|>"
    assert answer_of(problem, response) == "B"
    assert grade(problem, "B") is True
    assert grade(problem, answer_of(problem, "Answer: (A)")) is False
    assert grade(problem, answer_of(problem, "I do not know")) is False
    assert answer_of(problem, r"The answer is B: \boxed{C}") == "B", "the problem shows A and B"
    unlisted = Problem("q/2", "quiz", 1, "Which?\n\n(A) 1\n(B) 2", "C")
    assert grade(unlisted, answer_of(unlisted, r"\boxed{C}")), "never so that the gold answer cannot be given"


@pytest.mark.parametrize(("given", "right"), [
    ("B", True), ("(B)", True), ("Option B", True), (r"\text{B. 5 m}", True), ("b", True), ("C", False),
    ("Option C", False), ("A or B", False), ("bc", False),
])  # fmt: skip
def test_an_option_that_was_tagged_counts_in_every_form(given: str, right: bool) -> None:
    assert grade(Problem("q/1", "quiz", 1, "Which?", "B"), given) is right


@pytest.mark.parametrize("hostile", [
    "answer " * 500, "answer" + " " * 5000, "(" * 5000, "A, " * 2000, "*" * 5000, "answer is " * 500 + "B, " * 200,
    "\\text{" * 5000, "\\boxed{" + "\\text{" * 3000 + "B" + "}" * 3001, "not " * 2000 + "option B is correct",
    "_A" * 3000,
    "\\boxed{" + "A or " * 5000 + "}", "\\boxed{" + " " * 50_000 + "}", "the" + " " * 50_000 + "answer is B",
])  # fmt: skip
def test_hostile_text_takes_no_time(hostile: str) -> None:
    begin = time.monotonic()
    chosen_option(hostile)
    assert time.monotonic() - begin < 1


def test_a_letter_of_math500_counts_in_a_box_alone() -> None:
    problem = Problem("m/1", "math500", 1, "Which?", r"\text{(C)}")
    for text in ("The answer is C.", r"The answer is C, the \boxed{plane}.", "#### C", "C"):
        assert answer_of(problem, text, final_number=True) is None
    assert grade(problem, answer_of(problem, r"\boxed{C}")) and grade(
        problem, answer_of(problem, r"\boxed{\text{(C)}}")
    )
    assert not grade(problem, answer_of(problem, r"\boxed{\text{(B)}}"))
