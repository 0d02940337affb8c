"""``probes locate``: the neurons and heads of one block that write failures and not clean steps (core.md §1.2).

Also where such components lie: in the MLP or in the heads, and at which depth (``experts.py``). Only training problems
of the split that ``probes fit`` will make are used, so that the probes' test stays unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner import __version__
from neureasoner.artifacts import write_json, write_text
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.probes.attribution import experts
from neureasoner.probes.attribution.direct import Scores, direct_sweep
from neureasoner.probes.attribution.experts import Pools
from neureasoner.probes.attribution.selection import Pool, Selection, implied_k, places, pooled, select
from neureasoner.probes.attribution.spans import Span, spans
from neureasoner.probes.attribution.sweep import depass_sweep
from neureasoner.probes.config import LocateConfig
from neureasoner.probes.detectors.metrics import bootstrap_draws
from neureasoner.probes.features import LEVELS
from neureasoner.probes.labels import instance_labels, labels_of, split_problems
from neureasoner.sites import Layout
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces

KIND = {"intra": "neuron", "inter": "head", "instance": "neuron"}
SCORES = {"depass": depass_sweep, "direct": direct_sweep}


@dataclass
class Plan:
    """The settings held against the model: which block is chosen, which are scanned, how many of each type it has."""

    config: LocateConfig
    layer: int
    scanned: list[int]
    sizes: dict[str, int]  # components of a block by type

    @classmethod
    def of(cls, config: LocateConfig, layout: Layout) -> Plan:
        """Raises UserError for a block that the model does not have, or a TopK larger than a block."""
        layer = layout.n_layers // 2 if config.layer == -1 else config.layer
        layout.check(f"residual:{layer}")
        every = list(range(layout.n_layers))
        scanned = every if "all" in config.blocks else sorted({int(b) for b in config.blocks})
        if not set(scanned) <= set(every):
            raise UserError(f"key 'blocks' names block {scanned[-1]}, but this model has blocks 0 to {every[-1]}")
        sizes = {"neuron": layout.intermediate_size, "head": layout.n_heads}
        for kind, size in sizes.items():
            k = getattr(config, f"k_{kind}s")
            if k > size:
                raise UserError(f"key 'k_{kind}s' is {k}, but a block has {size} {kind}s; use fewer")
        return cls(config, layer, scanned, sizes)

    @property
    def wanted(self) -> dict[str, int]:
        """Components to choose, by type."""
        return {"neuron": self.config.neurons, "head": self.config.heads}

    def topk(self, kind: str) -> int:
        """The literal K of a type, 0 if another selection is used."""
        return int(getattr(self.config, f"k_{kind}s"))

    def pools(self, scores: dict[int, Scores]) -> dict[str, torch.Tensor]:
        """Scores of one span as those of every pool (``experts.Pools`` says which), ``[n, C]`` each."""
        here = scores[self.layer]
        out = {f"neuron:{self.layer}": here[0], f"head:{self.layer}": here[1]}
        out |= {"raw": pooled(here, False), "z": pooled(here, True)}
        if self.scanned:
            out |= {f"{kind}:{b}": scores[b][i] for b in self.scanned for i, kind in enumerate(("neuron", "head"))}
            out["depth"] = pooled([s for b in self.scanned for s in scores[b]], True)
        return out


def place_spans(
    model: Any, side: Sequence[Span], plan: Plan, column: dict[str, int], advance: Callable[[], None]
) -> dict[str, Pool]:
    """What the spans of one side say of the components of every pool; empty without spans.

    ``column``: problem id -> column of the draws. Memory: 12 bytes a span and component, of all scanned blocks twice.
    Raises UserError for scores that are not finite.
    """
    found: dict[str, list[list[np.ndarray]]] = {}
    for trace, targets in side:
        begin = len(trace.prompt_ids)
        ids = [*trace.prompt_ids, *trace.response_ids[: max(targets) + 1]]
        layers = sorted({plan.layer, *plan.scanned})
        scores = SCORES[plan.config.mode](model, ids, [begin + t for t in targets], layers)
        for layer, parts in scores.items():
            if not all(bool(torch.isfinite(p).all()) for p in parts):
                raise UserError(
                    f"trace '{trace.id}': scores of block {layer} are not finite; check the weights of model "
                    f"'{plan.config.model}' for NaN or infinite values"
                )
        for name, values in plan.pools(scores).items():
            rho, place, mean = places(values, plan.config.quantile)
            found.setdefault(name, []).append([t.cpu().numpy() for t in (rho, place, mean.float())])
        advance()
    problem = np.array([column[t.problem.id] for t, _ in side], dtype=np.int64)
    stacked = {name: [np.stack(rows) for rows in zip(*spans_, strict=True)] for name, spans_ in found.items()}
    return {name: Pool(rho, place, mean, problem) for name, (rho, place, mean) in stacked.items()}


def _site(kind: str, layer: int, indices: Sequence[int]) -> str:
    return f"{kind}:{layer}[{','.join(str(i) for i in sorted(indices))}]"


def _controls(selection: Selection, level: str, plan: Plan) -> str:
    """As many random components of the same type, outside the selection as far as there are enough."""
    kind = KIND[level]
    rng = np.random.default_rng([plan.config.seed, 7, LEVELS.index(level)])
    others = [i for i in rng.permutation(plan.sizes[kind]) if i not in set(selection.indices)]
    again = rng.permutation(selection.indices).tolist()
    return _site(kind, plan.layer, [int(i) for i in (others + again)[: len(selection.indices)]])


def _choose(level: str, pools: Pools, plan: Plan, draws: np.ndarray) -> Selection:
    """The level's selection. Raises UserError if a literal intersection is empty in every failing span."""
    kind = KIND[level]
    wanted, k = min(plan.wanted[kind], plan.sizes[kind]), plan.topk(kind)
    failing, clean = pools.pair(f"{kind}:{plan.layer}")
    chosen = select(failing, clean, wanted, draws, k)
    if not chosen.indices:
        raise UserError(
            f"{level}: no {kind} of block {plan.layer} is among the first {k} at every token of any of "
            f"{chosen.n_spans} failing spans; K = {implied_k(failing, wanted)} would hold {wanted} in the median span: "
            f"raise key 'k_{kind}s', or use selection worst_rank, which needs no K"
        )
    return chosen


@dataclass
class Found:
    """What one level's spans single out. ``gain [C]``: share of failing spans that select each component of the level's
    type, minus the share of clean ones. ``joint`` keeps the pools that are compared between levels."""

    chosen: Selection
    site: str
    gain: np.ndarray
    separation: dict[str, Any]
    depth: dict[str, Any]
    joint: Pools

    @classmethod
    def of(cls, level: str, pools: Pools, plan: Plan, draws: np.ndarray) -> Found:
        """Choose, and look where the level's experts lie. Raises UserError as ``_choose``."""
        kind, seed = KIND[level], plan.config.seed
        chosen = _choose(level, pools, plan, draws)
        often = [
            side.selects(plan.wanted[kind], plan.topk(kind)).mean(axis=0)
            for side in pools.pair(f"{kind}:{plan.layer}")
            if side is not None
        ]
        sizes = plan.sizes["neuron"], plan.sizes["head"]
        return cls(
            chosen,
            _site(kind, plan.layer, chosen.indices),
            often[0] - sum(often[1:]),
            experts.separation(pools, plan.layer, plan.wanted, draws, seed),
            experts.depth_of(pools, plan.scanned, *sizes, plan.wanted, draws, seed) if plan.scanned else {},
            Pools(*({k: v for k, v in side.items() if k in ("raw", "z")} for side in (pools.failing, pools.clean))),
        )


def _warnings(level: str, chosen: Selection, clean_wanted: bool, plan: Plan) -> list[str]:
    kind, size = KIND[level], plan.sizes[KIND[level]]
    out = []
    shared = 2 * len(chosen.indices) - size
    if shared > 0:
        out.append(
            f"{level}: {len(chosen.indices)} of a block's {size} {kind}s are selected, so its random "
            f"control shares {shared} of them and says less; set '{kind}s' to at most {size // 2}"
        )
    if chosen.n_problems < experts.FEWEST:
        out.append(
            f"{level}: failing spans of {chosen.n_problems} problem(s) only, so stability and intervals say little; "
            "judge traces of more problems"
        )
    if clean_wanted and not chosen.n_clean:
        out.append(f"{level}: no clean span to hold against the failing ones, so always-on components may be selected")
    return out


def _load_spans(config: LocateConfig) -> dict[str, tuple[list[Span], list[Span]]]:
    """Failing and clean spans of the training problems, by level."""
    traces = read_traces(config.traces)
    for t in traces:
        labels_of(t)
    split = split_problems(traces, config.validation, config.test, config.seed)
    train: list[Trace] = [t for t in traces if split[t.problem.id] == "train" and t.prompt_ids]
    easy = instance_labels(train, read_traces(config.nothinking) if config.nothinking else [])
    pairs = {level: spans(train, level, config, easy) for level in LEVELS}
    return {level: (failing, clean if config.contrast else []) for level, (failing, clean) in pairs.items()}


def _without_failures(level: str, config: LocateConfig) -> str:
    lacking = f"of an easy problem with {config.first_steps} closed steps " if level == "instance" else ""
    return f"{level}: no failing trace {lacking}among the training problems; no neurons"


def locate(config: LocateConfig) -> dict[str, Any]:
    """Stage ``probes locate``. Writes ``neurons.json``, ``experts.md`` and figures.

    A level without failing spans is left out with a warning; UserError if none is left.
    """
    from neureasoner.models import fingerprint, load
    from neureasoner.probes.attribution.figures import draw_example, draw_experts, draw_selected
    from neureasoner.progress import Progress

    inputs: list[str | Path] = [
        *model_files(config.model),
        config.traces,
        *([config.nothinking] if config.nothinking else []),
    ]
    folder = StageFolder(config.out, "probes locate", config, inputs=inputs)
    if folder.done:
        return folder.summary
    pairs = _load_spans(config)
    warnings = [_without_failures(level, config) for level, (failing, _) in pairs.items() if not failing]
    pairs = {level: pair for level, pair in pairs.items() if pair[0]}
    if not pairs:
        raise UserError("no neurons could be located: " + "; ".join(warnings))
    model, tokenizer = load(config.model)
    plan = Plan.of(config, Layout.of(model))
    problems = sorted({t.problem.id for sides in pairs.values() for side in sides for t, _ in side})
    column = {p: i for i, p in enumerate(problems)}
    draws = bootstrap_draws(len(problems), config.bootstrap, config.seed)
    found: dict[str, Found] = {}
    with Progress() as bar:
        task = bar.add_task("attribution", total=sum(len(side) for sides in pairs.values() for side in sides))
        for level, sides in pairs.items():
            bar.update(task, description=f"attribution ({level})")
            pools = Pools(*(place_spans(model, s, plan, column, lambda: bar.update(task, advance=1)) for s in sides))
            found[level] = Found.of(level, pools, plan, draws)
            warnings += _warnings(level, found[level].chosen, config.contrast, plan)
    sizes = plan.sizes["neuron"], plan.sizes["head"]
    types = experts.types_of({k: f.joint for k, f in found.items()}, *sizes, sum(plan.wanted.values()), draws)
    for level, f in found.items():
        types["levels"][level]["separation"] = f.separation
    depth = {"depth": {level: f.depth for level, f in found.items()}} if plan.scanned else {}
    summary = {
        "kind": "neurons",
        "schema": 1,
        "model": config.model,
        "fingerprint": fingerprint(model),
        "layer": plan.layer,
        "mode": config.mode,
        "selection": config.selection,
        "quantile": config.quantile,
        "contrast": config.contrast,
        "seed": config.seed,
        "version": __version__,
        "levels": {level: {"site": f.site, **asdict(f.chosen)} for level, f in found.items()},
        "joint": {level: _joint(types, level) for level in found},
        "random": {level: _controls(f.chosen, level, plan) for level, f in found.items()},
        "experts": {"blocks": plan.scanned, "draws": config.bootstrap, **types, **depth},
        "warnings": warnings,
        "problems": problems,
    }
    experts.print_table(summary)
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    draw_experts(folder.path / "experts.png", summary)
    draw_selected(folder.path / "selected.png", summary, {level: f.gain for level, f in found.items()})
    draw_example(folder.path, model, tokenizer, summary, pairs, config.batch_size)
    write_text(folder.path / "experts.md", experts.markdown(summary))
    write_json(folder.path / "neurons.json", summary)
    keys = ("layer", "levels", "joint", "experts", "warnings")
    return folder.finish({k: summary[k] for k in keys})


def _joint(types: dict[str, Any], level: str) -> dict[str, Any]:
    """The z-scored joint selection in short: its size and the shares of both types."""
    heads = types["levels"][level]["measures"]["z"]["heads"]["value"]
    by_chance = round(types["chance"]["value"], 4)
    return {"size": types["size"], "heads": heads, "neurons": round(1 - heads, 4), "heads_by_chance": by_chance}
