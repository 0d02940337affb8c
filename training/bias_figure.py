"""Figures of bias-only adaptation (PNG, drawn without a display)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

WINDOW = 10  # steps of the moving mean


def plot(history: Sequence[dict[str, float]], path: Path) -> None:
    """Share of right answers and response length over the updates (RL), or the loss (SFT)."""
    import numpy as np
    from matplotlib.figure import Figure

    keys = [("right", "right answers, %", 100.0), ("completions/mean_length", "tokens per response", 1.0)]
    if "right" not in history[0]:
        keys = [("loss", "loss per token (nats)", 1.0)]
    figure: Any = Figure(figsize=(4.6 * len(keys), 3.2), layout="constrained")
    steps = np.array([h["step"] for h in history])
    for i, (key, name, scale) in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), i + 1)
        values = np.array([h[key] for h in history]) * scale
        axes.plot(steps, values, color="0.75", linewidth=1, label="each update")
        width = min(WINDOW, len(values))
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color="C0", label=f"mean of the last {width}")
        axes.set(xlabel="update", ylabel=name)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
