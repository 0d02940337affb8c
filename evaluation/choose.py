"""``choose``: which rules of a plan act, and from which scores on, by what that is worth on validation problems.

Coordinate search: each rule alone at each of its settings, then the best settings together, then rules left out one by
one for as long as that loses nothing. Every plan answers the same problems with the same seeds. The plan-less run is
watched by all probes and interfered with by none, so its scores tell in which responses a plan acts at all; the others
are taken over as they are, because nothing in them would be drawn differently. Goes on after a kill: finished batches
are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.artifacts import read_json, write_json, write_text
from neureasoner.errors import UserError
from neureasoner.evaluation.choose_config import ChooseConfig
from neureasoner.evaluation.choose_search import PLAN_LESS, Search, joint_plans, name_of
from neureasoner.evaluation.choose_text import draw, markdown
from neureasoner.evaluation.metrics import LEVEL, compare, per_problem, summarise
from neureasoner.evaluation.problems import capped, containment, gradable_problems
from neureasoner.evaluation.results import command_line, versions
from neureasoner.inference.assemble import SPLIT
from neureasoner.inference.plan import PLAN_FILE, Plan
from neureasoner.inference.steered import load_directions, load_gates, load_probes
from neureasoner.model_files import model_files, resolve
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem


def choose(config: ChooseConfig) -> dict[str, Any]:
    """Stage ``choose``. Writes plan.yaml with its probes, choice.json, choice.md, frontier.png and every response.

    Raises UserError, before anything is generated, for problems that the probes were fitted on, or a rule that is not
    there.
    """
    from neureasoner.progress import Progress

    model = Path(resolve(config.model))
    if not (model / PLAN_FILE).is_file():
        raise UserError(f"{config.model}: holds no {PLAN_FILE}, so it is no steered checkpoint; run `assemble` first")
    plan = Plan.load(model)
    check_rules(config, plan)
    problems = gradable_problems(config.problems, config.limit)
    config = capped(config, problems)
    parts = [model / "probes" / SPLIT] if (model / "probes" / SPLIT).is_file() else []
    check_unseen(config, problems, read_json(parts[0]) if parts else None)
    named = [model / name / "probe.json" for name in plan.probe_paths]
    inputs: list[str | Path] = [config.problems, model / PLAN_FILE, *parts, *named, *plan.files]
    folder = StageFolder(config.out, "choose", config, inputs=[*inputs, *model_files(config.model)])
    if folder.done:
        print((folder.path / "choice.md").read_text(encoding="utf-8"), flush=True)
        return folder.summary
    held = containment(config.out, problems)
    tried = {r.name: len(config.min_steps.get(r.name, [0])) * len(_asked(config, r)) for r in plan.rules}
    joint = joint_plans(len(tried))
    n, plans = len(problems) * config.samples, 1 + sum(tried.values()) + joint
    print(
        f"{plans} plans or so (none, {', '.join(f'{k} of {r} alone' for r, k in tried.items())}, {joint} of several) × "
        f"{len(problems)} problems × {config.samples} samples: at most {plans * n:,} responses; those in which no rule "
        "acts are not drawn again",
        flush=True,
    )
    search = Search(config, problems, plan)
    with Progress() as bar:
        chosen = search.run(bar)
    found = results(search, chosen) | held
    _write(search, found, model)
    text = markdown(found)
    write_text(folder.path / "choice.md", text)
    print(text, flush=True)
    keys = ("accuracy", "tokens_mean", "utility", "utility_gain", "utility_gain_ci")
    entry = next(c for c in found["candidates"] if c["chosen"])
    return folder.finish(
        {"chosen": chosen, "rules": entry["rules"], "n_candidates": len(search.rows), **{k: entry.get(k) for k in keys}}
    )


def _asked(config: ChooseConfig, rule: Any) -> list[str]:
    return [""] if rule.trigger.probe is None else config.thresholds.get(rule.name, config.grid)


def check_rules(config: ChooseConfig, plan: Plan) -> None:
    """Raises UserError for settings of a rule that the plan lacks, or that has no use for them."""
    if not plan.rules:
        raise UserError(f"{config.model}: its plan has no rules, so there is nothing to choose")
    for key in ("thresholds", "min_steps"):
        for name in getattr(config, key):
            trigger = plan.rule(name).trigger
            if trigger.probe is None:
                raise UserError(f"key '{key}': rule {name} has no probe, so there is no score to wait for")
            if key == "min_steps" and trigger.at_step is not None:
                raise UserError(
                    f"key 'min_steps': rule {name} is read once, after {trigger.at_step} steps (at_step); leave it "
                    "out, or give the plan a rule that is read at every step"
                )


def check_unseen(config: ChooseConfig, problems: Sequence[Problem], split: dict[str, str] | None) -> None:
    """Raises UserError for problems that the probes were fitted or chosen on, unless they are allowed by that name."""
    if split is None:
        print(
            f"note: {config.model} does not tell which problems its probes were fitted on, so that these are others is "
            "taken on trust; assemble it again to have that checked"
        )
        return
    for part in ("train", "validation"):
        seen = [p.id for p in problems if split.get(p.id) == part]
        if seen and part not in config.allow:
            raise UserError(
                f"{config.problems}: {len(seen)} problems, such as '{seen[0]}', are of the part '{part}' on which the "
                f"probes of {config.model} were {'fitted' if part == 'train' else 'chosen'}; take others, or allow "
                f"them with --allow {part}"
            )


def results(search: Search, chosen: str) -> dict[str, Any]:
    """The whole of ``choice.json``."""
    config, rows = search.config, search.rows
    how = {"resamples": config.resamples, "seed": config.seed}
    plain = per_problem(rows[PLAN_LESS]).tokens.mean()
    entries = []
    for name, candidate in search.candidates.items():
        entry: dict[str, Any] = {
            "name": name,
            "rules": {s.rule: {**s.change, "asked": s.asked} for s in candidate},
            **summarise(rows[name], **how),
            "tokens_percent": float(100 * per_problem(rows[name]).tokens.mean() / plain),
            "utility": search.worth(name),
            "acts_in": float(np.mean([o.triggers > 0 for o in rows[name]])),
            "drawn": search.drawn[name],
            "chosen": name == chosen,
        }
        if candidate:
            entry["utility_gain"], entry["utility_gain_ci"] = search.worth(name, PLAN_LESS, ends=True)
            entry["against_plan_less"] = compare(rows[name], rows[PLAN_LESS], **how)
        entries.append(entry)
    for a in entries:
        a["frontier"] = not any(_beats(b, a) for b in entries)
    return {
        "schema": 1,
        "price": config.price,
        "utility": "accuracy in points less price times tokens in per cent of the plan-less model",
        "chosen": chosen,
        "candidates": entries,
        "rules": [_fate(search, chosen, rule) for rule in search.plan.names],
        "problems": {"file": config.problems, "n": len(search.problems)},
        "intervals": {"level": LEVEL, "method": "percentile bootstrap over problems", "resamples": config.resamples},
        "seeds": {"sampling": config.seed, "samples": config.samples},
        "sampling": {k: getattr(config, k) for k in ("temperature", "top_p", "max_new_tokens", "batch_size")},
        "model": config.model,
        "base": str(search.steered.card.get("base") or ""),
        "out": config.out,
        "versions": versions(),
        "command": command_line(),
    }


def _beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether a is as right for as few tokens as b, and better in one of the two."""
    less, right = a["tokens_mean"] <= b["tokens_mean"], a["accuracy"] >= b["accuracy"]
    return less and right and (a["tokens_mean"], a["accuracy"]) != (b["tokens_mean"], b["accuracy"])


def _fate(search: Search, chosen: str, rule: str) -> dict[str, Any]:
    """Why a rule is in the chosen plan or not: utility of the best plan with it less that of the one without it."""
    kept = rule in {s.rule for s in search.candidates[chosen]}
    holders = [n for n, c in search.candidates.items() if rule in {s.rule for s in c}]
    if not holders:
        return {"rule": rule, "kept": False}
    alone = max((n for n in holders if len(search.candidates[n]) == 1), key=search.worth)
    with_it = chosen if kept else max(holders, key=search.worth)
    without = name_of(search.without(chosen)[rule]) if kept else chosen
    found: dict[str, Any] = {"rule": rule, "kept": kept, "with": with_it, "without": without, "best_alone": alone}
    found["gain"], found["gain_ci"] = search.worth(with_it, without, ends=True)
    found["gain_alone"], found["gain_alone_ci"] = search.worth(alone, PLAN_LESS, ends=True)
    return found


def _write(search: Search, found: dict[str, Any], model: Path) -> None:
    """choice.json, the figure, and the plan with the folders that it names."""
    out = Path(search.config.out)
    candidate = search.candidates[found["chosen"]]
    plan = search.plan_of(candidate) if candidate else replace(search.plan, rules=())
    for kind in ("probes", "directions", "gates"):
        if (model / kind).is_dir():
            shutil.copytree(model / kind, out / kind, dirs_exist_ok=True)
    plan.save(out / PLAN_FILE)
    written = Plan.load(out / PLAN_FILE)
    for load in (load_probes, load_directions, load_gates):
        load(written)  # its paths lead somewhere
    draw(out, found)
    write_json(out / "choice.json", found)
