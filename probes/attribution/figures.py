"""Figures of ``probes locate`` (PNG, drawn without a display)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.probes.attribution.experts import MEASURES
from neureasoner.probes.figures import panels, save
from neureasoner.probes.recording.record import record
from neureasoner.traces import Trace

COLOURS = {"neuron": "#1b6ca8", "head": "#c0392b"}
SHADES = {"raw": "#cfcfcf", "z": "#8d99a6", "contrast": "#e0a899", "effect": "#c0392b"}


def _whiskers(intervals: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """``(values [n], reach down and up [2, n])``, nan where undefined. A bootstrap can miss its value."""
    value, low, high = (np.array([i[k] for i in intervals], dtype=np.float64) for k in ("value", "low", "high"))
    return value, np.maximum(0, np.stack([value - low, high - value]))


def draw_experts(path: Path, neurons: Mapping[str, Any]) -> None:
    """Share of heads in the joint selection by level and measure; where blocks were scanned, what lies in which."""
    from matplotlib.figure import Figure

    experts = neurons["experts"]
    levels, depth = experts["levels"], experts.get("depth", {})
    separated = any("separation" in d for d in depth.values())
    rows = 1 + bool(depth) + separated
    figure = Figure(figsize=(4.4 * max(2, len(levels)), 3.2 * rows), layout="constrained")
    parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    _draw_types(parts[0].add_subplot(), neurons)
    for row, draw in enumerate([_draw_depth, _draw_separation][: rows - 1], 1):
        axes = parts[row].subplots(1, len(levels), sharey=True, squeeze=False)[0]
        for i, (ax, level) in enumerate(zip(axes, levels, strict=True)):
            draw(ax, level, depth[level], experts["blocks"])
            ax.set_xlabel("block")
            if i == 0:
                ax.legend(frameon=False, fontsize=8)
            else:
                ax.set_ylabel("")
    save(figure, path)


def _draw_types(ax: Any, neurons: Mapping[str, Any]) -> None:
    experts = neurons["experts"]
    levels, chance = experts["levels"], experts["chance"]
    for i, measure in enumerate(MEASURES):
        at = [(j, e["measures"][measure]) for j, e in enumerate(levels.values()) if measure in e["measures"]]
        if at:
            value, reach = _whiskers([m["heads"] for _, m in at])
            x = np.array([j for j, _ in at]) + 0.2 * (i - 1.5)
            ax.bar(x, 100 * value, 0.18, yerr=100 * reach, color=SHADES[measure], capsize=3, label=measure)
    ax.axhspan(100 * chance["low"], 100 * chance["high"], color="#000000", alpha=0.08, lw=0)
    ax.axhline(100 * chance["value"], color="black", ls=":", lw=1.2, label="by chance (95 % range)")
    ax.set_xticks(range(len(levels)), [f"{k}\n{e['verdict']}" for k, e in levels.items()])
    ax.set_xlim(-0.6, len(levels) - 0.4)
    ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
    ax.set_ylabel("heads, % of the selection")
    ax.set_title(
        f"heads among the first {experts['size']} of block {neurons['layer']}'s neurons and heads", fontsize=11
    )
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_depth(ax: Any, level: str, depth: Mapping[str, Any], blocks: Sequence[int]) -> None:
    x, below = np.arange(len(blocks)), np.zeros(len(blocks))
    for kind, colour in COLOURS.items():
        value = 100 * np.array([v["value"] for v in depth["share"][kind]], dtype=np.float64)
        ax.bar(x, value, 0.8, bottom=below, color=colour, label=f"{kind}s")
        below += value
    ax.axhline(100 / len(blocks), color="black", ls=":", lw=1.2, label="by chance")
    _block_ticks(ax, blocks)
    ax.set_ylim(0, 105)
    ax.set_ylabel(f"% of the first {depth['size']} of all blocks")
    ax.set_title(f"{level}: experts by block", fontsize=11)


def _draw_separation(ax: Any, level: str, depth: Mapping[str, Any], blocks: Sequence[int]) -> None:
    for (kind, values), shift in zip(depth.get("separation", {}).items(), (-0.1, 0.1), strict=False):
        value, reach = _whiskers(values)
        at = np.arange(len(blocks)) + shift
        ax.errorbar(at, value, reach, fmt="o-", color=COLOURS[kind], ms=4, lw=1, capsize=2, label=f"{kind}s")
    ax.axhline(0.5, color="black", ls=":", lw=1.2)
    _block_ticks(ax, blocks)
    ax.set_ylim(0, 1.05)
    ax.set_ylabel("AUROC, unseen problems")
    ax.set_title(f"{level}: failing from clean spans", fontsize=11)


def _block_ticks(ax: Any, blocks: Sequence[int]) -> None:
    shown = range(0, len(blocks), -(-len(blocks) // 12))
    ax.set_xticks(list(shown), [str(blocks[i]) for i in shown])


def draw_selected(path: Path, neurons: Mapping[str, Any], gains: Mapping[str, np.ndarray]) -> None:
    """How much more often failing spans select each component of the level's type than clean ones; the chosen marked.

    The darker a mark, the more draws of problems choose the component again.
    """
    figure, axes = panels(len(gains))
    for ax, (level, values) in zip(axes, gains.items(), strict=True):
        chosen = neurons["levels"][level]
        kind, at = chosen["site"].split(":")[0], chosen["indices"]
        ax.plot(values, ".", color="#bbbbbb", ms=4, zorder=0)
        marks = ax.scatter(at, values[at], c=chosen["again"], cmap="Reds", vmin=0, vmax=1, s=22, edgecolors="#7b241c")
        ax.axhline(0, color="black", lw=0.6)
        ax.set_title(f"{level}: {len(at)} {kind}s chosen", fontsize=11)
        ax.set_xlabel(f"{kind} of block {neurons['layer']}")
        ax.set_ylabel("failing - clean share of spans" if chosen["n_clean"] else "share of failing spans")
        axes[0].figure.colorbar(marks, ax=ax, label="chosen again")
    save(figure, path)


def draw_example(
    folder: Path,
    model: Any,
    tokenizer: Any,
    neurons: dict[str, Any],
    pairs: Mapping[str, tuple[Sequence[tuple[Trace, list[int]]], Sequence[tuple[Trace, list[int]]]]],
    batch_size: int,
    n: int = 8,
) -> None:
    """Mean share of power by frequency over the chosen channels, some failing spans against some clean ones."""
    levels = [k for k in neurons["levels"] if pairs[k][0] and pairs[k][1]]
    if not levels:
        return
    grid = np.linspace(0, 0.5, 26)
    figure, axes = panels(len(levels))
    for ax, level in zip(axes, levels, strict=True):
        site = neurons["levels"][level]["site"]
        for side, label, colour in zip(pairs[level], ("failing", "clean"), ("#c0392b", "#1b6ca8"), strict=True):
            curves = []
            chosen = side[:n]
            for (_, targets), series in zip(
                chosen, record(model, tokenizer, [t for t, _ in chosen], [site], batch_size), strict=True
            ):
                x = np.abs(series[site][min(targets) : max(targets) + 1].astype(np.float64))
                if len(x) < 4:
                    continue
                power = np.abs(np.fft.rfft(x - x.mean(0), axis=0)) ** 2
                share = (power / np.maximum(power.sum(0), 1e-12)).mean(1) * len(power)
                curves.append(np.interp(grid, np.fft.rfftfreq(len(x)), share))
            if curves:
                ax.plot(grid, np.mean(curves, axis=0), color=colour, label=f"{label} (n={len(curves)})")
        ax.set_title(f"{level}: spectrum of the chosen channels")
        ax.set_xlabel("cycles per token")
        ax.set_ylabel("power, relative to flat")
        ax.legend(frameon=False)
    save(figure, folder / "spectrum.png")
