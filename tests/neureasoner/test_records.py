"""Artifacts, traces and stage folders: whole or not at all, and read back as written."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner import artifacts
from neureasoner.errors import UserError
from neureasoner.stages import MARK, STARTED, StageFolder
from neureasoner.traces import (
    InterLabel,
    IntraLabel,
    Labels,
    Problem,
    Step,
    Trace,
    read_problems,
    read_traces,
    write_rows,
)

PROBLEM = Problem("a-1", "arithmetic", 2, "1 + 1?", "2")


def trace() -> Trace:
    intra = IntraLabel(True, "step 1", "calculation", "no", (0, 4), 0)
    inter = InterLabel(True, "step 2", "modular_checks", "mild", "x", (2, 9), (0, 2), [0, 1])
    labels = Labels(True, "2", intra, inter, 3)
    return Trace(
        "t", PROBLEM, [1], [2, 3], "é\n\nb", [Step(0, 3, 0, 1)], True, labels, [{"k": 1}], {"thinking_tokens": 1}
    )


def test_records_come_back_as_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [PROBLEM])
    assert read_problems(tmp_path / "p.jsonl") == [PROBLEM]
    write_rows(tmp_path / "t.jsonl", [trace()])
    back = read_traces(tmp_path / "t.jsonl")
    assert back == [trace()] and back[0].thinking_end == 1


ROW = json.dumps({"id": "a", "family": "f", "difficulty": 1, "question": "q", "answer": "1"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no problems"),
        ("\n\n", "holds no problems"),
        (ROW + "\n{bad\n", "line 2: not JSON"),
        (ROW + "\n[1]\n", "line 2: expected a JSON object"),
        (ROW + '\n\n{"id": "b"}\n', "line 3: key 'family' is missing"),
        (ROW.replace("1,", '"hard",', 1) + "\n", "line 1: key 'difficulty' must be a whole number"),
        (ROW + "\n" + ROW + "\n", "'a' occurs twice"),
    ],
)
def test_bad_problem_files_name_the_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError) as e:
        read_problems(tmp_path / "p.jsonl")
    assert words in str(e.value) and "p.jsonl" in str(e.value)


def test_bad_trace_files_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": "t"}\n')
    with pytest.raises(UserError, match=r"line 1: key 'problem' is missing"):
        read_traces(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_traces(tmp_path / "absent.jsonl")


def test_tensors_round_trip_with_meta(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    artifacts.write_tensors(path, {"w": torch.arange(6.0).view(2, 3).T}, {"seed": 1})
    tensors, meta = artifacts.read_tensors(path)
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3).T) and meta == {"seed": 1}


def test_promise_10_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps({"w": 1}))  # never read as one: it must be refused
    with pytest.raises(UserError, match="not a safetensors file"):
        artifacts.read_tensors(path)


def test_promise_9_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    artifacts.write_json(path, [1])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        artifacts.write_json(path, [2])
    assert artifacts.read_json(path) == [1] and os.listdir(tmp_path) == ["x.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        artifacts.write_json(tmp_path / "file" / "x.json", 1)


@dataclass
class Settings:
    out: str
    n: int = 1


def test_stage_folder(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text("1")
    out = tmp_path / "out"

    def stage(n: int = 1) -> StageFolder:
        return StageFolder(out, "s", Settings(str(out), n), [source])

    first = stage()
    assert not first.done and (out / STARTED).is_file() and not (out / MARK).exists()
    assert not stage().done  # killed and started again
    assert not stage(2).done and not stage().done  # nothing is there yet, so nothing can be mixed
    (out / "part").write_text("half of it")
    with pytest.raises(UserError, match="other settings"):
        stage(2)
    first.finish({"rows": 3})
    assert stage().done and stage().summary == {"rows": 3} and not (out / STARTED).exists()
    source.write_text("2")
    with pytest.raises(UserError, match="other settings or inputs"):
        stage()
    with pytest.raises(UserError, match="does not exist"):
        StageFolder(out, "s", Settings(str(out)), [tmp_path / "absent"])
