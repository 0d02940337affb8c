"""Small SVG charts that follow the page's colours (CSS variables) and also stand alone as files. Standard library only.

Every mark carries a ``<title>`` so that hovering shows the numbers; every label is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

STYLE = """
.ax{stroke:var(--line,#c9ccd3);fill:none}.gr{stroke:var(--line,#c9ccd3);stroke-opacity:.45;fill:none}
text{font:11px system-ui,sans-serif;fill:var(--soft,#5d6472)}text.b{fill:var(--ink,#1c2028);font-weight:600}
.ci{stroke-width:1.4;fill:none;stroke-opacity:.75}.ln{stroke-width:2;fill:none}
""".replace("\n", "")

PALETTE = ("#8a90a0", "#2f6fde", "#d9822b", "#7a4fd0", "#1f9d74", "#c2416b", "#b59b1f", "#3aa5b8", "#a0622d", "#5f7f2f")
FIXED = {
    "vanilla": "var(--c-vanilla,#6b7280)",
    "full": "var(--c-full,#1f8f6a)",
    "oracle_trigger": "var(--c-oracle,#7a4fd0)",
    "intra": "var(--c-intra,#d9822b)",
    "inter": "var(--c-inter,#2f6fde)",
    "instance": "var(--c-instance,#b0418f)",
    "random_trigger": "var(--c-random,#c0504d)",
}


def colour(name: str, index: int = 0) -> str:
    """The colour of an arm or rule: its own if it has one, else by place."""
    return FIXED.get(name, PALETTE[index % len(PALETTE)])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    if high <= low:
        high = low + 1
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.0f}%" if percent else f"{value:,.10g}"


@dataclass
class Frame:
    """A plotting rectangle with linear axes; collects SVG parts."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 560
    height: int = 320
    left: int = 52
    right: int = 16
    top: int = 28
    bottom: int = 42

    def __post_init__(self) -> None:
        self.parts: list[str] = []
        if self.x[1] <= self.x[0]:
            self.x = (self.x[0], self.x[0] + 1)
        if self.y[1] <= self.y[0]:
            self.y = (self.y[0], self.y[0] + 1)

    def px(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        return (
            self.height
            - self.bottom
            - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - self.top - self.bottom)
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start", bold: bool = False, fill: str = "") -> None:
        style = f' style="fill:{fill}"' if fill else ""
        kind = ' class="b"' if bold else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}{style}>{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str, stroke: str = "", title: str = "") -> None:
        style = f' style="stroke:{stroke}"' if stroke else ""
        inside = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"{style}>{inside}</line>'
        )

    def dot(self, x: float, y: float, fill: str, title: str, radius: float = 4.5) -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:{fill}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def box(self, x: float, y: float, w: float, h: float, fill: str, title: str, opacity: float = 1.0) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}" rx="2" '
            f'style="fill:{fill};fill-opacity:{opacity}"><title>{escape(title)}</title></rect>'
        )

    def path(self, points: Sequence[tuple[float, float]], stroke: str, title: str = "") -> None:
        d = "M" + "L".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self.parts.append(f'<path d="{d}" class="ln" style="stroke:{stroke}"><title>{escape(title)}</title></path>')

    def axes(
        self,
        xlabel: str,
        ylabel: str,
        xticks: Sequence[float] | None = None,
        percent: tuple[bool, bool] = (False, False),
    ) -> None:
        base = self.height - self.bottom
        for t in ticks(*self.y):
            self.line(self.left, self.py(t), self.width - self.right, self.py(t), "gr")
            self.text(self.left - 6, self.py(t) + 4, _number(t, percent[1]), "end")
        for t in ticks(*self.x) if xticks is None else xticks:
            self.line(self.px(t), base, self.px(t), base + 4, "ax")
            self.text(self.px(t), base + 16, _number(t, percent[0]), "middle")
        self.line(self.left, base, self.width - self.right, base, "ax")
        self.text((self.left + self.width - self.right) / 2, self.height - 8, xlabel, "middle")
        self.text(6, 14, ylabel)

    def svg(self, label: str) -> str:
        """The finished picture; ``label`` is its accessible name."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(label, quote=True)}"><style>{STYLE}</style>{"".join(self.parts)}</svg>'
        )


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Move label positions apart to at least ``gap``, keeping their order and their middle."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = sum(p - w for p, w in zip(placed, wanted, strict=True)) / max(1, len(wanted))
    return [p - shift for p in placed]


def tradeoff(arms: Sequence[dict]) -> str:
    """Accuracy against mean tokens, with both intervals; one labelled point per arm."""
    xs = [v for a in arms for v in a["tokens_ci"]]
    ys = [v for a in arms for v in a["accuracy_ci"]]
    pad = 0.04 * (max(xs) - min(xs) or 1)
    across, up = (max(0, min(xs) - pad), max(xs) + pad), (max(0.0, min(ys) - 0.03), min(1.0, max(ys) + 0.03))
    frame = Frame(across, up, 680, 380)
    frame.right = 130
    frame.axes("mean tokens per answer (fewer is better)", "accuracy", percent=(False, True))
    labels = _spread([frame.py(a["accuracy"]) for a in arms], 13)
    curves: dict[str, list[tuple[float, float]]] = {}  # one baseline at several budgets: budget, budget_25, budget_75
    for arm in arms:
        stem, _, share = arm["name"].rpartition("_")
        curves.setdefault(stem if share.isdigit() else arm["name"], []).append((arm["tokens_mean"], arm["accuracy"]))
    names = [a["name"] for a in arms]
    for name, points in curves.items():
        if len(points) > 1:
            frame.path(sorted(points), colour(name, names.index(name) if name in names else len(names)), name)
    for i, (arm, label) in enumerate(zip(arms, labels, strict=True)):
        shade, x, y = colour(arm["name"], i), frame.px(arm["tokens_mean"]), frame.py(arm["accuracy"])
        (x0, x1), (y0, y1) = arm["tokens_ci"], arm["accuracy_ci"]
        title = f"{arm['name']}: {100 * arm['accuracy']:.1f}% [{100 * y0:.1f}, {100 * y1:.1f}], "
        title += f"{arm['tokens_mean']:.0f} tokens [{x0:.0f}, {x1:.0f}]"
        frame.line(frame.px(x0), y, frame.px(x1), y, "ci", shade, title)
        frame.line(x, frame.py(y0), x, frame.py(y1), "ci", shade, title)
        frame.dot(x, y, shade, title, 5.5 if arm["name"] in FIXED else 4)
        frame.line(x + 6, y, frame.width - frame.right + 4, label, "gr")
        bold = arm["name"] in ("vanilla", "full")
        frame.text(frame.width - frame.right + 8, label + 4, arm["name"], bold=bold, fill=shade)
    return frame.svg("accuracy against mean tokens for each arm")


def by_difficulty(family: str, arms: Sequence[dict]) -> str:
    """Accuracy of some arms over the difficulty of one family. Each arm: name and {difficulty: summary}."""
    levels = sorted({int(d) for a in arms for d in a["levels"]})
    frame = Frame((min(levels) - 0.4, max(levels) + 0.4), (0.0, 1.0), 360, 240)
    frame.axes("difficulty", f"accuracy · {family}", xticks=levels, percent=(False, True))
    for i, arm in enumerate(arms):
        shade, shift = colour(arm["name"], i), 0.06 * (i - (len(arms) - 1) / 2)
        points = [(int(d) + shift, s) for d, s in sorted(arm["levels"].items(), key=lambda kv: int(kv[0]))]
        frame.path([(x, s["accuracy"]) for x, s in points], shade, arm["name"])
        for x, s in points:
            low, high = s["accuracy_ci"]
            title = f"{arm['name']}, difficulty {round(x)}: {100 * s['accuracy']:.1f}% "
            title += f"[{100 * low:.1f}, {100 * high:.1f}], {s['n_problems']} problems"
            frame.line(frame.px(x), frame.py(low), frame.px(x), frame.py(high), "ci", shade, title)
            frame.dot(frame.px(x), frame.py(s["accuracy"]), shade, title, 3.5)
    return frame.svg(f"accuracy by difficulty, {family}")


def spread_rows(rows: Sequence[tuple[str, Sequence[float]]], xlabel: str) -> str:
    """One row per name: 5th to 95th percentile as a line, quartiles as a box, median as a tick."""
    top = max((v for _, values in rows for v in values), default=1.0)
    frame = Frame((0.0, top), (0.0, float(max(1, len(rows)))), 560, 60 + 24 * len(rows), left=130, top=8)
    for t in ticks(0, top):
        frame.line(frame.px(t), frame.top, frame.px(t), frame.height - frame.bottom, "gr")
        frame.text(frame.px(t), frame.height - frame.bottom + 16, _number(t, False), "middle")
    frame.text((frame.left + frame.width) / 2, frame.height - 8, xlabel, "middle")
    for i, (name, values) in enumerate(rows):
        if not len(values):
            continue
        q = [_quantile(sorted(values), p) for p in (0.05, 0.25, 0.5, 0.75, 0.95)]
        y, shade = frame.py(len(rows) - i - 0.5), colour(name, i)
        title = f"{name}: median {q[2]:.0f}, middle half {q[1]:.0f} to {q[3]:.0f}, 5% to 95% {q[0]:.0f} to {q[4]:.0f}"
        frame.text(frame.left - 8, y + 4, name, "end", bold=name in ("vanilla", "full"))
        frame.line(frame.px(q[0]), y, frame.px(q[4]), y, "ci", shade, title)
        frame.box(frame.px(q[1]), y - 6, frame.px(q[3]) - frame.px(q[1]), 12, shade, title, 0.45)
        frame.line(frame.px(q[2]), y - 7, frame.px(q[2]), y + 7, "ln", shade, title)
    return frame.svg(f"{xlabel}, by arm")


def _quantile(ordered: Sequence[float], p: float) -> float:
    at = p * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def histogram(groups: Sequence[tuple[str, Sequence[float]]], xlabel: str, ylabel: str, bins: int = 20) -> str:
    """Stacked histogram of positions, one colour per group."""
    top = max((v for _, values in groups for v in values), default=1.0) or 1.0
    counts = [[0] * bins for _ in groups]
    for g, (_, values) in enumerate(groups):
        for v in values:
            counts[g][min(bins - 1, int(v / top * bins))] += 1
    most = max(sum(c[b] for c in counts) for b in range(bins)) if groups else 1
    frame = Frame((0.0, top), (0.0, float(max(1, most))), 560, 240)
    frame.axes(xlabel, ylabel)
    for b in range(bins):
        base = 0
        for g, (name, _) in enumerate(groups):
            n, x0, x1 = counts[g][b], frame.px(b / bins * top), frame.px((b + 1) / bins * top)
            if n:
                title = f"{name}: {n} at {b / bins * top:.0f} to {(b + 1) / bins * top:.0f}"
                high = frame.py(base) - frame.py(base + n)
                frame.box(x0 + 0.5, frame.py(base + n), x1 - x0 - 1, high, colour(name, g), title, 0.85)
            base += n
    return frame.svg(f"{ylabel} over {xlabel}")


def bars(rows: Sequence[tuple[str, float, Sequence[float] | None, bool]], xlabel: str, low: float, high: float) -> str:
    """Horizontal bars with intervals: (name, value, interval or None, is it ours rather than a control)."""
    frame = Frame((low, high), (0.0, float(max(1, len(rows)))), 460, 56 + 22 * len(rows), left=206, top=8)
    for t in ticks(low, high):
        frame.line(frame.px(t), frame.top, frame.px(t), frame.height - frame.bottom, "gr")
        frame.text(frame.px(t), frame.height - frame.bottom + 16, _number(t, False), "middle")
    frame.text((frame.left + frame.width) / 2, frame.height - 8, xlabel, "middle")
    for i, (name, value, ci, ours) in enumerate(rows):
        y = frame.py(len(rows) - i - 0.5)
        title = f"{name}: {value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")
        shade = "var(--c-full,#1f8f6a)" if ours else "var(--c-vanilla,#6b7280)"
        frame.text(frame.left - 8, y + 4, name, "end", bold=ours)
        frame.box(frame.left, y - 6, frame.px(min(max(value, low), high)) - frame.left, 12, shade, title, 0.7)
        if ci:
            frame.line(frame.px(max(ci[0], low)), y, frame.px(min(ci[1], high)), y, "ln", "var(--ink,#1c2028)", title)
    return frame.svg(xlabel)


def roc(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], title: str) -> str:
    """False-alarm rate against recall."""
    frame = Frame((0.0, 1.0), (0.0, 1.0), 460, 300)
    frame.axes("false-alarm rate", f"recall · {title}", percent=(True, True))
    frame.line(frame.px(0), frame.py(0), frame.px(1), frame.py(1), "gr")
    for i, (name, points) in enumerate(curves):
        shade = colour("full" if i == 0 else name, i)
        frame.path(points, shade, name)
        frame.text(frame.px(0.98), frame.py(0.06 + 0.075 * (len(curves) - 1 - i)), name, "end", i == 0, shade)
    return frame.svg(f"ROC, {title}")
