"""What follows from a row's id alone: its shard, whether it is drawn, whether it came before."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def drawn(row_id: str, purpose: str) -> int:
    """A number that only the id and the purpose decide, uniform on 64 bits."""
    digest = blake2b(f"{purpose}\0{row_id}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def in_shard(row_id: str, index: int, count: int) -> bool:
    """Whether an id belongs to shard ``index`` (from 0) of ``count``. Every id belongs to exactly one."""
    return count == 1 or drawn(row_id, "shard") % count == index


def in_share(row_id: str, share: float, seed: int) -> bool:
    """Whether an id is among the share drawn with a seed. A larger share holds every smaller one."""
    return share >= 1 or drawn(row_id, f"share {seed}") < share * 2.0**64


class IdSet:
    """Ids met so far, by a 64-bit hash: 8 bytes each, sorted, and a small set of the latest."""

    RECENT = 1 << 16

    def __init__(self, saved: bytes = b""):
        self._sorted = np.sort(np.frombuffer(saved, "<u8"))
        self._recent: set[int] = set()

    def add(self, row_id: str) -> bytes | None:
        """Take in an id. Returns the 8 bytes to save, None if it is not new."""
        key = drawn(row_id, "id")
        if key in self._recent or self._has(key):
            return None
        self._recent.add(key)
        if len(self._recent) >= self.RECENT:
            recent = np.fromiter(self._recent, "<u8", len(self._recent))
            self._sorted, self._recent = np.sort(np.concatenate([self._sorted, recent])), set()
        return key.to_bytes(8, "little")

    def _has(self, key: int) -> bool:
        if not len(self._sorted):
            return False
        wanted = np.uint64(key)
        at = int(np.searchsorted(self._sorted, wanted))
        return at < len(self._sorted) and bool(self._sorted[at] == wanted)
