"""Figures, Markdown and terminal table of ``probes fluctuation`` (PNG, drawn without a display)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.probes.figures import save
from neureasoner.probes.fluctuation.statistics import BANDS, MEANING, SETS, SIDES, SMALL, cell

COLOURS = ("#c0392b", "#1b6ca8")  # failing (easy), clean (hard)
SHADES = {"chosen": "#1b6ca8", "random": "#999999"}
PERIODS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def _bands(ax: Any, curves: Mapping[str, Any], x: np.ndarray | None = None) -> None:
    """Both sides' means with their intervals, over ``x`` or over tokens; points that too few pairs reach left out."""
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=True):
        mean, low, high = (np.array(curve[k], dtype=np.float64) for k in ("mean", "low", "high"))
        at = np.isfinite(mean)
        where = (np.arange(len(mean)) if x is None else x)[at]
        ax.fill_between(where, low[at], high[at], color=colour, alpha=0.2, lw=0)
        ax.plot(where, mean[at], color=colour, label=name)


def _site(entry: Mapping[str, Any], key: str) -> tuple[str, str, list[str]]:
    kind, _, rest = entry["sites"][key].partition(":")
    block, _, indices = rest.rstrip("]").partition("[")
    return kind, block, indices.split(",")


def _title(entry: Mapping[str, Any], key: str) -> str:
    kind, block, indices = _site(entry, key)
    return f"{len(indices)} {key} {kind}{'s' * (len(indices) > 1)} of block {block}"


def draw_time(path: Path, level: str, entry: Mapping[str, Any], single: Mapping[str, Any]) -> None:
    """Mean z over relative and absolute time, and single pairs of one channel; chosen above, random below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 6.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex="col")
    for (relative, absolute, raw), key in zip(axes, SETS, strict=True):
        curves = entry["curves"][key]
        points = len(next(iter(curves["relative"].values()))["mean"])
        _bands(relative, curves["relative"], np.linspace(0, 100, points))
        _bands(absolute, curves["absolute"])
        both = [ax.get_ylim() for ax in (relative, absolute)]
        for ax in (relative, absolute):
            ax.axhline(0, color="black", lw=0.6)
            ax.set_ylim(min(low for low, _ in both), max(high for _, high in both))
        relative.set_ylabel(f"{_title(entry, key)}\nmean z of |a|")
        kind, _, indices = _site(entry, key)
        gap = _examples(raw, single[key])
        raw.set_ylabel(f"z of {kind} {entry['lead'] if key == 'chosen' else indices[0]}, base lines {gap:.0f} apart")
    axes[0][0].legend(frameon=False)
    for ax, title in zip(axes[0], ("over relative time", "over tokens since the onset", "single pairs"), strict=True):
        ax.set_title(title)
    for ax, label in zip(axes[1], ("% of the window", "tokens", "tokens"), strict=True):
        ax.set_xlabel(label)
    figure.suptitle(f"{level}: {entry['pairs']} pairs of {entry['problems']} problems, 95 % bands by problem")
    save(figure, path)


def _examples(ax: Any, single: Mapping[str, Sequence[np.ndarray]]) -> float:
    """Pairs above each other, each on a base line of its own; returns how far those are apart."""
    gap = float(np.ceil(max(np.ptp(z) for side in single.values() for z in side))) or 1.0
    for side, colour in zip(single.values(), COLOURS, strict=True):
        for i, z in enumerate(side):
            ax.plot(z - i * gap, color=colour, lw=0.9)
    for i in range(len(next(iter(single.values())))):
        ax.axhline(-i * gap, color="black", lw=0.4, ls=":")
    ax.set_yticks([])
    return gap


def draw_frequency(path: Path, level: str, entry: Mapping[str, Any]) -> None:
    """Mean power by frequency relative to a flat spectrum, periods marked above; chosen left, random right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    centres = np.sqrt(BANDS[1:] * BANDS[:-1])
    for ax, key in zip(axes, SETS, strict=True):
        _bands(ax, entry["curves"][key]["frequency"], centres)
        ax.set_xscale("log")
        ax.axhline(1, color="black", lw=0.6, ls=":")
        low, high = ax.get_xlim()
        shown = [p for p in PERIODS if low <= 1 / p <= high]
        for period in shown:
            ax.axvline(1 / period, color="#dddddd", lw=0.6, zorder=0)
        ax.set_xticks([1 / p for p in shown], [f"{1 / p:.3g}" for p in shown])
        ax.xaxis.set_minor_locator(NullLocator())
        above = ax.secondary_xaxis("top")
        above.set_xticks([1 / p for p in shown], [str(p) for p in shown])
        above.xaxis.set_minor_locator(NullLocator())
        above.set_xlabel("period, tokens")
        ax.set_xlabel("cycles per token")
        ax.set_title(_title(entry, key), fontsize=11)
    axes[0].set_ylabel("power of |a|, relative to flat")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{level}: {entry['pairs']} pairs cut to equal length, 95 % bands by problem")
    save(figure, path)


def draw_effects(path: Path, level: str, entry: Mapping[str, Any]) -> None:
    """Standardised paired effects of every statistic, chosen against random; the drawn direction shaded."""
    from matplotlib.figure import Figure

    statistics = list(entry["statistics"].values())
    figure = Figure(figsize=(8.4, 1.6 + 0.75 * len(statistics)), layout="constrained")
    ax = figure.add_subplot()
    for i, s in enumerate(statistics):
        for key, shift in zip(SETS, (-0.13, 0.13), strict=True):
            d = s[key]["d_z"]
            if d["low"] is None or d["value"] is None:
                continue
            ax.plot([d["low"], d["high"]], [i + shift] * 2, color=SHADES[key], lw=2)
            filled = s[key]["verdict"] != "undecided"
            ax.plot(d["value"], i + shift, "o", color=SHADES[key], mfc=SHADES[key] if filled else "white", ms=7)
    edge = 1.08 * max(0.5, *(abs(v) for v in ax.get_xlim()))
    for i, s in enumerate(statistics):
        ax.axhspan(i - 0.42, i + 0.42, *((0.5, 1) if s["expected"] > 0 else (0, 0.5)), color="#f3ead7", lw=0, zorder=0)
    for key in SETS:
        ax.plot([], [], "o-", color=SHADES[key], label=_title(entry, key))
    ax.plot([], [], "o", color="black", mfc="white", label="not significant (Holm)")
    ax.axvline(0, color="black", lw=0.8)
    ax.set(xlim=(-edge, edge), ylim=(len(statistics) - 0.5, -0.5))
    ax.set_yticks(range(len(statistics)), [s["label"] for s in statistics])
    failing, clean = SIDES[level]
    ax.set_xlabel(f"d of the paired difference {failing} - {clean}, 95 % by problem (shaded: as drawn in the paper)")
    ax.set_title(f"{entry['picture']}: {entry['verdict']['status']} ({level}, {entry['pairs']} pairs)", fontsize=11)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, path)


def draw_level(folder: Path, level: str, entry: Mapping[str, Any], single: Mapping[str, Any]) -> None:
    """``time.png``, ``frequency.png`` and ``effects.png`` of one level."""
    draw_time(folder / "time.png", level, entry, single)
    draw_frequency(folder / "frequency.png", level, entry)
    draw_effects(folder / "effects.png", level, entry)


def _p(value: float | None) -> str:
    return (
        "–" if value is None else f"{value:.4f}".lstrip("0") if 0.0001 <= value < 1 else "< .0001" if value < 1 else "1"
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(results: Mapping[str, Any]) -> str:
    """``fluctuation.md``: verdicts, tables, and what is needed to read and repeat them."""
    levels = results["levels"]
    lines = [
        "# Do failures fluctuate as drawn?",
        "",
        *(f"- **{k}** {e['verdict']['sentence']}." for k, e in levels.items()),
    ]
    lines += [f"- Warning: {w}." for w in results["warnings"]]
    for level, entry in levels.items():
        failing, clean = SIDES[level]
        tokens = ", ".join(f"{k} {v:.0f}" for k, v in entry["tokens"].items())
        left = ", ".join(f"{n} {what}" for what, n in entry["left_out"].items() if n)
        lines += [
            "",
            f"## {level}: {entry['picture']} ({failing} against {clean})",
            "",
            f"{entry['pairs']} pairs of {entry['problems']} problems ({left}); {entry['seen']} of them on problems the "
            f"channels were selected on. Median tokens: {tokens}. Channels: {_title(entry, 'chosen')}, "
            f"{_title(entry, 'random')}.",
            "",
            _row(
                "statistic",
                "drawn",
                "n",
                "channels",
                failing,
                clean,
                "difference",
                "d_z",
                "Cliff's delta",
                "p",
                "p (Holm)",
                "verdict",
            ),
            "|" + "---|" * 12,
        ]
        for s in entry["statistics"].values():
            for key in SETS:
                e = s[key]
                means = ["–" if v is None else f"{v:.3f}" for v in e["mean"].values()]
                effects = [cell(e[k], n) for k, n in (("difference", 3), ("d_z", 2), ("cliffs_delta", 2))]
                name = [s["label"], "+" if s["expected"] > 0 else "-", str(s["n"])] if key == "chosen" else [""] * 3
                lines.append(_row(*name, key, *means, *effects, _p(e["p"]), _p(e["p_holm"]), e["verdict"]))
            lines.append(
                _row("", "", "", "chosen - random", "", "", "", cell(s["chosen_minus_random"]), "", "", "", "")
            )
        lines += ["", *(f"![{name} of {level}]({level}/{name}.png)" for name in ("time", "frequency", "effects"))]
    return "\n".join([*lines, "", *_notes(results), ""])


def _notes(results: Mapping[str, Any]) -> list[str]:
    used = dict.fromkeys(name for e in results["levels"].values() for name in e["statistics"])
    labels = {n: s["label"] for e in results["levels"].values() for n, s in e["statistics"].items()}
    return [
        "## How to read it",
        "",
        *(f"- {labels[name]}: {MEANING[name]}." for name in used),
        "- Every statistic is taken on |a| (heads: the norm) channel by channel and averaged over channels. Both "
        "windows of a pair are cut to the length of the shorter one, because most statistics depend on it; only the "
        "curves over time show whole windows.",
        "- z uses a channel's mean and deviation over all clean (instance: hard) tokens of the level, for both sides.",
        "- d_z: mean of the paired differences over their deviation. Cliff's delta: chance that a value of the first "
        "side exceeds one of the second, minus the converse.",
        f"- Intervals: {results['intervals']}, {results['bootstrap']} draws. p: {results['permutations']} sign flips "
        "of whole problems, two-sided; Holm over all statistics of all levels, for chosen and random channels apart.",
        "- A picture **holds** if more than half of its statistics differ significantly as drawn and none the other "
        "way. It **does not hold** if none does and one differs significantly the other way, or if by their intervals "
        f"all effects lie below d = {SMALL}. Else it is **not decided**.",
        f"- Compared: {results['source']}. Model {results['model']} ({results['fingerprint']}), block "
        f"{results['layer']}.",
        f"- Seed {results['seed']}, version {results['version']}, command `{results['command']}`.",
    ]


def print_table(results: Mapping[str, Any]) -> None:
    """One row per statistic, and the verdicts."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title="paired effects d_z, 95 % by problem", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("statistic (drawn)")
    for name in ("chosen", "random", "p Holm"):
        table.add_column(name, justify="right")
    for level, entry in results["levels"].items():
        table.add_section()
        table.add_row(f"[bold]{level}, {entry['pairs']} pairs")
        for s in entry["statistics"].values():
            name = f"{s['label']} ({'> 0' if s['expected'] > 0 else '< 0'})"
            table.add_row(name, *(cell(s[key]["d_z"]) for key in SETS), _p(s["chosen"]["p_holm"]))
    console = Console()
    console.print(table)
    for level, entry in results["levels"].items():
        console.print(f"[bold]{level}[/] {entry['verdict']['sentence']}", highlight=False)
    for warning in results["warnings"]:
        console.print(f"[yellow]warning[/] {warning}", highlight=False)
