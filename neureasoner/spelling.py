"""Whether a tokenizer can spell a text: which of its characters the ids no longer hold. Imports no torch."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from typing import Any

# What every text of a reasoner is made of. Only single quotes and blanks: some normalisers merge double ones.
SAMPLE = (
    f"The quick brown fox jumps over the lazy dog.\n\nWait: {string.ascii_letters} {string.digits} "
    f"{string.punctuation}\n<think>\n<INTRA> So 6 * 7 = 42.\n</think>\n\nThe end"
)
_GAP = re.compile(r"\w\s+(?=\w)")
_UNSEEN = ("Mn", "Me", "Cc", "Cf")  # accents and invisible characters


def loses(tokenizer: Any, text: str) -> str | None:
    """The characters of ``text``, each once, that are gone from what its ids decode to; None if none is.

    Other forms of a character are no loss (upper case, NFC and NFKC, the blank before the first word or beside
    punctuation), nor are accents and invisible characters that the tokenizer's own normaliser takes out. An unknown
    token holds nothing, unless the text spells it. A blank between two words and every newline count as characters.
    """
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    if _decoded(tokenizer, ids) == text:
        return None
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        ids, text = [i for i in ids if i != unknown], text.replace(tokenizer.unk_token, "")
    spelled = _decoded(tokenizer, ids)
    asked, found = _folded(text), _folded(spelled)
    lost = _characters(asked) - _characters(found)
    normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if lost and normaliser is not None:
        removed = _characters(asked) - _characters(_folded(normaliser.normalize_str(text)))
        lost -= Counter({c: n for c, n in removed.items() if unicodedata.category(c) in _UNSEEN and c != "\n"})
    left = "".join(c for c in asked if c not in lost)  # a word that is gone takes its blanks along
    if len(_GAP.findall(left)) > len(_GAP.findall(found)):
        lost[" "] += 1
    if not lost:
        return None
    gone = dict.fromkeys(c for c in text if set(_folded(c)) & lost.keys() and text.count(c) > spelled.count(c))
    return "".join(gone) or "".join(lost)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _folded(text: str) -> str:
    """One spelling for all forms of a character: compatibility parts, without case, every blank a space."""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return re.sub(r"[^\S\n]", " ", parts)


def _characters(folded: str) -> Counter[str]:
    """How often each occurs; blanks apart, of which a tokenizer may add and take some."""
    return Counter(c for c in folded if c != " ")
