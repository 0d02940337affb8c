"""``assemble``: write a steered checkpoint, whole or not at all."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, read_json, write_json
from neureasoner.errors import UserError
from neureasoner.inference.config import AssembleConfig
from neureasoner.inference.plan import PLAN_FILE, Plan, find_plan
from neureasoner.model_files import model_files
from neureasoner.stages import MARK, STARTED, StageFolder

CARD = "neureasoner.json"
SPLIT = "split.json"  # which problems `probes fit` trained, chose and tested its probes on
LEVELS = ("intra", "inter", "instance")
PROBE_FILES = ("probe.json", "probe.safetensors")
OTHER_FILES = {
    "directions": ("direction.json", "direction.safetensors"),
    "gates": ("gate.json", "gate.safetensors"),
}


def assemble(config: AssembleConfig) -> dict[str, Any]:
    """Stage ``assemble``. Copies model, plan, probes, directions and gates into ``out``.

    Rules whose probe is missing are dropped, aloud; a missing direction or gate is an error.
    The instance rule is read as its probe was fitted: once (``at_step``), or from a step on (``min_steps``).
    Everything is built beside ``out`` and renamed into place, so a killed run leaves no half checkpoint.
    """
    out, plan_file = Path(config.out), find_plan(config.plan)
    plan = Plan.load(plan_file)
    source = Path(config.probes) if config.probes else plan.folder / "probes"
    probed = bool(config.probes or plan.probe_paths)
    if probed and not source.is_dir():
        if config.probes:
            raise UserError(f"{config.probes}: no such folder; run `probes fit` first")
        raise UserError(
            f"plan {plan.name} names probe {plan.probe_paths[0]}, and there is no {source}; give the folder of "
            "`probes fit` as probes"
        )
    levels = [f"{kind}{level}" for kind in ("", "paper/") for level in LEVELS] if probed else []
    found = [level for level in levels if _is_probe(source / level)]
    others = {name: _find(plan, name, "directions", config.directions) for name in plan.direction_paths}
    others |= {name: _find(plan, name, "gates", config.gates) for name in plan.gate_paths}
    if out.exists() and not (out / MARK).is_file() and {p.name for p in out.iterdir()} - {STARTED}:
        raise UserError(f"{out} holds other files; choose another --out or delete it")
    plan, dropped = _keep_rules(plan, found, source)
    files = [source / name / file for name in found for file in PROBE_FILES]
    files += [source / SPLIT] if probed and (source / SPLIT).is_file() else []
    files += [file for listed in others.values() for file in listed]
    inputs: list[str | Path] = [
        plan_file,
        *([source] if probed else []),
        *files,
        *model_files(config.model),
    ]
    folder = StageFolder(out, "assemble", config, inputs=inputs)
    if folder.done:
        return folder.summary
    for text in dropped:
        warnings.warn(text, stacklevel=2)
    building = out.parent / f".{out.name}.assembling"
    shutil.rmtree(building, ignore_errors=True)
    try:
        summary = _build(config, plan, found, source, others, building)
        summary["dropped"] = dropped
        write_json(building / STARTED, read_json(out / STARTED))
        shutil.rmtree(out)
        os.replace(building, out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        if out.is_dir() and not any(p.name != STARTED for p in out.iterdir()):
            shutil.rmtree(out)
        raise
    return folder.finish(summary)


def _is_probe(folder: Path) -> bool:
    return all((folder / file).is_file() for file in PROBE_FILES)


def _find(plan: Plan, name: str, kind: str, given: str) -> list[Path]:
    """The files of a direction or gate that a plan names. Raises UserError naming where they were looked for."""
    if not name.startswith(f"{kind}/") or ".." in Path(name).parts:
        raise UserError(f"plan {plan.name}: {name} must lie under {kind}/ in a checkpoint")
    own = Path(name).relative_to(kind)
    looked = [Path(given) / own, Path(given)] if given else [plan.folder / name]
    for folder in looked:
        files = [folder / file for file in OTHER_FILES[kind]]
        if all(file.is_file() for file in files):
            return files
    where = " nor in ".join(str(p) for p in looked)
    raise UserError(f"plan {plan.name} names {name}, but it is not in {where}; say where it lies with {kind}")


def _keep_rules(plan: Plan, found: list[str], source: Path) -> tuple[Plan, list[str]]:
    """The plan without rules whose probe ``source`` lacks, and a line for each rule dropped."""
    kept, dropped = [], []
    for rule in plan.rules:
        path = rule.trigger.probe
        if path is None:
            kept.append(rule)
            continue
        if not path.startswith("probes/"):
            raise UserError(f"plan {plan.name}, rule {rule.name}: probe {path} must lie under probes/ in a checkpoint")
        if path.removeprefix("probes/") in found:
            kept.append(rule)
        else:
            missing = source / path.removeprefix("probes/")
            dropped.append(f"rule {rule.name} is dropped: its probe {missing} does not exist")
    return replace(plan, rules=tuple(kept)), dropped


def _build(
    config: AssembleConfig, plan: Plan, found: list[str], source: Path, others: dict[str, list[Path]], out: Path
) -> dict[str, Any]:
    import torch

    from neureasoner.directions import Direction
    from neureasoner.inference.steered import SteeredModel
    from neureasoner.models import fingerprint, known_as, load, stored_dtype, tokenizer_fingerprint
    from neureasoner.probes.detectors.gate import FailureGate
    from neureasoner.probes.detectors.probe import Probe

    accept: list[str] = []
    if config.base:
        base, _ = load(config.base, device="cpu")
        accept += known_as(fingerprint(base))
        del base
    model, tokenizer = load(config.model, device="cpu", dtype=stored_dtype(config.model))
    probes = {f"probes/{name}": Probe.load(source / name) for name in found}
    plan = plan.fit_windows(probes)
    directions = {name: Direction.load(others[name][0].parent) for name in plan.direction_paths}
    gates = {name: FailureGate.load(others[name][0].parent) for name in plan.gate_paths}
    SteeredModel(model, tokenizer, plan, probes, accept, directions, gates)  # refuses what cannot run
    out.mkdir(parents=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name in found:
        target = out / "probes" / name
        target.mkdir(parents=True)
        for file in PROBE_FILES:
            shutil.copyfile(source / name / file, target / file)
    if found and (source / SPLIT).is_file():
        shutil.copyfile(source / SPLIT, out / "probes" / SPLIT)
    for name in (*directions, *gates):
        (out / name).mkdir(parents=True)
        for path in others[name]:
            shutil.copyfile(path, out / name / path.name)
    plan.save(out / PLAN_FILE)
    card = {
        "schema": 1,
        "version": __version__,
        "model": config.model,
        "fingerprint": fingerprint(model),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "base": config.base,
        "base_files": file_fingerprint(model_files(config.base)) if config.base else None,
        "base_fingerprint": accept[0] if accept else "",
        "versions": {"torch": torch.__version__, "transformers": _version("transformers")},
        "probes": {
            name: {
                "level": p.features.level,
                "features": p.features.name,
                "window": p.features.window,
                **({"exit_from": p.features.exit_from} if p.features.exit_from else {}),
                "threshold": float(p.threshold),
            }
            for name, p in probes.items()
        },
        "directions": {
            name: {"meaning": d.meaning, "sites": d.sites, "files": file_fingerprint(others[name])}
            for name, d in directions.items()
        },
        "gates": {
            name: {"threshold": g.threshold, "channels": len(g.channels), "files": file_fingerprint(others[name])}
            for name, g in gates.items()
        },
        "config": asdict(config),
    }
    write_json(out / CARD, card)
    others_named = [*directions, *gates]
    summary = {"rules": plan.names, "probes": sorted(probes), "fingerprint": card["fingerprint"]}
    return summary | ({"others": others_named} if others_named else {})


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
