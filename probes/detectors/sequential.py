"""When a trace's scores together are an alarm: rules over the sequence of decisions (core.md §1.7.2, pitfalls).

Legend: ``n`` decisions of any number of traces, ``m`` traces at hand, ``w`` numbers of state of a trace.

A rule turns calibrated scores into a **statistic** of the same length, and an alarm is ``statistic > threshold``, so
that one threshold calibrates any rule and rules compare at an equal budget of false alarms:

    none          the score itself
    consecutive   smallest of the last m scores, so that above the threshold means m positives in a row
    ewma          s_t = alpha l_t + (1 - alpha) s_(t-1), s_1 = l_1, of the logits l
    cusum         s_t = max(0, s_(t-1) + l_t - kappa), s_0 = 0

A score of -inf is a decision that is not valid: its statistic is -inf, and the rule goes on from the last valid one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.probes.detectors.metrics import threshold_for

SETTING = {"none": "", "consecutive": "m", "ewma": "alpha", "cusum": "kappa"}
RULES = tuple(SETTING)
LEAST = 1e-12  # probability: scores of exactly 0 and 1 keep a finite logit


def _logit(score: np.ndarray) -> np.ndarray:
    p = np.clip(score, LEAST, 1 - LEAST)
    return np.log(p / (1 - p))


@dataclass(frozen=True)
class Sequential:
    """A rule over the scores of a trace, its name and its one setting. Serialised into ``probe.json``.

    m      scores in a row, at least 1; ``consecutive``
    alpha  weight of the newest logit, in (0, 1]; ``ewma``
    kappa  drift taken off every logit; ``cusum``
    """

    name: str
    m: int | None = None
    alpha: float | None = None
    kappa: float | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"decision rule '{self.name}' is unknown; use one of {', '.join(RULES)}")
        own = SETTING[self.name]
        for key in ("m", "alpha", "kappa"):
            value = getattr(self, key)
            if (value is None) == (key == own):
                raise UserError(f"decision rule '{self.name}' {'needs' if key == own else 'has no'} setting '{key}'")
            kinds, noun = ((int,), "a whole number") if key == "m" else ((int, float), "a number")
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise UserError(f"decision rule '{self.name}': {key} must be {noun}, got {value!r}")
        if self.m is not None and self.m < 1:
            raise UserError(f"decision rule 'consecutive': m must be at least 1, got {self.m}")
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise UserError(f"decision rule 'ewma': alpha must lie in (0, 1], got {self.alpha}")
        if self.kappa is not None and not np.isfinite(self.kappa):
            raise UserError(f"decision rule 'cusum': kappa must be finite, got {self.kappa}")

    @classmethod
    def from_dict(cls, value: Any) -> Sequential:
        """Inverse of ``to_dict``. Raises UserError."""
        try:
            return cls(**value)
        except TypeError:
            raise UserError(f"decision rule: expected a name and its setting, got {value!r}") from None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: the name, and the setting if there is one."""
        own = SETTING[self.name]
        return {"name": self.name, **({own: getattr(self, own)} if own else {})}

    @property
    def middle(self) -> float:
        """What a score of one half is in the statistic's unit: the threshold where no data set one."""
        return 0.5 if self.name in ("none", "consecutive") else 0.0

    def apply(self, scores: np.ndarray, trace: np.ndarray) -> np.ndarray:
        """Statistic ``[n]`` of ``scores [n]`` (in [0, 1], or -inf); ``trace [n]`` says whose each decision is.

        Decisions of a trace are in time order; traces may mix. Equals ``start().update`` of every score in turn. Raises
        ValueError for other scores.
        """
        scores = _scores(scores)
        out = np.full(len(scores), -np.inf)
        rows = np.flatnonzero(np.isfinite(scores))
        if not len(rows):
            return out
        rows = rows[np.argsort(np.asarray(trace)[rows], kind="stable")]
        _, first, of, count = np.unique(
            np.asarray(trace)[rows], return_index=True, return_inverse=True, return_counts=True
        )
        place = np.arange(len(rows)) - first[of]  # of a decision within its trace
        by_time = np.argsort(place, kind="stable")
        state = self._state(len(count))
        for now in np.split(by_time, np.cumsum(np.bincount(place))[:-1]):
            state[of[now]], out[rows[now]] = self._advance(state[of[now]], scores[rows[now]])
        return out

    def start(self) -> Running:
        """The rule at the beginning of a trace, to be told one score at a time."""
        return Running(self)

    def _state(self, m: int) -> np.ndarray:
        """State ``[m, w]`` before the first score."""
        initial = {"consecutive": -np.inf, "ewma": np.nan}.get(self.name, 0.0)
        return np.full((m, self.m or 1), initial)

    def _advance(self, state: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One valid score each: ``state [m, w]``, ``score [m]`` -> the next state, statistic ``[m]``."""
        if self.name == "none":
            return state, score
        if self.name == "consecutive":
            state = np.concatenate([state[:, 1:], score[:, None]], axis=1)
            return state, state.min(axis=1)
        before, logit = state[:, 0], _logit(score)
        if self.alpha is not None:
            now = np.where(np.isnan(before), logit, self.alpha * logit + (1 - self.alpha) * before)
        else:
            now = np.maximum(0.0, before + logit - self.kappa)
        return now[:, None], now


class Running:
    """A rule in the middle of one trace."""

    def __init__(self, rule: Sequential):
        self.rule, self._state = rule, rule._state(1)

    def update(self, score: float) -> float:
        """Statistic after one more score (in [0, 1], or -inf where the decision is not valid)."""
        scores = _scores([score])
        if np.isneginf(scores[0]):
            return -np.inf
        self._state, statistic = self.rule._advance(self._state, scores)
        return float(statistic[0])


def _scores(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    wrong = ~((scores >= 0) & (scores <= 1) | np.isneginf(scores))
    if wrong.any():
        raise ValueError(f"scores must lie in [0, 1] or be -inf, got {scores[wrong][0]}")
    return scores


def threshold_for_budget(
    statistic: np.ndarray, trace: np.ndarray, clean_traces: np.ndarray, rate: float, default: float = 0.5
) -> float:
    """Smallest threshold at which at most ``floor(rate * number)`` of the clean traces have a statistic above it.

    ``statistic [n]``, ``trace [n]``, ``clean_traces``: numbers as in ``trace``; one without a valid decision cannot
    alarm. ``default`` is returned where the data set none (``Sequential.middle``).
    """
    clean = np.unique(clean_traces)
    maxima = np.full(len(clean), -np.inf)
    rows = np.isin(trace, clean)
    np.maximum.at(maxima, np.searchsorted(clean, np.asarray(trace)[rows]), np.asarray(statistic)[rows])
    return threshold_for(maxima, rate, default)
