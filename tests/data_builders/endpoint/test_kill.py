"""Killed at random moments, and shared: nothing answered is asked again, nothing comes out differently."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

JOB = Path(__file__).with_name("job.py")
CONCURRENCY = 8


def start(server: Any, folder: Path, name: str, n: int, *settings: str) -> subprocess.Popen[bytes]:
    ledger, out = folder / "shared.sqlite", folder / f"{name}.jsonl"
    command = [sys.executable, str(JOB), server.url, str(ledger), str(out), str(n), f"concurrency={CONCURRENCY}"]
    return subprocess.Popen(
        [*command, *settings], env=os.environ | {"TEST_KEY": "sk-test-0123456789", "PYTHONHASHSEED": "0"}
    )


def answered(path: Path) -> set[str]:
    """The keys in the ledger, read past all of its own code."""
    if not path.exists():
        return set()
    with sqlite3.connect(path, timeout=30) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
            return set()
        return {k for (k,) in db.execute("SELECT key FROM answers")}


def kill_and_resume(serve: Any, folder: Path, n: int, kills: int, seed: int, latency: float) -> int:
    """Returns how many runs were really killed."""
    # one in twelve answers is torn, so that the killed runs have roads of several requests too
    server = serve("--latency", str(latency), "--fault", "torn:0.08", "--fault", "500:0.02", "--seed", str(seed))
    whole = folder / "whole"
    whole.mkdir()
    assert start(server, whole, "out", n).wait(120) == 0
    expected = (whole / "out.jsonl").read_bytes()
    per_request = server.keys()

    server = serve("--latency", str(latency), "--fault", "torn:0.08", "--fault", "500:0.02", "--seed", str(seed))
    rng, killed = random.Random(seed), 0
    out, ledger = folder / "cut.jsonl", folder / "shared.sqlite"
    for _ in range(kills):
        before, seen = answered(ledger), server.keys()
        job = start(server, folder, "cut", n)
        # some die while they start, most while answers come in
        calls = len(server.rows("call")) + rng.randrange(0, max(2, 2 * n // kills))
        end = time.monotonic() + 20
        while job.poll() is None and len(server.rows("call")) < calls and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.random() * latency)
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            killed += 1
        job.wait()
        time.sleep(2 * latency)
        again = server.keys() - seen
        assert not before & set(again), "a request whose answer was kept was sent again"
        if out.exists():
            break
    assert start(server, folder, "cut", n).wait(120) == 0
    assert out.read_bytes() == expected
    # what may be paid twice is what was under way when the process died, and no more
    repeated = sum((server.keys() - per_request).values())
    failed = len(server.rows("failed"))
    assert repeated <= killed * CONCURRENCY + failed
    assert set(per_request) == set(server.keys()) == answered(ledger)
    return killed


@pytest.mark.slow
def test_killed_five_times_and_resumed(serve, tmp_path: Path) -> None:
    assert kill_and_resume(serve, tmp_path, n=100, kills=5, seed=1, latency=0.05) >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_twenty_times_and_resumed(serve, tmp_path: Path) -> None:
    assert kill_and_resume(serve, tmp_path, n=800, kills=20, seed=2, latency=0.1) == 20


def test_two_processes_share_a_ledger_and_pay_once(serve, tmp_path: Path) -> None:
    server = serve("--latency", "0.1", "--fault", "torn:0.1")
    jobs = [start(server, tmp_path, name, 80) for name in ("a", "b")]
    assert [j.wait(120) for j in jobs] == [0, 0]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert set(server.keys().values()) == {1} and len(server.keys()) >= 80


@pytest.mark.slow
def test_a_batch_is_killed_and_goes_on(serve, tmp_path: Path) -> None:
    server = serve("--batch-delay", "1.5", "--fault", "torn:0.1")
    settings = ("batch=25", "poll=0.1")
    for wait in (0, 1, 3):  # killed after so many batches were made
        job = start(server, tmp_path, "out", 60, *settings)
        end = time.monotonic() + 20
        while job.poll() is None and len(server.rows("batch")) < wait and time.monotonic() < end:
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert start(server, tmp_path, "out", 60, *settings).wait(120) == 0
    ids = [key for row in server.rows("batch") for key in row["ids"]]
    assert len(ids) == len(set(ids)) >= 60, "a request was submitted twice"
    assert not server.rows("call"), "everything was answered by batches"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 60
