"""Figures of the probe stages (PNG, drawn without a display)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.probes.detectors.metrics import roc
from neureasoner.probes.recording.record import record
from neureasoner.traces import Trace

COLOURS = {"chosen": "#1b6ca8", "paper": "#e08e0b", "random": "#999999", "length": "#bbbbbb"}


def _axes(n: int, height: float = 3.2) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * n, height), layout="constrained")
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_experts(path: Path, neurons: dict[str, Any], frequency: dict[str, np.ndarray]) -> None:
    """How often each component of the level's type is selected on failing spans; the chosen ones marked."""
    figure, axes = _axes(len(frequency))
    for ax, (level, values) in zip(axes, frequency.items(), strict=True):
        chosen = neurons["levels"][level]
        ax.plot(values, ".", color="#bbbbbb", ms=4)
        ax.plot(chosen["indices"], values[chosen["indices"]], "o", color="#c0392b", ms=4, label="chosen")
        share = neurons["joint"][level]
        kind = chosen["site"].split(":")[0]
        ax.set_title(
            f"{level}: joint top holds {share['heads']:.0%} heads (chance {share['heads_by_chance']:.0%})", fontsize=10
        )
        ax.set_xlabel(f"{kind} of block {neurons['layer']}")
        ax.set_ylabel("selected on share of failing spans")
        ax.legend(frameon=False)
    _save(figure, path)


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
    figure, axes = _axes(len(levels))
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
    _save(figure, folder / "spectrum.png")


def draw_scores(folder: Path, level: str, scores: dict[str, np.ndarray], results: dict[str, Any]) -> list[str]:
    """ROC curves of probe, paper probe and controls, and the chosen probe's scores by class. Returns file names."""
    figure, axes = _axes(2, 3.8)
    for key, colour in COLOURS.items():
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
    _save(figure, folder / f"{level}.png")
    return [f"{level}.png"]
