"""``evaluation show``: fits 80 columns, tells without colour, and lets no trace speak to the terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from neureasoner.artifacts import write_text
from neureasoner.cli import main
from neureasoner.errors import UserError
from neureasoner.evaluation.viewer.config import ShowConfig
from neureasoner.evaluation.viewer.terminal import PLAIN_BARS, sparkline, terminal


def shown(run: Path, width: int = 80, colour: bool = False, encoding: str = "utf-8", **settings: Any) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="replace", newline="\n")
    console = Console(
        file=file, width=width, force_terminal=colour, highlight=False, color_system="standard" if colour else None
    )
    terminal(ShowConfig(str(run), **settings), console)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(run: Path, width: int) -> None:
    said = shown(run, width, traces=12)
    assert max(map(cell_len, said.splitlines())) <= width
    assert "100 of 100 traces of full" in said and "\x1b" not in said
    assert ("│" in said.split("Question", 1)[1]) == (width >= 72), "side by side where there is room"


def test_marks_stand_without_colour(run: Path) -> None:
    said = shown(run, traces=1, search="Question 5?")
    assert "1 of 100 traces of full, in all; 1 shown" in said
    assert len(re.findall(r" 2✗ ", said)) == 2, "the wrong step on both sides"
    assert re.search(r"  3▶ <INTRA>", said)
    assert "intra after step 2: 0.90 against 0.65" in said and "0.30 at step 4, limit 0.65" in said
    assert "▁▁▂▃" in said, "scores 0, .1, .2, .3"
    assert re.search(r"vanilla wrong, answer 2, 40 tokens +│ full wrong", said)


def test_filters_and_arms(run: Path) -> None:
    for kind, count in (("to_right", 34), ("to_wrong", 17), ("false_alarm", 10), ("missed", 9), ("circle", 0)):
        assert f"{count} of 100 traces of full" in shown(run, only=kind, traces=1), kind
    assert "100 of 100 traces of vanilla" in shown(run, arm="vanilla", traces=1)
    assert "50 of 100" in shown(run, family="words", traces=1)
    alone = shown(run, beside="none", traces=1, search="Question 5?")
    assert "│ full" not in alone and "2✗" in alone
    assert "traces of" not in shown(run, traces=0)


def test_a_filter_that_needs_judged_steps_says_so_where_they_were_not(run: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").symlink_to(run / "results.json")
    for arm in ("vanilla", "full"):
        text = (run / "traces" / f"{arm}.jsonl").read_text().replace('"judge": "exact"', '"judge": "answer"')
        write_text(tmp_path / "traces" / f"{arm}.jsonl", text)
    said = shown(tmp_path, 200, only="false_alarm")
    assert "0 of 100 traces of full" in said and "100 of them were not judged step by step" in said
    assert "not judged" not in shown(tmp_path, 200, only="right", traces=1) + shown(run, 200, only="circle")
    assert "false alarm" not in shown(tmp_path, 200, traces=100)


def test_hostile_text_does_not_act(run: Path) -> None:
    said = shown(run, colour=True, traces=1, search="window.hacked")
    assert "1 of 100 traces" in said and "onerror" in said
    assert not re.findall(r"\x1b(?!\[[0-9;]*m)", said), "colours are ours; nothing else reaches the terminal"
    assert "\x07" not in said and "\x00" not in said and "\u2028" not in said
    assert "\u241b]0;owned\u2407" in re.sub(r"\s|│|\x1b\[[0-9;]*m", "", said).replace("▶", "")


def test_a_terminal_that_knows_only_ascii(run: Path) -> None:
    said = shown(run, encoding="ascii", traces=1, search="Question 5?")
    assert "  2x " in said and "  3> <INTRA>" in said and "__.:" in said


def test_sparkline() -> None:
    assert sparkline([0, 0.5, 1.0], 10) == "▁▅█" and sparkline([], 5) == "" and sparkline([1], 0) == ""
    assert sparkline([0, 0, 0, 9, 0, 0], 3, 0, 9) == "▁█▁", "a peak is not averaged away"
    assert sparkline([-1, 2], 4, -1, 2, PLAIN_BARS) == "_#" and sparkline([5, 5], 2, 5, 5) == "▁▁"


def test_scores_of_unwatched_arms_come_from_the_details(run: Path) -> None:
    said = shown(run, arm="vanilla", beside="none", traces=1, search="Question 5?")
    assert "▃▅" in said and "0.50 at step 2, limit 0.65" in said


def test_piped_through_the_command(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neureasoner.cli", "evaluation", "show", str(run), "--traces", "2"],
        capture_output=True,
        env={"PATH": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    assert "100 of 100 traces of full, in all; 2 shown" in lines and max(map(cell_len, lines)) <= 80


def test_bad_input(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["evaluation", "show", str(tmp_path)]) == 2
    assert "holds no results.json; name the folder that `neureasoner evaluate` wrote" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"arm 'ful' has no traces here; did you mean 'full'\?; there are vanilla, full"
    ):
        shown(run, arm="ful")
    with pytest.raises(UserError, match="arm 'x' has no traces here"):
        shown(run, beside="x")
    assert main(["evaluation", "show", str(run), "--only", "nonsense"]) == 2
    assert "to_right" in capsys.readouterr().err
    with pytest.raises(UserError, match="must not be negative"):
        ShowConfig("run", traces=-1)
