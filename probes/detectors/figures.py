"""Figures of ``probes fit`` and ``probes report`` (PNG, drawn without a display)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.probes.detectors.metrics import roc
from neureasoner.probes.figures import panels, save

COLOURS = {"chosen": "#1b6ca8", "paper": "#e08e0b", "random": "#999999", "length": "#bbbbbb"}
CURVES = ("#e08e0b", "#2e8b57", "#1b6ca8", "#8e44ad")


def draw_scores(folder: Path, level: str, scores: dict[str, np.ndarray], results: dict[str, Any]) -> list[str]:
    """ROC curves of probe, paper probe and controls, and the chosen probe's scores by class. Returns file names."""
    figure, axes = panels(2, 3.8)
    for key, colour in COLOURS.items():
        if f"{key}.y" not in scores:  # too few easy and hard questions for the paper's kind beside an exit
            continue
        y, s = scores[f"{key}.y"], scores[f"{key}.score"]
        entry = results["controls"][key] if key in ("random", "length") else results[key]
        area = entry["test"]["auroc"]["value"]
        name = entry["name"] if key in ("chosen", "length") else f"{key}: {entry['name']}"
        label = f"{name} ({'-' if area is None else f'{area:.2f}'})"
        axes[0].plot(*roc(y, s), color=colour, lw=2 if key == "chosen" else 1.3, label=label)
    axes[0].plot([0, 1], [0, 1], ":", color="#cccccc")
    axes[0].set_xlabel("false positive rate")
    axes[0].set_ylabel("true positive rate")
    axes[0].set_title(f"{level}: test problems")
    axes[0].legend(frameon=False, fontsize=8)
    y, s = scores["chosen.y"], scores["chosen.score"]
    bins = np.linspace(0, 1, 31)
    for value, label, colour in ((0, "clean", "#1b6ca8"), (1, "failing", "#c0392b")):
        axes[1].hist(s[y == value], bins, density=True, alpha=0.6, color=colour, label=label)
    axes[1].axvline(results["chosen"]["test"]["threshold"], color="black", lw=1, label="threshold")
    axes[1].set_xlabel("probability")
    axes[1].set_title(f"{level}: scores of {results['chosen']['name']}")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, folder / f"{level}.png")
    return [f"{level}.png"]


def _forest(ax: Any, names: Sequence[str], values: Sequence[dict[str, Any]], colours: Sequence[str]) -> None:
    """Values with 95 % intervals, one line each, the first on top."""
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        if value["value"] is None:
            continue
        low, high = (value[k] if value[k] is not None else value["value"] for k in ("low", "high"))
        ax.plot([low, high], [-i, -i], color=colour, lw=1.6)
        ax.plot(value["value"], -i, "o", color=colour, ms=4)
    ax.set_yticks([-i for i in range(len(names))], names, fontsize=7)
    ax.grid(axis="x", color="#eeeeee")


def draw_report(folder: Path, summary: dict[str, Any]) -> list[str]:
    """One figure per level: feature sets, learning curves, what parts add, reliability. Returns file names."""
    from matplotlib.figure import Figure

    out = []
    for level, entry in summary["levels"].items():
        figure = Figure(figsize=(13, 9), layout="constrained")
        axes = figure.subplots(2, 2)
        sets = sorted(entry["sets"], key=lambda e: (e["control"], -(e["test"]["auroc"]["value"] or 0)))
        colour = {True: "#999999", False: "#1b6ca8"}
        _forest(
            axes[0, 0],
            [f"{e['set']} ({e['estimator']})" for e in sets],
            [e["test"]["auroc"] for e in sets],
            ["#e08e0b" if e["set"] == "spectral" else colour[e["control"]] for e in sets],
        )
        axes[0, 0].axvline(0.5, color="#cccccc", ls=":")
        axes[0, 0].set_title(
            f"{level}: test AUROC by problem (orange: the paper's features, grey: controls)", fontsize=9
        )
        for (name, curve), tint in zip(entry["curve"].items(), CURVES, strict=False):
            x = [c["trajectories"] for c in curve]
            axes[0, 1].plot(x, [c["mean"] for c in curve], "o-", color=tint, ms=3, label=name)
            axes[0, 1].fill_between(x, [c["low"] for c in curve], [c["high"] for c in curve], color=tint, alpha=0.15)
        axes[0, 1].axvline(20, color="#bbbbbb", ls=":", label="the paper's 20")
        axes[0, 1].set_xscale("log")
        axes[0, 1].set_xlabel("labelled training trajectories")
        axes[0, 1].set_ylabel("test AUROC")
        axes[0, 1].set_title(f"{level}: learning curves (logistic, 95 % bands)", fontsize=9)
        axes[0, 1].legend(frameon=False, fontsize=8)
        kind, pairs = next(iter(entry["nested"].items()))
        _forest(
            axes[1, 0],
            [f"{e['smaller']}  →  {e['larger']}" for e in pairs],
            [e["auroc_difference"] for e in pairs],
            ["#999999" if "random" in e["larger"] else "#1b6ca8" for e in pairs],
        )
        axes[1, 0].axvline(0, color="#cccccc", ls=":")
        axes[1, 0].set_title(f"{level}: what a part adds (difference in test AUROC, paired, {kind})", fontsize=9)
        axes[1, 1].plot([0, 1], [0, 1], ":", color="#cccccc")
        for bins, tint in zip(entry["calibration"], CURVES, strict=False):
            kept = [(p, o) for p, o in zip(bins["predicted"], bins["observed"], strict=True) if p is not None]
            label = f"{bins['set']} (error {bins['error']['value']:.3f})"
            axes[1, 1].plot([p for p, _ in kept], [o for _, o in kept], "o-", ms=3, color=tint, label=label)
        axes[1, 1].set_xlabel("probability told")
        axes[1, 1].set_ylabel("share that failed" if level != "instance" else "share that were easy")
        axes[1, 1].set_title(f"{level}: reliability on test problems", fontsize=9)
        axes[1, 1].legend(frameon=False, fontsize=8)
        save(figure, folder / f"{level}_report.png")
        out.append(f"{level}_report.png")
    return out
