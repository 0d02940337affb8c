"""The blocks a trigger opens, and the reconstructed trace that holds one (core.md §1.8). Pure text, no torch.

A reconstructed response reads ``π_<j, π̃_j, ⟨trigger⟩, block, π_>j``: paragraphs separated by one blank line, the
trigger on its own line directly after the failed paragraph, and the block up to the next blank line::

    <INTRA>                                             <INTER>
    [FAILURE_INTRA] {announcement}                      [FAILURE_INTER] {announcement}
    - **error span**: "{quoted wrong text}"             - **past attempts summary:** {summary}
    - **analysis**: {analysis}                          - **problem-grounded analysis:** {analysis}

                                                        {pivot plan}

The colon stands outside the bold text on the left and inside on the right, as in the paper. The pivot plan is written
after a blank line; one that follows the bullets without a blank line is read too. Spans are half open, in characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from neureasoner.errors import UserError
from neureasoner.traces import FINISHED, INTER, INTRA, THINK_CLOSE, Problem, problem_from_dict, read_records

Span = tuple[int, int]

ERROR_LENGTHS = ("short", "medium", "long")
ERROR_TYPES = (
    "dropped_case",
    "invalid_division",
    "sign_error",
    "algebra_simplification_error",
    "mistaken_assumption",
    "domain_violation",
)
LOOP_LENGTHS = (3, 4, 5)
LOOP_THEMES = ("mod_checks", "bounds", "symmetry_observations", "equivalent_reformulations")
STYLE = "LRM_natural_first_person"
LEVELS = ("intra", "inter", "instance", "plain")

# No two quantifiers that can share white space: hostile text of a megabyte must be read in linear time.
_TRIGGER_LIKE = re.compile(r"<\s*(?:/\s*)?(INTRA|INTER)\s*(?:/\s*)?>", re.IGNORECASE)
_FAILURE_LIKE = re.compile(r"\[\s*+FAILURE\w*+\s*+\]?", re.IGNORECASE)
_BLANK = re.compile(r"\n[ \t]*+\n\s*+")


def is_trigger_like(text: str) -> bool:
    """Whether a text holds anything that could be taken for a trigger or a block's tag. Linear in the text."""
    return bool(_TRIGGER_LIKE.search(text) or _FAILURE_LIKE.search(text))


class LayoutError(ValueError):
    """A block that cannot be read or written; ``reasons`` says everything that is wrong with it."""

    def __init__(self, reasons: list[str]):
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class IntraBlock:
    """Diagnosis of one wrong step. Every part is one line."""

    announcement: str
    error_span: str
    analysis: str
    trigger: ClassVar[str] = INTRA
    tag: ClassVar[str] = "[FAILURE_INTRA]"


@dataclass(frozen=True)
class InterBlock:
    """Diagnosis of a loop and the way out of it. Every part is one line."""

    announcement: str
    summary: str
    analysis: str
    pivot: str
    trigger: ClassVar[str] = INTER
    tag: ClassVar[str] = "[FAILURE_INTER]"


Block = IntraBlock | InterBlock


@dataclass(frozen=True)
class Found:
    """A block in a text: its trigger, and the whole of it (an inter block with its pivot plan)."""

    block: Block
    trigger_span: Span
    span: Span


@dataclass
class Reconstruction:
    """One training row: a question and a response that fails, sees the trigger and repairs itself (or a plain one).

    ``failure_span`` covers the wrong step or the loop without the separator that closes it; ``trigger_span`` the
    trigger alone; ``block_span`` trigger and block. All count in ``response`` and are None for ``level == "plain"``,
    the rows left untouched; a row of level ``instance`` has a trigger only, the text that closes its thinking early.
    ``response`` holds no EOS. ``prompt`` is the bare question. ``control`` holds the sampled fields of §1.8.
    """

    id: str
    problem: Problem
    level: str
    prompt: str
    response: str
    failure_span: Span | None = None
    trigger_span: Span | None = None
    block_span: Span | None = None
    control: dict[str, Any] = field(default_factory=dict)
    reference_id: str = ""
    source: str = ""


def reconstruction_from_dict(row: dict[str, Any]) -> Reconstruction:
    """Inverse of ``dataclasses.asdict``. Raises UserError naming a missing, unknown or impossible value."""
    known = {f.name for f in fields(Reconstruction)}
    missing = {"id", "problem", "level", "prompt", "response"} - set(row)
    if missing or set(row) - known:
        raise UserError(
            f"not a reconstructed trace: missing keys {sorted(missing)}, unknown keys {sorted(set(row) - known)}"
        )
    spans: dict[str, Span | None] = {}
    for name in ("failure_span", "trigger_span", "block_span"):
        value = row.get(name)
        spans[name] = None if value is None else (int(value[0]), int(value[1]))
        if value is not None and not 0 <= value[0] < value[1] <= len(row["response"]):
            raise UserError(f"{name} {value} lies outside the response")
    if row["level"] not in LEVELS:
        raise UserError(f"level {row['level']!r} is not one of {', '.join(LEVELS)}")
    trigger = spans["trigger_span"]
    expected = {"intra": INTRA, "inter": INTER, "instance": FINISHED}.get(row["level"])
    if (trigger is None) != (expected is None):
        raise UserError(f"a row of level {row['level']} must {'not ' if expected is None else ''}have a trigger_span")
    return Reconstruction(**{**row, **spans, "problem": problem_from_dict(row["problem"])})


def read_reconstructions(path: str | Path) -> list[Reconstruction]:
    """Read ``train.jsonl``. Raises UserError with the line number of the first bad row, or for an empty file."""
    return read_records(path, reconstruction_from_dict, "reconstructed traces")


def paragraphs(text: str) -> list[Span]:
    """Spans of the paragraphs of ``text``, without the blank lines between them."""
    spans, start = [], 0
    for gap in _BLANK.finditer(text):
        if text[start : gap.start()].strip():
            spans.append((start, gap.start()))
        start = gap.end()
    if text[start:].strip():
        spans.append((start, start + len(text[start:].rstrip())))
    return spans


def render(block: Block) -> str:
    """The block's text, from its trigger to its last character. Raises LayoutError for an empty or multi-line part."""
    parts = {f.name: getattr(block, f.name) for f in fields(block)}
    bad = [f"{k} must be one line of text" for k, v in parts.items() if not v.strip() or "\n" in v]
    if bad:
        raise LayoutError(bad)
    head = f"{block.trigger}\n{block.tag} {block.announcement}\n"
    if isinstance(block, IntraBlock):
        return f'{head}- **error span**: "{block.error_span}"\n- **analysis**: {block.analysis}'
    return (
        f"{head}- **past attempts summary:** {block.summary}\n"
        f"- **problem-grounded analysis:** {block.analysis}\n\n{block.pivot}"
    )


def compose(
    before: Sequence[str], failure: Sequence[str], block: Block, after: Sequence[str], ending: str = ""
) -> dict[str, Any]:
    """Put a response together; returns ``response`` and its three spans, ready for ``Reconstruction(**...)``.

    ``ending`` follows the last paragraph on a new line (``</think>`` and the answer).
    """
    head = "".join(p + "\n\n" for p in before)
    failed = "\n\n".join(failure)
    start = len(head) + len(failed) + 2
    text = "\n\n".join([head + failed, render(block), *after])
    if ending:
        text += "\n" + ending
    return {
        "response": text,
        "failure_span": (len(head), len(head) + len(failed)),
        "trigger_span": (start, start + len(block.trigger)),
        "block_span": (start, start + len(render(block))),
    }


def _labelled(lines: list[str], prefix: str, name: str, reasons: list[str]) -> str:
    """Take the next line if it starts with ``prefix``; otherwise note that the part ``name`` is missing."""
    if lines and lines[0].startswith(prefix) and lines[0][len(prefix) :].strip():
        return lines.pop(0)[len(prefix) :].strip()
    reasons.append(f"label '{name}' missing")
    return ""


def parse(text: str) -> Found:
    """Read the first block of ``text``. Raises LayoutError naming every part that is missing."""
    match = re.search(f"^(?:{INTRA}|{INTER})$", text, re.MULTILINE)
    if match is None:
        raise LayoutError(["no trigger on a line of its own"])
    start, reasons = match.start(), list[str]()
    chunks = paragraphs(text[start:])
    first_end = start + chunks[0][1]
    lines = text[start:first_end].split("\n")[1:]
    if match.group() == INTRA:
        announcement = _labelled(lines, f"{IntraBlock.tag} ", IntraBlock.tag, reasons)
        quoted = _labelled(lines, "- **error span**: ", "error span", reasons)
        if quoted and not re.fullmatch(r'".+"', quoted):
            reasons.append("the error span is not quoted")
        analysis = _labelled(lines, "- **analysis**: ", "analysis", reasons)
        if lines and not reasons:
            reasons.append("text after the analysis before the blank line")
        if reasons:
            raise LayoutError(reasons)
        return Found(IntraBlock(announcement, quoted[1:-1], analysis), match.span(), (start, first_end))
    announcement = _labelled(lines, f"{InterBlock.tag} ", InterBlock.tag, reasons)
    summary = _labelled(lines, "- **past attempts summary:** ", "past attempts summary", reasons)
    analysis = _labelled(lines, "- **problem-grounded analysis:** ", "problem-grounded analysis", reasons)
    end = first_end
    pivot = " ".join(line.strip() for line in lines)
    if not pivot and not reasons and len(chunks) > 1:
        end = start + chunks[1][1]
        closing = text.find(THINK_CLOSE, start, end)
        end = end if closing < 0 else len(text[:closing].rstrip())
        pivot = text[start + chunks[1][0] : end]
    if not pivot and not reasons:
        reasons.append("pivot plan missing")
    if reasons:
        raise LayoutError(reasons)
    return Found(InterBlock(announcement, summary, analysis, pivot), match.span(), (start, end))


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _validate(
    level: str,
    reference_steps: Sequence[str],
    text: str,
    is_correct: Callable[[str], bool],
    keep: int,
    failure_span: Span | None,
    loop: int | None,
) -> list[str]:
    """What the two validators share. ``loop`` is the asked number of paragraphs, None for intra."""
    trigger, tag = (INTRA, IntraBlock.tag) if level == "intra" else (INTER, InterBlock.tag)
    reasons = []
    found: Found | None = None
    triggers, tags = _TRIGGER_LIKE.findall(text), _FAILURE_LIKE.findall(text)
    if text.count(trigger) != 1:
        reasons.append(f"{text.count(trigger)} times {trigger} instead of once")
    if len(triggers) > text.count(trigger) or len(tags) > 1 or (tags and tags != [tag]):
        reasons.append("trigger-like text elsewhere")
    try:
        found = parse(text)
    except LayoutError as e:
        reasons += e.reasons
    if not is_correct(text):
        reasons.append("final answer differs from the reference")
    if found is None or found.block.trigger != trigger:
        return reasons
    place = found.trigger_span[0]
    thinking = text.find(THINK_CLOSE)
    if 0 <= thinking < place:
        reasons.append("the trigger stands outside the thinking")
    if not text[:place].endswith("\n\n"):
        reasons.append("the trigger does not directly follow a finished step")
    before = [text[a:b] for a, b in paragraphs(text[:place])]
    same = 0
    for mine, theirs in zip(before, reference_steps, strict=False):
        if _squeeze(mine) != _squeeze(theirs):
            break
        same += 1
    failed = 1 if loop is None else len(before) - same
    if failure_span is not None:
        inside = text[failure_span[0] : failure_span[1]]
        failed = len(paragraphs(inside))
        if text[failure_span[1] : place].strip() or inside != inside.strip():
            reasons.append("the failure span does not end directly before the trigger")
    if loop is not None and failed != loop:
        reasons.append(f"the loop has {failed} paragraphs instead of {loop}")
    if same < min(keep, len(before) - failed):
        reasons.append(f"only {same} of the first {min(keep, len(before) - failed)} steps equal the reference")
    if isinstance(found.block, IntraBlock) and found.block.error_span not in text[:place]:
        reasons.append("the quoted error span does not occur before the trigger")
    return reasons


def validate_intra(
    reference_steps: Sequence[str],
    text: str,
    is_correct: Callable[[str], bool],
    *,
    keep: int = 2,
    failure_span: Span | None = None,
) -> list[str]:
    """Every check of §1.8 on an intra reconstruction; returns the reasons to reject it (empty = valid).

    ``reference_steps``: paragraphs of the reference thinking. ``is_correct``: grades the whole response against the
    reference answer. ``keep``: how many of the first steps were to be copied (fewer if the failure comes earlier).
    ``failure_span``: the wrong step, where the writer knows it; otherwise it is the paragraph before the trigger.
    """
    return _validate("intra", reference_steps, text, is_correct, keep, failure_span, None)


def validate_inter(
    reference_steps: Sequence[str],
    text: str,
    is_correct: Callable[[str], bool],
    *,
    loop_paragraphs: int,
    keep: int = 2,
    failure_span: Span | None = None,
) -> list[str]:
    """Every check of §1.8 on an inter reconstruction; returns the reasons to reject it (empty = valid).

    As ``validate_intra``; ``loop_paragraphs`` is the asked length. Without ``failure_span`` the loop is everything
    between the copied steps and the trigger.
    """
    return _validate("inter", reference_steps, text, is_correct, keep, failure_span, loop_paragraphs)
