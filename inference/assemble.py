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
from neureasoner.inference.plan import PLAN_FILE, Plan
from neureasoner.model_files import model_files
from neureasoner.stages import MARK, STARTED, StageFolder

CARD = "neureasoner.json"
LEVELS = ("intra", "inter", "instance")
PROBE_FILES = ("probe.json", "probe.safetensors")


def assemble(config: AssembleConfig) -> dict[str, Any]:
    """Stage ``assemble``. Copies model, plan and probes into ``out``; rules whose probe is missing are dropped, aloud.

    ``at_step`` of the instance rule is set to the number of steps its probe was fitted on. Everything is built beside
    ``out`` and renamed into place, so a killed run leaves no half checkpoint.
    """
    out, source = Path(config.out), Path(config.probes)
    found = [f"{kind}{level}" for kind in ("", "paper/") for level in LEVELS if _is_probe(source / kind / level)]
    if not source.is_dir():
        raise UserError(f"{config.probes}: no such folder; run `probes fit` first")
    if out.exists() and not (out / MARK).is_file() and {p.name for p in out.iterdir()} - {STARTED}:
        raise UserError(f"{out} holds other files; choose another --out or delete it")
    plan, dropped = _keep_rules(Plan.load(config.plan), found, source)
    files = [source / name / file for name in found for file in PROBE_FILES]
    inputs: list[str | Path] = [config.plan, config.probes, *files, *model_files(config.model)]
    folder = StageFolder(out, "assemble", config, inputs=inputs)
    if folder.done:
        return folder.summary
    for text in dropped:
        warnings.warn(text, stacklevel=2)
    building = out.parent / f".{out.name}.assembling"
    shutil.rmtree(building, ignore_errors=True)
    try:
        summary = _build(config, plan, found, source, building)
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


def _build(config: AssembleConfig, plan: Plan, found: list[str], source: Path, out: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig

    from neureasoner.inference.controller import Controller
    from neureasoner.models import fingerprint, load, resolve
    from neureasoner.probes.detectors.probe import Probe

    accept: list[str] = []
    if config.base:
        base, _ = load(config.base, device="cpu")
        accept.append(fingerprint(base))
        del base
    stored = AutoConfig.from_pretrained(resolve(config.model), trust_remote_code=False).dtype
    model, tokenizer = load(config.model, device="cpu", dtype=stored or torch.float32)
    probes = {f"probes/{name}": Probe.load(source / name) for name in found}
    plan = plan.fit_windows(probes)
    for probe in probes.values():
        if probe.model_fingerprint not in accept:
            probe.check(model)
    Controller(model, tokenizer, plan, probes, oracles=_placeholders(plan), accept=accept)
    out.mkdir(parents=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name in found:
        target = out / "probes" / name
        target.mkdir(parents=True)
        for file in PROBE_FILES:
            shutil.copyfile(source / name / file, target / file)
    plan.save(out / PLAN_FILE)
    card = {
        "schema": 1,
        "version": __version__,
        "model": config.model,
        "fingerprint": fingerprint(model),
        "base": config.base,
        "base_files": file_fingerprint(model_files(config.base)) if config.base else None,
        "base_fingerprint": accept[0] if accept else "",
        "versions": {"torch": torch.__version__, "transformers": _version("transformers")},
        "probes": {
            name: {
                "level": p.features.level,
                "features": p.features.name,
                "window": p.features.window,
                "threshold": float(p.threshold),
            }
            for name, p in probes.items()
        },
        "config": asdict(config),
    }
    write_json(out / CARD, card)
    return {"rules": plan.names, "probes": sorted(probes), "fingerprint": card["fingerprint"]}


def _placeholders(plan: Plan) -> dict[str, Any]:
    """Oracles are only known at generation; while assembling any will do."""
    return {r.trigger.oracle: (lambda row: False) for r in plan.rules if r.trigger.oracle}


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
