"""Chat templates and thinking (core.md §1.9): which templates delete it, and who opens it.

Rows are encoded from the template's prompt alone (``data_builders/encoding.py``), so that no template can delete the
thinking, as DeepSeek-R1's does for every assistant turn and Qwen3's for earlier ones. What is left is who writes
``<think>``: R1's prompt ends with it, Qwen3's does not, and the model writes it first. A row has it once either way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from neureasoner.data_builders.layouts import Reconstruction, Span
from neureasoner.prompts import encode_prompt
from neureasoner.thinking import OPEN, thinking_state
from neureasoner.traces import OPENED, THINK_CLOSE, THINK_OPEN


def open_once(rows: Iterable[Reconstruction], tokenizer: Any) -> list[Reconstruction]:
    """The rows with ``<think>`` written by the prompt or by the response, not by both and not by neither.

    A response that never closes its thinking has none, and is left alone. Spans move with the text.
    """
    prompt_ids = encode_prompt(tokenizer, "?")
    opened = thinking_state(prompt_ids, tokenizer) == OPEN
    return [_open_once(row, opened) for row in rows]


def _open_once(row: Reconstruction, opened: bool) -> Reconstruction:
    text = row.response
    if opened and text.startswith(THINK_OPEN):
        text = text.removeprefix(THINK_OPEN).removeprefix("\n")
    elif not opened and THINK_CLOSE in text and not text.lstrip().startswith(THINK_OPEN):
        text = OPENED + text
    moved = len(text) - len(row.response)

    def span(old: Span | None) -> Span | None:
        return None if old is None else (old[0] + moved, old[1] + moved)

    return replace(
        row,
        response=text,
        failure_span=span(row.failure_span),
        trigger_span=span(row.trigger_span),
        block_span=span(row.block_span),
    )
