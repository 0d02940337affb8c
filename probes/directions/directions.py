"""``probes directions``: the difference between two kinds of traces, or of thoughts, as a direction to steer along.

Legend: ``C`` values of a site, ``E`` states. Made on training problems of the split that the other stages make, and
checked on its validation problems: how well a state's place along the direction tells its side there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner.artifacts import file_fingerprint
from neureasoner.directions import INFO_FILE, Direction
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.probes.detectors.metrics import auroc
from neureasoner.probes.directions.config import DirectionsConfig
from neureasoner.probes.directions.estimators import (
    Estimate,
    Subspace,
    enough,
    mean_difference,
    pca_difference,
    relative_difference,
)
from neureasoner.probes.directions.states import States, projections, read_states, sites_of, states_of
from neureasoner.probes.labels import labels_of, split_problems
from neureasoner.sites import Layout, Site
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces

SIDES = {
    "correct": ("right traces", "wrong ones"),
    "short": ("the shortest right answer to a problem", "the longest"),
    "thoughts": ("thoughts that execute (shorter thinking)", "reflection and transition"),
}
WARN_BELOW = 0.6  # AUROC on validation problems


def meaning_of(config: DirectionsConfig) -> str:
    """The sign in words, from what is contrasted."""
    towards, away = SIDES[config.contrast]
    return f"positive = towards {towards}, away from {away}"


def subspace(folders: Sequence[str], sites: Sequence[str]) -> Subspace:
    """The vectors of other directions at these sites, stacked ``[k, C]``. Raises UserError for one that has none."""
    found: dict[str, list[np.ndarray]] = {}
    for folder in folders:
        other = Direction.load(folder)
        shared = [s for s in other.sites if s in sites]
        if not shared:
            raise UserError(f"{folder}: none of its sites ({', '.join(other.sites)}) is one of this direction's")
        for site in shared:
            found.setdefault(site, []).append(other.values[site].double().flatten().numpy())
    return {site: np.stack(rows) for site, rows in found.items()}


def estimate(examples: Any, config: DirectionsConfig, paired: bool, remove: Subspace) -> Estimate:
    """The estimator the settings name."""
    least = config.least_problems
    if config.estimator == "relative":
        return relative_difference(examples, config.top_k, least)
    if config.estimator == "pca":
        return pca_difference(examples, remove, least)
    return mean_difference(examples, paired, remove, least)


def to_direction(values: Mapping[str, np.ndarray], layout: Layout, meaning: str, **more: Any) -> Direction:
    """``[C]`` arrays by site as a Direction; heads get a row each."""
    shaped = {
        site: torch.tensor(v).reshape((-1, layout.head_dim) if Site.parse(site).kind == "head" else (-1,))
        for site, v in values.items()
    }
    return Direction(shaped, meaning, **more)


def sizes_of(layout: Layout) -> dict[str, int]:
    """What ``Direction.random_like`` draws other indices from."""
    return {"neuron": layout.intermediate_size, "head": layout.n_heads}


def directions(config: DirectionsConfig) -> dict[str, Any]:
    """Stage ``probes directions``. Writes ``direction.safetensors`` and ``direction.json``."""
    from neureasoner.models import fingerprint, load, load_tokenizer
    from neureasoner.progress import Progress

    removed = [Path(f) / INFO_FILE for f in config.remove]
    inputs: list[str | Path] = [*model_files(config.model), config.traces, *removed]
    folder = StageFolder(config.out, "probes directions", config, inputs=inputs)
    if folder.done:
        return folder.summary
    traces = read_traces(config.traces)
    for t in traces if config.contrast != "thoughts" else ():  # keywords need no judge
        labels_of(t)
    paired = config.paired
    if paired is None:
        paired = config.contrast != "thoughts" and config.estimator != "relative"
    paired = paired or config.estimator == "pca"
    # what there is to compare is counted first: the model may take minutes to load, and the traces hours to read
    train, held = _parts(traces, load_tokenizer(config.model), config)
    enough(_counts(train, paired), config.least_problems)
    model, _ = load(config.model)
    layout = Layout.of(model)
    sites = sites_of(layout, config.sites, ranked=config.estimator == "relative")
    remove = subspace(config.remove, sites)
    with Progress() as bar:
        task = bar.add_task("reading traces", total=len(train) + len(held))
        found = estimate(
            read_states(model, train, sites, config.batch_size, lambda n: bar.advance(task, n)), config, paired, remove
        )
        examples = read_states(model, held, list(found.values), config.batch_size, lambda n: bar.advance(task, n))
        side, along = projections(examples, found.values, paired)
    checked = {s: _rounded(auroc(side, x)) if 0 < side.sum() < len(side) else None for s, x in along.items()}
    values = found.values
    if config.length == "unit":
        values = {site: v / np.linalg.norm(v) for site, v in values.items()}
    info = {
        **found.info,
        "sizes": sizes_of(layout),
        "length": config.length,
        "validation_auroc": checked,
        "source_model": config.source_model or config.model,
        "traces": file_fingerprint([config.traces]),
        "options": folder.config,
    }
    direction = to_direction(
        values, layout, meaning_of(config), model=config.model, fingerprint=fingerprint(model), info=info
    )
    direction.save(folder.path)
    summary = {
        "meaning": direction.meaning,
        "estimator": found.info["estimator"],
        "examples": found.info["examples"],
        "problems": {"train": len({s.problem for s in train}), "validation": len({s.problem for s in held})},
        "norms": {site: _rounded(n) for site, n in direction.norms().items()},
        "validation_auroc": checked,
    }
    summary["warnings"] = _report(summary)
    return folder.finish(summary)


def _parts(traces: Sequence[Trace], tokenizer: Any, config: DirectionsConfig) -> tuple[list[States], list[States]]:
    """States of training and of validation problems; at most ``problems`` of the former, drawn by seed."""
    split = split_problems(traces, config.validation, config.test, config.seed)
    train, held = (
        states_of([t for t in traces if split[t.problem.id] == part], tokenizer, config)
        for part in ("train", "validation")
    )
    ids = sorted({s.problem for s in train})
    if len(ids) < config.least_problems:
        raise UserError(
            f"{len(ids)} training problems have states of the contrast '{config.contrast}', {config.least_problems} "
            "are needed; sample more traces, or lower least_problems"
        )
    used = set(np.random.default_rng([config.seed, 3]).permutation(ids)[: config.problems or None].tolist())
    return [s for s in train if s.problem in used], held


def _counts(states: Sequence[States], paired: bool) -> dict[str, int]:
    """What the estimators need enough of."""
    sides = [(s.problem, side) for s in states for side in s.sides]
    if paired:
        positive, negative = ({p for p, side in sides if side is wanted} for wanted in (True, False))
        return {"problems with both sides": len(positive & negative)}
    positives = sum(side for _, side in sides)
    return {"positive states": positives, "negative states": len(sides) - positives}


def _report(s: dict[str, Any]) -> list[str]:
    """Print the summary; what there is to warn of."""
    print(
        f"{s['meaning']}: {s['estimator']} of {s['examples']['positive']} and {s['examples']['negative']} states of "
        f"{s['problems']['train']} problems"
    )
    for site, norm in s["norms"].items():
        area = s["validation_auroc"][site]
        name = site if len(site) < 40 else f"{site[:36]}...]"
        print(f"  {name:<40} norm {norm:<8.4g} AUROC on validation problems {'–' if area is None else f'{area:.2f}'}")
    areas = [a for a in s["validation_auroc"].values() if a is not None]
    warnings = []
    if not areas:
        warnings.append("the validation problems have states of one side only, so the direction is unchecked")
    elif max(areas) < WARN_BELOW:
        warnings.append(f"no site tells the sides apart on validation problems (AUROC below {WARN_BELOW})")
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    return warnings


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
