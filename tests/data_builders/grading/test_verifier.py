"""Verdicts of math-verify, and that nothing an answer holds stops the run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from neureasoner.data_builders.grading import verifier as module
from neureasoner.data_builders.grading.verifier import MathVerifier, Verdict
from neureasoner.errors import UserError

# A stand-in for the worker: it answers "wrong", hangs or dies as the gold answer says.
STAND_IN = """
import json, os, sys, time
print('"ready"', flush=True)
for line in sys.stdin:
    gold, said = json.loads(line)
    if "hang" in gold: time.sleep(60)
    if "die" in gold: os._exit(9)
    print(json.dumps(["wrong", said]), flush=True)
"""


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    pytest.importorskip("math_verify")
    with MathVerifier(workers=1, timeout=60) as v:
        yield v


def stand_in(code: str = STAND_IN, **kwargs) -> MathVerifier:
    return MathVerifier(command=[sys.executable, "-c", code], **kwargs)


def test_algebra_decides(verifier: MathVerifier) -> None:
    pairs = [
        (r"\frac{1}{2}", r"So \boxed{0.5}."),
        (r"(3,\frac{\pi}{2})", r"\boxed{\left(3,\ \frac{\pi}{2}\right)}"),
        ("x^2+2x+1", r"\boxed{(x+1)^2}"),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
        ("12", "So the answer is 12 apples."),
        ("1/2", "I do not know."),
        ("1/2", ""),
        ("B", r"\boxed{\text{(C)}}"),
        ("1/2", r"\boxed{" + "1+" * 2000 + "1}"),
    ]
    states = [v.state for v in verifier.check(pairs)]
    assert states == [
        "correct", "correct", "correct", "wrong", "correct", "no_answer", "no_answer", "wrong", "unverifiable",
    ]  # fmt: skip


def test_it_works_in_a_thread(verifier: MathVerifier) -> None:
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.extend(verifier.check([("1/2", r"\boxed{0.5}")])))
    thread.start()
    thread.join()
    assert found == [Verdict("correct")]


def test_a_real_comparison_without_end_is_bounded() -> None:
    pytest.importorskip("math_verify")
    with MathVerifier(timeout=1.5) as v:
        v.check([("1/2", r"\boxed{0.5}")])  # its libraries are loaded
        begin = time.monotonic()
        verdicts = v.check([("1/3", r"\boxed{10^{10^{10^{10}}}}"), ("1/2", r"\boxed{0.5}")])
    assert verdicts[0].state in ("unverifiable", "wrong", "no_answer") and verdicts[1].state == "correct"
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("workers", [1, 3])
def test_hangs_and_crashes_cost_only_their_row(workers: int) -> None:
    pairs = [(g, rf"\boxed{{{i}/7}}") for i, g in enumerate(["a/2", "hang/2", "b/2", "die/2", "c/2", "die/3", "d/2"])]
    with stand_in(workers=workers, timeout=0.7) as v:
        verdicts = v.check(pairs)
    assert [x.state for x in verdicts] == ["wrong", *["unverifiable", "wrong"] * 3]
    assert [x.why for x in verdicts[1::2]] == ["timeout", "crash", "crash"]
    assert verdicts[4].why == r"\boxed{4/7}"  # every row got its own answer


def test_workers_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETIRE", 2)
    with stand_in() as v:
        assert [x.state for x in v.check([("a/2", rf"\boxed{{{i}/7}}") for i in range(5)])] == ["wrong"] * 5


def test_a_worker_that_cannot_start_is_said() -> None:
    with stand_in("raise SystemExit(1)") as v, pytest.raises(UserError, match="does not start"):
        v.check([("a/2", r"\boxed{1/7}")])


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install math-verify"):
        MathVerifier()
