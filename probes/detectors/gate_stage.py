"""``probes gate``: fit the failure gate, and test it beside its controls (core.md §3.5).

Legend: ``n`` questions, ``R`` bootstrap draws. Label and score polarity: 1 means the question needs intervention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner import __version__
from neureasoner.artifacts import write_json, write_text
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.probes.detectors.gate import (
    POLARITY,
    SETTINGS,
    FailureGate,
    pooled_prompts,
    question_values,
    select_channels,
    youden,
)
from neureasoner.probes.detectors.gate_config import GateConfig
from neureasoner.probes.detectors.metrics import auroc, bootstrap_draws, interval, ratio, roc, weighted_auroc
from neureasoner.probes.detectors.probe import git_revision
from neureasoner.probes.labels import SPLITS, labels_of, solving_rates, split_problems
from neureasoner.sites import Layout
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces

FEW = 50  # training questions below which a warning is due
Prompt = Sequence[int]


def question_labels(traces: Sequence[Trace], config: GateConfig) -> dict[str, int]:
    """Problem id -> 1 (fails: solving rate below ``fails_below``) or 0 (solved); a dropped middle is left out."""
    solved = config.solved_from or config.fails_below
    rates = {k: rate for k, (rate, _) in solving_rates(traces).items()}
    return {
        k: int(rate < config.fails_below) for k, rate in rates.items() if rate < config.fails_below or rate >= solved
    }


def figures(y: np.ndarray, score: np.ndarray, alarm: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """Test figures with 95 % intervals (problems resampled): ``y``, ``score``, ``alarm`` ``[n]``, ``draws [R, n]``."""
    hit, calm = alarm & (y == 1), ~alarm & (y == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = [(draws @ part) / (draws @ whole) for part, whole in ((hit, y == 1), (calm, y == 0))]
    return {
        "auroc": interval(weighted_auroc(y, score, draws)),
        "balanced_accuracy": interval((rates[0] + rates[1]) / 2),
        "recall": ratio(hit, y == 1, draws),
        "precision": ratio(hit, alarm, draws),
    }


class Data:
    """The questions in one order: prompts, labels ``y``, split, and what the controls look at, all ``[n]``."""

    def __init__(self, traces: Sequence[Trace], config: GateConfig):
        for t in traces:
            labels_of(t)
        split = split_problems(traces, config.validation, config.test, config.seed)
        labels = question_labels(traces, config)
        first = {t.problem.id: t for t in reversed(traces) if t.problem.id in labels}
        self.prompts = [t.prompt_ids for t in first.values()]
        self.y = np.array([labels[p] for p in first])
        self.split = np.array([split[p] for p in first])
        self.family = np.array([t.problem.family for t in first.values()])
        self.difficulty = np.array([f"{t.problem.family} {t.problem.difficulty}" for t in first.values()])
        self.length = np.array([len(p) for p in self.prompts], dtype=np.float64)
        short = [t.id for t in first.values() if len(t.prompt_ids) < 2]
        if short:
            raise UserError(f"trace '{short[0]}' has fewer than 2 prompt tokens; sample it again with data rollouts")
        self.counts = {p: [int((self.y[self.split == p] == v).sum()) for v in (1, 0)] for p in SPLITS}
        for part, (failing, solved) in self.counts.items():
            if not failing or not solved:
                raise UserError(
                    f"{part} has {failing} failing and {solved} solved problems, at least one of each is needed; "
                    "sample more problems, or move fails_below"
                )

    def of(self, part: str) -> np.ndarray:
        """Questions of a split, as indices."""
        return np.flatnonzero(self.split == part)


def fit_gate(
    data: Data, y: np.ndarray, pooled: np.ndarray, model: Any, config: GateConfig, origin: dict[str, Any]
) -> tuple[FailureGate, np.ndarray]:
    """Select channels and fit on labels ``y [n]`` of training and validation; the gate and all scores ``[n]``.

    ``pooled [n_train, N]``: prompt means of the training questions.
    """
    train, held = data.of("train"), data.of("validation")
    channels = select_channels(pooled, y[train], config.channels, Layout.of(model).intermediate_size)
    values = question_values(model, channels, data.prompts, config.batch_size)
    gate = FailureGate(channels, **origin, **{k: getattr(config, k) for k in SETTINGS})
    gate.fit([values[i] for i in train], y[train], ([values[i] for i in held], y[held]))
    return gate, gate.predict_proba(values)


def controls(data: Data) -> dict[str, tuple[np.ndarray, float]]:
    """Scores of all questions ``[n]`` and threshold of the predictors that look at no activation.

    Prompt length; failing rate of the family; failing rate of the difficulty within the family. The last two know what
    a user's question does not come with: a gate that does not beat them has learned to read the difficulty.
    """
    from sklearn.linear_model import LogisticRegression

    train, held = data.of("train"), data.of("validation")
    x = ((data.length - data.length[train].mean()) / (data.length[train].std() or 1.0))[:, None]
    length = LogisticRegression().fit(x[train], data.y[train]).predict_proba(x)[:, 1]
    out = {"length": (length, youden(data.y[held], length[held]))}
    for name, group in (("family", data.family), ("difficulty", data.difficulty)):
        kinds, of = np.unique(group, return_inverse=True)
        if len(kinds) > 1:
            n, failing = np.bincount(of[train], minlength=len(kinds)), np.bincount(of[train], data.y[train], len(kinds))
            rate = (failing + data.y[train].mean()) / (n + 1)  # a kind that training lacks has the overall rate
            out[name] = (rate[of], 0.5)  # alarm where the majority failed
    return out


def gate(config: GateConfig) -> dict[str, Any]:
    """Stage ``probes gate``. Writes ``gate/``, ``results.json``, ``report.md`` and ``roc.png``."""
    from neureasoner.models import fingerprint, load
    from neureasoner.probes.detectors.fit import command_line

    folder = StageFolder(config.out, "probes gate", config, inputs=[*model_files(config.model), config.traces])
    if folder.done:
        return folder.summary
    data = Data(read_traces(config.traces), config)
    train, held, test = (data.of(part) for part in SPLITS)
    model, _ = load(config.model)
    origin: dict[str, Any] = {"model": config.model, "model_fingerprint": fingerprint(model)}
    pooled = pooled_prompts(model, [data.prompts[i] for i in train], config.batch_size)
    fitted, score = fit_gate(data, data.y, pooled, model, config, origin)
    rng = np.random.default_rng([config.seed, 5])
    blind_gates = []
    for _ in range(config.permutations):  # a control of the whole search, selection of channels included
        shuffled = data.y.copy()
        for part in (train, held):
            shuffled[part] = rng.permutation(shuffled[part])
        blind_gates.append(fit_gate(data, shuffled, pooled, model, config, origin))
    blind, blind_score = blind_gates[0]
    scores = {"gate": (score, fitted.threshold)} | controls(data) | {"shuffled": (blind_score, blind.threshold)}
    y, draws = data.y[test], bootstrap_draws(len(test), config.bootstrap, config.seed)
    tested = {k: {"threshold": cut, **figures(y, s[test], s[test] > cut, draws)} for k, (s, cut) in scores.items()}
    blocks, n = np.unique(fitted.channels[:, 0], return_counts=True)
    warnings = []
    if len(train) < FEW:
        warnings.append(f"{len(train)} training questions are few (fewer than {FEW}): sample more problems")
    if tested["gate"]["auroc"]["low"] is None or tested["gate"]["auroc"]["low"] <= 0.5:
        warnings.append("the gate's AUROC on test problems is not above chance: do not steer by it")
    blindly = {k: tested[k]["auroc"]["value"] for k in ("length", "family", "difficulty") if k in tested}
    best = max(blindly, key=lambda k: blindly[k])
    if blindly[best] >= tested["gate"]["auroc"]["value"]:
        warnings.append(f"the gate tells no more than '{best}' alone does")
    results = {
        "polarity": POLARITY,
        "test": tested["gate"],
        "controls": {k: v for k, v in tested.items() if k != "gate"},
        "questions": {p: {"failing": f, "solved": s} for p, (f, s) in data.counts.items()},
        "channels_by_block": dict(zip(blocks.tolist(), n.tolist(), strict=True)),
        "shuffled_aurocs": [round(auroc(y, s[test]), 4) for _, s in blind_gates],
        "epochs": len(fitted.history_),
        "warnings": warnings,
        "seed": config.seed,
        "intervals": f"95 %, {config.bootstrap} bootstrap draws of test problems",
        **origin,
        "command": command_line(),
        "version": __version__,
        "git": git_revision(),
    }
    fitted.notes = {"test": tested["gate"], "split": "by problem", "fails_below": config.fails_below}
    fitted.save(folder.path / "gate")
    draw_roc(folder.path / "roc.png", y, {k: s[test] for k, (s, _) in scores.items()}, tested)
    text = markdown(results)
    write_text(folder.path / "report.md", text)
    write_json(folder.path / "results.json", results)
    print(text, flush=True)
    return folder.finish(results)


def draw_roc(path: Path, y: np.ndarray, scores: dict[str, np.ndarray], tested: dict[str, Any]) -> None:
    """ROC curves of the gate and its controls on test problems."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    ax = figure.add_subplot()
    colours = {
        "gate": "#1b6ca8",
        "length": "#e08e0b",
        "family": "#7a9a3a",
        "difficulty": "#8e44ad",
        "shuffled": "#999999",
    }
    for name, score in scores.items():
        label = f"{name} ({tested[name]['auroc']['value']:.2f})"
        ax.plot(*roc(y, score), color=colours[name], lw=2 if name == "gate" else 1.3, label=label)
    ax.plot([0, 1], [0, 1], ":", color="#cccccc")
    ax.set(xlabel="solved questions taken for failing", ylabel="failing questions found")
    ax.set_title(f"{len(y)} test problems, AUROC in brackets", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def markdown(results: dict[str, Any]) -> str:
    """The results as a table, gate first, with what the labels mean."""

    def cell(v: dict[str, Any]) -> str:
        if v["value"] is None:
            return "–"
        return f"{v['value']:.2f}" + ("" if v["low"] is None else f" [{v['low']:.2f}, {v['high']:.2f}]")

    names = ("auroc", "balanced_accuracy", "recall", "precision")
    lines = ["# Failure gate", "", f"Positive: {results['polarity']}. Intervals: {results['intervals']}.", ""]
    parts = (f"{k} {v['failing']} failing / {v['solved']} solved" for k, v in results["questions"].items())
    lines += [f"Questions: {'; '.join(parts)}.", "", f"| | {' | '.join(n.replace('_', ' ') for n in names)} |"]
    lines += ["|---" * (len(names) + 1) + "|"]
    for name, row in {"gate": results["test"], **results["controls"]}.items():
        lines.append(f"| {name} | {' | '.join(cell(row[n]) for n in names)} |")
    blind = results["shuffled_aurocs"]
    lines += ["", f"Shuffled training labels, {len(blind)} permutations (the first stands above): AUROC on average "]
    lines[-1] += f"{np.mean(blind):.2f}, from {min(blind):.2f} to {max(blind):.2f}."
    return "\n".join([*lines, *[f"\nWarning: {w}." for w in results["warnings"]]]) + "\n"
