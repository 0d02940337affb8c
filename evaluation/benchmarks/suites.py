"""Tests of a program: how they are read from a row, kept, and found again by the problem that needs them.

A problem's ``answer`` is ``tests:`` and the SHA-256 of its test set; the set lies in the cache
(``~/.cache/neureasoner/tests``, or ``tests`` in the folder that ``NEUREASONER_CACHE`` names). So traces stay small
though hidden tests take megabytes, and what a problem is graded by can never change unnoticed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickletools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neureasoner.artifacts import write_text
from neureasoner.data_builders.grading.answers import TESTS
from neureasoner.errors import UserError

MAX_TESTS = 512 << 20  # bytes of a test set unpacked; a larger one is a bomb
_HARMLESS = {
    "PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "UNICODE",
}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """Tests of one problem: (input, expected output) pairs as text. ``function``: the one to call; '' = stdin, stdout.

    For a function the input is one JSON value a line, one for each argument, and the output is JSON.
    """

    tests: tuple[tuple[str, str], ...]
    function: str = ""
    tolerance: float = 0.0

    def to_text(self) -> str:
        """Canonical JSON."""
        return json.dumps({"function": self.function, "tolerance": self.tolerance, "tests": self.tests}, sort_keys=True)


def folder() -> Path:
    """Where test sets are kept."""
    root = os.environ.get("NEUREASONER_CACHE") or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/neureasoner"
    return Path(root).expanduser() / "tests"


def keep(suite: Suite) -> str:
    """Put a suite into the cache. -> the ``answer`` of its problem."""
    text = suite.to_text()
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    path = folder() / digest
    if not path.is_file():
        write_text(path, base64.b64encode(zlib.compress(text.encode("utf-8", "surrogatepass"))).decode("ascii"))
    return f"{TESTS}{digest}"


def find(answer: str) -> Suite:
    """The suite an ``answer`` names. Raises UserError if it is not in this machine's cache, or was changed there."""
    digest = answer.removeprefix(TESTS)
    path = folder() / Path(digest).name
    if not path.is_file():
        raise UserError(
            f"the tests {digest[:12]}… of a code problem are not in {path.parent}; run `neureasoner evaluation "
            "benchmark` on this machine too, or let NEUREASONER_CACHE name a shared folder"
        )
    try:
        text = _inflate(base64.b64decode(path.read_bytes()))
    except (ValueError, zlib.error):
        text = b""
    if hashlib.sha256(text).hexdigest() != digest:
        raise UserError(f"{path}: damaged (its content has another hash than its name); delete it and build it again")
    row = json.loads(text.decode("utf-8", "surrogatepass"))
    return Suite(tuple((i, o) for i, o in row["tests"]), row["function"], row["tolerance"])


def _inflate(data: bytes) -> bytes:
    machine = zlib.decompressobj()
    out = machine.decompress(data, MAX_TESTS)
    if machine.unconsumed_tail:
        raise ValueError(f"unpacks to more than {MAX_TESTS >> 20} MiB")
    return out


def read_cell(cell: Any, where: str) -> list[Any]:
    """The tests of a cell: a list, JSON, or LiveCodeBench's base64 of zlib of a pickled JSON string. Raises UserError.

    The pickle is never loaded: its instructions are listed, and anything but one plain string is refused.
    """
    try:
        value = cell
        if isinstance(cell, str):
            try:
                value = json.loads(cell)
            except ValueError:
                value = json.loads(pickled_text(_inflate(base64.b64decode(cell, validate=True))))
        if isinstance(value, dict) and isinstance(value.get("tests"), list):
            value = value["tests"]
        if not isinstance(value, list):
            raise ValueError(f"expected a list of tests, got {type(value).__name__}")
        return value
    except (ValueError, RecursionError, zlib.error) as e:
        raise UserError(f"{where}: tests that cannot be read ({str(e)[:120]})") from None


def pickled_text(data: bytes) -> str:
    """The string of a pickle that holds one string and nothing else. Raises ValueError."""
    text: str | None = None
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name not in _HARMLESS:
                raise ValueError(f"a pickle that does more than hold one string ({code.name})")
            if "UNICODE" in code.name:
                if text is not None:
                    raise ValueError("a pickle of several strings")
                text = str(argument)
    except (IndexError, UnicodeDecodeError) as e:
        raise ValueError(f"a broken pickle ({e})") from None
    if text is None:
        raise ValueError("a pickle without a string")
    return text


def suite_of(cells: Sequence[Any], function: str, where: str) -> Suite:
    """One suite of several cells (public tests, hidden tests). Raises UserError for a test that cannot be."""
    tests: list[tuple[str, str]] = []
    for cell in cells:
        for number, test in enumerate(read_cell(cell, where), 1):
            if isinstance(test, dict):
                test = [test.get("input"), test.get("output")]
            if not isinstance(test, (list, tuple)) or len(test) != 2 or test[1] is None:
                raise UserError(f"{where}: test {number} has no input or no output")
            given, wanted = (t if isinstance(t, str) else json.dumps(t) for t in test)
            if function:
                _check_json(given, wanted, f"{where}: test {number}")
            tests.append((given, wanted))
    if not tests:
        raise UserError(f"{where}: no tests, so no program can be graded")
    return Suite(tuple(tests), function)


def _check_json(given: str, wanted: str, where: str) -> None:
    try:
        arguments(given)
        json.loads(wanted)
    except ValueError:
        raise UserError(f"{where}: the input or output of a function is not JSON") from None


def arguments(given: str) -> list[Any]:
    """The arguments of a call: one JSON value a line."""
    return [json.loads(line) for line in given.split("\n") if line.strip()]
