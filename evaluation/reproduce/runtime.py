"""``evaluation runtime``: what watching costs, at the same tokens, and what the whole plan costs, running free.

Every batch is timed in all arms in turn, the order rotating, so that a machine that slows down slows all of them. The
overhead is a ratio of times over the same batches; its interval resamples problems' batches, not repeats.

Legend: ``A`` arms, ``R`` repeats, ``B`` batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.artifacts import write_json, write_text
from neureasoner.errors import UserError
from neureasoner.evaluation.cells import header, interval, row
from neureasoner.evaluation.metrics import LEVEL, resampled_means
from neureasoner.evaluation.metrics import interval as ends_of
from neureasoner.evaluation.problems import capped
from neureasoner.evaluation.reproduce.config import RuntimeConfig
from neureasoner.evaluation.results import command_line, versions
from neureasoner.evaluation.runner import batch_seed
from neureasoner.inference.plan import PLAN_FILE, Plan
from neureasoner.model_files import model_files, resolve
from neureasoner.stages import StageFolder
from neureasoner.traces import read_problems

PLAIN, WATCHED, FREE = "plain", "watched", "free"
ARMS = (PLAIN, WATCHED, FREE)
ALMOST_ONE = math.nextafter(1.0, 0.0)  # 1 itself is refused, of a rule that is meant to fire


def silent(plan: Plan) -> Plan:
    """The rules that a probe watches for, at a threshold that no score exceeds: all the work and no intervention.

    Raises UserError if no rule has a probe.
    """
    names = [r.name for r in plan.rules if r.trigger.probe is not None]
    if not names:
        raise UserError(f"plan {plan.name}: no rule has a probe, so there is no watching to time")
    return plan.select(names).replace_triggers({name: {"threshold": ALMOST_ONE} for name in names})


def timed(run: Callable[[str, int], Sequence[Any]], batches: int, repeats: int, advance: Callable[[], None]) -> Any:
    """Seconds ``[A, R, B]`` and tokens ``[A, B]`` of ``run(arm, batch)``, which returns what it generated.

    Raises UserError if watching changed a token.
    """
    seconds, tokens = np.zeros((len(ARMS), repeats, batches)), np.zeros((len(ARMS), batches))
    for r in range(repeats):
        for b in range(batches):
            ids: dict[str, list[list[int]]] = {}
            for k in range(len(ARMS)):
                a = (k + r + b) % len(ARMS)
                begin = time.perf_counter()
                generated = run(ARMS[a], b)
                seconds[a, r, b] = time.perf_counter() - begin
                ids[ARMS[a]] = [g.response_ids for g in generated]
                tokens[a, b] = sum(map(len, ids[ARMS[a]]))
                advance()
            if ids[PLAIN] != ids[WATCHED]:
                raise UserError("the watched run wrote other tokens than the plain one; their times say nothing")
    return seconds, tokens


def overhead(arm: np.ndarray, against: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """``sum(arm) / sum(against) - 1`` of two ``[B]``, its interval from resampled batches (none of a single batch)."""
    draws = resampled_means(np.stack([arm, against], axis=1), resamples, seed)
    ends = ends_of(draws[:, 0] / draws[:, 1] - 1) if len(arm) > 1 else None
    return {"value": float(arm.sum() / against.sum() - 1), "ci": ends}


def figures(seconds: np.ndarray, tokens: np.ndarray, config: RuntimeConfig) -> dict[str, Any]:
    """Per arm: median time over repeats, summed over batches, and tokens; the overheads. See ``timed``."""
    middle = np.median(seconds, axis=1)  # [A, B]: a repeat that something else disturbed does not count
    arms = {
        name: {
            "seconds": float(middle[a].sum()),
            "seconds_of_repeats": [round(float(s), 3) for s in seconds[a].sum(axis=1)],
            "tokens": int(tokens[a].sum()),
            "tokens_per_second": float(tokens[a].sum() / middle[a].sum()),
        }
        for a, name in enumerate(ARMS)
    }
    how = {"resamples": config.resamples, "seed": config.seed}
    return {
        "arms": arms,
        "watching": overhead(middle[1], middle[0], **how),
        "free": overhead(middle[2], middle[0], **how),
        "free_tokens": overhead(tokens[2], tokens[0], **how),
    }


def runtime(config: RuntimeConfig) -> dict[str, Any]:
    """Stage ``evaluation runtime``. Writes results.json and results.md.

    Raises UserError for a folder that is no steered checkpoint, or a plan without probes.
    """
    from neureasoner.inference.steered import SteeredModel
    from neureasoner.progress import Progress

    checkpoint = Path(resolve(config.model))
    if not (checkpoint / PLAN_FILE).is_file():
        raise UserError(f"{config.model}: holds no {PLAN_FILE}, so it is no steered checkpoint; run `assemble` first")
    plan = Plan.load(checkpoint)
    watching = silent(plan)
    problems = read_problems(config.problems)[: config.limit or None]
    config = capped(config, problems)
    inputs: list[str | Path] = [config.problems, checkpoint / PLAN_FILE, *model_files(config.model)]
    folder = StageFolder(config.out, "evaluation runtime", config, inputs=inputs)
    if folder.done:
        print((folder.path / "results.md").read_text(encoding="utf-8"), flush=True)
        return folder.summary
    problems = sorted(problems, key=lambda p: (p.family, p.difficulty))  # a batch runs until its longest response ends
    size = config.batch_size
    batches = [problems[i : i + size] for i in range(0, len(problems), size)]
    free = SteeredModel.from_pretrained(config.model, device=config.device or None)
    models = {
        PLAIN: free.with_plan(Plan("none", folder=free.plan.folder)),
        WATCHED: free.with_plan(Plan(watching.name, watching.rules, free.plan.folder, watching.conflicts)),
        FREE: free,
    }

    def run(arm: str, b: int, cap: int = config.max_new_tokens) -> Sequence[Any]:
        return models[arm].generate(
            batches[b],
            max_new_tokens=cap,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=batch_seed(config.seed, 0, b),
            batch_size=size,
        )

    for arm in ARMS:
        run(arm, 0, min(32, config.max_new_tokens))  # the first call of anything is slow
    with Progress() as bar:
        task = bar.add_task("timing", total=len(ARMS) * config.repeats * len(batches))
        seconds, tokens = timed(run, len(batches), config.repeats, lambda: bar.advance(task))
    found = {
        "schema": 1,
        **figures(seconds, tokens, config),
        "problems": len(problems),
        "batches": len(batches),
        "repeats": config.repeats,
        "device": str(free.model.device),
        "intervals": {"level": LEVEL, "method": "percentile bootstrap over batches", "resamples": config.resamples},
        "sampling": {k: getattr(config, k) for k in ("temperature", "top_p", "max_new_tokens", "batch_size", "seed")},
        "model": config.model,
        "base": str(free.card.get("base") or ""),
        "versions": versions(),
        "command": command_line(),
    }
    write_json(folder.path / "results.json", found)
    text = markdown(found)
    write_text(folder.path / "results.md", text)
    print(text, flush=True)
    return folder.finish({k: found[k] for k in ("arms", "watching", "free", "free_tokens")})


def percent(entry: Mapping[str, Any]) -> str:
    """``+7.1 % [+6.0, +8.3]``."""
    if entry["ci"] is None:
        return f"{100 * entry['value']:+.1f} %"
    return interval(entry["value"], entry["ci"], sign="+").replace(" [", " % [", 1)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page, its heading left to whoever includes it."""
    arms, s = results["arms"], results["sampling"]
    said = {PLAIN: "–", WATCHED: percent(results["watching"]), FREE: percent(results["free"])}
    about = {PLAIN: "nobody watches", WATCHED: "probes watch, nobody intervenes", FREE: "the plan as it stands"}
    lines = header("arm", "seconds", "tokens", "tokens per second", "time against plain")
    for name, a in arms.items():
        cells = [f"{a['seconds']:.1f}", f"{a['tokens']}", f"{a['tokens_per_second']:.0f}", said[name]]
        lines.append(row(f"{name}: {about[name]}", *cells))
    how = (
        f"{results['problems']} problems in {results['batches']} batches of at most {s['batch_size']}, median of "
        f"{results['repeats']} repeats in turn, on {results['device']}; watched wrote the very tokens of plain, free "
        f"{percent(results['free_tokens'])} of them. 95 % intervals over batches."
    )
    return "\n".join([how, "", *lines]) + "\n"
