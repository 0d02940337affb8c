"""``details.safetensors``: what the monitored neurons did in an evaluation's traces, small enough for one page.

The traces are read again by the model that wrote them (teacher forcing gives what cached decoding gave, promise 2), so
an evaluation need not have recorded anything, and no rule of any arm had to watch.

Legend: ``T`` tokens of a trace, ``C`` channels of a level, ``N`` columns and ``S`` steps of all traces one after the
other, ``F`` frequencies.

    <level>.heat      uint8 [N, C]    mean of |a| over a column of tokens; 255 is ``scale`` or more
    <level>.scale     float32 [C]     the channel's 99.5th percentile over all columns
    <level>.spectrum  float16 [S, F]  share of a step's power at a frequency, mean over the channels that vary
    meta              sites, frequencies, thresholds; per trace its places, and scores where none were logged
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.artifacts import fingerprint, read_tensors, write_tensors
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import ARMS
from neureasoner.evaluation.examples import first_samples, pick
from neureasoner.evaluation.run_folder import load_results, load_traces
from neureasoner.evaluation.viewer.config import DetailsConfig
from neureasoner.probes.spectrum import MIN_LENGTH
from neureasoner.traces import Trace

FILE = "details.safetensors"
COLUMNS = 192  # of one trace; a side of the viewer is about as many pixels wide
FREQUENCIES = np.arange(1, 25) / 48  # cycles per token, up to one in two


def columns(x: np.ndarray, most: int = COLUMNS) -> tuple[np.ndarray, int]:
    """``x [T, C]`` -> (mean of ``|x|`` over ``per`` tokens each ``[ceil(T / per), C]`` float32, ``per``)."""
    per = max(1, -(-len(x) // most))
    edges = np.arange(0, len(x), per)
    sizes = np.diff([*edges, len(x)])[:, None]
    return (np.add.reduceat(np.abs(x, dtype=np.float64), edges, axis=0) / sizes).astype(np.float32), per


def step_spectrum(x: np.ndarray) -> np.ndarray:
    """``x [T, C]`` of one step -> ``[F]``: power of ``|x|`` at ``FREQUENCIES``, each channel's made to sum to one.

    The mean over the channels that vary; zeros where none does, or below 4 tokens (core.md §1.5).
    """
    y = np.abs(np.asarray(x, dtype=np.float64))
    if len(y) < MIN_LENGTH:
        return np.zeros(len(FREQUENCIES))
    centred = y - y.mean(axis=0)
    wave = np.exp(-2j * np.pi * FREQUENCIES[:, None] * np.arange(len(y)))
    power = np.abs(wave @ centred) ** 2
    varies = np.square(centred).sum(axis=0) > 1e-12 * np.square(y).sum(axis=0)
    if not varies.any():
        return np.zeros(len(FREQUENCIES))
    return (power[:, varies] / power[:, varies].sum(axis=0)).mean(axis=1)


def probe_scores(probe: Any, series: Mapping[str, np.ndarray], trace: Trace) -> list[list[Any]]:
    """``[level, step, token, statistic]`` at every separator where the probe would have decided, had it watched.

    Nothing is forced, so observation begins once; a plan's cooldowns and limits are not applied.
    """
    features, running, out = probe.features, probe.rule.start() if probe.rule else None, list[list[Any]]()
    bounds = [0, *(s.token_end for s in trace.steps if s.closed)]
    for i in range(1, len(bounds)):
        x, valid = features.compute(series, bounds[: i + 1])
        if valid:
            score = float(probe.predict_proba(x[None])[0])
            score = float(running.update(score)) if running else score
            if np.isfinite(score):
                out.append([features.level, i - 1, bounds[i], round(score, 4)])
    return out


def limits_of(triggers: Sequence[Any], probes: Mapping[str, Any]) -> dict[str, float]:
    """Threshold by level: the plan's where it has one, else the probe's own."""
    return {
        probes[t.probe].features.level: float(probes[t.probe].threshold if t.threshold is None else t.threshold)
        for t in triggers
    }


class _Reader:
    """The models of an evaluation, and what is to be recorded of their traces."""

    def __init__(self, results: Mapping[str, Any], config: DetailsConfig):
        from neureasoner.inference.steered import SteeredModel

        self.results, self.config = results, config
        self.steered = SteeredModel.from_pretrained(results["model"], device=config.device or None)
        self.sites = {level: str(n["site"]).split() for level, n in results["neurons"].items() if n.get("site")}
        if not self.sites:
            raise UserError("results.json names no neurons; evaluate with --neurons (neurons.json of `probes locate`)")
        triggers = [r.trigger for r in self.steered.plan.rules if r.trigger.probe is not None]
        self.probes = [self.steered.probes[str(name)] for name in dict.fromkeys(t.probe for t in triggers)]
        self.limits = limits_of(triggers, self.steered.probes)

    def read(self, arm: str, traces: Sequence[Trace]) -> Iterator[tuple[Trace, dict[str, np.ndarray], list[Any]]]:
        """(trace, ``[T, C]`` by level, scores of an arm that logged none)."""
        from neureasoner.models import load
        from neureasoner.probes.recording.record import record

        model, tokenizer = self.steered.model, self.steered.tokenizer
        if arm in ARMS and ARMS[arm].model == "base":
            model, tokenizer = load(self.results["base"], device=self.config.device or None)
        watched = any(t.meta.get("scores") for t in traces)
        sites = [s for level in self.sites.values() for s in level]
        sites += [] if watched else [s for p in self.probes for s in p.features.sites()]
        recorded = record(model, tokenizer, traces, sites, self.config.batch_size)
        for trace, series in zip(traces, recorded, strict=True):
            scores = [] if watched else [row for p in self.probes for row in probe_scores(p, series, trace)]
            levels = {k: np.concatenate([series[s] for s in v], axis=1) for k, v in self.sites.items()}
            yield trace, levels, scores


def write_details(config: DetailsConfig) -> Path:
    """Read the traces that a page of ``config.traces`` would embed again, and write ``details.safetensors``.

    Raises UserError for a folder without results, a model that is gone or another, and results that name no neurons.
    """
    import torch

    from neureasoner.progress import Progress

    out = Path(config.run)
    results = load_results(out)
    traces = load_traces(out, [a["name"] for a in results["arms"]])
    problems = set(pick(traces, config.traces))
    chosen = {arm: [t for t in rows if t.problem.id in problems] for arm, rows in first_samples(traces).items()}
    reader = _Reader(results, config)
    heat: dict[str, list[np.ndarray]] = {level: [] for level in reader.sites}
    spectra: dict[str, list[np.ndarray]] = {level: [] for level in reader.sites}
    entries: dict[str, Any] = {}
    column = step = 0
    with Progress() as bar:
        task = bar.add_task("reading traces", total=sum(map(len, chosen.values())))
        for arm, rows in chosen.items():
            for trace, levels, scores in reader.read(arm, rows):
                per = 1
                for level, x in levels.items():
                    means, per = columns(x)
                    heat[level].append(means)
                    cuts = [step_spectrum(x[s.token_start : s.token_end]) for s in trace.steps]
                    spectra[level].append(np.array(cuts, dtype=np.float16).reshape(-1, len(FREQUENCIES)))
                size = -(-len(trace.response_ids) // per)
                entries[f"{arm}/{trace.id}"] = {
                    "tokens": fingerprint(trace.response_ids),
                    "per": per,
                    "columns": [column, column + size],
                    "steps": [step, step + len(trace.steps)],
                    "scores": scores,
                }
                column, step = column + size, step + len(trace.steps)
                bar.advance(task)
    tensors: dict[str, torch.Tensor] = {}
    for level in reader.sites:
        all_heat = np.concatenate(heat[level])
        scale = np.maximum(np.quantile(all_heat, 0.995, axis=0), 1e-12).astype(np.float32)
        shades = np.rint(255 * np.minimum(all_heat / scale, 1.0)).astype(np.uint8)
        tensors |= {f"{level}.heat": torch.from_numpy(shades), f"{level}.scale": torch.from_numpy(scale)}
        tensors[f"{level}.spectrum"] = torch.from_numpy(np.concatenate(spectra[level]))
    meta = {
        "sites": {level: " ".join(sites) for level, sites in reader.sites.items()},
        "frequencies": FREQUENCIES.tolist(),
        "thresholds": reader.limits,
        "traces": entries,
    }
    write_tensors(out / FILE, tensors, meta)
    return out / FILE


def _bytes(values: np.ndarray) -> str:
    return b64encode(np.ascontiguousarray(values, dtype=np.uint8).tobytes()).decode("ascii")


class Details:
    """A details file, read."""

    def __init__(self, path: Path):
        self.path = path
        tensors, self.meta = read_tensors(path)
        self.tensors = {name: t.numpy() for name, t in tensors.items()}

    @classmethod
    def beside(cls, out: str | Path) -> Details | None:
        """The details of an evaluation's folder, if it has any."""
        path = Path(out) / FILE
        return cls(path) if path.is_file() else None

    @property
    def levels(self) -> dict[str, Any]:
        """What the page says of a level: its site and how many channels it has."""
        sites = self.meta["sites"]
        return {k: {"site": v, "channels": self.tensors[f"{k}.heat"].shape[1]} for k, v in sites.items()}

    def of(self, arm: str, trace: Trace) -> dict[str, Any] | None:
        """One trace as the page reads it, or None if it was not recorded. Raises UserError if it has changed since.

        ``heat`` is column by column, ``spectrum`` step by step in 255ths of ``peak``; both in base64.
        """
        entry = self.meta["traces"].get(f"{arm}/{trace.id}")
        if entry is None:
            return None
        if entry["tokens"] != fingerprint(trace.response_ids):
            raise UserError(f"{self.path}: was recorded from another trace '{trace.id}'; delete it or record again")
        levels = {}
        for level in self.meta["sites"]:
            shares = self.tensors[f"{level}.spectrum"][slice(*entry["steps"])].astype(np.float32)
            peak = max(float(shares.max(initial=0.0)), 1e-6)
            levels[level] = {
                "heat": _bytes(self.tensors[f"{level}.heat"][slice(*entry["columns"])]),
                "spectrum": _bytes(np.rint(255 * shares / peak)),
                "peak": round(peak, 5),
            }
        return {"per": entry["per"], "levels": levels, "scores": entry["scores"]}


def details(config: DetailsConfig) -> dict[str, Any]:
    """Stage ``evaluation details``: record, then write the page again with those traces."""
    from neureasoner.evaluation.report import write_report

    file = write_details(config)
    report = write_report(config.run, config.traces)
    print(f"{file} ({file.stat().st_size / 1e6:.1f} MB), {report} ({report.stat().st_size / 1e6:.1f} MB)")
    return {"file": str(file), "report": str(report)}
