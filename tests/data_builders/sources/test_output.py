"""Files that grow in parts: a kill between any two writes loses at most the part that was not committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neureasoner.data_builders.sources import output
from neureasoner.data_builders.sources.output import PROGRESS, PartFiles

NAMES = ["a.jsonl", "b.jsonl", "ids"]


def part(i: int) -> dict[str, bytes]:
    return {"a.jsonl": b"a%d\n" % i * (i + 1), "b.jsonl": b"" if i % 2 else b"b%d\n" % i, "ids": bytes([i]) * 8}


def run(folder: Path, n: int = 3) -> None:
    with PartFiles(folder, NAMES) as files:
        for i in range(files.state.get("parts", 0), n):
            files.commit(part(i), {"parts": i + 1})
        files.publish(drop=["ids"])


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up after it."""


def test_published_files_hold_all_parts(tmp_path: Path) -> None:
    run(tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(part(i)["a.jsonl"] for i in range(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", PROGRESS]


def test_a_kill_at_any_call_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    whole = {n: (tmp_path / "whole" / n).read_bytes() for n in NAMES[:2]}
    calls = 0
    real = {"fsync": output.os.fsync, "replace": output.os.replace, "write_json": output.write_json}

    def counted(name: str, limit: int) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise Killed
            return real[name](*args)

        return call

    for limit in range(1, 24):
        folder, calls = tmp_path / str(limit), 0
        with monkeypatch.context() as patch:
            patch.setattr(output.os, "fsync", counted("fsync", limit))
            patch.setattr(output.os, "replace", counted("replace", limit))
            patch.setattr(output, "write_json", counted("write_json", limit))
            try:
                run(folder)
            except Killed:
                assert not all((folder / n).exists() for n in NAMES[:2]) or limit > 12
        run(folder)
        assert {n: (folder / n).read_bytes() for n in NAMES[:2]} == whole


def test_torn_bytes_after_the_last_commit_are_cut_off(tmp_path: Path) -> None:
    with PartFiles(tmp_path, NAMES) as files:
        files.commit(part(0), {"parts": 1})
    with files.partial("a.jsonl").open("ab") as f:
        f.write(b'{"half": ')
    run(tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(part(i)["a.jsonl"] for i in range(3))


def test_a_lost_file_starts_the_work_again(tmp_path: Path) -> None:
    with PartFiles(tmp_path, NAMES) as files:
        files.commit(part(0), {"parts": 1})
        files.partial("a.jsonl").unlink()
    run(tmp_path)
    assert (tmp_path / "a.jsonl").read_bytes() == b"".join(part(i)["a.jsonl"] for i in range(3))
