"""``probes fit``: one probe per level, chosen on validation problems, tested on others, beside its controls."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner import __version__
from neureasoner.artifacts import read_json, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.probes.config import FitConfig
from neureasoner.probes.detectors.metrics import auroc, bootstrap_draws, interval, ratio, threshold_for, weighted_auroc
from neureasoner.probes.detectors.probe import Probe, git_revision
from neureasoner.probes.detectors.tables import Table, build_tables
from neureasoner.probes.features import LEVELS, FeatureSet
from neureasoner.probes.labels import (
    SPLITS,
    instance_labels,
    is_clean,
    labels_of,
    onset,
    solving_rates,
    split_problems,
)
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces

MIN_POSITIVE = {"train": 8, "validation": 3, "test": 1}  # samples, and as many negative ones


class Level:
    """Everything the fits of one level share: its traces, splits, and which traces are clean or failing."""

    def __init__(
        self,
        config: FitConfig,
        name: str,
        traces: Sequence[Trace],
        split: dict[str, str],
        easy: dict[str, int],
        tables: dict[tuple[str, int], Table],
        origin: dict[str, Any],
    ):
        self.config, self.name, self.traces, self.tables, self.origin = config, name, traces, tables, origin
        self.windows = list(dict.fromkeys(getattr(config, name)))
        self.split = np.array([split[t.problem.id] for t in traces])
        if name == "instance":
            self.onsets: list[int | None] = [None] * len(traces)
            self.clean = np.array([easy[t.problem.id] == 0 for t in traces])
        else:
            self.onsets = [onset(t, name) for t in traces]
            self.clean = np.array([is_clean(t, name) for t in traces])

    def shortage(self) -> str:
        """Why this level cannot be fitted, or ""."""
        for window, part in product(self.windows, SPLITS):
            table = self.table(window)
            y = table.y[table.valid_for(["spectral"]) & (self.split[table.trace] == part)]
            least = MIN_POSITIVE[part]
            if (y == 1).sum() < least or (y == 0).sum() < least:
                return (
                    f"{part} (window {window}) has {(y == 1).sum()} failing and {(y == 0).sum()} clean samples, "
                    f"at least {least} of each are needed; sample more traces"
                )
        return ""

    def features(self, name: str, window: int, channels: str) -> FeatureSet:
        return FeatureSet.named(name, self.name, window, channels, str(self.origin["residual"]))

    def fit(self, name: str, window: int, channels: str, decay: float) -> tuple[Probe, float]:
        """Train one candidate; its validation AUROC."""
        features = self.features(name, window, channels)
        table = self.table(window)
        x = self.matrix(features)
        usable = table.valid_for(features.parts) & (table.y >= 0)
        train, held = (usable & (self.split[table.trace] == part) for part in ("train", "validation"))
        probe = Probe(
            features,
            model=self.config.model,
            model_fingerprint=self.origin["fingerprint"],
            layer=self.origin["layer"],
            hidden=self.config.hidden,
            epochs=self.config.epochs,
            dropout=self.config.dropout,
            weight_decay=decay,
            seed=self.config.seed,
        ).fit(x[train], table.y[train], (x[held], table.y[held]))
        area = auroc(table.y[held], probe.predict_proba(x[held]))
        scores = self.scores(probe)
        maxima = self.maxima(probe, scores)[self.clean & (self.split == "validation")]
        probe.threshold = threshold_for(maxima, self.config.false_alarm_rate)
        return probe, area

    def table(self, window: int) -> Table:
        """Labels and places of the decisions over ``window`` (the same whatever the part)."""
        return self.tables["length", window]

    def matrix(self, features: FeatureSet) -> np.ndarray:
        """``[n, d]`` of a feature set, its parts put together in its order."""
        random = features.channels == self.origin["random"].get(self.name)
        named = {"spectral": "random" if random else "spectral"}
        return np.concatenate([self.tables[named.get(p, p), features.window].x for p in features.parts], axis=1)

    def scores(self, probe: Probe) -> np.ndarray:
        """Probability of every sample ``[n]``, -inf where the features are not valid."""
        table = self.table(probe.features.window)
        p = probe.predict_proba(self.matrix(probe.features))
        return np.where(table.valid_for(probe.features.parts), p, -np.inf)

    def maxima(self, probe: Probe, scores: np.ndarray) -> np.ndarray:
        """Largest score of every trace ``[n traces]``."""
        out = np.full(len(self.traces), -np.inf)
        np.maximum.at(out, self.table(probe.features.window).trace, scores)
        return out

    def choose(self, names: Sequence[str], channels: str) -> tuple[Probe, list[dict[str, Any]]]:
        """Fit all names, windows and weight decays; the best on validation, and the list of all."""
        grid = list(product(names, self.windows, self.config.weight_decay))
        tried = [self.fit(n, w, channels, d) for n, w, d in grid]
        best = max(range(len(tried)), key=lambda i: (round(tried[i][1], 4), -len(tried[i][0].features.parts)))
        log = [
            {"name": n, "window": w, "weight_decay": d, "validation_auroc": round(a, 4)}
            for (n, w, d), (_, a) in zip(grid, tried, strict=True)
        ]
        tried[best][0].notes = {"validation_auroc": log[best]["validation_auroc"], "tried": log}
        return tried[best][0], log

    def report(self, probe: Probe) -> dict[str, Any]:
        """Test figures with 95 % intervals (problems resampled), at the probe's threshold."""
        table = self.table(probe.features.window)
        scores = self.scores(probe)
        problems = sorted({t.problem.id for t, s in zip(self.traces, self.split, strict=True) if s == "test"})
        index = {p: i for i, p in enumerate(problems)}
        of_trace = np.array([index.get(t.problem.id, -1) for t in self.traces])
        draws = bootstrap_draws(len(problems), self.config.bootstrap, self.config.seed)

        def per_problem(where: np.ndarray, values: Any = 1.0) -> np.ndarray:
            out = np.zeros(len(problems))
            np.add.at(out, where, values)
            return out

        rows = (self.split[table.trace] == "test") & (table.y >= 0) & np.isfinite(scores)
        y, s, p = table.y[rows], scores[rows], of_trace[table.trace[rows]]
        alarm = s > probe.threshold
        hit = alarm & (y == 1)
        out: dict[str, Any] = {
            "n": int(rows.sum()),
            "n_problems": len(problems),
            "base_rate": round(float((y == 1).mean()), 4) if len(y) else None,
            "threshold": probe.threshold,
            "auroc": interval(weighted_auroc(y, s, draws[:, p])),
            "accuracy": ratio(per_problem(p, alarm == (y == 1)), per_problem(p), draws),
            "recall": ratio(per_problem(p, hit), per_problem(p, y == 1), draws),
            "precision": ratio(per_problem(p, hit), per_problem(p, alarm), draws),
        }
        clean = np.flatnonzero(self.clean & (self.split == "test"))
        tokens = np.array([self.traces[int(i)].thinking_end for i in clean], dtype=np.float64)
        fired = np.zeros(len(self.traces))
        np.add.at(fired, table.trace, scores > probe.threshold)
        where = of_trace[clean]
        out["false_alarms_per_1000_tokens"] = ratio(
            per_problem(where, fired[clean]), per_problem(where, tokens / 1000), draws
        )
        out["clean_traces_alarmed"] = ratio(per_problem(where, fired[clean] > 0), per_problem(where), draws)
        out["n_clean_traces"] = len(clean)
        if self.name != "instance":
            out |= self._delay(probe, scores, of_trace, per_problem, draws)
        return out

    def _delay(
        self, probe: Probe, scores: np.ndarray, of_trace: np.ndarray, per_problem: Any, draws: np.ndarray
    ) -> dict[str, Any]:
        """First alarm at or after the onset, on failing test traces; delays counted from the onset's separator."""
        table = self.table(probe.features.window)
        first, ends = {}, {}
        for i in range(len(scores)):
            trace, step = int(table.trace[i]), int(table.step[i])
            begin = self.onsets[trace]
            if begin is None or self.split[trace] != "test":
                continue
            if step == begin:
                ends[trace] = int(table.token[i])
            if step >= begin and trace not in first and scores[i] > probe.threshold:
                first[trace] = (step - begin, int(table.token[i]))
        failing = [i for i in range(len(self.traces)) if self.onsets[i] is not None and self.split[i] == "test"]
        found = [i for i in failing if i in first and i in ends]
        at, at_found = of_trace[failing].astype(int), of_trace[found].astype(int)
        counted = per_problem(at_found)
        return {
            "n_failing_traces": len(failing),
            "failing_traces_detected": ratio(counted, per_problem(at), draws),
            "delay_steps": ratio(per_problem(at_found, [first[i][0] for i in found]), counted, draws),
            "delay_tokens": ratio(per_problem(at_found, [first[i][1] - ends[i] for i in found]), counted, draws),
        }


def fit_level(level: Level, out: Path, channels: str, random: str) -> dict[str, Any]:
    """Fit, choose and test one level; writes ``<level>/`` and ``paper/<level>/``. Returns its part of the results."""
    import torch

    name = level.name
    fixed = level.config.candidates
    result: dict[str, Any] = {}
    probes: dict[str, Probe] = {}
    probes["chosen"], candidates = level.choose(fixed, channels)
    probes["paper"], paper_log = level.choose(["spectral"], channels)
    probes["random"], _ = level.choose(["spectral"], random)
    probes["length"], _ = level.choose(["length"], channels)
    scores: dict[str, torch.Tensor] = {}
    for key, probe in probes.items():
        table = level.table(probe.features.window)
        values = level.scores(probe)
        rows = (level.split[table.trace] == "test") & (table.y >= 0) & np.isfinite(values)
        scores[f"{key}.y"], scores[f"{key}.score"] = torch.tensor(table.y[rows]), torch.tensor(values[rows])
        result[key] = {
            "name": probe.features.name,
            "window": probe.features.window,
            "channels": probe.features.channels,
            "validation_auroc": probe.notes["validation_auroc"],
            "test": level.report(probe),
        }
    result["candidates"], result["paper_candidates"] = candidates, paper_log
    controls = {"random": result.pop("random"), "length": result.pop("length")}
    for key, folder in (("chosen", out / name), ("paper", out / "paper" / name)):
        probes[key].notes |= {"test": result[key]["test"], "seed": level.config.seed, "split": "by problem"}
        probes[key].save(folder)
    write_tensors(out / name / "scores.safetensors", scores)
    return {**result, "controls": controls}


def _check_neurons(config: FitConfig, model: Any, split: dict[str, str]) -> dict[str, Any]:
    from neureasoner.models import fingerprint

    neurons = read_json(config.neurons)
    if neurons.get("kind") != "neurons" or not neurons.get("levels"):
        raise UserError(f"{config.neurons}: not a neurons.json of probes locate; run probes locate first")
    found = fingerprint(model)
    if neurons["fingerprint"] != found:
        raise UserError(
            f"{config.neurons}: selected on model '{neurons['model']}' ({neurons['fingerprint']}), not on "
            f"'{config.model}' ({found}); run probes locate on this model"
        )
    leaked = [p for p in neurons["problems"] if split.get(p, "train") != "train"]
    if leaked:
        raise UserError(
            f"{config.neurons}: selected on {len(leaked)} problems (such as '{leaked[0]}') that are held out here; "
            "run probes locate on the same traces with the same seed, validation and test shares"
        )
    return neurons


def command_line() -> str:
    """The command that runs, for the records."""
    return shlex.join(
        ["neureasoner" if Path(sys.argv[0]).name in ("neureasoner", "cli.py") else sys.argv[0], *sys.argv[1:]]
    )


def fit(config: FitConfig) -> dict[str, Any]:
    """Stage ``probes fit``. Writes a folder per level, ``paper/<level>/``, ``split.json`` and ``results.json``.

    A level with too few failing traces is left out with a warning; UserError if none is left.
    """
    from neureasoner.models import load

    inputs: list[str | Path] = [
        *model_files(config.model),
        config.traces,
        config.neurons,
        *([config.nothinking] if config.nothinking else []),
    ]
    for name in config.candidates:  # an unknown name should not cost a recording
        FeatureSet.named(name, "intra", 2, "neuron:0[0]", "residual:0")
    folder = StageFolder(config.out, "probes fit", config, inputs=inputs)
    if folder.done:
        return folder.summary
    traces = read_traces(config.traces)
    for t in traces:
        labels_of(t)
    split = split_problems(traces, config.validation, config.test, config.seed)
    model, tokenizer = load(config.model)
    neurons = _check_neurons(config, model, split)
    nothinking = read_traces(config.nothinking) if config.nothinking else []
    easy = instance_labels(traces, nothinking)
    origin = {
        "fingerprint": neurons["fingerprint"],
        "layer": neurons["layer"],
        "residual": f"residual:{neurons['layer']}",
        "random": neurons["random"],
    }
    channels = {k: v["site"] for k, v in neurons["levels"].items()}
    tables = build_tables(config, folder.path / "features", model, tokenizer, traces, channels, origin, easy)
    del model
    results: dict[str, Any] = {}
    warnings: list[str] = []
    for name in LEVELS:
        kept = folder.path / name / "result.json"
        if kept.is_file():
            results[name] = read_json(kept)
            continue
        if name not in channels:
            warnings.append(f"{name}: probes locate found no failing traces; no probe")
            continue
        level = Level(config, name, traces, split, easy, tables[name], origin)
        short = level.shortage()
        if short:
            warnings.append(f"{name}: {short}; no probe, so no rule can use it")
            continue
        results[name] = fit_level(level, folder.path, channels[name], neurons["random"][name])
        write_json(kept, results[name])
    if not results:
        raise UserError("no probe could be fitted: " + "; ".join(warnings))
    counts = [n for _, n in solving_rates(traces).values()]
    summary = {
        "levels": results,
        "warnings": warnings,
        "seed": config.seed,
        "split": {
            part: {
                "problems": sum(s == part for s in split.values()),
                "traces": sum(split[t.problem.id] == part for t in traces),
            }
            for part in SPLITS
        },
        "instance_labels": {
            "easy": sum(v == 1 for v in easy.values()),
            "hard": sum(v == 0 for v in easy.values()),
            "dropped": sum(v < 0 for v in easy.values()),
            "samples_per_problem": [min(counts), max(counts)],
            "rule": "easy: rate >= 7/8"
            + (" and NoThinking right" if nothinking else "")
            + "; hard: rate <= 3/8"
            + ("; fewer than 4 samples for some problems, so the rates are coarse" if min(counts) < 4 else ""),
        },
        "intervals": f"95 %, {config.bootstrap} bootstrap draws of test problems",
        "alarm": "score > threshold",
        "model": config.model,
        "fingerprint": origin["fingerprint"],
        "command": command_line(),
        "version": __version__,
        "git": git_revision(),
    }
    write_json(folder.path / "split.json", split)
    write_json(folder.path / "results.json", summary)
    from neureasoner.probes.detectors.report import print_table

    print_table(summary)
    folder.finish(summary)
    shutil.rmtree(folder.path / "features", ignore_errors=True)  # hundreds of MB that only an unfinished fit needs
    return summary
