"""Grading: the family's scorer or algebra, and nothing an answer holds stops it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import pytest

from neureasoner.data_builders.grading import grade as module
from neureasoner.data_builders.grading.grade import answer_of, grade, same_answer
from neureasoner.errors import UserError
from neureasoner.traces import Problem

GAME = Problem("c-1", "countdown", 1, "Use 3, 4 and 8, each exactly once, with + - * / to reach 20.", "8 * 3 - 4")
FREE = Problem("m", "math", 1, "?", "\\frac{1}{2}")


@pytest.mark.parametrize(("response", "answer"), [
    ("thinking \\boxed{3}</think>\n\nso \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("</think>\n\nSo it is half.\n#### 1/2", "1/2"), ("</think>\n\nIt is half.", None), ("</think>\\boxed{1", None),
])  # fmt: skip
def test_a_free_answer_must_be_marked(response: str, answer: str | None) -> None:
    assert answer_of(FREE, response) == answer


NUMBER = Problem("g", "gsm8k", 1, "?", "4")


@pytest.mark.parametrize(("response", "answer"), [
    ("So, the answer is 4.", "4"), ("It is 7.</think>\n\nSo, the answer is **4**.<|im_end|>", "4"),
    ("I have 9, so \\boxed{4}, not 5", "4"), ("#### 4", "4"), ("#### Step 2\n\nIt is 4 apples.", "4"),
    ("It is 4.</think>\n\nno number", None), ("</think>\\boxed{4", None), ("</think>", None),
])  # fmt: skip
def test_of_an_unmarked_answer_the_final_number_counts(response: str, answer: str | None) -> None:
    assert answer_of(NUMBER, response, final_number=True) == answer
    assert grade(NUMBER, answer_of(NUMBER, response, final_number=True)) == (answer is not None)


def test_the_final_number_counts_where_the_gold_answer_is_one() -> None:
    final_number = partial(answer_of, final_number=True)
    said = "It is 1/2, that is, 0.5."
    assert final_number(replace(NUMBER, answer="0.50"), said) == "0.5" and grade(replace(NUMBER, answer="0.50"), "0.5")
    assert final_number(FREE, said) is None and final_number(replace(NUMBER, answer="tests:x"), said) is None
    assert final_number(replace(NUMBER, family="math500"), "It is 4.") is None, "graded by what is boxed"
    assert final_number(replace(NUMBER, family="math500"), "#### 4") is None
    assert answer_of(NUMBER, "It is 4.") is None, "only where it is asked for"
    assert not grade(replace(NUMBER, answer="2"), final_number(NUMBER, "It is 1/2.")), "no part of a fraction"
    assert grade(replace(NUMBER, answer="1,200.5"), final_number(NUMBER, "She pays $1,200.50."))


@pytest.mark.parametrize(("response", "answer"), [
    ("#### 18 dollars", "18"), ("#### 18 eggs", "18"), (r"\boxed{18 dollars}", "18"),
    (r"\boxed{\text{18 dollars}}", "18"), (r"\boxed{18\text{ eggs}}", "18"), (r"\boxed{\$18.00 a day}", "18.00"),
])  # fmt: skip
def test_a_unit_is_no_part_of_a_marked_number(response: str, answer: str) -> None:
    problem = replace(NUMBER, answer="18")
    assert answer_of(problem, response, final_number=True) == answer and grade(problem, answer)
    assert answer_of(problem, response) != answer, "only where it is asked for"
    assert answer_of(replace(problem, family="math500"), response, final_number=True) != answer
    assert answer_of(replace(problem, answer="x"), response, final_number=True) != answer


@pytest.mark.parametrize("response", [
    "#### 18 or 19", r"\boxed{18, 19}", r"\boxed{18x}", "#### 18 dozen", "#### half of 18", "#### 19 dollars",
])  # fmt: skip
def test_what_is_more_than_a_unit_stays(response: str) -> None:
    pytest.importorskip("math_verify")
    problem = replace(NUMBER, answer="18")
    assert not grade(problem, answer_of(problem, response, final_number=True))


@pytest.mark.parametrize(("gold", "given"), [
    (r"\$36", "36"), (r"\$18.90", "18.90"), (r"\$18.90", "18.9"), (r"\$32,\!348", "32348"), ("36", r"\$36"),
    ("18.9", r"\$18.90"), (r"\$36", r"\$36.00"), (r"\$\frac{1}{2}", "0.5"),
])  # fmt: skip
def test_an_escaped_dollar_is_money(gold: str, given: str) -> None:
    pytest.importorskip("math_verify")
    assert same_answer(gold, given) and not same_answer(gold, given + "1")


@pytest.mark.parametrize(("gold", "given"), [("$18.90$", "18.9"), ("$\\frac12$", "0.5"), ("18.9", "$18.90$")])
def test_a_dollar_as_a_delimiter_is_none(gold: str, given: str) -> None:
    pytest.importorskip("math_verify")
    assert same_answer(gold, given) and not same_answer(gold, "7")


def test_free_answers_are_compared_as_mathematics() -> None:
    pytest.importorskip("math_verify")
    assert grade(FREE, "0.5") and grade(FREE, "\\dfrac12") and not grade(FREE, "0.6") and not grade(FREE, None)
    assert same_answer("(3, 4)", "(3,4)") and same_answer("x+1", "1+x") and same_answer("$12$", "12.")
    assert same_answer("x^8+x^7+x^6+x^5+x^4+x^3+x^2+x+1", "1 + x + x^2 + x^3 + x^4 + x^5 + x^6 + x^7 + x^8")
    assert same_answer("B", "\\text{(B)}") and not same_answer("B", "C")


def test_embedded_families_have_their_own_scorer() -> None:
    assert grade(GAME, "3 * 8 - 4") and not grade(GAME, "3 + 8 - 4") and answer_of(GAME, "</think>\\boxed{1}") == "1"


@pytest.mark.parametrize("hostile", [
    "9^{9^{9^{9}}}", "99999999!", "(" * 290, "9" * 299, "\\sqrt{" * 49, "\x00", "\ud800", "1" * 100_000, "", "$",
])  # fmt: skip
def test_hostile_answers_are_wrong_and_end(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    monkeypatch.setattr(module._verifier(), "timeout", 1.0)
    begin = time.monotonic()
    assert not same_answer("5", hostile) and not grade(GAME, hostile)
    assert time.monotonic() - begin < 30  # a second of algebra; the rest is a new process


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module._verifier.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        same_answer("1/2", "0.5")
