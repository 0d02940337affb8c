"""Outputs compared, programs found in answers; no sandbox needed here."""

from __future__ import annotations

import time

import pytest

from neureasoner.evaluation.benchmarks.code import program_of, same_output, same_value


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ("42", "42\n", True),
        (" 1 2 \r\n3\n\n", "1 2\n3", True),
        ("1 2 3", "1\n2\n3", False),
        ("1  2", "1 2", True),  # number by number
        ("0.50", "0.5", True),
        ("1e3", "1000", True),
        ("0.1000001", "0.1", False),
        ("yes", "YES", False),
        ("a  b", "a b", False),
        ("", "", True),
        ("", "0", False),
        ("nan", "nan", True),  # equal text
        ("inf 1.0", "inf 1", False),  # no number, and the line is not equal text
        ("9" * 400, "9" * 400, True),
        ("1" + "0" * 400, "1e400", True),
        ("4\x002", "42", False),
        ("\u0664\u0662", "42", False),  # digits of another script
        ("1e99999999", "1", False),
    ],
)
def test_output_is_compared_line_by_line_and_number_by_number(given: str, wanted: str, same: bool) -> None:
    assert same_output(given, wanted) is same


def test_tolerance_is_only_there_where_it_was_asked_for() -> None:
    assert not same_output("3.14159", "3.14160")
    assert same_output("3.14159 x", "3.14160 x", tolerance=1e-4)
    assert not same_output("3.14159 x", "3.14160 y", tolerance=1e-4)
    assert same_value([1.0, {"a": 2.00001}], [1, {"a": 2}], tolerance=1e-4)
    assert not same_value(2.00001, 2)
    assert not same_value(10**400, 1.5, tolerance=1e-4) and same_value(10**400, 10**400, tolerance=1e-4)


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ([1, [2, 3]], [1, [2, 3]], True),
        ([1, 2], [1, 2, 3], False),
        (1.0, 1, True),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        (float("nan"), float("nan"), False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ("1", 1, False),
        (None, None, True),
        (None, 0, False),
    ],
)
def test_values_are_equal_as_json(given: object, wanted: object, same: bool) -> None:
    assert same_value(given, wanted) is same
    assert same_value([given], [wanted]) is same


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\nBetter:\n```py\nprint(2)\n```", "print(2)\n"),
        ("```python\nprint(1)\n```\nOutput:\n```text\n1\n```", "print(1)\n"),
        ("```\nprint(3)\n```", "print(3)\n"),
        ("```python\nprint(4)", "print(4)"),  # the block is not closed
        ("```cpp\nint main() {}\n```", None),
        ("print(5)", None),
        ("```python\n\n```", None),
        ("```python\nprint(6)\n```\n```python", "print(6)\n"),  # nothing after the last fence
        ("```py x```\nprint(7)\n```", "print(7)\n"),
    ],
)
def test_the_last_python_block_is_the_program(text: str, program: str | None) -> None:
    assert program_of(text) == program


N = 10**6


@pytest.mark.parametrize(
    ("given", "same"),
    [("1" * N + "x", False), ("1" * N, False), ("." + "1" * N + "x", False), ("1." + "1" * N + "x", False),
    ("1" * N + "e", False), ("1 " * N + "x", False), ("5." + "0" * N, True), ("+" * N, False), ("0" * N + "5", True)],
    ids=range(9),
)  # fmt: skip
def test_no_output_takes_long_to_compare(given: str, same: bool) -> None:
    begin = time.monotonic()
    assert same_output(given, "5") is same
    assert same_output("7 " + given, "7 5", tolerance=1e-6) is same
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("text", ["`" * 60_000, "```" + " " * 60_000, "```" + "a" * 60_000, "```py " * 20_000])
def test_no_answer_takes_long_to_find_a_program_in(text: str) -> None:
    begin = time.monotonic()
    assert program_of(text) is None
    assert program_of(text + "\n") is None
    assert time.monotonic() - begin < 2
