"""What closing the thinking by a score would have brought, told from forecasts at separators (``data closings``).

A trace is closed at its first forecast separator whose score is above the threshold: its accuracy and tokens are then
those of the continuations closed there, else those of the continuations left alone at its last forecast separator; a
trace without one counts as it was written. All of it offline, so thresholds are compared on the same continuations.

Legend: ``n`` forecast separators, ``m`` traces, ``P`` problems, ``R`` bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neureasoner.probes.detectors.metrics import interval, ratio, weighted_auroc
from neureasoner.probes.detectors.scoring import Decisions, Evaluation
from neureasoner.probes.labels import Closing, hopeless_problems, labels_of
from neureasoner.traces import Trace

MOST_THRESHOLDS, CURVE = 256, 40  # thresholds tried, and shown


@dataclass
class Outcomes:
    """Shares right and whole responses' tokens, closed at each separator and left alone.

    trace, right, tokens  ``[n]`` of the separators, by trace and step: whose it is, what closing there brings
    left_right, left_tokens  ``[m]`` of the traces left alone
    counted  ``bool [m]``: traces up to the last one forecast, as a limit took the first so many
    hopeless  ``bool [m]``: of a problem never solved in any trace or continuation
    """

    trace: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    left_right: np.ndarray
    left_tokens: np.ndarray
    counted: np.ndarray
    hopeless: np.ndarray

    @classmethod
    def of(cls, closings: Sequence[Sequence[Closing]], traces: Sequence[Trace]) -> Outcomes:
        """From the forecasts of each trace (``labels.closings_of``)."""
        rows = [row for found in closings for row in found]
        never = hopeless_problems(rows, traces)
        last = max(i for i, found in enumerate(closings) if found)
        ends = [found[-1] if found else None for found in closings]
        return cls(
            trace=np.repeat(np.arange(len(traces)), [len(found) for found in closings]),
            right=np.array([row.right_closed / row.n for row in rows]),
            tokens=np.array([row.token + row.tokens_closed for row in rows]),
            left_right=np.array(
                [
                    e.right_left / e.n_left if e else float(labels_of(t).correct)
                    for e, t in zip(ends, traces, strict=True)
                ]
            ),
            left_tokens=np.array(
                [e.token + e.tokens_left if e else len(t.response_ids) for e, t in zip(ends, traces, strict=True)]
            ),
            counted=np.arange(len(traces)) <= last,
            hopeless=np.array([t.problem.id in never for t in traces]),
        )

    def close(self, alarm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Alarms ``bool [n]`` -> share right, tokens, whether it was closed, ``[m]`` each."""
        first = np.full(len(self.left_right), -1)
        fired = np.flatnonzero(alarm)[::-1]  # the first one is written last
        first[self.trace[fired]] = fired
        closed = first >= 0
        return (
            np.where(closed, self.right[first], self.left_right),
            np.where(closed, self.tokens[first], self.left_tokens),
            closed,
        )

    def utility(self, alarm: np.ndarray, traces: np.ndarray, price: float) -> float:
        """Accuracy in points minus ``price`` times tokens in per cent of those left alone, over ``traces bool [m]``."""
        at = traces & self.counted
        right, tokens, _ = self.close(alarm)
        return float(100 * right[at].mean() - price * 100 * tokens[at].sum() / self.left_tokens[at].sum())

    def thresholds(self, scores: np.ndarray, traces: np.ndarray) -> np.ndarray:
        """Thresholds that tell scores ``[n]`` of ``traces`` apart, ascending: 0 closes at the first separator, none
        closes nothing."""
        values = np.unique(scores[traces[self.trace] & np.isfinite(scores)])[:-1]
        if len(values) > MOST_THRESHOLDS:
            values = values[np.linspace(0, len(values) - 1, MOST_THRESHOLDS).round().astype(int)]
        return np.unique(np.r_[0.0, values])

    def choose(self, scores: np.ndarray, traces: np.ndarray, price: float) -> tuple[float, float, float]:
        """The threshold of largest utility over ``traces`` (the highest of equals), its utility, that of no closing."""
        tried = self.thresholds(scores, traces)
        worth = [round(self.utility(scores > t, traces, price), 9) for t in tried]
        best = len(tried) - 1 - int(np.argmax(worth[::-1]))
        return float(tried[best]), worth[best], self.utility(np.zeros(len(scores), bool), traces, price)

    def figures(self, alarm: np.ndarray, evaluation: Evaluation) -> dict[str, Any]:
        """What the alarms bring on the traces of ``evaluation``, against leaving all alone, with intervals.

        ``closed``: share of traces; ``accuracy`` and ``points``: share right, and its gain in points; ``tokens_saved``:
        per cent; the same of ``solved`` and of ``hopeless`` questions apart.
        """
        right, tokens, closed = self.close(alarm)
        at = evaluation.traces & self.counted

        def part(which: np.ndarray) -> dict[str, Any]:
            def total(values: np.ndarray) -> np.ndarray:
                out = np.zeros(evaluation.n_problems)
                np.add.at(out, evaluation.problem[which], values[which])
                return out

            count, draws = total(np.ones(len(right))), evaluation.draws
            return {
                "traces": int(which.sum()),
                "closed": ratio(total(closed.astype(float)), count, draws),
                "accuracy": ratio(total(right), count, draws),
                "points": ratio(100 * total(right - self.left_right), count, draws),
                "tokens_saved": ratio(100 * total(self.left_tokens - tokens), total(self.left_tokens), draws),
            }

        return part(at) | {"solved": part(at & ~self.hopeless), "hopeless": part(at & self.hopeless)}

    def curve(self, scores: np.ndarray, traces: dict[str, np.ndarray], price: float) -> list[dict[str, Any]]:
        """Values without intervals over thresholds, for each named part of the traces: the frontier to choose from."""
        tried = self.thresholds(scores, next(iter(traces.values())))
        shown = tried[np.unique(np.linspace(0, len(tried) - 1, CURVE).round().astype(int))]
        out = []
        for threshold in [*shown.tolist(), 1.0]:
            alarm = scores > threshold
            right, tokens, closed = self.close(alarm)
            row: dict[str, Any] = {"threshold": threshold}
            for name, which in traces.items():
                at = which & self.counted
                if not at.any():
                    continue
                row[name] = {
                    "closed": round(float(closed[at].mean()), 4),
                    "accuracy": round(float(right[at].mean()), 4),
                    "points": round(float(100 * (right - self.left_right)[at].mean()), 3),
                    "utility": round(self.utility(alarm, at, price), 3),
                    "tokens_saved": self._saved(tokens, at),
                    "tokens_saved_solved": self._saved(tokens, at & ~self.hopeless),
                    "tokens_saved_hopeless": self._saved(tokens, at & self.hopeless),
                }
            out.append(row)
        return out

    def _saved(self, tokens: np.ndarray, at: np.ndarray) -> float | None:
        """Per cent of the tokens of ``at`` left alone; None where there are none."""
        whole = self.left_tokens[at].sum()
        return round(float(100 * (whole - tokens[at].sum()) / whole), 3) if whole else None


def within_family(decisions: Decisions, scores: np.ndarray, evaluation: Evaluation) -> dict[str, Any]:
    """AUROC inside each family that has both labels, and their mean weighted by decisions, with intervals.

    What a score knows beyond the family: one that reads nothing else has 0.5 here, however high its AUROC over all.
    """
    rows = evaluation.rows(scores)
    y, s, w = decisions.y[rows], scores[rows], evaluation.weights(rows)
    family = decisions.family[decisions.trace[rows]]
    total, weight = np.zeros(len(w)), np.zeros(len(w))
    families: dict[str, Any] = {}
    for name in sorted(set(family.tolist())):
        of = family == name
        if len(set(y[of].tolist())) < 2:
            continue
        area, size = weighted_auroc(y[of], s[of], w[:, of]), w[:, of].sum(axis=1)
        families[name] = {"n": int(of.sum()), "auroc": interval(area)}
        known = np.isfinite(area)  # a draw may lack a label in a family
        total[known] += (area * size)[known]
        weight[known] += size[known]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"within_family": interval(total / weight), "families": families}


def family_scores(decisions: Decisions) -> np.ndarray:
    """The control that knows the family alone: the share of label 1 among its training decisions, ``[n]`` (of all
    training decisions where a family has none)."""
    train, family = decisions.rows("train"), decisions.family[decisions.trace]
    share = {name: decisions.y[train & (family == name)].mean() for name in set(family[train].tolist())}
    every = float(decisions.y[train].mean()) if train.any() else 0.5
    return np.array([share.get(name, every) for name in family.tolist()])


def exit_figures(
    decisions: Decisions, outcomes: Outcomes, scores: np.ndarray, threshold: float, evaluation: Evaluation, price: float
) -> dict[str, Any]:
    """All that is told of one score as an exit, at its threshold."""
    held = decisions.split == "validation"
    rows = evaluation.rows(scores)
    return {
        "auroc": interval(weighted_auroc(decisions.y[rows], scores[rows], evaluation.weights(rows))),
        **within_family(decisions, scores, evaluation),
        "threshold": threshold,
        "validation_utility": round(outcomes.utility(scores > threshold, held, price), 3),
        **outcomes.figures(scores > threshold, evaluation),
    }
