"""Text as a language model may see it, and the way back from its quotes to characters, tokens and steps.

``neutral`` replaces single characters by single characters, so a place in the shown text is the same place in the
original. A quote is looked for exactly, then folded (white space, Unicode compatibility forms, quotation marks and
dashes), then with at most a fifth of its characters wrong (core.md §1.3). Numbers, operations and relations
are never matched loosely: in a reasoning trace "= 41" and "= 42" are near in letters and far in meaning.

Cost: linear in the text for the first two; the third is bounded by anchors once quote and text are long.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from neureasoner.data_builders.layouts import Span
from neureasoner.traces import Trace

SIMILARITY = 0.8
MAX_QUOTE = 20_000  # characters
MIN_QUOTE = 3  # characters that are not white space; less says nothing about a place
WORK = 400_000  # characters of text that the fuzzy search reads for a quote of WIDE characters
WIDE = 2_000
GONE = "\ufffd"

# --- what a model may see ---------------------------------------------------------------------------------------

_TAGS = "PROBLEM|REASONING_TRACE|REFERENCE_REASONING|CONTROL"
_TAG_LIKE = re.compile(rf"<(?=[/|｜!?<A-Za-z]|\s{{0,8}}/?\s{{0,8}}(?:{_TAGS}))", re.IGNORECASE)
_MARK_LIKE = re.compile(
    r"\[(?=\s{0,8}/?\s{0,8}(?:paragraph|inst|system|available|tool|failure|user|assistant))", re.IGNORECASE
)
_UNUSUAL = re.compile(r"[^\n\t -~\u00a1-\u00ac\u00ae-\u02ff\u0370-\u05ff\u2010-\u2027\u2030-\u205e\u2070-\u2bff]")
_SPACES = {"\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"}


def _plain(match: re.Match[str]) -> str:
    """A character without power: controls, direction marks, invisible letters and half characters become U+FFFD."""
    c = match[0]
    if c in _SPACES:
        return " "
    category = unicodedata.category(c)
    if category in ("Cc", "Cs", "Co", "Cn"):
        return GONE
    if category == "Cf":
        # Joiners shape Persian words and emoji; between Latin letters they only hide a word from a reader.
        before = match.string[match.start() - 1 : match.start()]
        return c if c in "\u200c\u200d" and before > "\u02ff" else GONE
    return GONE if 0xE0100 <= ord(c) <= 0xE01EF else c


def neutral(text: str) -> str:
    """``text`` with nothing in it that could be taken for markup of ours or of a chat template. Same length.

    ``<`` before a letter, slash or bar becomes ``＜``, ``[`` before a paragraph mark or a role becomes ``［``; what
    cannot be seen becomes U+FFFD.
    """
    text = _UNUSUAL.sub(_plain, text)
    return _MARK_LIKE.sub("［", _TAG_LIKE.sub("＜", text))


# --- folding ----------------------------------------------------------------------------------------------------

_SAME = {
    **dict.fromkeys("‘’‚‛′`´ʼ", "'"),
    **dict.fromkeys("“”„‟«»″", '"'),
    **dict.fromkeys("‐‑‒–—―−﹣", "-"),
    GONE: "",
}
_FOLDED: dict[str, str] = {}


def _fold_char(c: str) -> str:
    """What a character counts as: "" for invisible ones, " " for any white space."""
    folded = _FOLDED.get(c)
    if folded is None:
        folded = _SAME.get(c)
        if folded is None:
            if c.isspace():
                folded = " "
            elif unicodedata.category(c) in ("Cc", "Cf", "Cs"):
                folded = ""
            else:
                folded = "".join(_SAME.get(x, x) for x in unicodedata.normalize("NFKD", c))
                folded = " ".join(folded.split()) if folded.strip() else " "
        _FOLDED[c] = folded
    return folded


@dataclass(frozen=True)
class Folded:
    """A folded text; ``at[i]`` is the original place of its i-th character."""

    text: str
    at: array[int]


def fold(text: str) -> Folded:
    """White space collapsed to one blank, compatibility forms resolved, quotation marks and dashes made alike."""
    out: list[str] = []
    at: array[int] = array("L")
    blank = True  # no blank at the start
    for i, c in enumerate(text):
        for f in _fold_char(c):
            if f == " " and blank:
                continue
            blank = f == " "
            out.append(f)
            at.append(i)
    if out and out[-1] == " ":
        out.pop()
        at.pop()
    return Folded("".join(out), at)


def dense(folded: Folded) -> Folded:
    """Without blanks, in small letters, runs of backslashes as one: what the fuzzy search compares."""
    out: list[str] = []
    at: array[int] = array("L")
    for i, c in zip(folded.at, folded.text, strict=True):
        if c == " " or (c == "\\" and out and out[-1] == "\\"):
            continue
        low = c.lower()
        out.append(low if len(low) == 1 else c)
        at.append(i)
    return Folded("".join(out), at)


# --- search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a quote stands (characters) and how it was found: exact, normalised or fuzzy, with its similarity."""

    span: Span
    how: str
    similarity: float = 1.0


def _whole(text: str, start: int, end: int) -> bool:
    """Whether the span cuts no number: "= 4" is not what "= 42" says."""
    cut_left = start > 0 and text[start - 1].isdigit() and text[start].isdigit()
    cut_right = end < len(text) and text[end].isdigit() and text[end - 1].isdigit()
    return not cut_left and not cut_right


def _first(text: str, quote: str, begin: int = 0, stop: int | None = None) -> int:
    """First occurrence that cuts no number, else the first one; -1 without any."""
    stop = len(text) if stop is None else stop
    first = at = text.find(quote, begin, stop)
    for _ in range(1000):
        if at < 0:
            break
        if _whole(text, at, at + len(quote)):
            return at
        at = text.find(quote, at + 1, stop)
    return first


def approximate(quote: str, text: str, most: int) -> Iterator[tuple[int, int]]:
    """(edits, end) of every place where ``quote`` ends with at most ``most`` edits, best end of each run of ends.

    Myers' bit-parallel search: one pass over the text, every column of the distance table in a few whole-number
    operations. The start is free, as is what follows the end.
    """
    mask, top = (1 << len(quote)) - 1, 1 << (len(quote) - 1)
    bits: dict[str, int] = {}
    for i, c in enumerate(quote):
        bits[c] = bits.get(c, 0) | (1 << i)
    plus, minus, edits = mask, 0, len(quote)
    best: tuple[int, int] | None = None
    for end, c in enumerate(text, 1):
        equal = bits.get(c, 0)
        vertical = equal | minus
        horizontal = (((equal & plus) + plus) ^ plus) | equal
        up = minus | (~(horizontal | plus) & mask)
        down = plus & horizontal
        if up & top:
            edits += 1
        elif down & top:
            edits -= 1
        up, down = (up << 1) & mask, (down << 1) & mask
        plus, minus = down | (~(vertical | up) & mask), up & vertical
        if edits <= most:
            if best is None or edits < best[0]:
                best = (edits, end)
        elif best is not None:
            yield best
            best = None
    if best is not None:
        yield best


def _start(quote: str, text: str, edits: int, end: int) -> int:
    """Where the occurrence that ends at ``end`` begins: the latest start from which ``edits`` suffice."""
    window = text[max(0, end - len(quote) - edits) : end][::-1]
    # The reversed quote must match from the window's first character on: a guard no text holds pays for any skip.
    guard = "\0" * (edits + 1)
    found = next(approximate(guard + quote[::-1], guard + window, edits), None)
    return end - (found[1] - len(guard)) if found else max(0, end - len(quote))


def _windows(quote: str, text: str, most: int) -> list[Span]:
    """Parts of ``text`` worth reading: all of it when that is cheap, else around the quote's rarest pieces."""
    n, m = len(text), len(quote)
    budget = WORK * WIDE // max(m, WIDE)
    if n <= budget:
        return [(0, n)]
    size = min(10, max(4, m // 6))
    offsets = sorted({round(k * (m - size) / 63) for k in range(64)}) if m > size else [0]
    counts = sorted((found, o) for o in offsets if (found := text.count(quote[o : o + size])))
    spans = []
    for _, o in counts[:8]:
        piece, at = quote[o : o + size], -1
        for _ in range(16):
            at = text.find(piece, at + 1)
            if at < 0:
                break
            spans.append((max(0, at - o - most), min(n, at - o + m + 2 * most)))
    merged: list[tuple[int, int, int]] = []  # how many pieces speak for it, start, end
    for a, b in sorted(spans):
        if merged and a <= merged[-1][2]:
            votes, start, end = merged[-1]
            merged[-1] = (votes + 1, start, max(b, end))
        else:
            merged.append((1, a, b))
    kept = []
    for _, a, b in sorted(merged, key=lambda x: -x[0]):
        if budget > 0:
            kept.append((a, min(b, a + budget)))
            budget -= b - a
    return kept


def _figures(text: str) -> list[str]:
    """Numbers, operations and relations, in order: what must be the same in quote and text."""
    return re.findall(r"\d+|[+*/^=<>≤≥\u0338]", text)


def _unslipped(quote: str) -> str:
    r"""LaTeX that JSON swallowed: ``\frac`` written with one backslash arrives as a form feed and ``rac``."""
    swallowed = {"\b": "\\b", "\f": "\\f", "\t": "\\t", "\r": "\\r", "\n": "\\n", "\v": "\\v"}
    return re.sub(r"[\b\f\v]|[\t\r\n](?=[a-z])", lambda m: swallowed[m[0]], quote)


class QuoteFinder:
    """Finds quotes in one text; what is computed of the text is kept for the next quote."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def folded(self) -> Folded:
        return fold(self.text)

    @cached_property
    def dense(self) -> Folded:
        return dense(self.folded)

    def find(self, quote: str, within: Span | None = None) -> Place | None:
        """Where ``quote`` stands; None if it is too short or too long, or nothing is at least 0.8 like it.

        The first occurrence counts, but one inside ``within`` (characters, such as a named paragraph) comes first, and
        so does one that cuts no number.
        """
        if len(quote) > MAX_QUOTE:
            return None
        variants = [quote.strip()]
        if any(c in quote for c in "\b\f\v\t\r\n"):
            variants.append(_unslipped(quote).strip())
        if (bare := variants[0].strip("\"'“”")) != variants[0]:  # a quote in quotation marks of its own
            variants.append(bare)
        variants = [v for v in variants if len(dense(fold(v)).text) >= MIN_QUOTE]
        for v in variants:
            at = _first(self.text, v, *within) if within else -1
            at = _first(self.text, v) if at < 0 else at
            if at >= 0:
                return Place((at, at + len(v)), "exact")
        needles = [fold(v) for v in variants]
        found = [self._normalised(needle.text, within) for needle in needles]
        found = found if any(found) else [self._fuzzy(dense(needle).text) for needle in needles]
        return next((place for place in found if place), None)

    def _normalised(self, needle: str, within: Span | None) -> Place | None:
        hay = self.folded
        at = -1
        if within:
            at = _first(hay.text, needle, *(bisect_right(hay.at, x - 1) for x in within))
        at = _first(hay.text, needle) if at < 0 else at
        return None if at < 0 else Place(self._span(hay, at, at + len(needle)), "normalised")

    def _fuzzy(self, needle: str) -> Place | None:
        hay, most, figures = self.dense, int(round((1 - SIMILARITY) * len(needle), 6)), _figures(needle)
        found = []
        for a, b in _windows(needle, hay.text, most):
            found += [(edits, a + end) for edits, end in approximate(needle, hay.text[a:b], most)]
        for edits, end in sorted(found)[:20]:
            start = _start(needle, hay.text, edits, end)
            alike = _figures(hay.text[start:end]) == figures
            if start < end and alike and _whole(hay.text, start, end):
                return Place(self._span(hay, start, end), "fuzzy", 1 - edits / len(needle))
        return None

    @staticmethod
    def _span(folded: Folded, start: int, end: int) -> Span:
        return folded.at[start], folded.at[end - 1] + 1


def find_quote(quote: str, text: str, within: Span | None = None) -> Place | None:
    """See ``QuoteFinder.find``."""
    return QuoteFinder(text).find(quote, within)


# --- from characters to tokens and steps -------------------------------------------------------------------------


def step_of(trace: Trace, span: Span) -> int | None:
    """Index of the step in which the span begins; None outside the thinking."""
    i = bisect_right([s.char_start for s in trace.steps], span[0]) - 1
    return i if i >= 0 and span[0] < trace.steps[i].char_end else None


def token_span(offsets: Sequence[int], span: Span) -> Span:
    """Response tokens that hold any character of ``span``.

    ``offsets``: the ``T + 1`` character boundaries of the tokens (``Separators.offsets``).
    """
    start = bisect_right(offsets, span[0]) - 1
    end = bisect_right(offsets, span[1] - 1)
    return max(0, start), min(len(offsets) - 1, max(end, start + 1))


def step_tokens(trace: Trace, span: Span) -> Span | None:
    """Response tokens of every step that ``span`` touches, where the tokens' own boundaries are not at hand."""
    touched = [s for s in trace.steps if s.char_start < span[1] and span[0] < s.char_end]
    return (touched[0].token_start, touched[-1].token_end) if touched else None
