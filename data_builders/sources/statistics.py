"""Counts of an import that need the memory of a few numbers, however many rows pass, and survive a resume as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PER_OCTAVE = 16  # buckets per doubling: a percentile is right to within 4.5 %


def _bucket(value: int) -> int:
    """Small values have a bucket each; larger ones share one with their neighbours."""
    if value < _PER_OCTAVE:
        return value
    octave = value.bit_length() - _PER_OCTAVE.bit_length()
    return _PER_OCTAVE * octave + (value >> octave)


def _middle(bucket: int) -> float:
    """The middle of a bucket's values."""
    if bucket < _PER_OCTAVE:
        return float(bucket)
    octave = (bucket - _PER_OCTAVE) // _PER_OCTAVE
    low = (bucket - _PER_OCTAVE * octave) << octave
    return low + ((1 << octave) - 1) / 2


class Spread:
    """Mean, extremes and percentiles of whole numbers >= 0, without keeping them."""

    def __init__(self, state: dict[str, Any] | None = None):
        state = state or {"n": 0, "sum": 0, "min": None, "max": None, "buckets": {}}
        self.n, self.sum, self.min, self.max = state["n"], state["sum"], state["min"], state["max"]
        self.buckets: dict[int, int] = {int(k): v for k, v in state["buckets"].items()}

    def add(self, values: Sequence[int]) -> None:
        """Count values."""
        for value in values:
            bucket = _bucket(value)
            self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        if values:
            self.n, self.sum = self.n + len(values), self.sum + sum(values)
            self.min = min(values) if self.min is None else min(self.min, *values)
            self.max = max(values) if self.max is None else max(self.max, *values)

    def state(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {"n": self.n, "sum": self.sum, "min": self.min, "max": self.max, "buckets": self.buckets}

    def percentile(self, p: float) -> float | None:
        """The value below which a share ``p`` lies, to the precision of a bucket."""
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= p * self.n:
                return min(max(_middle(bucket), self.min), self.max)
        return None

    def summary(self) -> dict[str, Any]:
        """For summary.json; {} without values."""
        if not self.n:
            return {}
        shares = {f"p{round(100 * p)}": round(self.percentile(p) or 0) for p in (0.5, 0.9, 0.99)}
        return {"mean": round(self.sum / self.n, 1), "min": self.min, **shares, "max": self.max, "sum": self.sum}
