"""Spectra of a sliding window, kept while a response is being written (core.md §1.6).

Legend: ``B`` rows, ``N`` channels, ``L`` tokens in a row's window (each row has its own), ``R`` slots of the ring,
``K`` frequencies, ``M`` tokens after which the phases of all frequencies repeat, ``d`` features of a level.

Two back ends behind one interface, ``push(y)``, ``pop(n)``, ``features(level)``:

- ``FFTWindow``, the default: on read-out the features of core.md §1.5, bit for bit those of ``spectral_features``.
- ``StreamingWindow``: the paper's Algorithm 2 (core.md §1.6.2), sums at fixed frequencies that follow the window.

They are two feature sets, not two ways to one (§1.6.3, fact 1): a probe fitted on one is wrong on the other. ``spec``
says what a window computes; ``check_spec`` refuses a probe what it was not fitted on.

The caller knows the steps: at a separator it pops the tokens of the oldest one (§1.6.1) and reads. All is NumPy on the
host: the features have to equal those of the NumPy code a probe is fitted with, and for one token of a few hundred
channels the cost is that of the calls, which are cheaper than PyTorch's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.probes.features import FeatureSet
from neureasoner.probes.spectrum import (
    BACKEND,
    EPS,
    MIN_LENGTH,
    SPECTRAL,
    STREAMING,
    Grid,
    fixed_numbers,
    grid_of,
    spectrum,
)
from neureasoner.sites import Site

LARGEST = 1e150  # of |y|: its square still is a float64
BLOCK = 64  # tokens added to the sums in one matrix product
CHUNK = 1 << 14  # values of several rows transformed at once; larger temporaries cost more than calls
REFRESH = 512  # tokens in and out of a window before its sums are made anew (§1.6.3, fact 6)
SPREAD = 1e4  # the sums are made anew when V was once this much larger than E is now


def check_spec(expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Refuse features other than those a probe was fitted on. Both are ``spec`` mappings, or supersets of one.

    Raises UserError naming the first key that differs, in the order of ``expected``, then keys only ``got`` has.
    """
    for key in [*expected, *(k for k in got if k not in expected)]:
        if key not in expected or key not in got or expected[key] != got[key]:
            want, have = (repr(m[key]) if key in m else "absent" for m in (expected, got))
            raise UserError(
                f"spectral features: {key} is {have}, the probe was fitted with {want}; "
                "read the features the probe was fitted on, or fit it again"
            )


def window_for(features: FeatureSet, rows: int) -> SlidingWindow:
    """The window whose ``features(level)`` are the spectral part of a feature set.

    Raises UserError for a feature set without a spectral part.
    """
    if "spectral" not in features.parts:
        raise UserError(f"feature set '{features.name}' has no spectral part, so there is no window to keep for it")
    channels = sum(len(Site.parse(c).indices or ()) for c in features.channels.split())
    grid = grid_of(features.backend)
    if grid is None:
        return FFTWindow(rows, channels, window=features.window)
    return StreamingWindow(rows, channels, window=features.window, grid=grid.name, frequencies=len(grid.turns))


class SlidingWindow(ABC):
    """The activations of the tokens in the window, a ring per row; what is made of them is up to the back end.

    rows      B
    channels  N
    window    steps the caller keeps (``FeatureSet.window``); part of the identity, nothing here depends on it
    capacity  tokens a row has room for at first, rounded up to a power of two; doubled whenever a row is full

    ``start``, ``end`` [B]: the window of row b holds its tokens ``start[b] <= i < end[b]``, counted over all pushed.
    Memory: ``8 B R N`` bytes, where R follows the longest window there has been.
    """

    backend: str
    levels: tuple[str, ...]

    def __init__(self, rows: int, channels: int, *, window: int = 4, capacity: int = 256):
        if min(rows, channels, window, capacity) < 1:
            raise ValueError(f"rows, channels, window and capacity must be positive, got {(rows, channels, window)}")
        self.rows, self.channels, self.window = rows, channels, window
        self.start, self.end = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self._ring = np.zeros((rows, 1 << (capacity - 1).bit_length(), channels))  # [B, R, N]
        self._all = np.arange(rows)
        self._room = self._ring.shape[1]  # tokens that surely fit without a look at every row

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row's window, ``[B]``. ``pop(lengths)`` empties all rows."""
        return self.end - self.start

    def push(self, y: np.ndarray, active: np.ndarray | None = None) -> None:
        """Add one token to every row, or to the rows where ``active`` bool ``[B]`` is true.

        ``y [B, N]``: activations, signed or not (the features are of ``|y|``); what it holds for other rows is ignored.
        Raises UserError for NaN, infinite or absurdly large values and ValueError for a wrong shape; then no row has
        changed.
        """
        y = np.abs(np.asarray(y, dtype=np.float64))
        if y.shape != (self.rows, self.channels):
            raise ValueError(f"expected activations [{self.rows}, {self.channels}], got {list(y.shape)}")
        rows = self._all
        if active is not None:
            rows = np.flatnonzero(active)
            y = y[rows]
            if not len(rows):
                return
        if not y.max() <= LARGEST:  # false for NaN too
            row, channel = np.argwhere(~(y <= LARGEST))[0]
            raise UserError(
                f"the activation of channel {channel} in row {rows[row]} is {y[row, channel]}, which has no spectrum; "
                "load the model in bfloat16 or float32"
            )
        if not self._room:
            self._room = self._ring.shape[1] - int(self.lengths.max())
            if not self._room:
                self._grow()
        self._room -= 1
        self._ring[rows, self.end[rows] % self._ring.shape[1]] = y
        self.end[rows] += 1

    def pop(self, n: int | np.ndarray) -> None:
        """Drop the ``n`` oldest tokens of every row; ``n [B]`` gives each row its own number.

        Raises ValueError for a negative number or more tokens than a row has; then no row has changed.
        """
        self.start += self._counts(n)

    def features(self, level: str, rows: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(features ``[r, N * d]`` float64, channel by channel as in ``spectral_features``; valid bool ``[r]``).

        ``rows``: the ones to read, in the order wanted; all by default. Windows of fewer than 4 tokens are not valid
        and give zeros. (That a decision waits for 16 tokens is the business of the feature set, core.md §1.5.)
        Raises UserError for a level this back end has no features for.
        """
        self._check(level)
        index = self._all if rows is None else np.asarray(rows, dtype=np.int64)
        valid = self.lengths[index] >= MIN_LENGTH
        names = SPECTRAL[level]
        out = np.zeros((len(index), self.channels, len(names)))
        if valid.any():
            values = self._spectra(index[valid])
            out[valid] = np.stack([values[name] for name in names], axis=2)
        return out.reshape(len(index), -1), valid

    def spec(self, level: str) -> dict[str, Any]:
        """What ``features(level)`` computes, as plain JSON values, for ``check_spec``. Raises UserError as it does."""
        self._check(level)
        return {"backend": self.backend, **self._grid(), "window": self.window, "level": level, "epsilon": EPS}

    def _check(self, level: str) -> None:
        if level not in self.levels:
            raise UserError(f"{self.backend} has no features of level '{level}'; it has {', '.join(self.levels)}")

    def _counts(self, n: int | np.ndarray) -> np.ndarray:
        """The argument of ``pop``, checked, ``[B]``."""
        counts = np.broadcast_to(np.asarray(n), (self.rows,))
        if counts.dtype.kind not in "iu" or (counts < 0).any() or (counts > self.lengths).any():
            raise ValueError(f"cannot pop {counts.tolist()} tokens from windows of {self.lengths.tolist()}")
        return counts

    def _grow(self) -> None:
        old, slots = self._ring, self._ring.shape[1]
        self._ring = np.zeros((self.rows, 2 * slots, self.channels))
        at = self.start[:, None] + np.arange(slots)  # [B, R]: all slots are taken in one row, in others some are stale
        self._ring[self._all[:, None], at % (2 * slots)] = old[self._all[:, None], at % slots]
        self._room = slots

    def _read(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """``|y|`` of the given tokens. rows [r], tokens [r, t] -> [r, t, N]."""
        return self._ring[rows[:, None], tokens % self._ring.shape[1]]

    @abstractmethod
    def _grid(self) -> dict[str, Any]:
        """The part of ``spec`` that tells the frequencies."""

    @abstractmethod
    def _spectra(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Spectral numbers by name, each ``[r, N]``, of rows ``[r]`` with at least 4 tokens."""


class FFTWindow(SlidingWindow):
    """The exact features of the window (core.md §1.5): one real FFT per channel on read-out, none in between.

    Rows whose windows are equally long are transformed together; the numbers are the same bits as one by one.
    """

    backend = BACKEND
    levels = tuple(SPECTRAL)

    def _grid(self) -> dict[str, Any]:
        return {"grid": "dft"}

    def _spectra(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        lengths = self.lengths[rows]
        out: dict[str, np.ndarray] = {}
        for t in np.unique(lengths):
            same = np.flatnonzero(lengths == t)
            for group in np.array_split(same, -(-len(same) * int(t) * self.channels // CHUNK)):
                if not len(group):
                    continue
                x = self._read(rows[group], self.start[rows[group], None] + np.arange(t))  # [g, t, N]
                for name, value in spectrum(x.transpose(0, 2, 1).reshape(-1, t)).items():
                    out.setdefault(name, np.empty((len(rows), self.channels)))[group] = value.reshape(len(group), -1)
        return out


class StreamingWindow(SlidingWindow):
    """The paper's Algorithm 2 (core.md §1.6.2): power at K fixed frequencies, from sums that follow the window.

    grid, frequencies  the name of a ``Grid`` and its K; raises UserError as ``Grid.of`` does

    Four things differ from the formulas as printed, none in what they compute (§1.6.3, facts 6 and 7):

    - All ``w_k`` are multiples of ``2 pi / M``, so ``q_k^i`` comes from a table by ``i mod M``: a token leaves with the
      very phase it came with, and nothing drifts.
    - Tokens enter the sums in blocks, at a read-out, a pop, or every 64: the same products, as one matrix product.
    - The sums are of ``z = |y| - c``, where ``c`` is one value of the channel, 0 at first. The mean is taken off on
      read-out anyway, so ``c`` changes nothing but that ``V - U^2 / L`` no longer cancels.
    - A read-out first makes the sums anew from the ring if 512 tokens (or L, if more) came or went since that was last
      done, or if V was once 10^4 times what E is now, for the rounding errors of then are still in there.

    So features equal direct evaluation to 1e-9, but for a series of which the grid sees next to nothing (less than
    10^-10 of the power it could): there S is a difference of equal numbers, whichever way it is computed.

    Epsilon is relative to ``sum y^2`` in the ratios and absolute in the energy, as in ``probes/spectrum.py``.
    A push costs O(N), the rest O(N K) per token that came or went, whatever L is.
    """

    backend = STREAMING

    def __init__(
        self,
        rows: int,
        channels: int,
        *,
        window: int = 4,
        capacity: int = 256,
        grid: str = "uniform",
        frequencies: int = 16,
    ):
        super().__init__(rows, channels, window=window, capacity=capacity)
        self.grid = Grid.of(grid, frequencies)
        self.levels = self.grid.levels
        self._phase = self.grid.phases  # q_k^i at [i mod M, k]
        self._eta = 1.0 / (1.0 - self._phase[1])
        ones = np.ones((self.grid.period, 1))
        self._weights = np.concatenate([self._phase.real, self._phase.imag, ones], 1)  # [M, 2 K + 1]
        self._sums = np.zeros((rows, 2 * frequencies + 1, channels))  # Re A, Im A, U
        self._squares, self._peak = np.zeros((rows, channels)), np.zeros((rows, channels))  # V, its largest value
        self._shift = np.zeros((rows, channels))  # c
        self._folded = np.zeros(rows, np.int64)  # the sums are over start <= i < folded
        self._since = np.zeros(rows, np.int64)  # tokens added and taken away since the sums were made anew
        self._pending = 0

    def push(self, y: np.ndarray, active: np.ndarray | None = None) -> None:
        """As ``SlidingWindow.push``."""
        super().push(y, active)
        self._pending += 1
        if self._pending >= BLOCK:
            self._fold()

    def pop(self, n: int | np.ndarray) -> None:
        """As ``SlidingWindow.pop``."""
        n = self._counts(n)
        self._fold()
        rows = np.flatnonzero(n)
        self._peak[rows] = np.maximum(self._peak[rows], self._squares[rows])
        self._add(rows, self.start[rows], self.start[rows] + n[rows], -1.0)
        self.start += n

    def _grid(self) -> dict[str, Any]:
        return {"grid": self.grid.name, "frequencies": len(self.grid.turns)}

    def _fold(self) -> None:
        """Bring the sums up to the newest token."""
        rows = np.flatnonzero(self.end > self._folded)
        self._add(rows, self._folded[rows], self.end[rows], 1.0)
        self._folded[:] = self.end
        self._pending = 0

    def _add(self, rows: np.ndarray, first: np.ndarray, stop: np.ndarray, sign: float) -> None:
        """Add tokens ``first <= i < stop`` (each ``[r]``) of rows ``[r]`` to the sums, or take them away (sign -1)."""
        self._since[rows] += stop - first
        for at in range(0, int((stop - first).max(initial=0)), BLOCK):
            i = (first + at)[:, None] + np.arange(min(BLOCK, int((stop - first).max()) - at))  # [r, t]
            z = self._read(rows, i)
            z -= self._shift[rows, None]
            z[i >= stop[:, None]] = 0.0  # rows with fewer tokens
            weights = self._weights[i % len(self._weights)]  # [r, t, 2 K + 1]
            self._sums[rows] += sign * (weights.transpose(0, 2, 1) @ z)
            self._squares[rows] += sign * np.einsum("rtn,rtn->rn", z, z)

    def _energy(self, rows: np.ndarray) -> np.ndarray:
        """``E = V - U^2 / L`` (core.md §1.6.2), the sum of squared deviations, ``[r, N]``."""
        total = self._sums[rows, -1]
        return np.maximum(self._squares[rows] - total * total / self.lengths[rows, None], 0.0)

    def _refresh(self, rows: np.ndarray) -> None:
        """Make the sums of rows ``[r]`` anew where they are old, or small beside what has passed through them.

        ``c`` becomes the newest value: with one out of the window, V is at most about L times ``V - U^2 / L``, and a
        constant channel gives exact zeros.
        """
        largest = np.maximum(self._peak[rows], self._squares[rows])
        worn = (largest > SPREAD * self._energy(rows)).any(axis=1)
        rows = rows[worn | (self._since[rows] > np.maximum(REFRESH, self.lengths[rows]))]
        self._sums[rows] = self._squares[rows] = self._peak[rows] = 0.0
        self._shift[rows] = self._read(rows, self.end[rows, None] - 1)[:, 0]
        self._add(rows, self.start[rows], self.end[rows], 1.0)
        self._since[rows] = 0

    def _spectra(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        self._fold()
        self._refresh(np.unique(rows))
        k, period = len(self.grid.turns), len(self._phase)
        length, c, total = self.lengths[rows, None], self._shift[rows], self._sums[rows, -1]
        squares = self._squares[rows] + c * (2.0 * total + length * c)  # sum y^2, of y = z + c
        # B = sum of q^i over the window, a geometric series; S = A - mean * B
        b = self._phase[self.start[rows] % period] * (1.0 - self._phase[self.lengths[rows] % period]) * self._eta
        mean = (total / length)[:, None]
        s = self._sums[rows, :-1] - np.concatenate([b.real, b.imag], 1)[:, :, None] * mean  # [r, 2 K, N]
        s *= s
        return fixed_numbers(s[:, :k] + s[:, k:], squares, self._energy(rows))
