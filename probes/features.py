"""Feature sets: plain values that turn a recorded series into the input of a probe.

Legend: ``T`` rows (response tokens), ``C`` channels, ``D`` hidden size, ``d`` features.

A decision falls at a separator. ``bounds = [b_0, end of step 0, …, end of the step just closed]``; ``b_0`` is 0, or
where observation began again after a trigger. The **window** of intra and inter is what remains after the separator
popped the oldest step (core.md §1.6.1): the last ``k - 1`` finished steps, ``bounds[-k] … bounds[-1]``, or all
there are while there are fewer. Instance has two kinds: the paper's is read once, at the K-th separator, over
``bounds[0] … bounds[K]``; an **exit** (``exit_from`` K > 0) is read at every separator from the K-th on, over the same
trailing window as intra.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.probes.spectrum import BACKEND, MIN_LENGTH, SPECTRAL, grid_of, spectral_features
from neureasoner.sites import Site

LEVELS = ("intra", "inter", "instance")
PARTS = ("spectral", "magnitude", "entropy", "residual", "trend", "duration", "length")
MIN_TOKENS = 16  # before the first decision (core.md §1.5)
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
TREND = (
    "state_cosine_previous",
    "state_cosine_nearest",
    "mean_cosine_previous",
    "mean_cosine_nearest",
    "norm_ratio",
    "entropy_slope",
    "surprisal_slope",
)
SLOPE_STEPS = 4  # over which the slopes of a trend are fitted
LENGTH = ("tokens", "steps", "step_tokens", "log_tokens", "log_steps", "log_step_tokens")


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


def magnitude_features(x: np.ndarray, start: int, bounds: Sequence[int]) -> np.ndarray:
    """``x [T, C]`` -> ``[3 C]``: means of ``|x|`` over the window and over the last step, and its largest value.

    What the channels say without a spectrum: a control of it, and a feature.
    """
    size = np.abs(np.asarray(x[start : bounds[-1]], dtype=np.float64))
    return np.concatenate([size.mean(axis=0), size[bounds[-2] - bounds[-1] :].mean(axis=0), size.max(axis=0)])


def residual_features(residual: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """``residual [T, D]`` -> ``[2 D]``: the vector at the separator, and the mean over the step it closed."""
    step = np.asarray(residual[bounds[-2] : bounds[-1]], dtype=np.float64)
    return np.concatenate([step[-1], step.mean(axis=0)])


def trend_features(residual: np.ndarray, logits: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """``residual [T, D]``, ``logits [T, 2]`` -> ``[D + 7]``: how the state moves from step to step.

    The change of the state between the last two separators, then the numbers named by ``TREND``: cosines of the newest
    state (at the separator, and the step's mean) with the previous one and with the nearest of those before it, which a
    model in a loop revisits; the log ratio of norms; slopes of step means over the last 4 steps. Zeros where there are
    too few steps.
    """
    first = bounds[0]
    rows = np.asarray(residual[first : bounds[-1]], dtype=np.float64)
    starts, ends = np.array(bounds[:-1]) - first, np.array(bounds[1:]) - first
    sizes = (ends - starts)[:, None]
    states, means = rows[ends - 1], np.add.reduceat(rows, starts, axis=0) / sizes
    out = np.zeros(len(TREND))
    if len(states) < 2:
        return np.concatenate([np.zeros(rows.shape[1]), out])
    norms = np.linalg.norm(states, axis=1)
    for at, group in enumerate((states, means)):
        length = np.maximum(np.linalg.norm(group, axis=1), 1e-12)
        cosines = (group[:-1] @ group[-1]) / (length[:-1] * length[-1])
        out[2 * at] = cosines[-1]
        out[2 * at + 1] = cosines[:-1].max(initial=-1.0) if len(cosines) > 1 else 0.0
    out[4] = np.log(max(norms[-1], 1e-12) / max(norms[-2], 1e-12))
    values = np.asarray(logits[first : bounds[-1]], dtype=np.float64)
    steps = (np.add.reduceat(values, starts, axis=0) / sizes)[-SLOPE_STEPS:]
    t = np.arange(len(steps)) - (len(steps) - 1) / 2
    out[5:] = t @ steps / (t @ t)
    return np.concatenate([states[-1] - states[-2], out])


def length_features(bounds: Sequence[int]) -> np.ndarray:
    """``[6]``: token position, finished steps, length of the last one, and their logarithms. A control."""
    values = np.array([bounds[-1] - bounds[0], len(bounds) - 1, bounds[-1] - bounds[-2]], dtype=np.float64)
    return np.concatenate([values, np.log1p(values)])


@dataclass(frozen=True)
class FeatureSet:
    """What a probe sees: which parts, over which window, read from which sites. Serialised into ``probe.json``.

    channels  sites of the spectral and magnitude parts, one or several divided by blanks
    residual  residual sites of the residual and trend parts, likewise (a trend is of the first)
    backend   which spectral numbers: ``exact-rfft`` or ``algorithm-2/<grid>/<K>`` (``probes/spectrum.py``)
    exit_from instance read at every separator from this many closed steps on; 0: the paper's kind, read once. The rule
              counts the steps (``min_steps``): after a trigger the bounds here begin anew
    """

    name: str
    level: str
    parts: tuple[str, ...]
    window: int
    channels: str = ""
    residual: str = ""
    backend: str = BACKEND
    exit_from: int = 0

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"feature set: level '{self.level}' is unknown; use one of {', '.join(LEVELS)}")
        wrong = [p for p in self.parts if p not in PARTS]
        if wrong or not self.parts or len(set(self.parts)) != len(self.parts):
            raise UserError(f"feature set '{self.name}': join different parts out of {', '.join(PARTS)} with '+'")
        if self.exit_from < 0 or (self.exit_from and self.level != "instance"):
            raise UserError(f"feature set '{self.name}': exit_from {self.exit_from} belongs to instance, from 1 on")
        least = 1 if self.once else 2
        if self.window < least:
            raise UserError(f"feature set '{self.name}': window {self.window} is below {least} for {self.level}")
        if {"spectral", "magnitude"} & set(self.parts) and any(
            Site.parse(c).indices is None for c in self.channels.split() or ["?"]
        ):
            raise UserError(f"feature set '{self.name}': channels '{self.channels}' must list neurons or heads")
        states = self.residual.split() or ["?"]
        if {"residual", "trend"} & set(self.parts) and any(Site.parse(r).kind != "residual" for r in states):
            raise UserError(f"feature set '{self.name}': residual '{self.residual}' must be a residual site")
        grid = grid_of(self.backend)
        if grid is not None and self.level not in grid.levels:
            raise UserError(
                f"feature set '{self.name}': {self.backend} has no features of level '{self.level}'; "
                f"it has {', '.join(grid.levels)}"
            )

    @classmethod
    def named(
        cls,
        name: str,
        level: str,
        window: int,
        channels: str = "",
        residual: str = "",
        backend: str = BACKEND,
        exit_from: int = 0,
    ) -> FeatureSet:
        """Parse ``'entropy+residual'``. Sites and back end of parts that are not in it are left out."""
        parts = tuple(p.strip() for p in name.split("+"))
        return cls(
            "+".join(parts),
            level,
            parts,
            window,
            channels if {"spectral", "magnitude"} & set(parts) else "",
            residual if {"residual", "trend"} & set(parts) else "",
            backend if "spectral" in parts else BACKEND,
            exit_from,
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

    @property
    def once(self) -> bool:
        """Whether it is read at one separator alone: the paper's instance kind."""
        return self.level == "instance" and not self.exit_from

    def sites(self) -> list[str]:
        """Site strings that have to be recorded, each once, in the order of the parts."""
        states = self.residual.split()
        of = {
            "spectral": self.channels.split(),
            "entropy": ["logits"],
            "residual": states,
            "trend": [*states, "logits"],
        }
        return list(dict.fromkeys(s for p in self.parts for s in of.get(p, [])))

    def dim(self, hidden_size: int) -> int:
        """Number of features ``d``."""
        n = sum(len(Site.parse(c).indices or ()) for c in self.channels.split())
        of = {
            "spectral": n * len(SPECTRAL[self.level]),
            "magnitude": 3 * n,
            "entropy": len(ENTROPY),
            "residual": 2 * hidden_size * len(self.residual.split()),
            "trend": hidden_size + len(TREND),
            "duration": 1,
            "length": len(LENGTH),
        }
        return sum(of[p] for p in self.parts)

    def start(self, bounds: Sequence[int]) -> int:
        """First row of the window at the separator ``bounds[-1]``."""
        return bounds[0] if self.once else bounds[max(0, len(bounds) - self.window)]

    def compute(self, series: dict[str, np.ndarray], bounds: Sequence[int]) -> tuple[np.ndarray, bool]:
        """Features ``[d]`` (float64) at the separator ``bounds[-1]``, and whether they may be decided upon.

        Rows of ``series`` (``[T, C]`` by site) beyond ``bounds[-1]`` are ignored. Not valid: fewer than 16 tokens so
        far, a window of fewer than 4 tokens (spectral), the paper's instance kind anywhere but at the K-th separator;
        then zeros where nothing can be computed. Raises ValueError if a series is shorter than the bounds say.
        """
        if len(bounds) < 2 or any(b <= a for a, b in pairwise(bounds)):
            raise ValueError(f"bounds must rise and hold at least one finished step, got {list(bounds)}")
        for site in self.sites():
            if series[site].shape[0] < bounds[-1]:
                raise ValueError(f"series '{site}' has {series[site].shape[0]} rows, bounds reach {bounds[-1]}")
        start, end = self.start(bounds), bounds[-1]
        valid = end - bounds[0] >= MIN_TOKENS and (not self.once or len(bounds) - 1 == self.window)
        if "spectral" in self.parts:
            valid = valid and end - start >= MIN_LENGTH
        states = [series[r] for r in self.residual.split()]
        part: dict[str, Callable[[], Sequence[np.ndarray]]] = {
            "spectral": lambda: [
                spectral_features(series[c][start:end], self.level, self.backend)[0] for c in self.channels.split()
            ],
            "magnitude": lambda: [magnitude_features(series[c], start, bounds) for c in self.channels.split()],
            "entropy": lambda: [entropy_features(series["logits"], bounds, start)],
            "residual": lambda: [residual_features(s, bounds) for s in states],
            "trend": lambda: [trend_features(states[0], series["logits"], bounds)],
            "duration": lambda: [np.log1p([float(end - start)])],
            "length": lambda: [length_features(bounds)],
        }
        return np.concatenate([x for p in self.parts for x in part[p]()]), bool(valid)
