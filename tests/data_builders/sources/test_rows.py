"""The <think> form agrees with the rewriters' References, whatever the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neureasoner.data_builders.rewriters import Rejected
from neureasoner.data_builders.sources.rows import SourceRow, read_sources, tidy
from neureasoner.errors import UserError
from neureasoner.traces import THINK_CLOSE


def row(thinking: str = "a\n\nb", solution: str = "It is 5.", **changes) -> SourceRow:
    return SourceRow("x-1", "What?", thinking, solution, "5", "corpus", **changes)


def test_response_is_what_a_reference_writes() -> None:
    r = row()
    assert r.response == "a\n\nb\n</think>\n\nIt is 5."
    reference = r.reference()
    assert reference.paragraphs == ("a", "b") and reference.response == r.response
    assert reference.problem.question == "What?" and reference.problem.answer == "5"


def test_an_unfinished_thought_is_no_reference() -> None:
    cut = row(solution="", closed=False, finished=False)
    assert THINK_CLOSE not in cut.response
    with pytest.raises(Rejected):
        cut.reference()


@given(st.text(st.sampled_from("ab \t\n\r\u00a0"), min_size=1), st.text(st.sampled_from("ab \n")))
def test_reference_of_any_tidied_text_is_the_row(thinking: str, solution: str) -> None:
    r = row(tidy(thinking) or "a", tidy(solution))
    assert r.reference().response == r.response
    assert list(r.reference().paragraphs) == r.paragraphs
    assert tidy(r.thinking) == r.thinking


def test_tidy_keeps_indentation() -> None:
    assert tidy("x:\n\n    indented\n \t\n\ny  ") == "x:\n\n    indented\n\ny"


def test_lines_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "references.jsonl"
    rows = [row(), row("ü 中", meta={"line": 3})]
    path.write_bytes(b"".join(r.line() for r in rows))
    assert list(read_sources(path)) == rows
    path.write_text(json.dumps({"id": "x", "odd": 1}))
    with pytest.raises(UserError, match=r"line 1: not a row of `data import`"):
        list(read_sources(path))
