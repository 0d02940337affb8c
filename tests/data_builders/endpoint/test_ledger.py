"""The ledger alone: claims, the living and the dead, strange files, scrubbing."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from neureasoner.data_builders.endpoint.ledger import BUSY, MINE, Ledger
from neureasoner.data_builders.endpoint.requests import Answer, Usage
from neureasoner.data_builders.endpoint.scrub import HIDDEN, Scrubber
from neureasoner.errors import UserError

ANSWER = Answer("text \x00 ٣ é", "stop", "", Usage(10, 5, 2), "tiny-1")


def claim(ledger: Ledger, key: str):
    with ledger.transaction():
        return ledger.claim(key)


def put(ledger: Ledger, key: str, answer: Answer = ANSWER, batch: bool = False) -> None:
    with ledger.transaction():
        ledger.put(key, "tiny", answer, batch)


def test_an_answer_is_kept_whole_and_the_first_one_stays(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    assert claim(ledger, "k") == MINE
    put(ledger, "k")
    put(ledger, "k", Answer("other"))
    assert claim(ledger, "k") == ANSWER
    ledger.close()
    again = Ledger(tmp_path / "l")
    assert again.answered(["k", "x"]) == {"k": ANSWER}
    put(again, "b", batch=True)
    total = again.totals()["tiny"]
    assert (total.answers, total.usage, total.batch_usage) == (2, Usage(10, 5, 2), Usage(10, 5, 2))


def test_a_claim_keeps_others_out_until_it_is_given_up(tmp_path: Path) -> None:
    a, b = Ledger(tmp_path / "l"), Ledger(tmp_path / "l")
    assert claim(a, "k") == MINE and claim(b, "k") == BUSY and claim(a, "k") == MINE
    with a.transaction():
        b_cannot = a.execute("SELECT worker FROM claims WHERE key = 'k'")
        a.release("k")
    assert b_cannot == [(a.worker,)] and claim(b, "k") == MINE
    with a.transaction():
        a.release("k")  # no longer its own
    assert claim(a, "k") == BUSY
    b.close()
    assert claim(a, "k") == MINE


def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from neureasoner.data_builders.endpoint.ledger import Ledger\n"
        "l = Ledger(sys.argv[1])\n"
        "with l.transaction(): print(l.claim('k'), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "l")], capture_output=True, text=True)
    assert done.stdout == "mine\n" and done.returncode == -9
    assert claim(Ledger(tmp_path / "l"), "k") == MINE


def test_another_machine_is_believed_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    far, near = Ledger(tmp_path / "l"), Ledger(tmp_path / "l")
    claim(far, "k")
    far.execute("UPDATE workers SET host = 'elsewhere', pid = 4194303 WHERE id = ?", (far.worker,))
    assert claim(near, "k") == BUSY
    far.execute("UPDATE workers SET beat = beat - 1000 WHERE id = ?", (far.worker,))
    assert claim(near, "k") == MINE


def test_a_process_number_that_was_given_out_again_is_not_mistaken(tmp_path: Path) -> None:
    old, new = Ledger(tmp_path / "l"), Ledger(tmp_path / "l")
    claim(old, "k")
    old.execute("UPDATE workers SET born = '1', pid = ? WHERE id = ?", (os.getpid(), old.worker))
    assert claim(new, "k") == MINE


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    text, other, newer = tmp_path / "text", tmp_path / "other", tmp_path / "newer"
    text.write_text("some notes, long enough to be no empty file at all\n" * 50)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (a)")
    Ledger(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 9")
    for path, reason in ((text, "is no ledger"), (other, "is no ledger"), (newer, "version 9"), (tmp_path, "unable")):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(UserError, match=reason):
            Ledger(path)
        assert path.is_dir() or path.read_bytes()[100:] == before[100:]


def test_many_threads_with_doors_of_their_own(tmp_path: Path) -> None:
    won: list[str] = []

    def work() -> None:
        ledger = Ledger(tmp_path / "l")
        for i in range(40):
            if claim(ledger, f"k{i}") == MINE:
                won.append(f"k{i}")
                put(ledger, f"k{i}")
        ledger.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(won) == sorted({f"k{i}" for i in range(40)})


def test_keys_are_taken_out_of_texts_and_errors() -> None:
    scrub = Scrubber("sk-canary+0123456789")
    assert scrub.text("a sk-canary+0123456789 b") == f"a {HIDDEN} b"
    assert scrub.text("sk-canary%2B0123456789") == HIDDEN and "canary" not in repr(scrub)
    assert scrub.error("no sk-other-99999999\n key\x1b[31m") == f"no {HIDDEN} key [31m"
    assert scrub.error("Authorization: Bearer abcdefghijk") == f"Authorization: Bearer {HIDDEN}"
    assert Scrubber("EMPTY").text("the list is EMPTY") == "the list is EMPTY"
    assert len(scrub.error("x" * 10_000)) < 600
