"""Text of a model, a problem or a file as a terminal may see it. Standard library only."""

from __future__ import annotations

_GONE = "\ufffd"
# What would move the cursor, hide text or turn it round, as one character each, so that offsets stay true.
_CONTROLS = {c: chr(0x2400 + c) for c in range(32)} | {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), _GONE)
_CONTROLS |= dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x2070)], _GONE)
_CONTROLS |= {0x0A: "\n", 0x09: " "} | dict.fromkeys(range(0xD800, 0xE000), _GONE)


def safe(text: str) -> str:
    """``text`` with control characters as pictures of themselves; only line breaks act. As long as before."""
    return text.translate(_CONTROLS)
