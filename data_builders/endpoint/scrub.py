"""Keeping the key out of everything that is written or shown."""

from __future__ import annotations

import re
from urllib.parse import quote

HIDDEN = "[key]"
SHORTEST = 8  # a shorter "key" is a placeholder such as EMPTY; taking it out of answers would damage them
_LOOKS_LIKE_A_KEY = re.compile(r"\bsk-[A-Za-z0-9_*-]{8,}|(?<=Bearer )[^\s\"',]{8,}")


class Scrubber:
    """Takes one key out of texts. ``repr`` does not show it."""

    def __init__(self, key: str = ""):
        forms = {key, quote(key, safe="")} if len(key) >= SHORTEST else set()
        self._forms = sorted(forms, key=len, reverse=True)

    def text(self, text: str) -> str:
        """``text`` without the key. Anything else is left as it is, so that an answer stays what was answered."""
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        return text

    def error(self, text: str, limit: int = 500) -> str:
        """An error text fit for one line: no key, nothing that looks like one, no line breaks, not too long."""
        text = _LOOKS_LIKE_A_KEY.sub(HIDDEN, self.text(text))
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= limit else text[:limit] + " […]"
