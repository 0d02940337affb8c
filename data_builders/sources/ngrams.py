"""Hashes of word windows, and a sorted table of them: 12 bytes an entry instead of a hundred in a dict.

Legend: ``W`` words of a text, ``n`` words of a window. A window's hash is a polynomial in its words' 64-bit hashes
(mod 2^64), mixed at the end; all ``W - n + 1`` windows of a text cost a few vector operations. Hashes are the same in
every process and on every machine. Two different windows of the 10^6 of a large index and the 10^8 of a large corpus
meet by chance with a probability below 10^-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
_BASE = 0x9E3779B97F4A7C15 | 1
_INVERSE = pow(_BASE, -1, 1 << 64)


def text_hash(text: str) -> int:
    """64-bit hash of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


_word_hash = lru_cache(maxsize=1 << 16)(text_hash)


def word_hashes(words: Sequence[str]) -> Hashes:
    """[W] hash of each word."""
    return np.fromiter((_word_hash(w) for w in words), np.uint64, len(words))


class _Powers:
    """Powers of a number mod 2^64, grown when a longer text comes."""

    def __init__(self, base: int):
        self.base, self.values = base, np.ones(1, np.uint64)

    def first(self, n: int) -> Hashes:
        if n > len(self.values):
            factors = np.full(max(n, 2 * len(self.values)), self.base, np.uint64)
            factors[0] = 1
            self.values = np.cumprod(factors)
        return self.values[:n]


_UP, _DOWN = _Powers(_BASE), _Powers(_INVERSE)


def _mix(h: Hashes) -> Hashes:
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


class Windows:
    """All windows of one text. ``Windows(word_hashes(words)).of(13)`` is [W - 12] hashes (empty if W < 13)."""

    def __init__(self, hashes: Hashes):
        # sum of w_i / base^i up to each word: a window is a difference, times base^start
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * _DOWN.first(len(hashes)))])

    def of(self, n: int) -> Hashes:
        """[W - n + 1] hashes of the windows of ``n`` words."""
        count = len(self._sums) - n
        if count <= 0:
            return np.zeros(0, np.uint64)
        return _mix((self._sums[n:] - self._sums[:-n]) * _UP.first(count))


class Table:
    """Sorted hashes [E] and the item each belongs to [E]. Of equal hashes the first item stays."""

    def __init__(self, hashes: Hashes, items: npt.NDArray[np.int32]):
        order = np.argsort(hashes, kind="stable")
        hashes, items = hashes[order], items[order]
        first = np.ones(len(hashes), bool)
        first[1:] = hashes[1:] != hashes[:-1]
        self.hashes, self.items = hashes[first], items[first]

    def __len__(self) -> int:
        return len(self.hashes)

    def find(self, queries: Hashes) -> npt.NDArray[np.intp]:
        """[Q] entry of each query, -1 where there is none."""
        if not len(self.hashes) or not len(queries):
            return np.full(len(queries), -1, np.intp)
        at = np.minimum(np.searchsorted(self.hashes, queries), len(self.hashes) - 1)
        return np.where(self.hashes[at] == queries, at, -1)
