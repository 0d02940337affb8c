"""The process that compares answers: JSON lines in, JSON lines out. Started by ``verifier.MathVerifier``.

A process of its own because a comparison may never end and may eat all memory (``10^{10^{10}}``): the parent can kill
it, from any thread, and memory is capped here. math-verify's own time limit needs signals in a main thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from typing import Any

MEMORY = 3 << 30  # bytes of address space
_MATH = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")


def _as_math(text: str) -> str:
    """math-verify looks for LaTeX between dollar signs only. An escaped one is money, and no such sign."""
    return text if _MATH.search(text) else f"${text}$"


def compare(gold: str, predicted: str) -> tuple[str, str]:
    """(state, why): correct, wrong, no_answer, unverifiable. Gold first: math-verify is not symmetric."""
    from math_verify import parse, verify

    def read(text: str) -> list[Any]:
        return list(parse(text, parsing_timeout=None))  # type: ignore[arg-type]

    expected = read(_as_math(gold)) or read(gold)
    if not expected:
        return "unverifiable", "the gold answer cannot be read"
    found = read(predicted)
    if not found:
        return "no_answer", "no expression in the answer"
    try:
        same = verify(expected, found, timeout_seconds=None, raise_on_error=True)
    except Exception as e:
        # one candidate reading may fail while another one matches
        if verify(expected, found, timeout_seconds=None):
            return "correct", ""
        return "unverifiable", type(e).__name__
    return ("correct", "") if same else ("wrong", "")


def main() -> None:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import math_verify  # noqa: F401

    out.write('"ready"\n')
    out.flush()
    for line in sys.stdin.buffer:
        try:
            answer = compare(*json.loads(line))
        except MemoryError:
            answer = ("unverifiable", "out of memory")
        except Exception as e:
            answer = ("unverifiable", type(e).__name__)
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
