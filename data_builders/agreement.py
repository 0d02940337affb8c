"""How far two judges agree on the same traces: exact against a language model, or two language models.

The first judge is the reference: precision is the share of the second's findings that the first made too, recall the
share of the first's findings that the second made. Cohen's kappa is symmetric. Intervals are percentile bootstrap over
problems, because traces of one problem are not independent. A figure that is not defined (no finding to divide by, or
a kappa of judges who both never vary) is None and prints as ``-``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.traces import Labels, Trace

NONE = "none"
FIGURES = ("precision", "recall", "kappa", "agreement")


@dataclass(frozen=True)
class Figure:
    """A value in [-1, 1] with its interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One finding (or one classification): how many traces have it after each judge, after both, and the figures.

    ``precision`` and ``recall`` are None for the classification into all error types.
    """

    name: str
    first: int
    second: int
    both: int
    precision: Figure
    recall: Figure
    kappa: Figure
    agreement: Figure


@dataclass(frozen=True)
class Disagreement:
    """One trace on which the judges differ, and what each says."""

    id: str
    problem: str
    about: str
    first: str
    second: str


@dataclass(frozen=True)
class Agreement:
    """``n`` traces of ``problems`` problems that both judged. ``left_out``: ids that only one of them labelled."""

    judges: tuple[str, str]
    n: int
    problems: int
    rows: list[Row]
    error_step: Figure
    loop_start: Figure
    disagreements: list[Disagreement]
    left_out: list[str] = field(default_factory=list)


def kappa(confusion: np.ndarray) -> np.ndarray:
    """Cohen's kappa of confusion matrices [..., K, K] (any weights); nan where both judges use one class only."""
    total = confusion.sum(axis=(-2, -1))
    observed = np.trace(confusion, axis1=-2, axis2=-1)
    chance = (confusion.sum(axis=-1) * confusion.sum(axis=-2)).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = chance / total
        return np.where(np.isclose(total, expected), np.nan, (observed - expected) / (total - expected))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def compare(
    first: Sequence[Trace], second: Sequence[Trace], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Agreement:
    """Compare the labels of the same traces. Traces that one of the two did not label are left out and listed.

    Raises UserError when an id occurs twice or no trace was labelled by both.
    """
    a, b = _labelled(first, "first"), _labelled(second, "second")
    ids = [i for i in a if i in b]
    if not ids:
        raise UserError("the two sets of judged traces share no labelled trace (same ids are compared)")
    pairs = [(_labels(a[i]), _labels(b[i])) for i in ids]
    names = [a[i].problem.id for i in ids]
    problems = sorted(set(names))
    index = {p: k for k, p in enumerate(problems)}
    group = np.array([index[p] for p in names])
    weights = _resampled(len(problems), resamples, seed)
    count = _Counter(group, len(problems), weights, level)

    rows = [count.classes("correct", _column(pairs, lambda x: x.correct), [False, True])]
    rows.append(count.classes("wrong step", _column(pairs, lambda x: x.intra.has_error), [False, True]))
    one, two = _column(pairs, _error_type)
    types = _findings(one, two)
    for name in types:
        rows.append(count.classes(f"  {name}", _is(name, one, two), [False, True]))
    rows.append(count.classes("error type", (one, two), [*types, NONE]))
    rows.append(count.classes("stagnation", _column(pairs, lambda x: x.inter.is_stagnant), [False, True]))
    one, two = _column(pairs, _loop_theme)
    for name in _findings(one, two):
        rows.append(count.classes(f"  {name}", _is(name, one, two), [False, True]))

    wrong = np.array([x.intra.has_error and y.intra.has_error for x, y in pairs])
    loops = np.array([x.inter.steps is not None and y.inter.steps is not None for x, y in pairs])
    step = np.array([x.intra.step is not None and x.intra.step == y.intra.step for x, y in pairs])
    start = np.array([_start(x) is not None and _start(x) == _start(y) for x, y in pairs])
    return Agreement(
        judges=(pairs[0][0].judge, pairs[0][1].judge),
        n=len(ids),
        problems=len(problems),
        rows=rows,
        error_step=count.share(step & wrong, wrong),
        loop_start=count.share(start & loops, loops),
        disagreements=[d for i, p, pair in zip(ids, names, pairs, strict=True) for d in _differences(i, p, *pair)],
        left_out=sorted(a.keys() ^ b.keys()),
    )


def _labels(trace: Trace) -> Labels:
    assert trace.labels is not None
    return trace.labels


def _labelled(traces: Sequence[Trace], which: str) -> dict[str, Trace]:
    found: dict[str, Trace] = {}
    for t in traces:
        if t.id in found:
            raise UserError(f"the {which} set holds trace id '{t.id}' twice")
        found[t.id] = t
    return {i: t for i, t in found.items() if t.labels is not None}


def _column(pairs: Sequence[tuple[Labels, Labels]], what: Callable[[Labels], Any]) -> tuple[list[Any], list[Any]]:
    return [what(x) for x, _ in pairs], [what(y) for _, y in pairs]


def _is(name: str, one: list[str], two: list[str]) -> tuple[list[bool], list[bool]]:
    return [x == name for x in one], [x == name for x in two]


def _findings(*columns: list[str]) -> list[str]:
    """Every class that occurs, without none."""
    return sorted({x for column in columns for x in column} - {NONE})


def _error_type(labels: Labels) -> str:
    return labels.intra.error_type if labels.intra.has_error else NONE


def _loop_theme(labels: Labels) -> str:
    return labels.inter.loop_theme if labels.inter.is_stagnant else NONE


def _start(labels: Labels) -> int | None:
    return labels.inter.steps[0] if labels.inter.steps else None


def _resampled(problems: int, resamples: int, seed: int) -> np.ndarray:
    """[R + 1, P]: how often each problem is drawn; row 0 is the sample itself."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(problems, np.full(problems, 1 / problems), size=resamples)
    return np.concatenate([np.ones((1, problems)), drawn]).astype(np.uint16)


class _Counter:
    """Figures with intervals: every count is taken per problem once, then weighted by the resamples."""

    def __init__(self, group: np.ndarray, problems: int, weights: np.ndarray, level: float):
        self.group, self.problems, self.weights, self.level = group, problems, weights, level

    def _weighted(self, flags: np.ndarray) -> np.ndarray:
        """[R + 1] weighted counts of a flag per trace."""
        counts = np.bincount(self.group, weights=flags.astype(float), minlength=self.problems)
        rows = range(0, len(self.weights), 64)  # in pieces, as each is copied to floats
        return np.concatenate([self.weights[i : i + 64] @ counts for i in rows])

    def _figure(self, values: np.ndarray) -> Figure:
        if np.isnan(values[0]):
            return Figure(None)
        known = values[1:][~np.isnan(values[1:])]
        if 2 * len(known) < len(values) - 1 or not len(known):
            return Figure(float(values[0]))  # undefined in most resamples: an interval would be of the lucky ones
        low, high = np.quantile(known, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Figure(float(values[0]), float(low), float(high))

    def share(self, part: np.ndarray, whole: np.ndarray) -> Figure:
        return self._figure(_share(self._weighted(part), self._weighted(whole)))

    def classes(self, name: str, columns: tuple[list[Any], list[Any]], known: list[Any]) -> Row:
        """Figures of one classification: ``known`` is [False, True], or the kinds of finding and NONE last."""
        place = {c: i for i, c in enumerate(known)}
        x, y = (np.array([place[c] for c in side]) for side in columns)
        k = len(known)
        table = np.stack(
            [np.stack([self._weighted((x == i) & (y == j)) for j in range(k)], axis=-1) for i in range(k)], axis=-2
        )
        found_x, found_y = x > 0, y > 0
        if known[-1] == NONE:  # all but the last are findings
            found_x, found_y = x < k - 1, y < k - 1
        undefined = Figure(None)
        return Row(
            name=name,
            first=int(found_x.sum()),
            second=int(found_y.sum()),
            both=int((found_x & found_y & (x == y)).sum()),
            precision=undefined if known[-1] == NONE else self.share(found_x & found_y, found_y),
            recall=undefined if known[-1] == NONE else self.share(found_x & found_y, found_x),
            kappa=self._figure(kappa(table)),
            agreement=self.share(x == y, np.ones(len(x), bool)),
        )


def _differences(name: str, problem: str, x: Labels, y: Labels) -> list[Disagreement]:
    """What two judges say differently of one trace; where they agree on a finding, also where they place it."""
    said: list[tuple[str, str, str]] = [("correct", str(x.correct), str(y.correct))]
    said.append(("error type", _error_type(x), _error_type(y)))
    if x.intra.has_error and y.intra.has_error:
        said.append(("error step", str(x.intra.step), str(y.intra.step)))
    said.append(("stagnation", str(x.inter.is_stagnant), str(y.inter.is_stagnant)))
    if x.inter.is_stagnant and y.inter.is_stagnant:
        said.append(("loop theme", x.inter.loop_theme, y.inter.loop_theme))
        said.append(("loop start", str(_start(x)), str(_start(y))))
    return [Disagreement(name, problem, about, a, b) for about, a, b in said if a != b]


def _cell(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    interval = "" if figure.low is None else f" [{figure.low:.2f}, {figure.high:.2f}]"
    return f"{figure.value:.2f}{interval}"


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def table(agreement: Agreement, listed: int = 20) -> str:
    """The comparison as plain text; the first ``listed`` disagreements at its end."""
    one, two = agreement.judges
    lines = [
        f"{agreement.n} traces of {agreement.problems} problems; first judge: {one}, second judge: {two}",
        f"{'':<24}{'first':>6}{'second':>7}{'both':>6}  " + "".join(f"{name:<20}" for name in FIGURES),
    ]
    for row in agreement.rows:
        cells = "".join(f"{_cell(getattr(row, name)):<20}" for name in FIGURES)
        lines.append(f"{row.name:<24}{row.first:>6}{row.second:>7}{row.both:>6}  {cells}".rstrip())
    lines.append(f"same wrong step, where both found one: {_cell(agreement.error_step)}")
    lines.append(f"same start of the loop, where both found one: {_cell(agreement.loop_start)}")
    if agreement.left_out:
        lines.append(f"left out, because one judge gave no labels: {len(agreement.left_out)}")
    lines.append(f"{len(agreement.disagreements)} disagreements")
    lines += [f"  {_line(d.id)}: {d.about}: {d.first} | {d.second}" for d in agreement.disagreements[:listed]]
    if len(agreement.disagreements) > listed:
        lines.append(f"  … and {len(agreement.disagreements) - listed} more")
    return "\n".join(lines)
