"""What a detector's scores are worth: figures over the decisions of traces, with intervals from resampled problems.

Legend: ``n`` decisions, ``m`` traces, ``P`` problems, ``R`` bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.probes.detectors.metrics import (
    bootstrap_draws,
    interval,
    ratio,
    weighted_auroc,
    weighted_average_precision,
    weighted_brier,
)
from neureasoner.probes.detectors.tables import Table
from neureasoner.probes.labels import SPLITS, Closing, is_clean, onset
from neureasoner.traces import Trace


@dataclass
class Decisions:
    """The decisions of one level over one window, and what is known of their traces.

    level    intra, inter or instance
    y        ``[n]`` 1 failing (instance: easy, exit: costs nothing), 0 clean, -1 dropped
    trace, step, token  ``[n]`` as in Table
    problem  ``[m]`` index of a trace's problem in ``problems``; ``family``, ``split`` ``[m]``
    clean    ``[m]`` whether the judge found nothing (instance: the problem is hard; exit: closing always costs)
    onset    ``[m]`` first step at which an alarm is right, -1 where there is none
    tokens   ``[m]`` length of the thinking
    """

    level: str
    y: np.ndarray
    trace: np.ndarray
    step: np.ndarray
    token: np.ndarray
    problems: list[str]
    problem: np.ndarray
    family: np.ndarray
    split: np.ndarray
    clean: np.ndarray
    onset: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(
        cls,
        level: str,
        table: Table,
        traces: Sequence[Trace],
        split: dict[str, str],
        easy: dict[str, int],
        closings: Sequence[Sequence[Closing]] | None = None,
    ) -> Decisions:
        """Raises UserError if a problem has no split, or an unknown one. With ``closings`` the level is an exit."""
        problems = sorted({t.problem.id for t in traces})
        for p in problems:
            if split.get(p) not in SPLITS:
                raise UserError(
                    f"problem '{p}' is in split '{split.get(p)}'; each must be in one of {', '.join(SPLITS)}"
                )
        index = {p: i for i, p in enumerate(problems)}
        begins: list[int | None] = [None] * len(traces)
        if closings is not None:
            clean = [bool(found) and not any(c.label for c in found) for found in closings]
        elif level == "instance":
            clean = [easy[t.problem.id] == 0 for t in traces]
        else:
            clean = [is_clean(t, level) for t in traces]
            begins = [onset(t, level) for t in traces]
        return cls(
            level,
            table.y,
            table.trace,
            table.step,
            table.token,
            problems,
            problem=np.array([index[t.problem.id] for t in traces]),
            family=np.array([t.problem.family for t in traces]),
            split=np.array([split[t.problem.id] for t in traces]),
            clean=np.array(clean),
            onset=np.array([-1 if b is None else b for b in begins]),
            tokens=np.array([t.thinking_end for t in traces], dtype=np.float64),
        )

    def rows(self, part: str) -> np.ndarray:
        """Labelled decisions ``bool [n]`` of the traces of one split."""
        return (self.y >= 0) & (self.split[self.trace] == part)

    def maxima(self, scores: np.ndarray) -> np.ndarray:
        """Largest score of every trace ``[m]``, -inf where it has no valid decision."""
        out = np.full(len(self.split), -np.inf)
        np.maximum.at(out, self.trace, scores)
        return out


class Evaluation:
    """Figures of several detectors over the same problems and the same draws, so that they can be compared in pairs.

    traces     ``bool [m]``: the traces looked at (the test split by default)
    bootstrap  draws of problems behind each 95 % interval
    """

    def __init__(self, decisions: Decisions, bootstrap: int, seed: int, traces: np.ndarray | None = None):
        self.decisions = d = decisions
        self.traces = d.split == "test" if traces is None else traces
        present = np.unique(d.problem[self.traces])
        self.n_problems = len(present)
        index = np.full(len(d.problems), -1)
        index[present] = np.arange(len(present))
        self.problem = index[d.problem]  # [m], -1 for traces outside
        self.draws = bootstrap_draws(len(present), bootstrap, seed)  # [1 + R, P]

    def rows(self, scores: np.ndarray) -> np.ndarray:
        """Labelled decisions ``bool [n]`` that have a score."""
        d = self.decisions
        return self.traces[d.trace] & (d.y >= 0) & np.isfinite(scores)

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Multiplicity of each decision in each draw, ``[1 + R, rows]``."""
        return self.draws[:, self.problem[self.decisions.trace[rows]]]

    def _per_problem(self, where: np.ndarray, values: Any = 1.0) -> np.ndarray:
        out = np.zeros(self.n_problems)
        np.add.at(out, where, values)
        return out

    def ranking(self, p: np.ndarray, rows: np.ndarray | None = None) -> dict[str, Any]:
        """Figures that need no threshold, of probabilities ``p [n]`` (-inf: no valid decision)."""
        d = self.decisions
        rows = self.rows(p) if rows is None else rows
        y, s, w = d.y[rows], p[rows], self.weights(rows)
        return {
            "n": int(rows.sum()),
            "n_problems": self.n_problems,
            "base_rate": round(float(y.mean()), 4) if len(y) else None,
            "auroc": interval(weighted_auroc(y, s, w)),
            "average_precision": interval(weighted_average_precision(y, s, w)),
            "brier": interval(weighted_brier(y, s, w)),
        }

    def decided(self, alarm: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        """Figures per decision of alarms ``bool [n]``."""
        d = self.decisions
        at, y = self.problem[d.trace[rows]], d.y[rows] == 1
        a = alarm[rows]
        count = lambda which: self._per_problem(at, which)  # noqa: E731
        hit, miss, false, quiet = (self.draws @ count(x) for x in (a & y, ~a & y, a & ~y, ~a & ~y))
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, specificity = hit / (hit + miss), quiet / (quiet + false)
            return {
                "accuracy": interval((hit + quiet) / (hit + miss + false + quiet)),
                "balanced_accuracy": interval((recall + specificity) / 2),
                "recall": interval(recall),
                "precision": interval(hit / (hit + false)),
            }

    def alarms(self, alarm: np.ndarray) -> dict[str, Any]:
        """Figures per trace: false alarms on clean ones, and how soon failing ones are found (intra, inter)."""
        d = self.decisions
        clean = np.flatnonzero(d.clean & self.traces)
        at = self.problem[clean]
        fired = np.zeros(len(d.split))
        np.add.at(fired, d.trace, alarm)
        per = self._per_problem
        out = {
            "false_alarms_per_1000_tokens": ratio(per(at, fired[clean]), per(at, d.tokens[clean] / 1000), self.draws),
            "clean_traces_alarmed": ratio(per(at, fired[clean] > 0), per(at), self.draws),
            "n_clean_traces": len(clean),
        }
        return out if d.level == "instance" else out | self._delay(alarm)

    def _delay(self, alarm: np.ndarray) -> dict[str, Any]:
        """First alarm at or after the onset, on failing traces; delays counted from the onset's separator."""
        d, m = self.decisions, len(self.decisions.split)
        begin = d.onset[d.trace]
        ends, first_token = np.full(m, -1), np.full(m, -1)
        at_onset = np.flatnonzero((begin >= 0) & (d.step == begin))
        ends[d.trace[at_onset]] = d.token[at_onset]
        first_step = np.full(m, -1)
        late = np.flatnonzero(alarm & (begin >= 0) & (d.step >= begin))[::-1]  # the first one is written last
        first_step[d.trace[late]], first_token[d.trace[late]] = d.step[late], d.token[late]
        failing = np.flatnonzero((d.onset >= 0) & self.traces)
        found = failing[(first_step[failing] >= 0) & (ends[failing] >= 0)]
        per, where = self._per_problem, self.problem[found]
        counted = per(where)
        return {
            "n_failing_traces": len(failing),
            "failing_traces_detected": ratio(counted, per(self.problem[failing]), self.draws),
            "delay_steps": ratio(per(where, first_step[found] - d.onset[found]), counted, self.draws),
            "delay_tokens": ratio(per(where, first_token[found] - ends[found]), counted, self.draws),
        }

    def figures(self, p: np.ndarray, threshold: float, statistic: np.ndarray | None = None) -> dict[str, Any]:
        """All of the above at one threshold of ``statistic`` (by default of the probabilities ``p`` themselves)."""
        rows = self.rows(p)
        alarm = (p if statistic is None else statistic) > threshold
        return {
            **self.ranking(p, rows),
            "threshold": threshold,
            **self.decided(alarm, rows),
            **self.alarms(alarm),
        }
