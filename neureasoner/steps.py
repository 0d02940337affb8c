r"""Paragraph steps of a thinking text, found token by token.

The rule, the same online and offline: **a step closes with the first token at which the step's own text holds a blank
line (``\n\n``) after something other than white space.** So the separator belongs to the step it closes however the
tokenizer merged it (``.\n\n``, ``\n`` + ``\n``); it is decided at that token, without looking ahead, and a bound once
set never moves. Newlines that come before any text (a third newline, an empty paragraph, a leading newline) belong to
the step that follows; they never make a step of their own.

**The thinking ends at the token that completes the text** ``</think>``, be that one token or the last of several that
spell it, merged with their neighbours or not. What belongs to the thinking then ends before the first token that holds
a part of the tag; if that token also closed a step (``.\n\n<``), with that step, because its bound is set. The thinking
also ends before a token that ends the response.

A token is never split: text after a blank line inside one token stays with the step it closes.

Legend: ``T`` response tokens, ``V`` vocabulary; bounds are token ends, ``[0, end of step 0, …]``.
"""

from __future__ import annotations

import codecs
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from neureasoner.traces import THINK_CLOSE, Step

# States of the text of the step that is open. CLOSED is only ever an outcome: the next step begins BLANK.
BLANK, TEXT, NEWLINE, CLOSED = range(4)
_SPACE = frozenset(b" \t\n\r\v\f")
_TAG = THINK_CLOSE.encode()
WHOLE = len(_TAG)  # of the tag's bytes, how many stand at the end of the text: 0 … WHOLE


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


def _progress(read: int, text: bytes) -> int:
    """Bytes of the tag read after ``text``; WHOLE as soon as it is complete. Only its first byte begins it anew."""
    for byte in text:
        read = read + 1 if byte == _TAG[read] else int(byte == _TAG[0])
        if read == WHOLE:
            break
    return read


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

    ``table[state][id]`` is the state after token ``id``, ``tags[n][id]`` how many bytes of ``</think>`` stand at the
    end of the text after it, where ``n`` stood there before. Ids the tokenizer does not know (padded rows of the LM
    head) have no text and change nothing.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        vocab: dict[str, int] = tokenizer.get_vocab()
        self.size = max(vocab.values()) + 1
        self.eos: int | None = tokenizer.eos_token_id
        self.byte_level = _is_byte_level(tokenizer)
        self.texts: list[bytes] = [b""] * self.size
        alphabet, anchor = _byte_alphabet(), vocab.get("a")
        for token, i in vocab.items():
            if self.byte_level:
                known = all(c in alphabet for c in token)
                self.texts[i] = bytes(alphabet[c] for c in token) if known else token.encode()
            else:
                self.texts[i] = self._after(anchor, i).encode()
        self.table = [bytes(_walk(state, text) for text in self.texts) for state in (BLANK, TEXT, NEWLINE)]
        self.tags = self._tag_rows()

    def _after(self, anchor: int | None, token_id: int) -> str:
        """A token's text as it stands after others: alone, some tokenizers drop the space that it begins with."""
        if anchor is not None:
            before, both = self._decode([anchor]), self._decode([anchor, token_id])
            if both.startswith(before):
                return both[len(before) :]
        return self._decode([token_id])

    def _tag_rows(self) -> list[bytes]:
        begins: defaultdict[bytes, list[int]] = defaultdict(list)
        for i, text in enumerate(self.texts):
            begins[text[:1]].append(i)
        fresh = bytes(_progress(0, text) if b"<" in text else 0 for text in self.texts)
        rows = [fresh]
        for read in range(1, WHOLE):
            row = bytearray(fresh)  # only what goes on where the tag stands, and what has no text, is different
            for i in begins[b""] + begins[_TAG[read : read + 1]]:
                row[i] = _progress(read, self.texts[i])
            rows.append(bytes(row))
        return rows

    @cached_property
    def closing(self) -> frozenset[int]:
        """Ids that hold the whole of ``</think>``."""
        return frozenset(i for i, read in enumerate(self.tags[0]) if read == WHOLE)

    @cached_property
    def spells_close(self) -> bool:
        """Whether some tokens one after the other spell ``</think>``."""
        reached, new = {0}, {0}
        while new and WHOLE not in new:
            new = set().union(*(self.tags[read] for read in new)) - reached
            reached |= new
        return WHOLE in new

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

    def tag(self, read: int, token_id: int) -> int:
        """Bytes of the tag that stand at the end after ``token_id``, where ``read`` stood there before it."""
        return self.tags[read][token_id] if token_id < self.size else read

    def goes_on(self, read: int, token_id: int) -> bool:
        """Whether the token's text goes on with the tag of which ``read`` bytes stand there."""
        text = self.texts[token_id] if token_id < self.size else b""
        return text.startswith(_TAG[read:]) or _TAG[read:].startswith(text)

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

    ``ends``: ids that end a response, none of them thinking or part of a step; by default the tokenizer's EOS alone.

    Attributes: ``bounds`` ``[0, end of step 0, …]`` of the closed steps; ``n_tokens`` pushed so far; ``in_thinking``;
    ``thinking_tokens``, the leading tokens that belong to the thinking. A tag that is not complete is thinking still.
    """

    def __init__(self, separators: Separators, in_thinking: bool = True, ends: Iterable[int] = ()):
        self.separators = separators
        self.ends = frozenset(ends) or frozenset(() if separators.eos is None else (separators.eos,))
        self.bounds: list[int] = [0]
        self.n_tokens = 0
        self.thinking_tokens = 0
        self.in_thinking = in_thinking
        self._state = BLANK
        self._tag = 0  # bytes of the tag that stand at the end
        self._before_tag = (0, BLANK)  # tokens and state before the first token of that tag

    def push(self, token_id: int) -> bool:
        """Read one token; True if it closes a step, whose end is then ``bounds[-1]``."""
        self.n_tokens += 1
        if not self.in_thinking:
            return False
        if token_id in self.ends:
            self.in_thinking = False
            return False
        if not self._tag or not self.separators.goes_on(self._tag, token_id):
            self._before_tag = self.n_tokens - 1, self._state
        self._tag = self.separators.tag(self._tag, token_id)
        if self._tag == WHOLE:
            self._end()
            return False
        self.thinking_tokens = self.n_tokens
        self._state = self.separators.step(self._state, token_id)
        if self._state != CLOSED:
            return False
        self._state = BLANK
        self.bounds.append(self.n_tokens)
        return True

    def _end(self) -> None:
        """Take what belongs to the tag out of the thinking, but no bound back."""
        self.in_thinking = False
        self.thinking_tokens, self._state = self._before_tag
        if self.bounds[-1] > self.thinking_tokens:
            self.thinking_tokens, self._state = self.bounds[-1], BLANK

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


def segment(
    response_ids: Sequence[int], tokenizer: Any, ends: Iterable[int] = (), in_thinking: bool = True
) -> tuple[list[Step], int]:
    """Steps of a response and the number of its tokens that are thinking (``</think>`` and ``ends`` excluded).

    ``tokenizer`` may be a tokenizer or its Separators, ``ends`` as in ``StepSegmenter``; ``in_thinking``: whether the
    response begins inside the thinking (``neureasoner.thinking``). Character offsets count in
    ``tokenizer.decode(response_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)``.
    """
    separators = Separators.of(tokenizer)
    segmenter = StepSegmenter(separators, in_thinking, ends)
    for token_id in response_ids:
        segmenter.push(token_id)
    return segmenter.steps(separators.offsets(response_ids)[1]), segmenter.thinking_tokens
