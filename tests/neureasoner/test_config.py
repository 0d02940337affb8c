"""The configuration dialect: precedence, types, and messages that name the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from neureasoner.config import from_dict, parse
from neureasoner.errors import UserError


@dataclass
class Config:
    """For the tests."""

    out: str = field(metadata={"help": "folder"})
    n: int = field(default=3, metadata={"help": "100 % of them"})
    rate: float = 0.5
    deep_check: bool = False
    names: list[str] = field(default_factory=lambda: ["a"])
    sizes: tuple[int, ...] = ()
    cap: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    mix: dict[str, float] = field(default_factory=dict)
    prompt: list[str] = field(default_factory=list, metadata={"split": False})
    path: str = field(default="", metadata={"positional": True})

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"key 'n' must be at least 1, got {self.n}")


def go(*argv: str) -> Config:
    return parse(Config, argv, "neureasoner test")


def test_every_type_from_the_command_line() -> None:
    config = go(
        *["here", "--out", "x", "--n", "4", "--rate", "1e-3", "--deep_check"],
        *["--names", "neuron:3[1,5],logits", "b", "--sizes", "1", "2", "--cap", "7", "--mode", "slow"],
        *["--mix", "a=0.5", "b=1", "--prompt", "one, two"],
    )
    assert config == Config(
        "x",
        4,
        1e-3,
        True,
        ["neuron:3[1,5]", "logits", "b"],
        (1, 2),
        7,
        "slow",
        {"a": 0.5, "b": 1.0},
        ["one, two"],
        "here",
    )


def test_dash_and_underscore_and_bools() -> None:
    assert go("--out", "x", "--deep-check", "true").deep_check
    assert not go("--out", "x", "--deep_check", "false").deep_check
    assert go("--out", "x", "--cap", "none").cap is None


def test_file_sets_defaults_and_the_command_line_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("out: y\nn: 9\nrate: 1e-4\ndeep-check: true\nnames: [p, q]\ncap: null\n")
    config = go("--config", str(file), "--n", "2")
    assert (config.out, config.n, config.rate, config.deep_check, config.names) == ("y", 2, 1e-4, True, ["p", "q"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "x", "--namse", "q"], "'--namse' is unknown; did you mean '--names'"),
        ([], "--out is required"),
        (["--out", "x", "--n", "many"], "--n: expected a whole number, got 'many'"),
        (["--out", "x", "--n", "2.5"], "--n: expected a whole number"),
        (["--out", "x", "--rate", "fast"], "--rate: expected a number"),
        (["--out", "x", "--deep_check", "maybe"], "--deep-check: expected true or false"),
        (["--out", "x", "--mode", "medium"], "--mode: expected one of fast, slow"),
        (["--out", "x", "--n", "0"], "at least 1, got 0"),
        (["--out", "x", "a", "b"], "'b' was not expected"),
        (["--out", "x", "--config", "absent.yaml"], "absent.yaml: no such file"),
        (["--out", "x", "--mix", "a"], "--mix: expected key=value pairs"),
    ],
)
def test_bad_command_lines_are_named(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as e:
        go(*argv)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ouT: x\nnn: 3\n", "key 'ouT' is unknown; did you mean 'out'"),
        ("out: x\nn: [1, 2]\n", "key 'n': expected a whole number"),
        ("out: x\nn: true\n", "key 'n': expected a whole number"),
        ("out: x\n  n: 3\n", "line 2: not YAML"),
        ("- out\n", "expected key: value pairs"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as e:
        go("--config", str(file))
    assert words in str(e.value) and str(file) in str(e.value)


def test_from_dict_says_where() -> None:
    assert from_dict(Config, {"out": "x", "deep-check": "no", "sizes": [1]}).sizes == (1,)
    with pytest.raises(UserError, match="stage 3: key 'nmes' is unknown; did you mean 'names'"):
        from_dict(Config, {"out": "x", "nmes": 1}, "stage 3")
    with pytest.raises(UserError, match="stage 3: key 'out' is required"):
        from_dict(Config, {}, "stage 3")


def test_help_shows_defaults_and_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        go("--help")
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert "folder (required)" in text and "100 % of them (default: 3)" in text
