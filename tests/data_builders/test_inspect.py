"""``data inspect``: the right records, in the right colours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from neureasoner.data_builders.inspect import inspect, masked_spans, numbered, row_text, trace_text
from neureasoner.data_builders.inspect_config import InspectConfig
from neureasoner.data_builders.layouts import IntraBlock, Reconstruction, compose
from neureasoner.errors import UserError
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows

PROBLEM = Problem("p1", "sum", 2, "What is 2 + 2?", "4")
TEXT = "Let me see.\n\n2 + 2 = 5.\n\nSo [it] is 5.\n</think>\n\nThe answer is \\boxed{5}"
BLOCK = IntraBlock("Wait.", "2 + 2 = 5", "It is 4.")
ROW = Reconstruction(
    "r1",
    PROBLEM,
    "intra",
    PROBLEM.question,
    **compose(["Let me see."], ["2 + 2 = 5."], BLOCK, ["So it is 4."], "</think>\n\n\\boxed{4}"),
    control={"error_type": "sign_error"},
)
PLAIN = Reconstruction("r2", PROBLEM, "plain", PROBLEM.question, "So it is 4.\n</think>\n\n\\boxed{4}")


def trace(name: str, wrong: bool) -> Trace:
    span = (TEXT.index("2 + 2"), TEXT.index("2 + 2") + 9)
    intra = IntraLabel(True, "2 + 2 = 5", "calculation", "it is 4", span, 1) if wrong else IntraLabel()
    return Trace(name, PROBLEM, [1], [2, 3], TEXT, [], True, Labels(not wrong, "5", intra, InterLabel(), 2))


def look(path: Path, tokenizer: Any = None, colour: bool = False, **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=colour, color_system="standard" if colour else None)
    inspect(InspectConfig(str(path), **options), console)
    return out.getvalue()


def styled(text: Any, style: str) -> list[str]:
    return [text.plain[s.start : s.end] for s in text.spans if str(s.style) == style]


def test_problems_traces_and_rows_are_told_apart(tmp_path: Path) -> None:
    write_rows(tmp_path / "p", [PROBLEM])
    write_rows(tmp_path / "t", [trace("t1", True)])
    write_rows(tmp_path / "r", [ROW])
    assert "problem p1" in look(tmp_path / "p") and "What is 2 + 2?" in look(tmp_path / "p")
    shown = look(tmp_path / "t")
    assert "trace t1" in shown and "  1 2 + 2 = 5." in shown and "So [it] is 5." in shown
    assert "intra: first_error_step 2 + 2 = 5, error_type calculation" in shown and "wrong (5)" in shown
    shown = look(tmp_path / "r", model="")
    assert "reconstruction r1" in shown and "<INTRA>" in shown and "error_type sign_error" in shown


def test_colours_mark_failure_trigger_and_masked_tokens(tiny_tokenizer: Any) -> None:
    text = row_text(ROW, tiny_tokenizer)
    assert styled(text, "red") == ["2 + 2 = 5."]
    assert "".join(styled(text, "yellow")).startswith("<INTRA>\n[FAILURE_INTRA] Wait.")
    assert styled(text, "dim on blue") == ["<INTRA>"]
    assert styled(row_text(ROW, tiny_tokenizer, True), "dim on blue") == ["2 + 2 = 5", "<INTRA>"]
    assert styled(row_text(ROW), "dim on blue") == [] == masked_spans(PLAIN, tiny_tokenizer)
    assert styled(trace_text(trace("t", True)), "red") == ["2 + 2 = 5"]


def test_colours_stay_in_place_when_steps_are_numbered() -> None:
    text = numbered(trace_text(trace("t", True)))
    assert text.plain.startswith("  0 Let me see.\n\n  1 2 + 2 = 5.\n\n  2 So")
    assert styled(text, "red") == ["2 + 2 = 5"] and "  3 The answer" not in text.plain


def test_masks_are_shown_with_a_model(tmp_path: Path, tiny_tokenizer: Any, make_model: Any) -> None:
    make_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "r", [ROW])
    shown = look(tmp_path / "r", colour=True, model=str(tmp_path / "model"))
    assert "does not train" in shown and "\x1b[2;33;44m" in shown and "\x1b[31m" in shown
    assert "does not train" not in look(tmp_path / "r", model="")


def test_the_sample_is_asked_for_by_seed_id_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_rows(path, [trace(f"t{i}", i % 2 == 0) for i in range(20)])
    assert look(path, n=2, seed=1) == look(path, n=2, seed=1) != look(path, n=2, seed=2)
    assert look(path, n=50).count("trace t") == 20
    assert look(path, n=50, kind="clean").count("trace t") == 10
    assert "trace t7" in look(path, id="t7")
    with pytest.raises(UserError, match="no record has the id 'x'"):
        look(path, id="x")
    with pytest.raises(UserError, match="nothing of kind 'inter'; there are clean, intra, sum"):
        look(path, kind="inter")


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"id": "x"}\n')
    with pytest.raises(UserError, match="line 1: key 'family' is missing"):
        look(tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(UserError, match="is empty"):
        look(tmp_path / "b")
    with pytest.raises(UserError, match="n' must be at least 1"):
        InspectConfig("x", n=0)
