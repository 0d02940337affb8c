"""``ablate``: a steering direction, its controls, and what is left of it without each part, on the same problems.

Every arm is a plan of one rule. The strength is chosen on validation problems (best accuracy, the weaker of equals),
never on those that are measured. Goes on after a kill: finished batches are kept.

Legend: ``P`` problems, ``R`` draws.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.artifacts import write_json, write_text
from neureasoner.directions import INFO_FILE, Direction
from neureasoner.errors import UserError
from neureasoner.evaluation.ablation_config import AblateConfig
from neureasoner.evaluation.ablation_text import markdown
from neureasoner.evaluation.arms import Arm
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.metrics import LEVEL, Outcome, compare, per_problem, summarise
from neureasoner.evaluation.problems import check_apart, containment, gradable_problems
from neureasoner.evaluation.results import command_line, versions
from neureasoner.evaluation.runner import ArmRun, outcomes
from neureasoner.model_files import model_files
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem, read_traces

VANILLA, FULL = "vanilla", "full"
RULE = "steer"


@dataclass(frozen=True)
class Steering:
    """One arm: which direction, whether the gate chooses the questions (``coin``: it is drawn), and the sign."""

    name: str
    about: str
    direction: str
    gated: bool = True
    coin: bool = False
    sign: float = 1.0

    def plan(self, config: AblateConfig, strength: float, rate: float) -> Any:
        """The plan of this arm. ``rate``: the share of questions the gate picks, for the coin."""
        from neureasoner.inference.plan import Plan

        folder = Path(config.out) / "plans"
        trigger: dict[str, Any] = (
            {} if config.trigger == "decode" and config.gate and self.gated else {config.trigger: True}
        )
        if config.gate and self.gated:
            trigger["gate"] = rate if self.coin else _relative(config.gate, folder)
        rule = {
            "name": RULE,
            "trigger": trigger,
            "action": {config.action: True},
            "direction": _relative(self.direction, folder),
            "strength": {"value": self.sign * strength, "unit": config.unit},
        }
        return Plan.from_dict({"name": self.name, "rules": [rule]}, f"arm {self.name}", folder)


def _relative(path: str, folder: Path) -> str:
    return os.path.relpath(Path(path).resolve(), folder.resolve())


def arms_of(config: AblateConfig) -> list[Steering]:
    """The arms besides vanilla, full first."""
    whom = "the questions the gate picks" if config.gate else "every question"
    arms = [Steering(FULL, f"the direction, on {whom}", config.direction)]
    for name, folder in config.variants.items():
        about = Direction.load(folder).info.get("about") or Direction.load(folder).meaning
        arms.append(Steering(name, str(about), folder))
    if config.gate:
        arms.append(Steering("no_gate", "the direction, on every question", config.direction, gated=False))
        arms.append(
            Steering("random_gate", "the direction, on as many questions drawn by a coin", config.direction, coin=True)
        )
    return [*arms, Steering("flipped", f"the direction backwards, on {whom}", config.direction, sign=-1.0)]


class Ablation:
    """Model, problems and gate, loaded once; runs arms and keeps their outcomes."""

    def __init__(self, config: AblateConfig, validation: list[Problem], test: list[Problem]):
        from neureasoner.inference.plan import Plan
        from neureasoner.inference.steered import SteeredModel
        from neureasoner.models import load
        from neureasoner.probes.detectors.gate import FailureGate

        self.config, self.problems = config, {"validation": validation, "test": test}
        self.arms = arms_of(config)
        self.plain = SteeredModel(*load(config.model, device=config.device or None), Plan("none"))
        self.gate = FailureGate.load(config.gate) if config.gate else None
        self.rate = 0.0
        if self.gate is not None:
            picked = self.scores("validation") > self.gate.threshold
            self.rate = float(picked.mean())
            if not 0 < self.rate < 1:
                raise UserError(
                    f"{config.gate}: the gate picks {'all' if self.rate else 'none'} of the {len(picked)} validation "
                    "questions, so it decides nothing; fit another, or leave it out"
                )
        (Path(config.out) / "plans").mkdir(parents=True, exist_ok=True)  # paths in the plans count from there
        for arm in self.arms:  # a wrong file should not cost an arm
            self.plain.with_plan(arm.plan(config, config.strengths[0], self.rate or 1.0))

    def scores(self, part: str) -> np.ndarray:
        """The gate's scores of the questions of a part, in order ``[P]``."""
        from neureasoner.inference.steered import encode_prompt
        from neureasoner.probes.detectors.gate import gate_scores

        assert self.gate is not None
        prompts = [encode_prompt(self.plain.tokenizer, p) for p in self.problems[part]]
        return gate_scores(self.gate, self.plain.model, prompts, self.config.batch_size)

    def run(self, part: str, arm: Steering | None, strength: float, bar: Any) -> list[Outcome]:
        """Outcomes of an arm (None: vanilla) at a strength, generated as far as they are not there yet."""
        c = self.config
        name = VANILLA if arm is None else arm.name if part == "test" else f"{arm.name}_{strength:g}"
        settings = EvaluateConfig(
            c.model,
            c.problems if part == "test" else c.validation,
            c.out if part == "test" else str(Path(c.out) / "validation"),
            samples=c.samples if part == "test" else c.validation_samples,
            seed=c.seed if part == "test" else c.seed + 1,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            top_p=c.top_p,
            batch_size=c.batch_size,
        )

        def load() -> Any:
            return self.plain if arm is None else self.plain.with_plan(arm.plan(c, strength, self.rate or 1.0))

        run = ArmRun(Arm(name, ""), load, settings, self.problems[part])
        task = bar.add_task(f"{part} {name}", total=len(run.jobs))
        if not run.file.is_file():
            right: list[bool] = []
            for sample, batch in run.jobs:
                right += [o.correct for o in outcomes(run.part(sample, batch), c.max_new_tokens)]
                bar.update(task, advance=1, so_far=f"{np.mean(right):.1%} right")
            run.merge()
        found = outcomes(read_traces(run.file), c.max_new_tokens)
        so_far = f"{per_problem(found).accuracy.mean():.1%} right"
        bar.update(task, completed=len(run.jobs), so_far=so_far)
        return found


def choose_strength(tried: Mapping[float, Sequence[Outcome]]) -> float:
    """The strength with the best accuracy on validation problems; of equals the weakest."""
    return max(sorted(tried), key=lambda s: per_problem(tried[s]).accuracy.mean())


def gate_figures(ablation: Ablation, vanilla: Sequence[Outcome]) -> dict[str, Any]:
    """What the gate is worth on the test problems: a question fails if vanilla solves it too rarely."""
    from neureasoner.probes.detectors.metrics import bootstrap_draws, interval, weighted_auroc

    gate, problems = ablation.gate, ablation.problems["test"]
    assert gate is not None
    below = float(gate.notes.get("fails_below", 0.5))
    table = per_problem(vanilla)
    rate = dict(zip(table.ids, table.accuracy, strict=True))
    fails = np.array([rate[p.id] < below for p in problems])
    score = ablation.scores("test")
    draws = bootstrap_draws(len(problems), min(ablation.config.resamples, 1000), ablation.config.seed)
    picked = score > gate.threshold
    both = 0 < fails.sum() < len(fails)
    return {
        "auroc": interval(weighted_auroc(fails.astype(int), score, draws)) if both else None,
        "fails_below": below,
        "failing": int(fails.sum()),
        "questions": len(fails),
        "picked": float(picked.mean()),
        "recall": float(picked[fails].mean()) if fails.any() else None,
        "picked_of_solved": float(picked[~fails].mean()) if (~fails).any() else None,
        "picked_of_validation": ablation.rate,
        "fitted": gate.notes.get("test", {}).get("auroc"),
    }


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Stage ``ablate``. Writes results.json and .md, plans/<arm>.yaml and the traces of both problem files.

    Raises UserError for problem files that overlap, or a direction or gate of another model, before anything runs.
    """
    parts = {k: gradable_problems(getattr(config, k), config.limit) for k in ("validation", "problems")}
    check_apart(parts["problems"], parts["validation"], config.problems, config.validation, "the strength")
    folders = [config.direction, *config.variants.values()]
    given = [Path(f) / INFO_FILE for f in folders] + ([Path(config.gate) / "gate.json"] if config.gate else [])
    folder = StageFolder(
        config.out, "ablate", config, inputs=[config.problems, config.validation, *given, *model_files(config.model)]
    )
    if folder.done:
        print((folder.path / "results.md").read_text(encoding="utf-8"), flush=True)
        return folder.summary
    held = containment(config.out, [*parts["validation"], *parts["problems"]])
    found = _run(Ablation(config, parts["validation"], parts["problems"])) | held
    write_json(folder.path / "results.json", found)
    text = markdown(found)
    write_text(folder.path / "results.md", text)
    print(text, flush=True)
    keys = ("strength", "accuracy", "accuracy_ci", "tokens_mean", "tokens_ci")
    arms = {a["name"]: {k: a[k] for k in keys} for a in found["arms"]}
    return folder.finish({"arms": arms, "gate": found["gate"], "n_problems": len(parts["problems"])})


def _run(ablation: Ablation) -> dict[str, Any]:
    """Validation, then test; the whole of ``results.json``."""
    from neureasoner.progress import Progress

    config = ablation.config
    how = {"resamples": config.resamples, "seed": config.seed}
    with Progress() as bar:
        plain = ablation.run("validation", None, 0.0, bar)
        tuning, strength = [], {}
        for arm in ablation.arms if config.tune == "each" else ablation.arms[:1]:
            tried = {s: ablation.run("validation", arm, s, bar) for s in config.strengths}
            strength[arm.name] = choose_strength(tried)
            for s, outs in tried.items():
                tuning.append({"arm": arm.name, "strength": s, **summarise(outs, **how)})
                tuning[-1] |= {"against_vanilla": compare(outs, plain, **how), "chosen": s == strength[arm.name]}
        rows = {VANILLA: ablation.run("test", None, 0.0, bar)}
        for arm in ablation.arms:
            chosen = strength.setdefault(arm.name, strength[FULL])
            arm.plan(config, chosen, ablation.rate or 1.0).save(Path(config.out) / "plans" / f"{arm.name}.yaml")
            rows[arm.name] = ablation.run("test", arm, chosen, bar)
    about = {VANILLA: "the model alone"} | {a.name: a.about for a in ablation.arms}
    return {
        "schema": 1,
        "arms": [
            {
                "name": name,
                "about": about[name],
                "strength": strength.get(name, 0.0),
                **summarise(outs, **how),
                "truncated": float(np.mean([o.truncated for o in outs])),
                "steered": float(np.mean([o.triggers > 0 for o in outs])),
                "seconds": round(sum(o.seconds for o in outs), 2),
            }
            for name, outs in rows.items()
        ],
        "comparisons": [
            {"arm": a, "against": b, **compare(rows[a], rows[b], **how)}
            for a, b in [(n, VANILLA) for n in rows if n != VANILLA]
            + [(FULL, n) for n in rows if n not in (FULL, VANILLA)]
        ],
        "tuning": {"vanilla": summarise(plain, **how), "tried": tuning, "tune": config.tune},
        "gate": gate_figures(ablation, rows[VANILLA]) if ablation.gate is not None else {},
        "intervals": {"level": LEVEL, "method": "percentile bootstrap over problems", "resamples": config.resamples},
        "p_values": "two-sided sign flips by problem; all are counted where there are no more than resamples",
        "seeds": {"sampling": config.seed, "samples": config.samples, "validation_samples": config.validation_samples},
        "sampling": {k: getattr(config, k) for k in ("temperature", "top_p", "max_new_tokens", "batch_size")},
        "problems": {"test": len(ablation.problems["test"]), "validation": len(ablation.problems["validation"])},
        "model": config.model,
        "direction": config.direction,
        "rule": {"trigger": config.trigger, "action": config.action, "gate": config.gate, "unit": config.unit},
        "versions": versions(),
        "command": command_line(),
    }
