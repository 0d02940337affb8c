"""Where answers stand, and what is decided without algebra."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neureasoner.data_builders.grading.answers import (
    balanced,
    final_answer,
    gold_answer,
    is_number,
    last_boxed,
    last_number,
    option_letter,
    plain,
    unwrapped,
    whole_number,
    with_unit,
)
from neureasoner.data_builders.grading.verifier import quick


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\boxed 7", "7"),
        (r"\fbox{x}", "x"),
        (r"\boxed{open", None),
        (r"\boxed{4} and \boxed{open", "4"),
        (r"\boxed{a {b} \} c}", r"a {b} \} c"),
        (r"\boxed{1} \boxed {2}", "2"),
        (r"\boxed{out \boxed{in}}", "in"),
        ("none", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(("text", "whole"), [("", True), ("{}", True), (r"\frac{1}{2}", True), (r"\frac{1}{", False),
    ("}{", False), (r"\{1", True), (r"\\{1", False), (r"\{{1}\}", True), ("a}", False), ("\\", True)])  # fmt: skip
def test_braces_that_balance(text: str, whole: bool) -> None:
    assert balanced(text) is whole


def test_final_answers() -> None:
    assert final_answer(r"It is \boxed{5}.") == ("5", True)
    assert final_answer("So 72.\n#### 72") == ("72", True)
    assert final_answer("It is 5 apples.") == ("It is 5 apples.", False)
    assert final_answer("#### Step one\n\nIt is 5.")[1] is False  # a heading
    assert gold_answer(r"Because of this \boxed{5}") == "5" and gold_answer(" 5 ") == "5"


@pytest.mark.parametrize(
    ("text", "value"),
    [("27", 27), ("27.0", 27), ("-1,234", -1234), ("$12$", 12), (r"5,\!400", 5400), ("1{,}000", 1000), ("12.", 12)],
)
def test_whole_numbers(text: str, value: int) -> None:
    assert whole_number(text) == value


@pytest.mark.parametrize("text", ["1,2", "0.5", "x", "", "12 apples", "1/2", "9" * 50, "12,34"])
def test_not_whole_numbers(text: str) -> None:
    assert whole_number(text) is None


@given(st.integers(-(10**12), 10**12))
def test_whole_numbers_in_any_writing(n: int) -> None:
    for text in (str(n), f"{n:,}", f"{n}.0", f"${n}$", f"\\text{{{n}}}"):
        assert whole_number(text) == n


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So, the answer is 4.", "4"),
        ("$1,200.50", "1200.50"),
        (r"\$1{,}200", "1200"),
        ("-3", "-3"),
        ("\u22123", "-3"),
        ("-$5 or $-6$", "-6"),
        ("no number", None),
        ("", None),
        ("It weighs 5kg.", "5"),
        ("72 km/h", "72"),
        ("25 cm^2", "25"),
        ("25 m2 of CO2", "25"),
        ("25 m^{2}, 4 s^{-1}", "4"),
        ("50%", "50"),
        ("3 + 4 = 7, so 7 dollars, not 8", "8"),
        ("10-3", "3"),
        ("5 - 3", "3"),
        ("from 5 to -3.", "-3"),
        ("**4**", "4"),
        ("the answer is...4", "4"),
        ("2.5.", "2.5"),
        (".5", ".5"),
        ("1/2 cup", "1/2"),
        (r"-\frac{1}{2}", "-1/2"),
        ("5, 6", "6"),
        ("1,200,50", "50"),
        ("x_1 and H2O", None),
    ],
)
def test_last_numbers(text: str, number: str | None) -> None:
    assert last_number(text) == number


@given(st.decimals(-(10**9), 10**9, places=2))
def test_last_numbers_in_any_writing(x: Decimal) -> None:
    for text in (f"First 1, then {x:,} m.", f"{x}", f"It is {x:,}.", f"so **{x}**", f"= {x:,}%\n"):
        assert Decimal(last_number(text) or "none") == x


@pytest.mark.parametrize(("gold", "number"), [("1,200.5", True), ("-3", True), ("$18$", True), ("1/2", False),
    ("x", False), ("12 apples", False), ("", False), ("(3, 4)", False), ("3,4", False)])  # fmt: skip
def test_golds_that_are_numbers(gold: str, number: bool) -> None:
    assert is_number(gold) is number


@pytest.mark.parametrize(
    ("marked", "number"),
    [
        ("18 dollars", "18"),
        ("18 eggs.", "18"),
        (r"\text{18 dollars}", "18"),
        (r"18\text{ dollars}", "18"),
        (r"18\,\mathrm{dollars}", "18"),
        (r"\$18.50 per week", "18.50"),
        ("$18 a day", "18"),
        ("$18$ dollars", "18"),
        (r"1,200~\text{square feet}", "1200"),
        (r"32,\!348 people", "32348"),
        ("18 miles/hour", "18"),
        ("Ann pays -18 dollars", "-18"),
        ("1/2 cup", "1/2"),
        ("18", None),
        (r"\frac{1}{2}", None),
        ("18 or 19", None),
        ("18 or more", None),
        ("18, 19", None),
        ("18x", None),
        ("18 x", None),
        ("18dollars", None),
        ("x18", None),
        ("18 + 1", None),
        ("18^2", None),
        ("18%", None),
        ("18 dozen", None),
        ("18 and a half", None),
        ("half of 18", None),
        ("not 18", None),
        ("Minus 18", None),
        ("18 \\cdot y", None),
        ("(18, y)", None),
        ("18 m^2", None),
        ("dollars", None),
        ("", None),
    ],
)
def test_marked_numbers_with_units(marked: str, number: str | None) -> None:
    assert with_unit(marked) == number


@pytest.mark.parametrize(("gold", "letter"), [
    ("B", "B"), ("(B)", "B"), (r"\text{(B)}", "B"), (r"\textbf{C}", "C"), (r"\textit{C}", "C"), ("BC", None),
    ("b", None), ("Option B", None), ("The answer is (D).", None), ("K", None),
])  # fmt: skip
def test_golds_that_are_option_letters(gold: str, letter: str | None) -> None:
    assert option_letter(gold) == letter


@pytest.mark.parametrize(("text", "bare"), [
    (r"\$18.90", "18.90"), (r"\$32,\!348", "32,348"), (r"\textit{a b}", "ab"), (r"\mbox{\emph{x}}.", "x"),
    (r"\mathbb{R}", r"\mathbb{R}"), (r"\dfrac12", r"\frac12"),
])  # fmt: skip
def test_plain(text: str, bare: str) -> None:
    assert plain(text) == bare


def test_wrappers_are_undone_however_answers_nest_them_and_no_further() -> None:
    nested = lambda depth: "\\text{" * depth + "B" + "}" * depth  # noqa: E731
    assert unwrapped(nested(9)) == "B" == option_letter(nested(9))
    assert unwrapped(nested(3), " ").split() == ["B"]
    begin = time.monotonic()
    assert "B" in unwrapped(nested(50_000))
    assert with_unit(nested(50_000)) is None
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("gold", "predicted", "boxed", "same"),
    [
        ("27.0", "27", True, True),
        ("27", "28", True, False),
        ("B", r"\text{(B)}", True, True),
        ("B", "The answer is C.", False, False),
        ("B", "option (B) is correct, not option (A)", False, True),
        ("A", "The answer: A careful look shows nothing.", False, None),
        ("B", r"\text{Option B}", True, True),
        ("B", "A or B", True, False),
        (r"\$36", "36", True, True),
        ("B", "I cannot say", False, None),
        (r"\text{Evelyn}", "Evelyn", True, True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})", True, True),
        ("1/2", "0.5", True, None),
        ("5", "It is 5.", False, None),
    ],
)
def test_quick(gold: str, predicted: str, boxed: bool, same: bool | None) -> None:
    assert quick(gold, predicted, boxed) is same
