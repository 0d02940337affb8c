"""The paper's own samples: one per token, over the window that ends there (core.md §1.7.2), to reproduce its Table 4.

Neighbouring tokens share almost their whole window, so a random split of them puts near-copies on both sides. These
samples exist to show what that does to the figures; the shipped probes decide at separators.

Legend: ``t`` tokens, ``d`` features of the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.probes.detectors.estimators import make_estimator
from neureasoner.probes.detectors.metrics import auroc
from neureasoner.probes.features import MIN_TOKENS
from neureasoner.probes.labels import DROPPED, bounds_of, is_clean, labels_of, step_label
from neureasoner.probes.recording.record import record
from neureasoner.probes.spectrum import spectral_features
from neureasoner.traces import Trace


@dataclass
class TokenSamples:
    """``x [n, d]``, labels ``y [n]``, and the trajectory ``[n]`` each came from (no two of one problem)."""

    x: np.ndarray
    y: np.ndarray
    trajectory: np.ndarray


def token_labels(trace: Trace, level: str, window: int, easy: int) -> np.ndarray:
    """Label of every thinking token ``[t]``: that of its step (intra, inter), or the problem's up to the K-th step."""
    bounds = bounds_of(trace)
    out = np.full(bounds[-1], DROPPED)
    for step in range(len(bounds) - 1):
        if level == "instance":
            label = easy if len(bounds) > window and step < window else DROPPED
        else:
            label = step_label(trace, level, step)
        out[bounds[step] : bounds[step + 1]] = label
    out[: MIN_TOKENS - 1] = DROPPED
    return out


def token_features(x: np.ndarray, bounds: Sequence[int], level: str, window: int, tokens: np.ndarray) -> np.ndarray:
    """Spectral features ``[t, d]`` of the windows that end with ``tokens``: the open step and the k - 1 before it."""
    edges = np.array(bounds)
    out = []
    for token in tokens:
        open_step = int(np.searchsorted(edges, token, side="right")) - 1
        start = 0 if level == "instance" else edges[max(0, open_step - window + 1)]
        out.append(spectral_features(x[start : token + 1], level)[0])
    return np.stack(out)


def draw_trajectories(
    traces: Sequence[Trace], level: str, easy: dict[str, int], n: int, rng: np.random.Generator
) -> list[int]:
    """``n`` trajectories as the paper takes them: failing ones (instance: half easy, half hard), one per problem."""
    wanted = {"instance": (1, 0)}.get(level, (1,))
    chosen: list[int] = []
    seen: set[str] = set()
    for side in wanted:
        quota = len(chosen) + n // len(wanted)
        for i in rng.permutation(len(traces)):
            trace = traces[i]
            if len(chosen) == quota:
                break
            if level == "instance":
                fits = easy[trace.problem.id] == side
            else:
                label = labels_of(trace)
                placed = label.intra.step if level == "intra" else label.inter.steps
                fits = not is_clean(trace, level) and placed is not None
            if fits and trace.problem.id not in seen:
                seen.add(trace.problem.id)
                chosen.append(int(i))
    return chosen


def sample_tokens(
    model: Any,
    tokenizer: Any,
    traces: Sequence[Trace],
    level: str,
    window: int,
    channels: str,
    easy: dict[str, int],
    batch_size: int,
) -> TokenSamples:
    """All labelled tokens of ``traces``. Raises UserError if they are all of one class."""
    xs, ys, where = [], [], []
    for i, (trace, series) in enumerate(
        zip(traces, record(model, tokenizer, traces, [channels], batch_size, thinking_only=True), strict=True)
    ):
        labels = token_labels(trace, level, window, easy.get(trace.problem.id, DROPPED))
        tokens = np.flatnonzero(labels >= 0)
        if len(tokens):
            xs.append(token_features(series[channels], bounds_of(trace), level, window, tokens))
            ys.append(labels[tokens])
            where.append(np.full(len(tokens), i))
    if len({int(v) for y in ys for v in y}) < 2:
        raise UserError(f"{level}: the tokens of {len(traces)} trajectories are all of one class; give more traces")
    return TokenSamples(np.concatenate(xs), np.concatenate(ys), np.concatenate(where))


def table_4(samples: TokenSamples, split: str, seed: int) -> dict[str, float]:
    """One run of the paper's protocol: its MLP, 8:2, threshold 0.5. ``split``: 'tokens' (the paper) or 'trajectories'.

    Accuracy, balanced accuracy, recall and AUROC of the 20 %; accuracy of the larger class as what it takes to beat.
    """
    rng = np.random.default_rng([seed, len(samples.y)])
    units = np.arange(len(samples.y)) if split == "tokens" else samples.trajectory
    ids = rng.permutation(np.unique(units))
    test = np.isin(units, ids[: max(1, round(0.2 * len(ids)))])
    y, yt = samples.y[~test], samples.y[test]
    if len(set(y)) < 2 or len(set(yt)) < 2:
        return {}
    p = make_estimator("mlp", seed=seed, epochs=30).fit(samples.x[~test], y).predict_proba(samples.x[test])[:, 1]
    hit = (p > 0.5) == (yt == 1)
    recall, specificity = hit[yt == 1].mean(), hit[yt == 0].mean()
    return {
        "accuracy": float(hit.mean()),
        "majority": float(max(yt.mean(), 1 - yt.mean())),
        "balanced_accuracy": float((recall + specificity) / 2),
        "recall": float(recall),
        "auroc": auroc(yt, p),
    }
