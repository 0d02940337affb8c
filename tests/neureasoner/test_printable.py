"""Text that nobody has read, as a terminal may see it."""

from __future__ import annotations

import unicodedata

from neureasoner.printable import safe


def test_offsets_stay() -> None:
    text = "a\x1b[31m\r\n\tb\x9b2J\u202e\u2066\x7f\ud800\U0001f9e0é"
    assert len(safe(text)) == len(text) and "\n" in safe(text) and safe(text).encode("utf-8")
    assert safe("plain \U0001f9e0 text\n") == "plain \U0001f9e0 text\n"
    assert safe("\x1b\x00\x7f\t\x9b") == "\u241b\u2400\u2421 \ufffd"


def test_no_control_character_acts() -> None:
    every = "".join(map(chr, range(0x110000)))
    seen = safe(every)
    assert len(seen) == len(every)
    assert {c for c in seen if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} == {"\n"}


def test_nothing_turns_the_text_round() -> None:
    """The standard's own list: characters whose class is an embedding, override or isolate, and the three marks."""
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    bidi = [c for c in map(chr, range(0x110000)) if unicodedata.bidirectional(c) in turns]
    assert len(bidi) == 9
    assert safe("".join(bidi) + "\u061c\u200e\u200f") == "\ufffd" * 12
    assert safe("".join(map(chr, range(0x206A, 0x2070)))) == "\ufffd" * 6, "deprecated, and still obeyed by some"
