"""``probes locate``: the neurons and heads of one block that write failures and not clean steps (core.md §1.2).

Only training problems of the split that ``probes fit`` will make are used, so that the probes' test stays unseen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner import __version__
from neureasoner.artifacts import write_json
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.probes.attribution.depass import depass_scores
from neureasoner.probes.attribution.direct import direct_scores
from neureasoner.probes.attribution.selection import Selection, joint_worst_rank, ranks, select, worst_rank
from neureasoner.probes.config import LocateConfig
from neureasoner.probes.features import LEVELS
from neureasoner.probes.labels import closed_steps, instance_labels, is_clean, labels_of, split_problems
from neureasoner.sites import Layout
from neureasoner.stages import StageFolder
from neureasoner.traces import Step, Trace, read_traces

KIND = {"intra": "neuron", "inter": "head", "instance": "neuron"}
SCORES = {"depass": depass_scores, "direct": direct_scores}
SIMILAR = 0.5  # character 3-gram Jaccard of a repeated attempt
Span = tuple[Trace, list[int]]  # a trace and target positions in its response


def _trigrams(text: str) -> set[str]:
    flat = re.sub(r"\s+", " ", text.strip().lower())
    return {flat[i : i + 3] for i in range(max(1, len(flat) - 2))}


def loop_openings(trace: Trace) -> list[int]:
    """Steps that open a repeated attempt: the judge's, else the loop's first and those like an earlier one (§1.2.2)."""
    label = labels_of(trace).inter
    if label.attempts or label.steps is None:
        return label.attempts
    first, end = label.steps
    grams = {
        i: _trigrams(trace.response[trace.steps[i].char_start : trace.steps[i].char_end]) for i in range(first, end)
    }
    like = lambda a, b: len(a & b) / max(1, len(a | b)) >= SIMILAR  # noqa: E731
    return [i for i in range(first, end) if i == first or any(like(grams[i], grams[j]) for j in range(first, i))]


def _tokens(steps: Sequence[Step], drop_separator: bool) -> list[int]:
    """Response positions of ``steps``, without closing separators if asked (a step keeps at least one token)."""
    out: list[int] = []
    for s in steps:
        end = s.token_end - 1 if drop_separator and s.closed and s.token_end - s.token_start > 1 else s.token_end
        out.extend(range(s.token_start, end))
    return out


def spans(
    traces: Sequence[Trace], level: str, config: LocateConfig, easy: dict[str, int]
) -> tuple[list[Span], list[Span]]:
    """Failing spans and matched clean ones, at most ``max_traces`` each, in a seeded order.

    Clean spans match the failing ones: as many steps of a clean trace (intra, inter), the first K steps of a hard
    problem (instance).
    """
    rng = np.random.default_rng([config.seed, LEVELS.index(level)])
    failing: list[tuple[Trace, list[Step]]] = []
    clean: list[tuple[Trace, list[Step]]] = []
    counts: list[int] = []
    for i in rng.permutation(len(traces)):
        trace = traces[i]
        steps = closed_steps(trace)
        if level == "instance":
            side = {1: failing, 0: clean}.get(easy[trace.problem.id])
            if side is not None and len(steps) >= config.first_steps:
                side.append((trace, steps[: config.first_steps]))
            continue
        if is_clean(trace, level):
            clean.append((trace, steps))
            continue
        label = labels_of(trace)
        wrong = [label.intra.step] if level == "intra" else list(loop_openings(trace))
        chosen = [trace.steps[w] for w in wrong if w is not None]
        if chosen:
            failing.append((trace, chosen))
            counts.append(len(chosen))
    failing, clean = failing[: config.max_traces], clean[: config.max_traces]
    if level != "instance" and counts:
        matched = []
        for trace, steps in clean:
            n = min(int(rng.choice(counts)), len(steps))
            if n:
                matched.append((trace, [steps[j] for j in sorted(rng.choice(len(steps), n, replace=False))]))
        clean = matched
    build = lambda side: [(t, _tokens(s, config.exclude_separators)) for t, s in side]  # noqa: E731
    return build(failing), build(clean)


def _worst(
    model: Any, side: Sequence[Span], layer: int, config: LocateConfig, advance: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Worst ranks of every span: ``neuron [R, F]``, ``head [R, H]``, ``joint [R, F + H]``."""
    out: dict[str, list[np.ndarray]] = {"neuron": [], "head": [], "joint": []}
    for trace, targets in side:
        begin = len(trace.prompt_ids)
        ids = [*trace.prompt_ids, *trace.response_ids[: max(targets) + 1]]
        scores = SCORES[config.mode](model, ids, [begin + t for t in targets], layer)
        neurons, heads = (s.float().cpu().numpy() for s in scores)
        out["neuron"].append(worst_rank(neurons, config.quantile))
        out["head"].append(worst_rank(heads, config.quantile))
        out["joint"].append(joint_worst_rank(neurons, heads, config.quantile))
        advance()
    return {k: np.stack(v) if v else np.zeros((0, 1)) for k, v in out.items()}


def _joint(rho: np.ndarray, n_neurons: int, size: int) -> dict[str, Any]:
    """Where the joint, z-scored ranking puts its first ``size`` components."""
    top = np.argsort(ranks(-rho).mean(axis=0), kind="stable")[:size]
    heads = float((top >= n_neurons).mean())
    chance = (rho.shape[1] - n_neurons) / rho.shape[1]
    return {"size": size, "heads": round(heads, 4), "neurons": round(1 - heads, 4), "heads_by_chance": round(chance, 4)}


def _site(kind: str, layer: int, indices: Sequence[int]) -> str:
    return f"{kind}:{layer}[{','.join(str(i) for i in sorted(indices))}]"


def _controls(selection: Selection, kind: str, layer: int, size: int, seed: int, level: str) -> str:
    """As many random components of the same type, outside the selection as far as there are enough."""
    rng = np.random.default_rng([seed, 7, LEVELS.index(level)])
    others = [i for i in rng.permutation(size) if i not in set(selection.indices)]
    again = rng.permutation(selection.indices).tolist()
    return _site(kind, layer, [int(i) for i in (others + again)[: len(selection.indices)]])


def locate(config: LocateConfig) -> dict[str, Any]:
    """Stage ``probes locate``. Writes ``neurons.json`` and figures.

    A level without failing spans is left out with a warning; UserError if none is left.
    """
    from rich.progress import Progress

    from neureasoner.models import fingerprint, load
    from neureasoner.probes.figures import draw_example, draw_experts

    inputs: list[str | Path] = [
        *model_files(config.model),
        config.traces,
        *([config.nothinking] if config.nothinking else []),
    ]
    folder = StageFolder(config.out, "probes locate", config, inputs=inputs)
    if folder.done:
        return folder.summary
    traces = read_traces(config.traces)
    for t in traces:
        labels_of(t)
    split = split_problems(traces, config.validation, config.test, config.seed)
    train = [t for t in traces if split[t.problem.id] == "train" and t.prompt_ids]
    easy = instance_labels(train, read_traces(config.nothinking) if config.nothinking else [])
    model, tokenizer = load(config.model)
    layout = Layout.of(model)
    layer = layout.n_layers // 2 if config.layer == -1 else config.layer
    layout.check(f"residual:{layer}")
    sizes = {"neuron": layout.intermediate_size, "head": layout.n_heads}
    out: dict[str, Any] = {"levels": {}, "joint": {}, "random": {}}
    warnings: list[str] = []
    used: set[str] = set()
    frequency: dict[str, np.ndarray] = {}
    pairs = {level: spans(train, level, config, easy) for level in LEVELS}
    with Progress() as bar:
        total = sum(len(f) + len(c) * config.contrast for f, c in pairs.values())
        task = bar.add_task("attribution", total=total)
        for level, (failing, clean) in pairs.items():
            if not failing:
                warnings.append(f"{level}: no failing trace among the training problems; no neurons")
                continue
            bar.update(task, description=f"attribution ({level})")
            clean = clean if config.contrast else []
            used |= {t.problem.id for t, _ in failing + clean}
            kind = KIND[level]
            bad, good = (_worst(model, s, layer, config, lambda: bar.update(task, advance=1)) for s in (failing, clean))
            wanted = config.heads if kind == "head" else config.neurons
            chosen = select(bad[kind], good[kind] if clean else None, wanted)
            out["levels"][level] = {"site": _site(kind, layer, chosen.indices), **asdict(chosen)}
            out["joint"][level] = _joint(bad["joint"], sizes["neuron"], config.neurons + config.heads)
            out["random"][level] = _controls(chosen, kind, layer, sizes[kind], config.seed, level)
            shared = 2 * len(chosen.indices) - sizes[kind]
            if shared > 0:
                warnings.append(
                    f"{level}: {len(chosen.indices)} of a block's {sizes[kind]} {kind}s are selected, so its random "
                    f"control shares {shared} of them and says less; set '{kind}s' to at most {sizes[kind] // 2}"
                )
            frequency[level] = (ranks(-bad[kind]) <= wanted).mean(axis=0)
    for level, entry in out["levels"].items():
        n = len(entry["indices"])
        print(f"{level}: {n} {KIND[level]}s of block {layer}, from {entry['n_spans']} failing spans", flush=True)
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    if not out["levels"]:
        raise UserError("no neurons could be located: " + "; ".join(warnings))
    summary = {
        "kind": "neurons",
        "schema": 1,
        "model": config.model,
        "fingerprint": fingerprint(model),
        "layer": layer,
        "mode": config.mode,
        "quantile": config.quantile,
        "contrast": config.contrast,
        "seed": config.seed,
        "version": __version__,
        **out,
        "warnings": warnings,
        "problems": sorted(used),
    }
    draw_experts(folder.path / "experts.png", summary, frequency)
    draw_example(folder.path, model, tokenizer, summary, pairs, config.batch_size)
    write_json(folder.path / "neurons.json", summary)
    return folder.finish({"layer": layer, "levels": out["levels"], "joint": out["joint"], "warnings": warnings})
