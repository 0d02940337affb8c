"""Feature sets: plain values that turn a recorded series into the input of a probe.

Legend: ``T`` rows (response tokens), ``C`` channels, ``F`` bins of the real FFT, ``D`` hidden size, ``d`` features.

A decision falls at a separator. ``bounds = [b_0, end of step 0, …, end of the step just closed]``; ``b_0`` is 0, or
where observation began again after a trigger. The **window** of intra and inter is what remains after the separator
popped the oldest step (core.md §1.6.1): the last ``k - 1`` finished steps, ``bounds[-k] … bounds[-1]``, or all
there are while there are fewer. The window of instance is ``bounds[0] … bounds[K]``, read once, at the K-th separator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.sites import Site

LEVELS = ("intra", "inter", "instance")
PARTS = ("spectral", "entropy", "residual", "length")
BACKEND = "exact-rfft"
EPS = 1e-12  # of sum x^2 in the ratios, absolute in the energy
FLOOR = -20.0  # of the energy: log of next to nothing is an outlier, not a feature
MIN_TOKENS = 16  # before the first decision (core.md §1.5)
SPECTRAL = {"intra": ("r_hf", "entropy", "energy"), "inter": ("r_dom", "entropy"), "instance": ("r_lf", "entropy")}
ENTROPY = (
    "step_entropy_mean",
    "step_entropy_max",
    "step_entropy_last",
    "step_entropy_sd",
    "step_surprisal_mean",
    "step_surprisal_max",
    "step_surprisal_second",
    "step_surprisal_sum",
    "step_excess",
    "step_certain",
    "window_entropy_mean",
    "window_entropy_max",
    "window_surprisal_mean",
    "window_surprisal_max",
    "window_step_min",
    "entropy_over_earlier",
)
LENGTH = ("tokens", "steps", "step_tokens", "log_tokens", "log_steps", "log_step_tokens")


def spectrum(x: np.ndarray) -> dict[str, np.ndarray]:
    """Spectral numbers of ``|x|`` along the last axis (core.md §1.5). ``x [C, T]`` -> five arrays ``[C]``.

    ``r_hf``, ``r_lf``, ``r_dom``, ``entropy`` (of the normalised power) and ``energy``. Zeros where T < 4 (too short to
    have a spectrum) and, but for the energy, for constant series.
    """
    x = np.abs(np.ascontiguousarray(x, dtype=np.float64))  # one memory layout: the same bits from any buffer
    c, t = x.shape
    if t < 4:
        return {k: np.zeros(c) for k in ("r_hf", "r_lf", "r_dom", "entropy", "energy")}
    power = np.abs(np.fft.rfft(x - x.mean(axis=1, keepdims=True), axis=1)) ** 2
    bins = power.shape[1]  # F; power[:, 0] is DC
    power[:, 0] = 0.0
    total = power.sum(axis=1)
    floor = total + EPS * np.square(x).sum(axis=1)
    share = power / np.where(floor > 0, floor, 1.0)[:, None]
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return {
        "r_hf": share[:, bins // 2 :].sum(axis=1),
        "r_lf": share[:, 1 : bins // 2].sum(axis=1),
        "r_dom": share.max(axis=1),
        "entropy": -(share * logs).sum(axis=1) / np.log(bins - 1),
        "energy": np.maximum(np.log(total + EPS), FLOOR),
    }


def spectral_features(x: np.ndarray, level: str) -> tuple[np.ndarray, bool]:
    """``x [T, C]`` -> (features ``[C * d]``, channel by channel in the order given; valid: T >= 4)."""
    values = spectrum(np.asarray(x).T)
    return np.stack([values[name] for name in SPECTRAL[level]], axis=1).ravel(), x.shape[0] >= 4


def entropy_features(logits: np.ndarray, bounds: Sequence[int], start: int) -> np.ndarray:
    """``logits [T, 2]`` (entropy, surprisal) -> ``[16]`` named by ``ENTROPY``; nothing in it counts tokens so far."""
    first, a, b = bounds[0], bounds[-2], bounds[-1]
    rows = np.asarray(logits[first:b], dtype=np.float64)
    entropy, surprisal = rows[:, 0], rows[:, 1]
    se, ss = entropy[a - first :], surprisal[a - first :]
    we, ws = entropy[start - first :], surprisal[start - first :]
    ordered = np.sort(ss)
    edges = [x - first for x in bounds[:-1] if x >= start]
    sizes = np.diff([*edges, b - first])
    earlier = entropy[: a - first]
    return np.array(
        [
            se.mean(),
            se.max(),
            se[-1],
            se.std(),
            ss.mean(),
            ordered[-1],
            ordered[-2] if len(ordered) > 1 else 0.0,
            np.log1p(ss.sum()),
            (ss - se).mean(),
            (se < 0.05).mean(),
            we.mean(),
            we.max(),
            ws.mean(),
            ws.max(),
            (np.add.reduceat(entropy, edges) / sizes).min(),
            se.mean() - earlier.mean() if len(earlier) else 0.0,
        ]
    )


def residual_features(residual: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """``residual [T, D]`` -> ``[2 D]``: the vector at the separator, and the mean over the step it closed."""
    step = np.asarray(residual[bounds[-2] : bounds[-1]], dtype=np.float64)
    return np.concatenate([step[-1], step.mean(axis=0)])


def length_features(bounds: Sequence[int]) -> np.ndarray:
    """``[6]``: token position, finished steps, length of the last one, and their logarithms. A control."""
    values = np.array([bounds[-1] - bounds[0], len(bounds) - 1, bounds[-1] - bounds[-2]], dtype=np.float64)
    return np.concatenate([values, np.log1p(values)])


@dataclass(frozen=True)
class FeatureSet:
    """What a probe sees: which parts, over which window, read from which sites. Serialised into ``probe.json``."""

    name: str
    level: str
    parts: tuple[str, ...]
    window: int
    channels: str = ""
    residual: str = ""

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"feature set: level '{self.level}' is unknown; use one of {', '.join(LEVELS)}")
        wrong = [p for p in self.parts if p not in PARTS]
        if wrong or not self.parts or len(set(self.parts)) != len(self.parts):
            raise UserError(f"feature set '{self.name}': join different parts out of {', '.join(PARTS)} with '+'")
        least = 1 if self.level == "instance" else 2
        if self.window < least:
            raise UserError(f"feature set '{self.name}': window {self.window} is below {least} for {self.level}")
        if "spectral" in self.parts and Site.parse(self.channels or "?").indices is None:
            raise UserError(f"feature set '{self.name}': channels '{self.channels}' must list neurons or heads")
        if "residual" in self.parts and Site.parse(self.residual or "?").kind != "residual":
            raise UserError(f"feature set '{self.name}': residual '{self.residual}' must be a residual site")

    @classmethod
    def named(cls, name: str, level: str, window: int, channels: str = "", residual: str = "") -> FeatureSet:
        """Parse ``'entropy+residual'``. Sites of parts that are not in it are left out."""
        parts = tuple(p.strip() for p in name.split("+"))
        return cls(
            "+".join(parts),
            level,
            parts,
            window,
            channels if "spectral" in parts else "",
            residual if "residual" in parts else "",
        )

    @classmethod
    def from_dict(cls, value: Any) -> FeatureSet:
        """Inverse of ``to_dict``. Raises UserError."""
        try:
            return cls(**{**value, "parts": tuple(value["parts"])})
        except (KeyError, TypeError) as e:
            raise UserError(f"feature set: malformed ({e}); fit the probe again") from None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "parts": list(self.parts)}

    def sites(self) -> list[str]:
        """Site strings that have to be recorded, in the order of the parts."""
        of = {"spectral": self.channels, "entropy": "logits", "residual": self.residual, "length": ""}
        return [of[p] for p in self.parts if of[p]]

    def dim(self, hidden_size: int) -> int:
        """Number of features ``d``."""
        n = len(Site.parse(self.channels).indices or ()) if self.channels else 0
        of = {
            "spectral": n * len(SPECTRAL[self.level]),
            "entropy": len(ENTROPY),
            "residual": 2 * hidden_size,
            "length": len(LENGTH),
        }
        return sum(of[p] for p in self.parts)

    def start(self, bounds: Sequence[int]) -> int:
        """First row of the window at the separator ``bounds[-1]``."""
        return bounds[0] if self.level == "instance" else bounds[max(0, len(bounds) - self.window)]

    def compute(self, series: dict[str, np.ndarray], bounds: Sequence[int]) -> tuple[np.ndarray, bool]:
        """Features ``[d]`` (float64) at the separator ``bounds[-1]``, and whether they may be decided upon.

        Rows of ``series`` (``[T, C]`` by site) beyond ``bounds[-1]`` are ignored. Not valid: fewer than 16 tokens so
        far, a window of fewer than 4 tokens (spectral), instance anywhere but at the K-th separator; then zeros where
        nothing can be computed. Raises ValueError if a series is shorter than the bounds say.
        """
        if len(bounds) < 2 or any(b <= a for a, b in pairwise(bounds)):
            raise ValueError(f"bounds must rise and hold at least one finished step, got {list(bounds)}")
        for site in self.sites():
            if series[site].shape[0] < bounds[-1]:
                raise ValueError(f"series '{site}' has {series[site].shape[0]} rows, bounds reach {bounds[-1]}")
        start, end = self.start(bounds), bounds[-1]
        valid = end - bounds[0] >= MIN_TOKENS and (self.level != "instance" or len(bounds) - 1 == self.window)

        def spectral() -> np.ndarray:
            nonlocal valid
            x, enough = spectral_features(series[self.channels][start:end], self.level)
            valid = valid and enough
            return x

        part: dict[str, Callable[[], np.ndarray]] = {
            "spectral": spectral,
            "entropy": lambda: entropy_features(series["logits"], bounds, start),
            "residual": lambda: residual_features(series[self.residual], bounds),
            "length": lambda: length_features(bounds),
        }
        return np.concatenate([part[p]() for p in self.parts]), bool(valid)
