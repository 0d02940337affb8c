"""``data inspect --html``: one self-contained page to browse problems, traces and training rows. No network, no server.

What a model or a problem wrote reaches the page as inert JSON and is set as text by the page's script, so nothing in it
can become markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from neureasoner.artifacts import write_text
from neureasoner.data_builders.inspect import Record, facts_of, kinds, masked_spans
from neureasoner.data_builders.layouts import Reconstruction
from neureasoner.errors import UserError
from neureasoner.traces import Problem, Trace, read_jsonl

REJECTED = "rejected.jsonl"


def marks(record: Record, tokenizer: Any = None, mask_failure: bool = False) -> list[tuple[int, int, str]]:
    """Stretches of the text to colour: (start, end, fail, block, trigger, loop or masked)."""
    out: list[tuple[int, int, str]] = []
    if isinstance(record, Reconstruction):
        for span, kind in (
            (record.failure_span, "fail"),
            (record.block_span, "block"),
            (record.trigger_span, "trigger"),
        ):
            out += [(*span, kind)] if span else []
        if tokenizer is not None:
            out += [(a, b, "masked") for a, b in masked_spans(record, tokenizer, mask_failure)]
    elif isinstance(record, Trace) and record.labels is not None:
        for label, kind in ((record.labels.inter, "loop"), (record.labels.intra, "fail")):
            out += [(*label.span, kind)] if label.span else []
    return out


def view(record: Record, tokenizer: Any = None, mask_failure: bool = False) -> dict[str, Any]:
    """One record as the page reads it."""
    problem = record if isinstance(record, Problem) else record.problem
    return {
        "id": record.id,
        "kinds": sorted(kinds(record)),
        "question": problem.question,
        "answer": problem.answer,
        "text": "" if isinstance(record, Problem) else record.response,
        "marks": marks(record, tokenizer, mask_failure),
        "facts": facts_of(record),
        "reason": "",
    }


def rejected(path: str | Path) -> list[dict[str, Any]]:
    """The rows that were rejected beside a train.jsonl, with their reasons; none where there is no such file."""
    file = Path(path).with_name(REJECTED)
    if not file.is_file():
        return []
    return [
        {
            "id": f"{row.get('id', '?')}/{row.get('level', '?')}",
            "kinds": ["rejected", str(row.get("level", "?"))],
            "question": "",
            "answer": "",
            "text": "",
            "marks": [],
            "facts": [],
            "reason": str(row.get("reason", "")),
        }
        for _, row in read_jsonl(file)
    ]


def embed(value: Any) -> str:
    """JSON that can stand inside a script element: no character that HTML or JavaScript would read otherwise."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.encode("utf-8", "replace").decode()
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def write_page(
    out: str | Path, title: str, records: Iterable[Record], others: Sequence[dict[str, Any]] = (),
    tokenizer: Any = None, mask_failure: bool = False,
) -> int:  # fmt: skip
    """Write the page; returns how many records it holds. Raises UserError when that is none."""
    rows = [view(r, tokenizer, mask_failure) for r in records] + list(others)
    if not rows:
        raise UserError("there is no record to browse")
    page = (files("neureasoner.data_builders") / "browse.html").read_text(encoding="utf-8")
    head, _, tail = page.partition("{{data}}")
    head = head.replace("{{title}}", escape(title.encode("utf-8", "replace").decode()))
    write_text(out, head + embed(rows) + tail)
    return len(rows)
