"""Spectral numbers of a window of activations, as pure functions (core.md §1.5, §1.6.2).

Legend: ``T`` tokens, ``C`` channels, ``F`` bins of the real FFT, ``K`` fixed frequencies, ``d`` features of a level.

Two back ends, two different feature sets (§1.6.3, fact 1): ``exact-rfft`` looks at the window's own DFT bins,
Algorithm 2 at K fixed frequencies, named ``algorithm-2/<grid>/<K>``. A probe fitted on one is wrong on the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from neureasoner.errors import UserError

BACKEND = "exact-rfft"
STREAMING = "algorithm-2"
GRIDS = ("uniform", "log")
LOG_PERIOD = 4096  # tokens after which the phases of the log grid repeat
LONGEST = 512  # tokens: the longest period the log grid looks for; loops of paragraphs take 50 to 200 (§1.6.3, fact 3)
EPS = 1e-12  # of sum x^2 in the ratios, absolute in the energy
FLOOR = -20.0  # of the energy: log of next to nothing is an outlier, not a feature
MIN_LENGTH = 4  # tokens; below it there is no spectrum (core.md §1.5)
SPECTRAL = {"intra": ("r_hf", "entropy", "energy"), "inter": ("r_dom", "entropy"), "instance": ("r_lf", "entropy")}


@dataclass(frozen=True)
class Grid:
    """K fixed frequencies ``w_k = 2 pi turns_k / period``, ascending, none of them 0 (§1.6.3, fact 4).

    "uniform": ``w_k = pi k / K``, the only one ``intra`` may read: its upper half means ``w > pi / 2``.
    "log": evenly spaced in their logarithm from ``2 pi / 512`` to ``pi``, which sees loops of whole paragraphs that
    fall below the lowest uniform frequency; for ``inter``.
    """

    name: str
    turns: tuple[int, ...]
    period: int

    @classmethod
    def of(cls, name: str, frequencies: int) -> Grid:
        """Raises UserError for an unknown grid, for K < 2 (the entropy is divided by log K), and for too large a K."""
        if name not in GRIDS:
            raise UserError(f"streaming spectra: grid '{name}' is unknown; use one of {', '.join(GRIDS)}")
        if frequencies < 2:
            raise UserError(f"streaming spectra: {frequencies} frequencies are too few; use 2 or more, 16 by default")
        if name == "uniform":
            return cls(name, tuple(range(1, frequencies + 1)), 2 * frequencies)
        turns = np.unique(np.rint(np.geomspace(LOG_PERIOD // LONGEST, LOG_PERIOD // 2, frequencies)).astype(np.int64))
        if len(turns) < frequencies:
            raise UserError(f"streaming spectra: a log grid has no {frequencies} different frequencies; use 40")
        return cls(name, tuple(turns.tolist()), LOG_PERIOD)

    @property
    def backend(self) -> str:
        """``algorithm-2/<grid>/<K>``."""
        return f"{STREAMING}/{self.name}/{len(self.turns)}"

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels whose features the grid gives."""
        return ("intra", "inter") if self.name == "uniform" else ("inter",)

    @property
    def omega(self) -> np.ndarray:
        """The frequencies in radians per token, ``[K]``."""
        return 2 * np.pi * np.array(self.turns) / self.period

    @property
    def phases(self) -> np.ndarray:
        """``q_k^i = e^(-i w_k i)`` for ``i = 0 … period - 1``, complex128 ``[M, K]``."""
        angle = np.arange(self.period)[:, None] * np.array(self.turns) % self.period
        return np.exp(-2j * np.pi * angle / self.period)


@cache
def grid_of(backend: str) -> Grid | None:
    """The grid a back end's name tells, None for the exact FFT. Raises UserError for an unknown name."""
    if backend == BACKEND:
        return None
    kind, _, rest = backend.partition("/")
    name, _, k = rest.partition("/")
    if kind != STREAMING or not k.isdigit():
        raise UserError(
            f"spectral back end '{backend}' is unknown; use '{BACKEND}' or, for instance, '{STREAMING}/uniform/16'"
        )
    return Grid.of(name, int(k))


@cache
def _phases(backend: str) -> np.ndarray:
    grid = grid_of(backend)
    assert grid is not None
    return grid.phases


def spectrum(x: np.ndarray) -> dict[str, np.ndarray]:
    """Spectral numbers of ``|x|`` along the last axis (core.md §1.5). ``x [C, T]`` -> five arrays ``[C]``.

    ``r_hf``, ``r_lf``, ``r_dom``, ``entropy`` (of the normalised power) and ``energy``. Zeros where T < 4 (too short to
    have a spectrum) and, but for the energy, for constant series.
    """
    x = np.abs(np.ascontiguousarray(x, dtype=np.float64))  # one memory layout: the same bits from any buffer
    c, t = x.shape
    if t < MIN_LENGTH:
        return {k: np.zeros(c) for k in ("r_hf", "r_lf", "r_dom", "entropy", "energy")}
    power = np.abs(np.fft.rfft(x - x.mean(axis=1, keepdims=True), axis=1)) ** 2
    bins = power.shape[1]  # F; power[:, 0] is DC
    power[:, 0] = 0.0
    total = power.sum(axis=1)
    share, entropy = _shares(power, total + EPS * np.square(x).sum(axis=1), 1)
    return {
        "r_hf": share[:, bins // 2 :].sum(axis=1),
        "r_lf": share[:, 1 : bins // 2].sum(axis=1),
        "r_dom": share.max(axis=1),
        "entropy": entropy / np.log(bins - 1),
        "energy": np.maximum(np.log(total + EPS), FLOOR),
    }


def _shares(power: np.ndarray, floor: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised power, and its entropy in nats along ``axis``; zeros where there is no power."""
    share = power / np.expand_dims(np.where(floor > 0, floor, 1.0), axis)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return share, -(share * logs).sum(axis=axis)


def fixed_numbers(power: np.ndarray, squares: np.ndarray, energy: np.ndarray) -> dict[str, np.ndarray]:
    """Algorithm 2's numbers from the power at K frequencies (core.md §1.6.2). ``power [..., K, C]``, rest ``[..., C]``.

    squares  ``sum y^2``, for the relative epsilon
    energy   ``E``, the sum of squared deviations
    """
    k = power.shape[-2]
    share, entropy = _shares(power, power.sum(axis=-2) + EPS * squares, -2)
    return {
        "r_hf": share[..., k // 2 :, :].sum(axis=-2),
        "r_dom": share.max(axis=-2),
        "entropy": entropy / np.log(k),
        "energy": np.maximum(np.log(energy + EPS), FLOOR),
    }


def fixed_spectrum(x: np.ndarray, backend: str) -> dict[str, np.ndarray]:
    """Algorithm 2's numbers of a window evaluated directly: ``x [C, T]`` -> four arrays ``[C]``; zeros where T < 4.

    Equal to what ``StreamingWindow`` keeps up to date, whatever the window's place in the response: the place turns all
    sums by one phase, which their power does not see.
    """
    y = np.abs(np.ascontiguousarray(np.asarray(x).T, dtype=np.float64))  # [T, C]
    t, c = y.shape
    if t < MIN_LENGTH:
        return {k: np.zeros(c) for k in ("r_hf", "r_dom", "entropy", "energy")}
    phases = _phases(backend)
    centred = y - y.mean(axis=0)
    s = phases[np.arange(t) % len(phases)].T @ centred  # [K, C]
    return fixed_numbers(s.real**2 + s.imag**2, np.square(y).sum(axis=0), np.square(centred).sum(axis=0))


def spectral_features(x: np.ndarray, level: str, backend: str = BACKEND) -> tuple[np.ndarray, bool]:
    """``x [T, C]`` -> (features ``[C * d]``, channel by channel in the order given; valid: T >= 4)."""
    x = np.asarray(x)
    values = spectrum(x.T) if backend == BACKEND else fixed_spectrum(x.T, backend)
    return np.stack([values[name] for name in SPECTRAL[level]], axis=1).ravel(), x.shape[0] >= MIN_LENGTH
