"""Figure 5: Cons@k of two arms over k, their difference in pairs of problems, and the figure.

Legend: ``P`` problems, ``S`` samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.evaluation.metrics import (
    Outcome,
    accuracy_interval,
    answer_classes,
    by_problem,
    cons_at_k,
    interval,
    resampled_means,
)
from neureasoner.evaluation.runner import equivalence, outcomes
from neureasoner.traces import Problem, read_traces

SIZES = (4, 8, 16, 32, 64)


def votes(rows: Sequence[Outcome], problems: Mapping[str, Problem], seed: int) -> dict[int, np.ndarray]:
    """Cons@k ``[P]`` by k, problems in order of id: as many k of ``SIZES`` as every problem has samples for."""
    groups = by_problem(rows)
    samples = min(map(len, groups.values()))
    groups = {i: group[:samples] for i, group in groups.items()}
    classes = [answer_classes([o.answer for o in group], equivalence(problems[i])) for i, group in groups.items()]
    correct = [[o.correct for o in group] for group in groups.values()]
    return {k: cons_at_k(classes, correct, k, seed=seed) for k in SIZES if k <= samples}


def curves(folder: Path, arms: Sequence[str], results: Mapping[str, Any]) -> dict[str, Any]:
    """``{"arms": {arm: {k: {accuracy, ci}}}, "difference": {k: {accuracy, ci}}}`` of an evaluation's traces.

    The difference is second arm less first, problem by problem. Raises UserError for too few samples.
    """
    seed, resamples = results["seeds"]["bootstrap"], results["intervals"]["resamples"]
    by_arm: dict[str, dict[int, np.ndarray]] = {}
    for arm in arms:
        traces = read_traces(folder / "traces" / f"{arm}.jsonl")
        rows = outcomes(traces, results["sampling"]["max_new_tokens"])
        by_arm[arm] = votes(rows, {t.problem.id: t.problem for t in traces}, seed)
    sizes = [k for k in SIZES if all(k in found for found in by_arm.values())]
    if not sizes:
        raise UserError(f"{folder}: a vote needs at least {SIZES[0]} samples a problem; evaluate with samples=64")

    def entry(values: np.ndarray, ends: Any = accuracy_interval) -> dict[str, Any]:
        draws = resampled_means(values[:, None], resamples, seed)[:, 0]
        return {"accuracy": float(values.mean()), "ci": ends(values, draws)}

    first, second = (by_arm[arm] for arm in arms)
    return {
        "arms": {arm: {k: entry(found[k]) for k in sizes} for arm, found in by_arm.items()},
        "difference": {k: entry(second[k] - first[k], lambda _, draws: interval(draws)) for k in sizes},
    }


def figure(found: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """Accuracy over k with bands, one line an arm. ``names``: what each arm is called."""
    from matplotlib.figure import Figure

    drawn: Any = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    for colour, (arm, by_k) in zip(("0.35", "C0"), found["arms"].items(), strict=True):
        k = list(by_k)
        low, high = zip(*(e["ci"] for e in by_k.values()), strict=True)
        axes.fill_between(k, 100 * np.array(low), 100 * np.array(high), color=colour, alpha=0.15, linewidth=0)
        axes.plot(k, [100 * e["accuracy"] for e in by_k.values()], "o-", color=colour, label=names[arm], markersize=4)
    axes.set_xscale("log", base=2)
    axes.set(xticks=k, xlabel="samples k in the vote", ylabel="Cons@k, %")
    axes.set_xticklabels([str(i) for i in k])
    axes.legend(frameon=False, loc="best")
    axes.grid(alpha=0.25)
    return drawn
