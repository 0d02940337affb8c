r"""Paragraph steps of a thinking text, found token by token.

The rule, the same online and offline: **a step closes with the first token at which the step's own text holds a blank
line (``\n\n``) after something other than white space.** So the separator belongs to the step it closes however the
tokenizer merged it (``.\n\n``, ``\n`` + ``\n``); it is decided at that token, without looking ahead, and a bound once
set never moves. Newlines that come before any text (a third newline, an empty paragraph, a leading newline) belong to
the step that follows; they never make a step of their own. Thinking ends before ``</think>``, or before EOS.

A token is never split: text after a blank line inside one token stays with the step it closes.

Legend: ``T`` response tokens; bounds are token ends, ``[0, end of step 0, …]``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from neureasoner.traces import THINK_CLOSE, Step

# States of the text of the step that is open. CLOSED is only ever an outcome: the next step begins BLANK.
BLANK, TEXT, NEWLINE, CLOSED = range(4)
_SPACE = frozenset(b" \t\n\r\v\f")


def _walk(state: int, text: bytes) -> int:
    """State after reading ``text``; CLOSED as soon as a blank line follows text."""
    for byte in text:
        if state == BLANK:
            state = BLANK if byte in _SPACE else TEXT
        elif byte == 0x0A:
            if state == NEWLINE:
                return CLOSED
            state = NEWLINE
        else:
            state = TEXT
    return state


def _byte_alphabet() -> dict[str, int]:
    """Characters in which byte-level BPE writes bytes: printable ones as themselves, others from 256."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    return json.loads(backend.to_str())["decoder"]["type"] == "ByteLevel"


class Separators:
    """What every vocabulary entry does to a step, computed once per tokenizer.

    ``table[state][id]`` is the state after token ``id``. ``think_close`` is the id of ``</think>`` (None if the
    tokenizer has no such token: then only EOS ends the thinking). Ids the tokenizer does not know (padded rows of the
    LM head) have no text and change nothing.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        vocab: dict[str, int] = tokenizer.get_vocab()
        self.size = max(vocab.values()) + 1
        self.think_close: int | None = vocab.get(THINK_CLOSE)
        self.eos: int | None = tokenizer.eos_token_id
        self.byte_level = _is_byte_level(tokenizer)
        self.texts: list[bytes] = [b""] * self.size
        alphabet = _byte_alphabet()
        for token, i in vocab.items():
            if self.byte_level:
                known = all(c in alphabet for c in token)
                self.texts[i] = bytes(alphabet[c] for c in token) if known else token.encode()
            else:
                self.texts[i] = self._decode([i]).encode()
        self.table = [bytes(_walk(state, text) for text in self.texts) for state in (BLANK, TEXT, NEWLINE)]

    @classmethod
    def of(cls, tokenizer: Any) -> Separators:
        """The separators of ``tokenizer``, kept until it goes or grows. Separators pass through."""
        if isinstance(tokenizer, Separators):
            return tokenizer
        kept = _KEPT.get(tokenizer)
        if kept is None or kept[0] != len(tokenizer):
            kept = _KEPT[tokenizer] = (len(tokenizer), cls(tokenizer))
        return kept[1]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def step(self, state: int, token_id: int) -> int:
        """State after ``token_id``."""
        return self.table[state][token_id] if token_id < self.size else state

    def contains_separator(self, token_id: int) -> bool:
        r"""Whether the token's own text holds ``\n\n``."""
        return token_id < self.size and b"\n\n" in self.texts[token_id]

    def offsets(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Decoded text and the ``T + 1`` character boundaries of the tokens in it.

        Boundary ``t`` is the number of complete characters that the first ``t`` tokens spell; the last is
        ``len(text)``. Linear in ``T``.
        """
        text = self._decode(ids)
        bounds = self._byte_offsets(ids, text) if self.byte_level else None
        return text, bounds if bounds is not None else self._window_offsets(ids, text)

    def _byte_offsets(self, ids: Sequence[int], text: str) -> list[int] | None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces, bounds, n = [], [0], 0
        for i in ids:
            pieces.append(decoder.decode(self.texts[i] if i < self.size else b""))
            n += len(pieces[-1])
            bounds.append(n)
        if "".join(pieces) + decoder.decode(b"", final=True) != text:
            return None  # the tokenizer decodes in a way of its own
        bounds[-1] = len(text)
        return bounds

    def _window_offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """For tokenizers whose pieces depend on their neighbours: decode a short window and count what is new."""
        bounds, begin, read = [0], 0, 0
        for t in range(1, len(ids) + 1):
            old, new = self._decode(ids[begin:read]), self._decode(ids[begin:t])
            # U+FFFD at the end: a character still in pieces. No character has more than four.
            grown = len(new) - len(old) if not new.endswith("\ufffd") or t - read > 4 else 0
            bounds.append(min(bounds[-1] + max(grown, 0), len(text)))
            if grown > 0:
                begin, read = read, t
        bounds[-1] = len(text)
        return bounds


_KEPT: WeakKeyDictionary[Any, tuple[int, Separators]] = WeakKeyDictionary()


class StepSegmenter:
    """Feed it the response token by token. One instance per sequence.

    Attributes: ``bounds`` ``[0, end of step 0, …]`` of the closed steps; ``n_tokens`` pushed so far; ``in_thinking``;
    ``thinking_tokens``, the leading tokens that belong to the thinking.
    """

    def __init__(self, separators: Separators, in_thinking: bool = True):
        self.separators = separators
        self.bounds: list[int] = [0]
        self.n_tokens = 0
        self.thinking_tokens = 0
        self.in_thinking = in_thinking
        self._state = BLANK

    def push(self, token_id: int) -> bool:
        """Read one token; True if it closes a step, whose end is then ``bounds[-1]``."""
        self.n_tokens += 1
        if not self.in_thinking:
            return False
        if token_id in (self.separators.think_close, self.separators.eos):
            self.in_thinking = False
            return False
        self.thinking_tokens = self.n_tokens
        self._state = self.separators.step(self._state, token_id)
        if self._state != CLOSED:
            return False
        self._state = BLANK
        self.bounds.append(self.n_tokens)
        return True

    @property
    def has_open_text(self) -> bool:
        """Whether a paragraph has begun that no separator has closed."""
        return self._state != BLANK

    def steps(self, offsets: Sequence[int]) -> list[Step]:
        """The steps so far, given the character boundaries of the tokens (``Separators.offsets``).

        A last paragraph without a separator is the only step with ``closed=False``.
        """
        steps = [Step(offsets[a], offsets[b], a, b) for a, b in pairwise(self.bounds)]
        if self.has_open_text:
            a, b = self.bounds[-1], self.thinking_tokens
            steps.append(Step(offsets[a], offsets[b], a, b, closed=False))
        return steps


def segment(response_ids: Sequence[int], tokenizer: Any) -> tuple[list[Step], int]:
    """Steps of a response and the number of its tokens that are thinking (``</think>``, EOS excluded).

    ``tokenizer`` may be a tokenizer or its Separators. Character offsets count in
    ``tokenizer.decode(response_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)``.
    """
    separators = Separators.of(tokenizer)
    segmenter = StepSegmenter(separators)
    for token_id in response_ids:
        segmenter.push(token_id)
    return segmenter.steps(separators.offsets(response_ids)[1]), segmenter.thinking_tokens
