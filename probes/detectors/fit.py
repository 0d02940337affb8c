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
from neureasoner.probes.detectors.closing import Outcomes, exit_figures, family_scores
from neureasoner.probes.detectors.metrics import auroc, threshold_for
from neureasoner.probes.detectors.probe import Probe, git_revision
from neureasoner.probes.detectors.scoring import Decisions, Evaluation
from neureasoner.probes.detectors.tables import Table, beside, build_tables
from neureasoner.probes.features import LEVELS, FeatureSet
from neureasoner.probes.labels import (
    SPLITS,
    Closing,
    closings_of,
    instance_labels,
    labels_of,
    read_closings,
    solving_rates,
    split_problems,
)
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces

PAIRS = "pairs"  # the tables of the paper's instance kind beside those of an exit
MIN_POSITIVE = {"train": 8, "validation": 3, "test": 1}  # samples, and as many negative ones


def _key(part: str, window: int) -> str:
    return f"{part}/{window}"


def _sets(
    windows: Sequence[int], candidates: Sequence[str], level: str, channels: str, origin: dict[str, Any], exit_from: int
) -> dict[str, FeatureSet]:
    """Every part over every window that some candidate or control of a level needs, by ``part/window``."""
    wanted = {"length", "spectral", *(p for c in candidates for p in c.replace(" ", "").split("+"))}
    more, out = {"residual": origin["residual"], "exit_from": exit_from}, {}
    for window in dict.fromkeys(windows):
        for part in sorted(wanted):
            out[_key(part, window)] = FeatureSet.named(part, level, window, channels, **more)
        out[_key("random", window)] = FeatureSet.named("spectral", level, window, origin["random"][level], **more)
    return out


class Level:
    """Everything the fits of one level share: the features of its decisions, and what is known of their traces.

    With ``closings`` (those of each trace) it is an exit, from step ``exit_from`` on.
    """

    def __init__(
        self,
        config: FitConfig,
        name: str,
        traces: Sequence[Trace],
        split: dict[str, str],
        easy: dict[str, int],
        tables: dict[str, Table],
        origin: dict[str, Any],
        closings: Sequence[Sequence[Closing]] | None = None,
    ):
        self.config, self.name, self.tables, self.origin = config, name, tables, origin
        self.windows = list(dict.fromkeys(getattr(config, name)))
        self.decisions = {
            w: Decisions.of(name, tables[_key("length", w)], traces, split, easy, closings) for w in self.windows
        }
        self.exit_from = _first(closings) if closings is not None else 0
        self.outcomes = Outcomes.of(closings, traces) if closings is not None else None

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
        features = FeatureSet.named(
            name, self.name, window, channels, str(self.origin["residual"]), exit_from=self.exit_from
        )
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
        validation = decisions.split == "validation"
        if self.outcomes is not None:
            probe.threshold, _, _ = self.outcomes.choose(self.scores(probe), validation, self.config.price)
        else:
            maxima = decisions.maxima(self.scores(probe))[decisions.clean & validation]
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
        return self.evaluation(probe.features.window).figures(self.scores(probe), probe.threshold)

    def evaluation(self, window: int) -> Evaluation:
        """The test problems, and the draws that all intervals of a window share."""
        return Evaluation(self.decisions[window], self.config.bootstrap, self.config.seed)

    def exit_report(self, probes: dict[str, Probe]) -> dict[str, Any]:
        """The exit against its controls, each closing at its own best threshold of validation; and the frontier."""
        outcomes, price = self.outcomes, self.config.price
        assert outcomes is not None
        chosen = probes["chosen"]
        d = self.decisions[chosen.features.window]
        held, test = d.split == "validation", d.split == "test"
        family, always = family_scores(d), np.ones(len(d.y))
        scored = {k: (self.decisions[p.features.window], self.scores(p), p.threshold) for k, p in probes.items()}
        scored["family"] = d, family, outcomes.choose(family, held, price)[0]
        scored["always"] = d, always, 0.0
        evaluation = self.evaluation(chosen.features.window)
        never = outcomes.utility(np.zeros(len(d.y), bool), held, price)
        return {
            "from_step": self.exit_from,
            "price": price,
            "utility": "accuracy in points minus price times tokens in per cent of those left alone, on validation",
            "validation_utility_of_never_closing": round(never, 3),
            **{
                k: exit_figures(own, outcomes, p, threshold, evaluation, price)
                for k, (own, p, threshold) in scored.items()
            },
            "curve": outcomes.curve(scored["chosen"][1], {"validation": held, "test": test}, price),
        }


def _first(closings: Sequence[Sequence[Closing]]) -> int:
    """K of the forecasts: the step from which an exit is read."""
    return min(c.first for found in closings for c in found)


def fit_level(level: Level, out: Path, channels: str, random: str, pairs: Level | None) -> dict[str, Any]:
    """Fit, choose and test one level; writes ``<level>/`` and ``paper/<level>/``. Returns its part of the results.

    ``pairs``: the level of the paper's probe, where its decisions are others; None: it cannot be fitted.
    """
    import torch

    name = level.name
    fixed = level.config.candidates
    owners = {"paper": pairs}
    result: dict[str, Any] = {}
    probes: dict[str, Probe] = {}
    probes["chosen"], candidates = level.choose(fixed, channels)
    if pairs is not None:
        probes["paper"], result["paper_candidates"] = pairs.choose(["spectral"], channels)
    probes["random"], _ = level.choose(["spectral"], random)
    probes["length"], _ = level.choose(["length"], channels)
    scores: dict[str, torch.Tensor] = {}
    for key, probe in probes.items():
        owner = owners.get(key) or level
        decisions, values = owner.decisions[probe.features.window], owner.scores(probe)
        rows = decisions.rows("test") & np.isfinite(values)
        scores[f"{key}.y"], scores[f"{key}.score"] = torch.tensor(decisions.y[rows]), torch.tensor(values[rows])
        result[key] = {
            "name": probe.features.name,
            "window": probe.features.window,
            "channels": probe.features.channels,
            "validation_auroc": probe.notes["validation_auroc"],
            "test": owner.report(probe),
        }
    result["candidates"] = candidates
    if level.outcomes is not None:
        result["exit"] = level.exit_report({k: p for k, p in probes.items() if k != "paper"})
    controls = {"random": result.pop("random"), "length": result.pop("length")}
    for key, folder in (("chosen", out / name), ("paper", out / "paper" / name)):
        if key not in probes:
            continue
        probes[key].notes |= {"test": result[key]["test"], "seed": level.config.seed, "split": "by problem"}
        probes[key].save(folder)
    write_tensors(out / name / "scores.safetensors", scores)
    return {**result, "controls": controls}


def _warnings(name: str, result: dict[str, Any]) -> list[str]:
    """What a reader has to know of a level that was fitted."""
    out = []
    if "paper" not in result:
        out.append(f"{name}: too few easy and hard questions for the paper's kind of probe; no paper/{name}")
    found = result.get("exit")
    if found and found["chosen"]["validation_utility"] <= found["validation_utility_of_never_closing"]:
        out.append(
            f"{name}: on validation, closing does not pay at price {found['price']} (utility "
            f"{found['chosen']['validation_utility']}, never closing {found['validation_utility_of_never_closing']}); "
            "leave its rule out of the plan, or say what tokens are worth (key 'price')"
        )
    return out


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

    A level with too few failing traces is left out with a warning; UserError if none is left. With ``closings`` the
    instance probe is an exit, and ``paper/instance`` still the paper's kind, fitted on easy and hard questions.
    """
    from neureasoner.models import load

    inputs: list[str | Path] = [
        *model_files(config.model),
        config.traces,
        config.neurons,
        *filter(None, [config.nothinking, config.closings]),
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
    closings = closings_of(read_closings(config.closings), traces) if config.closings else None
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
    first = _first(closings) if closings is not None else 0
    sets = {
        level: _sets(getattr(config, level), config.candidates, level, site, origin, first * (level == "instance"))
        for level, site in channels.items()
    }
    if closings is not None and "instance" in channels:
        sets[PAIRS] = _sets(config.instance, [], "instance", channels["instance"], origin, 0)
    tables = build_tables(folder.path / "features", model, tokenizer, traces, sets, easy, config.batch_size, closings)
    del model
    results: dict[str, Any] = {}
    warnings: list[str] = []
    for name in LEVELS:
        kept = folder.path / name / "result.json"
        if kept.is_file():
            results[name] = read_json(kept)
            warnings += _warnings(name, results[name])
            continue
        if name not in channels:
            warnings.append(f"{name}: probes locate found no failing traces; no probe")
            continue
        exits = closings if name == "instance" else None
        level = Level(config, name, traces, split, easy, tables[name], origin, exits)
        short = level.shortage()
        if short:
            warnings.append(f"{name}: {short}; no probe, so no rule can use it")
            continue
        pairs: Level | None = level
        if exits is not None:
            pairs = Level(config, name, traces, split, easy, tables[PAIRS], origin)
            pairs = None if pairs.shortage() else pairs
        results[name] = fit_level(level, folder.path, channels[name], neurons["random"][name], pairs)
        write_json(kept, results[name])
        warnings += _warnings(name, results[name])
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
