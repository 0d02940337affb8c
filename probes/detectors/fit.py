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
from neureasoner.probes.detectors.metrics import auroc, threshold_for
from neureasoner.probes.detectors.probe import Probe, git_revision
from neureasoner.probes.detectors.scoring import Decisions, Evaluation
from neureasoner.probes.detectors.tables import Table, beside, build_tables
from neureasoner.probes.features import LEVELS, FeatureSet
from neureasoner.probes.labels import (
    SPLITS,
    instance_labels,
    labels_of,
    solving_rates,
    split_problems,
)
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces

MIN_POSITIVE = {"train": 8, "validation": 3, "test": 1}  # samples, and as many negative ones


def _key(part: str, window: int) -> str:
    return f"{part}/{window}"


def _sets(config: FitConfig, level: str, channels: str, origin: dict[str, Any]) -> dict[str, FeatureSet]:
    """Every part over every window that some candidate or control of a level needs, by ``part/window``."""
    wanted = {"length", "spectral", *(p for c in config.candidates for p in c.replace(" ", "").split("+"))}
    out = {}
    for window in dict.fromkeys(getattr(config, level)):
        for part in sorted(wanted):
            out[_key(part, window)] = FeatureSet.named(part, level, window, channels, origin["residual"])
        out[_key("random", window)] = FeatureSet.named("spectral", level, window, origin["random"][level])
    return out


class Level:
    """Everything the fits of one level share: the features of its decisions, and what is known of their traces."""

    def __init__(
        self,
        config: FitConfig,
        name: str,
        traces: Sequence[Trace],
        split: dict[str, str],
        easy: dict[str, int],
        tables: dict[str, Table],
        origin: dict[str, Any],
    ):
        self.config, self.name, self.tables, self.origin = config, name, tables, origin
        self.windows = list(dict.fromkeys(getattr(config, name)))
        self.decisions = {w: Decisions.of(name, tables[_key("length", w)], traces, split, easy) for w in self.windows}

    def shortage(self) -> str:
        """Why this level cannot be fitted, or ""."""
        for window, part in product(self.windows, SPLITS):
            decisions = self.decisions[window]
            y = decisions.y[self.tables[_key("spectral", window)].valid & decisions.rows(part)]
            least = MIN_POSITIVE[part]
            if (y == 1).sum() < least or (y == 0).sum() < least:
                return (
                    f"{part} (window {window}) has {(y == 1).sum()} failing and {(y == 0).sum()} clean samples, "
                    f"at least {least} of each are needed; sample more traces"
                )
        return ""

    def table(self, features: FeatureSet) -> Table:
        """The features of a set, its parts put together in its order."""
        random = features.channels == self.origin["random"].get(self.name)
        named = {"spectral": "random" if random else "spectral"}
        return beside([self.tables[_key(named.get(p, p), features.window)] for p in features.parts])

    def fit(self, name: str, window: int, channels: str, decay: float) -> tuple[Probe, float]:
        """Train one candidate; its validation AUROC."""
        features = FeatureSet.named(name, self.name, window, channels, str(self.origin["residual"]))
        table, decisions = self.table(features), self.decisions[window]
        train, held = (table.valid & decisions.rows(part) for part in ("train", "validation"))
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
        ).fit(table.x[train], table.y[train], (table.x[held], table.y[held]))
        area = auroc(table.y[held], probe.predict_proba(table.x[held]))
        maxima = decisions.maxima(self.scores(probe))[decisions.clean & (decisions.split == "validation")]
        probe.threshold = threshold_for(maxima, self.config.false_alarm_rate)
        return probe, area

    def scores(self, probe: Probe) -> np.ndarray:
        """Probability of every decision ``[n]``, -inf where the features are not valid."""
        table = self.table(probe.features)
        return np.where(table.valid, probe.predict_proba(table.x), -np.inf)

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
        evaluation = Evaluation(self.decisions[probe.features.window], self.config.bootstrap, self.config.seed)
        return evaluation.figures(self.scores(probe), probe.threshold)


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
        decisions, values = level.decisions[probe.features.window], level.scores(probe)
        rows = decisions.rows("test") & np.isfinite(values)
        scores[f"{key}.y"], scores[f"{key}.score"] = torch.tensor(decisions.y[rows]), torch.tensor(values[rows])
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


def read_neurons(path: str, model: Any, name: str, split: dict[str, str]) -> dict[str, Any]:
    """The ``neurons.json`` of ``probes locate``. Raises UserError unless it was made on this model (called ``name``),
    and on no problem that ``split`` holds out."""
    from neureasoner.models import fingerprint, known_as

    neurons = read_json(path)
    if neurons.get("kind") != "neurons" or not neurons.get("levels"):
        raise UserError(f"{path}: not a neurons.json of probes locate; run probes locate first")
    found = fingerprint(model)
    if neurons["fingerprint"] not in known_as(found):
        raise UserError(
            f"{path}: selected on model '{neurons['model']}' ({neurons['fingerprint']}), not on "
            f"'{name}' ({found}); run probes locate on this model"
        )
    leaked = [p for p in neurons["problems"] if split.get(p, "train") != "train"]
    if leaked:
        raise UserError(
            f"{path}: selected on {len(leaked)} problems (such as '{leaked[0]}') that are held out here; "
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
    neurons = read_neurons(config.neurons, model, config.model, split)
    nothinking = read_traces(config.nothinking) if config.nothinking else []
    easy = instance_labels(traces, nothinking)
    origin = {
        "fingerprint": neurons["fingerprint"],
        "layer": neurons["layer"],
        "residual": f"residual:{neurons['layer']}",
        "random": neurons["random"],
    }
    channels = {k: v["site"] for k, v in neurons["levels"].items()}
    sets = {level: _sets(config, level, site, origin) for level, site in channels.items()}
    tables = build_tables(folder.path / "features", model, tokenizer, traces, sets, easy, config.batch_size)
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
    from neureasoner.probes.detectors.report_text import print_table

    print_table(summary)
    folder.finish(summary)
    shutil.rmtree(folder.path / "features", ignore_errors=True)  # hundreds of MB that only an unfinished fit needs
    return summary
