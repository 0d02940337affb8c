"""``probes rcn``: neurons whose mean activation has opposite signs in right and wrong traces (core.md §3.2, §3.3).

Legend: ``K`` neurons kept, ``L`` blocks. Only training problems of the split that ``probes fit`` and ``probes gate``
make are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, read_json, read_tensors, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.probes.attribution.contrast import (
    Row,
    contrast,
    encode,
    random_neurons,
    statistics,
)
from neureasoner.probes.attribution.rcn_config import RcnConfig
from neureasoner.probes.labels import labels_of, solving_rates, split_problems
from neureasoner.sites import Layout
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces

SCHEMA = 1
MEANING = (
    "delta = mean activation over right traces minus mean over wrong ones; adding a positive multiple of the shift "
    "moves a neuron towards its mean in right traces"
)
SHIFT = {"raw": "alpha * delta", "sigma": "alpha * delta * sigma (delta counts a neuron's own standard deviations)"}


def draw_rcn(
    path: Path, layer: np.ndarray, arrays: dict[str, np.ndarray], summary: dict[str, Any], null: np.ndarray, n: int
) -> None:
    """Where the neurons lie (``n`` blocks), how stable each is, and their sizes against shuffled labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 3.6), layout="constrained")
    where, stable, chance = figure.subplots(1, 3)
    size, share = np.abs(arrays["delta"]), arrays["bootstrap"]
    for sign, label, colour in ((1, "higher in right traces", "#1b6ca8"), (-1, "higher in wrong traces", "#c0392b")):
        at = np.sign(arrays["delta"]) == sign
        where.plot(layer[at], size[at], "o", color=colour, ms=5, alpha=0.6, label=f"{label} ({at.sum()})")
    where.set(xlabel="block", ylabel="|S|", title=f"the {len(size)} chosen neurons", xlim=(-0.5, n - 0.5))
    where.set_ylim(0, size.max() * 1.3)
    where.xaxis.get_major_locator().set_params(integer=True)
    stable.bar(np.arange(1, len(share) + 1), share, color="#1b6ca8")
    stable.axhline(summary["stability"]["mean_jaccard"], color="black", lw=1, ls="--", label="mean Jaccard of the set")
    stable.set(xlabel="rank", ylabel="share of draws", ylim=(0, 1.25), title="in the first K again (questions redrawn)")
    rank = np.arange(1, len(size) + 1)
    chance.plot(rank, np.sort(size)[::-1], color="#c0392b", label="found")
    low, middle, high = np.quantile(null, [0.025, 0.5, 0.975], axis=0)
    chance.plot(rank, middle, color="#999999", label="right and wrong shuffled (95 %)")
    chance.fill_between(rank, low, high, color="#dddddd")
    p_value = summary["chance"]["p_kth_size"]
    chance.set(xlabel="rank", ylabel="|S|", title=f"against chance (last one: p = {p_value:.2g})")
    chance.set_ylim(0, size.max() * 1.3)
    for ax in (where, stable, chance):
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class Rcn:
    """Reasoning-critical neurons, best first. Arrays ``[K]``; ``random_index``: the control, in the same blocks."""

    layer: np.ndarray
    index: np.ndarray
    delta: np.ndarray
    sigma: np.ndarray
    right_mean: np.ndarray
    wrong_mean: np.ndarray
    random_index: np.ndarray
    unit: str
    model: str
    fingerprint: str

    @property
    def shift(self) -> np.ndarray:
        """What a strength of 1 adds to the activations ``[K]``, whatever the unit of ``delta``."""
        return self.delta * self.sigma if self.unit == "sigma" else self.delta

    def check(self, model: Any) -> None:
        """Raises UserError unless ``model`` holds the weights these neurons were found on."""
        from neureasoner.models import fingerprint, known_as

        found = fingerprint(model)
        if self.fingerprint not in known_as(found):
            raise UserError(
                f"the neurons were found on model '{self.model}' ({self.fingerprint}), this one is {found}; "
                "run probes rcn on this model"
            )


def load_rcn(folder: str | Path) -> Rcn:
    """Read a folder of ``probes rcn``. Raises UserError if it is missing or damaged, or of two different runs."""
    folder = Path(folder)
    if not (folder / "neurons.json").is_file():
        raise UserError(f"{folder}: holds no neurons.json; name a folder written by probes rcn")
    info = read_json(folder / "neurons.json")
    if info.get("kind") != "rcn" or info.get("schema") != SCHEMA:
        raise UserError(f"{folder}: neurons.json is not one of probes rcn (schema {SCHEMA}); run probes rcn again")
    tensors, _ = read_tensors(folder / "neurons.safetensors")
    if file_fingerprint([folder / "neurons.safetensors"]) != info.get("tensors"):
        raise UserError(f"{folder}: neurons.json and neurons.safetensors are of different runs; run probes rcn again")
    try:
        arrays = {
            f.name: tensors[f.name].numpy() for f in fields(Rcn) if f.name not in ("unit", "model", "fingerprint")
        }
        return Rcn(**arrays, unit=info["unit"], model=info["model"], fingerprint=info["fingerprint"])
    except KeyError as e:
        raise UserError(f"{folder}: damaged, {e} is missing; run probes rcn again") from None


def _both_sides(traces: Iterable[Trace]) -> list[Trace]:
    """Traces of the questions with right and wrong ones, question by question."""
    traces = list(traces)
    rates = solving_rates(traces)
    return sorted((t for t in traces if 0 < rates[t.problem.id][0] < 1), key=lambda t: t.problem.id)


def contrast_rows(train: Sequence[Trace], tokenizer: Any, config: RcnConfig) -> tuple[list[Trace], list[Row]]:
    """Traces of the contrast questions, question by question, and their rows. Raises UserError if there are too few."""
    found = _both_sides(train)
    rows = {t.id: encode(t, tokenizer, config) for t in found}
    found = _both_sides(t for t in found if rows[t.id][2] > rows[t.id][1])
    ids = list(dict.fromkeys(t.problem.id for t in found))
    if len(ids) < config.least_problems:
        raise UserError(
            f"{len(ids)} of {len({t.problem.id for t in train})} training problems have right and wrong traces, "
            f"{config.least_problems} are needed; sample more traces of problems the model sometimes solves, "
            "or lower least_problems"
        )
    used = set(np.random.default_rng([config.seed, 3]).permutation(ids)[: config.problems or None].tolist())
    found = [t for t in found if t.problem.id in used]
    return found, [rows[t.id] for t in found]


def rcn(config: RcnConfig) -> dict[str, Any]:
    """Stage ``probes rcn``. Writes ``neurons.safetensors``, ``neurons.json``, ``neurons.png`` and ``directions/``.

    ``directions/full`` is the same neurons as a Direction; beside it are its ablation variants.
    """
    from neureasoner.models import fingerprint, load, load_tokenizer
    from neureasoner.probes.directions.critical import critical_directions
    from neureasoner.progress import Progress

    folder = StageFolder(config.out, "probes rcn", config, inputs=[*model_files(config.model), config.traces])
    if folder.done:
        return folder.summary
    traces = read_traces(config.traces)
    for t in traces:
        labels_of(t)
    split = split_problems(traces, config.validation, config.test, config.seed)
    train = [t for t in traces if split[t.problem.id] == "train"]
    found, rows = contrast_rows(train, load_tokenizer(config.model), config)  # before the model, which may take minutes
    model, _ = load(config.model)
    problems, question = np.unique([t.problem.id for t in found], return_inverse=True)
    right = np.array([labels_of(t).correct for t in found])
    with Progress() as bar:
        task = bar.add_task("reading traces", total=len(rows))
        c = contrast(model, rows, right, question, config, lambda n: bar.advance(task, n))
    chosen, arrays, summary, null = statistics(c, config)
    layout = Layout.of(model)
    layer, index = np.divmod(chosen, layout.intermediate_size)
    control = random_neurons(layer, index, layout.intermediate_size, config.seed)
    draw_rcn(folder.path / "neurons.png", layer, arrays, summary, null, layout.n_layers)
    tensors = {k: torch.tensor(v) for k, v in (("layer", layer), ("index", index), ("random_index", control))}
    tensors |= {k: torch.tensor(v, dtype=torch.float32) for k, v in arrays.items()}
    write_tensors(folder.path / "neurons.safetensors", tensors)
    left_out = len({t.problem.id for t in train}) - len(problems)
    summary = {
        "neurons": len(chosen),
        "blocks": {int(k): int((layer == k).sum()) for k in np.unique(layer)},
        "traces": {"right": int(right.sum()), "wrong": int((~right).sum())},
        "training_problems": {"used": len(problems), "left_out": left_out},
        **summary,
    }
    summary["warnings"] = _report(summary, config)
    origin = {
        "model": config.model,
        "fingerprint": fingerprint(model),
        "source_model": config.source_model or config.model,
    }
    told = {**origin, "options": folder.config, "traces": file_fingerprint([config.traces]), "seed": config.seed}
    for name, direction in critical_directions(c, chosen, control, config, layout, told).items():
        direction.save(folder.path / "directions" / name)
    info = {
        "kind": "rcn",
        "schema": SCHEMA,
        **origin,
        "unit": config.unit,
        "meaning": MEANING,
        "shift": SHIFT[config.unit],
        "options": folder.config,
        "statistics": summary,
        "problems": problems.tolist(),
        "seed": config.seed,
        "version": __version__,
        "tensors": file_fingerprint([folder.path / "neurons.safetensors"]),
    }
    write_json(folder.path / "neurons.json", info)
    return folder.finish(summary)


def _report(s: dict[str, Any], config: RcnConfig) -> list[str]:
    """Print the summary; what there is to warn of."""
    chance, jaccard, size, traces = s["chance"], s["stability"]["mean_jaccard"], s["size"], s["traces"]
    print(
        f"{s['neurons']} neurons (by block {', '.join(f'{k}: {v}' for k, v in s['blocks'].items())}) from "
        f"{traces['right']} right and {traces['wrong']} wrong traces of {s['training_problems']['used']} problems\n"
        f"{s['flips']} neurons change their sign, {chance['flips']['mean']:.0f} with shuffled labels\n"
        f"|S| from {size['largest']:.3g} to {size['least']:.3g}, "
        f"{chance['as_large_as_the_last']['mean']:.1f} as large with shuffled labels (p = {chance['p_kth_size']:.2g})\n"
        f"redrawn questions give sets with a mean Jaccard of {jaccard:.2f}",
        flush=True,
    )
    checks = {
        f"fewer than the {config.neurons} neurons asked for change their sign": s["neurons"] < config.neurons,
        "shuffled labels give neurons as large: these may be chance": chance["p_kth_size"] > 0.05,
        "redrawn questions keep less than a third of the set: sample more problems": jaccard < 0.3,
    }
    warnings = [text for text, due in checks.items() if due]
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    return warnings
