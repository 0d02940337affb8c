"""``combine``: parts of a plan switched on together and apart, on the same problems with the same seeds.

The effect of a part is the difference between two arms that differ in it alone. Whether one part explains another is a
difference of such differences, problem by problem: what it brings beside the others, less what it brings alone.
Goes on after a kill: finished batches are kept.

Legend: ``P`` problems, ``R`` draws.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.artifacts import write_json, write_text
from neureasoner.directions import INFO_FILE
from neureasoner.errors import UserError
from neureasoner.evaluation.ablation import Ablation, Steering, choose_strength
from neureasoner.evaluation.combination_config import ALL, NONE, WITHOUT, CombineConfig
from neureasoner.evaluation.combination_text import markdown
from neureasoner.evaluation.metrics import (
    LEVEL,
    Outcome,
    compare,
    interval,
    per_problem,
    resampled_means,
    shown,
    sign_flip_p,
    summarise,
)
from neureasoner.evaluation.problems import capped, check_apart, containment, gradable_problems
from neureasoner.evaluation.results import command_line, versions
from neureasoner.inference.plan import PLAN_FILE, Plan, Rule
from neureasoner.inference.plan_yaml import rule_from_dict
from neureasoner.model_files import model_files, resolve
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem

Outcomes = Mapping[str, Sequence[Outcome]]


@dataclass(frozen=True)
class Switched(Steering):
    """One arm: the parts that are on, and the plan that this leaves."""

    on: tuple[str, ...] = ()
    rules: Plan = field(default_factory=lambda: Plan(NONE))

    def plan(self, config: Any, strength: float, rate: float) -> Plan:
        """The plan of this arm, whose strengths it already holds."""
        return self.rules


def _moved(rule: Rule, start: Path, folder: Path) -> Rule:
    """A rule whose paths count from ``start``, with paths that count from ``folder``."""

    def path(name: str) -> str:
        return os.path.relpath((start / name).resolve(), folder.resolve())

    t = rule.trigger
    gate = path(t.gate) if isinstance(t.gate, str) else t.gate
    t = replace(t, probe=path(t.probe) if t.probe else None, gate=gate)
    return replace(rule, trigger=t, direction=path(rule.direction) if rule.direction else None)


def whole_plan(config: CombineConfig) -> Plan:
    """The checkpoint's rules and those of the settings, in this order, in a plan of ``out/plans``.

    Raises UserError for a folder that is no steered checkpoint, and for a rule that is misspelt or occurs twice.
    """
    model, folder = Path(resolve(config.model)), Path(config.out) / "plans"
    if not (model / PLAN_FILE).is_file():
        raise UserError(f"{config.model}: holds no {PLAN_FILE}, so it is no steered checkpoint; run `assemble` first")
    own = Plan.load(model)
    rules = [_moved(rule, model, folder) for rule in own.rules]
    for name, value in config.rules.items():
        if not isinstance(value, dict):
            raise UserError(f"key 'rules', {name}: expected a rule as in a plan, got {value!r}")
        rules.append(_moved(rule_from_dict({"name": name, **value}, f"key 'rules', {name}"), Path("."), folder))
    plan = Plan(ALL, tuple(rules), folder, "order")
    return with_probes(Plan.from_dict(plan.to_dict(), "combined plan", folder), config.probes)


def with_probes(plan: Plan, probes: Mapping[str, str]) -> Plan:
    """The plan with other probes for some rules; ``at_step`` follows the steps that a probe was fitted on."""
    from neureasoner.probes.detectors.probe import Probe

    named = {rule: os.path.relpath(Path(p).resolve(), plan.folder.resolve()) for rule, p in probes.items()}
    thresholds = {r.name: r.trigger.threshold for r in plan.rules}
    plan = plan.replace_triggers({r: {"probe": p, "threshold": thresholds.get(r)} for r, p in named.items()})
    return plan.fit_windows({named[rule]: Probe.load(p) for rule, p in probes.items()})


def parts_of(config: CombineConfig, plan: Plan) -> dict[str, list[str]]:
    """Rules by part. Raises UserError for a rule that the plan lacks, or strengths of a part that has none."""
    parts = config.parts or {name: [name] for name in plan.names}
    for rules in parts.values():
        plan.select(rules)
    for part in config.strengths:
        if part not in parts:
            raise UserError(f"key 'strengths': no part is named '{part}'; there are {', '.join(parts)}")
        if all(plan.rule(r).forces for r in parts[part]):
            raise UserError(f"key 'strengths': part '{part}' only forces texts, which have no strength")
    return parts


def name_of(on: Sequence[str], parts: Sequence[str]) -> str:
    """An arm's name: none, all, without_x, or the parts that are on."""
    if not on or len(on) == len(parts):
        return ALL if on else NONE
    if len(on) == len(parts) - 1 and len(parts) > 2:
        return WITHOUT + next(p for p in parts if p not in on)
    return "+".join(on)


def subsets(parts: Sequence[str], arms: str) -> list[tuple[str, ...]]:
    """Which parts are on in each arm: nothing first, everything last."""
    n = len(parts)
    sizes = {"whole": (0, n), "minus": (0, 1, n - 1, n), "factorial": range(n + 1)}[arms]
    return [on for k in sorted({*sizes}) for on in combinations(parts, k)]


class Combination(Ablation):
    """Model and problems, loaded once; ``run`` of ``Ablation`` generates the arms."""

    def __init__(self, config: CombineConfig, plan: Plan, problems: dict[str, list[Problem]]):
        from neureasoner.inference.steered import SteeredModel

        self.config: Any = config
        self.problems, self.rate, self.gate = problems, 0.0, None
        self.parts, self.whole = parts_of(config, plan), plan
        used = [rule for rules in self.parts.values() for rule in rules]
        plan.folder.mkdir(parents=True, exist_ok=True)  # paths in the plans count from there
        # loads every probe, direction and gate, so that a wrong file does not cost an arm
        self.plain = SteeredModel.from_pretrained(config.model, plan.select(used), device=config.device or None)
        for changed in self._variants():
            self.plain.with_plan(changed.rules)

    def switched(self, on: Iterable[str], plan: Plan | None = None) -> Switched:
        """The arm with these parts on."""
        on = tuple(p for p in self.parts if p in set(on))
        name = name_of(on, list(self.parts))
        rules = (plan or self.whole).select([rule for p in on for rule in self.parts[p]])
        about = "no rule acts" if not on else f"{', '.join(on)} on"
        return Switched(name, about, "", on=on, rules=replace(rules, name=name))

    def _variants(self) -> list[Switched]:
        everything = self.switched(self.parts).rules
        found = []
        for name, probes in self.config.variants.items():
            if not isinstance(probes, dict) or not probes:
                raise UserError(f"key 'variants', {name}: expected RULE: probe folder, got {probes!r}")
            rules = replace(with_probes(everything, probes), name=name)
            found.append(Switched(name, f"everything, other probes for {', '.join(probes)}", "", rules=rules))
        return found

    def strengthened(self, part: str, strength: float) -> Plan:
        """The whole plan with every rule of a part that has a strength set to this one."""
        mine = set(self.parts[part])

        def change(rule: Rule) -> Rule:
            if rule.name not in mine or rule.forces:
                return rule
            return replace(rule, strength=replace(rule.strength, value=strength))

        return replace(self.whole, rules=tuple(map(change, self.whole.rules)))

    def tune(self, bar: Any) -> list[dict[str, Any]]:
        """Choose each part's strength, that part alone on, and keep it in the plan."""
        tried: list[dict[str, Any]] = []
        how = {"resamples": self.config.resamples, "seed": self.config.seed}
        for part, strengths in self.config.strengths.items():
            plans = {s: self.strengthened(part, s) for s in strengths}
            found = {s: self.run("validation", self.switched([part], plans[s]), s, bar) for s in strengths}
            best = choose_strength(found)
            for s, outs in found.items():
                tried.append({"part": part, "strength": s, **summarise(outs, **how), "chosen": s == best})
            self.whole = plans[best]
        return tried

    def measure(self, bar: Any) -> dict[str, tuple[Switched, list[Outcome]]]:
        """Every arm on the test problems."""
        arms = [self.switched(on) for on in subsets(list(self.parts), self.config.arms)] + self._variants()
        for arm in arms:
            arm.rules.save(arm.rules.folder / f"{arm.name}.yaml")
        return {arm.name: (arm, self.run("test", arm, 1.0, bar)) for arm in arms}


def contrast(rows: Outcomes, weights: Mapping[str, float], config: CombineConfig) -> dict[str, Any]:
    """A weighted sum of arms, problem by problem: accuracy and tokens with intervals, p-value of the accuracy."""
    tables = {name: per_problem(rows[name]) for name in weights}
    if len({t.ids for t in tables.values()}) != 1:
        raise ValueError("a contrast needs the same problems in every arm")
    accuracy = np.sum([w * tables[n].accuracy for n, w in weights.items()], axis=0)
    tokens = np.sum([w * tables[n].tokens for n, w in weights.items()], axis=0)
    draws = resampled_means(np.stack([accuracy, tokens], axis=1), config.resamples, config.seed)
    ends, p = interval(draws[:, 0]), sign_flip_p(accuracy, config.resamples, config.seed)
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_ci": ends,
        "accuracy_p": p,
        "accuracy_shown": shown(ends, p),
        "tokens": float(tokens.mean()),
        "tokens_ci": interval(draws[:, 1]),
    }


def effects(rows: Outcomes, parts: Sequence[str], config: CombineConfig) -> list[dict[str, Any]]:
    """Per part: what it brings alone, what beside all others, and the difference of the two.

    ``mean``, where every subset was run: what it brings on average over what else is on.
    """

    def arm(*on: str) -> str:
        return name_of([p for p in parts if p in on], parts)

    found = []
    for x in parts:
        others = [p for p in parts if p != x]
        alone = {arm(x): 1.0, NONE: -1.0}
        beside = {ALL: 1.0, arm(*others): -1.0}
        entry = {"part": x, "alone": contrast(rows, alone, config), "beside": contrast(rows, beside, config)}
        entry["change"] = contrast(rows, _difference(beside, alone), config)
        contexts = [c for k in range(len(others) + 1) for c in combinations(others, k)]
        if all(arm(x, *c) in rows and arm(*c) in rows for c in contexts):
            share = 1.0 / len(contexts)
            weights = {arm(x, *c): share for c in contexts} | {arm(*c): -share for c in contexts}
            entry["mean"] = contrast(rows, weights, config)
        found.append(entry)
    return found


def _difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) - b.get(name, 0.0) for name in {**a, **b}}


def pairs(rows: Outcomes, parts: Sequence[str], config: CombineConfig) -> list[dict[str, Any]]:
    """Per pair of parts, nothing else on: each alone, each beside the other, and how far they fail to add up."""
    found = []
    for x, y in combinations(parts, 2):
        both = name_of([x, y], parts)
        if both not in rows:
            continue
        first, second = {x: 1.0, NONE: -1.0}, {y: 1.0, NONE: -1.0}
        first_beside, second_beside = {both: 1.0, y: -1.0}, {both: 1.0, x: -1.0}
        weights = {"first": first, "second": second, "first_beside": first_beside, "second_beside": second_beside}
        entry = {name: contrast(rows, w, config) for name, w in weights.items()}
        found.append({"parts": [x, y], **entry, "change": contrast(rows, _difference(first_beside, first), config)})
    return found


def combine(config: CombineConfig) -> dict[str, Any]:
    """Stage ``combine``. Writes results.json and .md, plans/<arm>.yaml and the traces of every arm.

    Raises UserError for problem files that overlap, and for a rule, probe, direction or gate that does not fit the
    model, before anything is generated.
    """
    names = {"test": config.problems} | ({"validation": config.validation} if config.strengths else {})
    problems = {k: gradable_problems(file, config.limit) for k, file in names.items()}
    check_apart(problems["test"], problems.get("validation", []), config.problems, config.validation, "strengths")
    config = capped(config, [p for part in problems.values() for p in part])
    plan = whole_plan(config)
    parts_of(config, plan)
    described = [plan.folder / d / INFO_FILE for d in plan.direction_paths]
    described += [plan.folder / g / "gate.json" for g in plan.gate_paths]
    described += [plan.folder / p / "probe.json" for p in plan.probe_paths]
    inputs: list[str | Path] = [*names.values(), Path(resolve(config.model)) / PLAN_FILE, *map(_plain, described)]
    folder = StageFolder(config.out, "combine", config, inputs=[*inputs, *model_files(config.model)])
    if folder.done:
        print((folder.path / "results.md").read_text(encoding="utf-8"), flush=True)
        return folder.summary
    held = containment(config.out, [p for part in problems.values() for p in part])
    found = _run(Combination(config, plan, problems)) | held
    write_json(folder.path / "results.json", found)
    text = markdown(found)
    write_text(folder.path / "results.md", text)
    print(text, flush=True)
    keys = ("accuracy", "accuracy_ci", "tokens_mean", "tokens_ci")
    arms = {a["name"]: {k: a[k] for k in keys} for a in found["arms"]}
    return folder.finish({"arms": arms, "n_problems": found["problems"]["test"]})


def _plain(path: Path) -> Path:
    """A path without ``..``: the folder it steps out of need not exist yet."""
    return Path(os.path.normpath(path))


def _run(combination: Combination) -> dict[str, Any]:
    """Validation, then test; the whole of ``results.json``."""
    from neureasoner.progress import Progress

    config = combination.config
    how = {"resamples": config.resamples, "seed": config.seed}
    with Progress() as bar:
        tuning = combination.tune(bar)
        measured = combination.measure(bar)
    rows = {name: outs for name, (_, outs) in measured.items()}
    parts = list(combination.parts)
    compared = [(n, NONE) for n in rows if n != NONE] + [(ALL, n) for n in rows if n not in (NONE, ALL)]
    whole = config.arms == "whole"
    return {
        "schema": 1,
        "parts": combination.parts,
        "arms": [
            {
                "name": name,
                "about": arm.about,
                "on": list(arm.on),
                "variant": name in config.variants,
                **summarise(outs, **how),
                "truncated": float(np.mean([o.truncated for o in outs])),
                "triggers_per_trace": float(np.mean([o.triggers for o in outs])),
                "seconds": round(sum(o.seconds for o in outs), 2),
            }
            for name, (arm, outs) in measured.items()
        ],
        "comparisons": [{"arm": a, "against": b, **compare(rows[a], rows[b], **how)} for a, b in compared],
        "effects": [] if whole or len(parts) < 2 else effects(rows, parts, config),
        "pairs": [] if whole or len(parts) < 3 else pairs(rows, parts, config),
        "tuning": tuning,
        "strengths": {r.name: r.strength.value for r in combination.whole.rules if not r.forces},
        "intervals": {"level": LEVEL, "method": "percentile bootstrap over problems", "resamples": config.resamples},
        "p_values": "two-sided sign flips by problem; all are counted where there are no more than resamples",
        "seeds": {"sampling": config.seed, "samples": config.samples, "validation_samples": config.validation_samples},
        "sampling": {k: getattr(config, k) for k in ("temperature", "top_p", "max_new_tokens", "batch_size")},
        "problems": {k: len(v) for k, v in combination.problems.items()},
        "model": config.model,
        "base": str(combination.plain.card.get("base") or ""),
        "versions": versions(),
        "command": command_line(),
    }
