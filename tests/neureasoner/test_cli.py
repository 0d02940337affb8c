"""The command line as a user meets it: fast help, one-line errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from neureasoner import __version__, cli
from neureasoner.commands import COMMANDS, Command
from neureasoner.errors import UserError
from neureasoner.floor_config import DoctorConfig

HEAVY = ("torch", "transformers", "numpy", "yaml", "rich", "trl", "sklearn", "matplotlib")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from neureasoner.cli import main; main(['--help'])\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = python(code)
        seconds.append(time.perf_counter() - begin)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert min(seconds) < 1.0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_imports_only_its_settings(name: str) -> None:
    code = (
        "import sys; from neureasoner.cli import main\n"
        f"try: main({[*name.split(), '--help']!r})\nexcept SystemExit as e: assert not e.code\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]"), done.stdout


def test_version_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"neureasoner {__version__}"
    assert cli.main(["probes"]) == 0
    out = capsys.readouterr().out
    assert "probes fit" in out and "data judge" not in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["evalute"], "did you mean 'evaluate'"),
        (["data", "judg"], "did you mean 'data judge'"),
        (["run", "no_such_recipe"], "recipe 'no_such_recipe' is not shipped"),
        (["doctor", "--modle", "x"], "did you mean '--model'"),
        (["doctor", "./no/such/folder"], "no such model folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("neureasoner: error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "run the same command again to resume"),
        (UserError("cause;\n fix"), 2, "error: cause; fix"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "no permission for /x/y"),
        (OSError(28, "No space left on device", "/x/y"), 2, "cannot write /x/y (No space left on device)"),
    ],
)
def test_what_a_stage_raises(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(config: Any) -> None:
        assert isinstance(config, DoctorConfig)
        raise error

    monkeypatch.setattr(Command, "load", lambda self: stage)
    assert cli.main(["doctor"]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [UserError("row '\x1b]0;owned\x07\x9b2J\u061c\u202e'"), PermissionError(13, "denied", "/x/\x1b[2J\ny\x9b\u2066")],
)
def test_an_error_does_not_speak_to_the_terminal(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage(config: Any) -> None:
        raise error

    monkeypatch.setattr(Command, "load", lambda self: stage)
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert "\u241b" in err and err.endswith("\n") and err[:-1].isprintable(), ascii(err)


def test_a_hostile_cell_of_a_file_does_not_speak_to_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"id": "1", "family": "\\u001b[2J\\u202e", "difficulty": 1, "question": "q", "answer": "a"}\n')
    line = [sys.executable, "-m", "neureasoner.cli", "evaluate", "--model", "tiny", "--arms", "vanilla"]
    done = subprocess.run([*line, "--problems", file, "--out", tmp_path / "out"], capture_output=True, timeout=60)
    assert done.returncode == 2 and b"unknown problem family" in done.stderr and b"\x1b" not in done.stderr
    assert "\u202e" not in done.stderr.decode()


def test_a_defect_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "doctor", Command("", "floor_config", "DoctorConfig", "no_such_module", "x"))
    with pytest.raises(ImportError, match="no_such_module"):
        cli.main(["doctor"])
