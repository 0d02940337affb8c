"""``probes report``: everything that says how far a detector can be trusted, as JSON, Markdown and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner import __version__
from neureasoner.artifacts import read_json, read_tensors, write_json, write_text
from neureasoner.errors import UserError
from neureasoner.probes.detectors import study
from neureasoner.probes.detectors.figures import draw_report, draw_scores
from neureasoner.probes.detectors.fit import command_line, read_neurons
from neureasoner.probes.detectors.report_config import ReportConfig
from neureasoner.probes.detectors.report_text import markdown
from neureasoner.probes.detectors.scoring import Decisions
from neureasoner.probes.detectors.study import LevelStudy
from neureasoner.probes.detectors.tables import build_tables
from neureasoner.probes.detectors.token_samples import draw_trajectories, sample_tokens, table_4
from neureasoner.probes.features import FeatureSet
from neureasoner.probes.labels import closings_of, instance_labels, read_closings, split_problems
from neureasoner.probes.spectrum import BACKEND
from neureasoner.sites import Layout
from neureasoner.stages import MARK, StageFolder
from neureasoner.traces import Trace, read_traces

SETS = (
    "spectral",
    "spectral+duration",
    "algorithm-2",
    "algorithm-2 log",
    "spectral+blocks",
    "magnitude",
    "entropy",
    "entropy+spectral",
    "entropy+magnitude",
    "residual",
    "residuals",
    "trend",
    "entropy+residual",
    "entropy+residual+spectral",
    "entropy+residual+trend",
    "entropy+residuals+trend",
    "entropy+residuals+trend+spectral",
    "entropy+residuals+trend+magnitude+blocks",
    *study.CONTROLS,
)


def _random_elsewhere(site: str, layer: int, layout: Layout, seed: int) -> str:
    """As many random components of the same type in another block: a control for the choice of the block."""
    kind, _, indices = site.partition(":")
    n = indices.count(",") + 1
    rng = np.random.default_rng([seed, 11])
    other = int(rng.choice([b for b in range(layout.n_layers) if b != layer] or [layer]))
    size = layout.n_heads if kind == "head" else layout.intermediate_size
    return f"{kind}:{other}[{','.join(map(str, sorted(rng.permutation(size)[:n].tolist())))}]"


def parts_of(
    level: str,
    window: int,
    neurons: dict[str, Any],
    more: Sequence[dict[str, Any]],
    layout: Layout,
    seed: int,
    exit_from: int = 0,
) -> dict[str, FeatureSet]:
    """Every part that some feature set of ``SETS`` is made of, by its key."""
    layer, site = neurons["layer"], neurons["levels"][level]["site"]
    middle = f"residual:{layer}"
    depths = sorted({layout.n_layers // 4, layer, 3 * layout.n_layers // 4, layout.n_layers - 1} - {layer})
    elsewhere = _random_elsewhere(site, layer, layout, seed)
    others = " ".join(m["levels"][level]["site"] for m in more if level in m["levels"])

    def named(name: str, channels: str = "", residual: str = middle, backend: str = BACKEND) -> FeatureSet:
        return FeatureSet.named(name, level, window, channels, residual, backend, exit_from)

    out = {
        "spectral": named("spectral", site),
        "magnitude": named("magnitude", site),
        "random": named("spectral", neurons["random"][level]),
        "random block": named("spectral", elsewhere),
        **{name: named(name) for name in ("entropy", "residual", "trend", "duration", "length")},
        "residuals": named("residual", residual=" ".join([middle, *(f"residual:{b}" for b in depths)])),
    }
    if level != "instance":
        out["algorithm-2"] = named("spectral", site, backend="algorithm-2/uniform/16")
    if level == "inter":
        out["algorithm-2 log"] = named("spectral", site, backend="algorithm-2/log/16")
    if others:
        out["blocks"] = named("spectral", others)
    return out


def _paper_protocol(
    config: ReportConfig,
    model: Any,
    tokenizer: Any,
    traces: Sequence[Trace],
    level: str,
    window: int,
    channels: str,
    easy: dict[str, int],
    exit_from: int,
) -> dict[str, Any]:
    """The paper's Table 4 by its own protocol, and the same samples split by trajectory; mean and sd over draws."""
    if exit_from:
        return {"skipped": "an exit has labels at the separators forecast, and the paper's protocol labels every token"}
    runs: dict[str, list[dict[str, float]]] = {"tokens": [], "trajectories": []}
    sizes = []
    for r in range(config.repeats):
        rng = np.random.default_rng([config.seed, 3, r])
        chosen = [traces[i] for i in draw_trajectories(traces, level, easy, config.trajectories, rng)]
        if len(chosen) < 4:
            return {"skipped": f"{len(chosen)} failing trajectories are too few"}
        samples = sample_tokens(model, tokenizer, chosen, level, window, channels, easy, config.batch_size)
        sizes.append(len(samples.y))
        for split, found in runs.items():
            found.append(table_4(samples, split, config.seed + r))
    out: dict[str, Any] = {"drawn": len(chosen), "samples": round(float(np.mean(sizes)))}
    for split, found in runs.items():
        kept = [f for f in found if f]
        out[split] = {
            key: {
                "mean": round(float(np.mean([f[key] for f in kept])), 4),
                "sd": round(float(np.std([f[key] for f in kept])), 4),
            }
            for key in (kept[0] if kept else {})
        } | {"runs": len(kept)}
    return out


def _experiments(config: ReportConfig, s: LevelStudy) -> dict[str, Callable[[], Any]]:
    """The experiments of a level by name, in the order of the report."""
    chosen = s.chosen
    compared = list(dict.fromkeys([study.PAPER, study.ENTROPY, chosen]))
    several = lambda f: [f(name) for name in compared]  # noqa: E731
    return {
        "sets": lambda: study.feature_sets(s),
        "estimators": lambda: [e for name in compared for e in study.estimators(s, name, config.compared)],
        "shuffled": lambda: several(lambda n: study.shuffled(s, n, config.repeats)),
        "splits": lambda: several(lambda n: study.splits(s, n, config.repeats)),
        "curve": lambda: {n: study.learning_curve(s, n, config.curve, config.repeats) for n in compared},
        "nested": lambda: {kind: study.nested(s, kind) for kind in config.estimators},
        "redundancy": lambda: study.redundancy(s),
        "rules": lambda: study.decision_rules(s, chosen) if s.decisions.level != "instance" else [],
        "calibration": lambda: several(lambda n: study.calibration(s, n)),
        "errors": lambda: several(lambda n: study.errors(s, n)),
    }


def report(config: ReportConfig) -> dict[str, Any]:
    """Stage ``probes report``. Writes report.json, report.md and figures; every experiment is kept as it is done."""
    from neureasoner.models import load
    from neureasoner.progress import Progress

    where = Path(config.fit)
    if not (where / "results.json").is_file() or not (where / MARK).is_file():
        raise UserError(f"{where}: holds no results.json of a finished fit; run probes fit first, or name its folder")
    results, before = read_json(where / "results.json"), read_json(where / MARK)["config"]
    source = {
        k: getattr(config, k) or before.get(k, "") for k in ("model", "traces", "neurons", "nothinking", "closings")
    }
    asked = filter(None, [source["nothinking"], source["closings"]])
    named = [source["traces"], source["neurons"], *config.more_neurons, *asked]
    folder = StageFolder(config.out, "probes report", config, inputs=[where / "results.json", *named])
    if folder.done:
        return folder.summary
    traces = read_traces(source["traces"])
    split = read_json(where / "split.json")
    if set(split) != {t.problem.id for t in traces}:
        raise UserError(f"{source['traces']}: not the problems of {where}/split.json; name the traces probes fit read")
    if split != split_problems(traces, before["validation"], before["test"], before["seed"]):
        raise UserError(f"{where}/split.json is not the split of its own settings; fit the probes again")
    model, tokenizer = load(source["model"])
    neurons, *more = (read_neurons(p, model, source["model"], split) for p in (source["neurons"], *config.more_neurons))
    easy = instance_labels(traces, read_traces(source["nothinking"]) if source["nothinking"] else [])
    levels = [name for name in results["levels"] if name in config.levels]
    windows = {name: results["levels"][name]["chosen"]["window"] for name in levels}
    layout = Layout.of(model)
    closings = closings_of(read_closings(source["closings"]), traces) if source["closings"] else None
    exits = {name: results["levels"][name].get("exit", {}).get("from_step", 0) for name in levels}
    parts = {name: parts_of(name, windows[name], neurons, more, layout, config.seed, exits[name]) for name in levels}
    tables = build_tables(folder.path / "features", model, tokenizer, traces, parts, easy, config.batch_size, closings)
    summary: dict[str, Any] = {"levels": {}}
    for name in levels:
        kept = folder.path / "parts" / name

        def once(key: str, run: Callable[[], Any], kept: Path = kept) -> Any:
            path = kept / f"{key}.json"
            if not path.is_file():
                write_json(path, run())
            return read_json(path)

        own = closings if exits[name] else None
        decisions = Decisions.of(name, next(iter(tables[name].values())), traces, split, easy, own)
        sets = [s for s in SETS if all(p in tables[name] for p in s.split("+"))]
        level = LevelStudy(
            decisions,
            tables[name],
            sets,
            config.estimators,
            config.false_alarm_rate,
            config.bootstrap,
            config.seed,
            kept / "fits",
        )
        with Progress() as bar:
            task = bar.add_task(f"{name}: fitting", total=len(sets) + 12)
            for s in sets:
                level.fit(s)
                bar.advance(task)
            entry = {"window": windows[name], "channels": neurons["levels"][name]["site"], "chosen": level.chosen}
            site = neurons["levels"][name]["site"]
            entry["table_4"] = once(
                "table_4",
                lambda: _paper_protocol(config, model, tokenizer, traces, name, windows[name], site, easy, exits[name]),  # noqa: B023
            )
            bar.advance(task)
            for key, run in _experiments(config, level).items():
                bar.update(task, description=f"{name}: {key}")
                entry[key] = once(key, run)
                bar.advance(task)
        summary["levels"][name] = entry
    summary |= {
        "split": results["split"],
        "false_alarm_rate": config.false_alarm_rate,
        "bootstrap": config.bootstrap,
        "repeats": config.repeats,
        "seed": config.seed,
        "model": source["model"],
        "fingerprint": results["fingerprint"],
        "layer": neurons["layer"],
        "command": command_line(),
        "version": __version__,
    }
    figures = draw_report(folder.path, summary)
    for name in levels:
        tensors, _ = read_tensors(where / name / "scores.safetensors")
        figures += draw_scores(folder.path, name, {k: v.numpy() for k, v in tensors.items()}, results["levels"][name])
    text = markdown(summary, figures)
    write_json(folder.path / "report.json", summary)
    write_text(folder.path / "report.md", text)
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
    return folder.finish({"figures": figures, "chosen": {k: v["chosen"] for k, v in summary["levels"].items()}})
