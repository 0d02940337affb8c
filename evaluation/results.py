"""Puts ``results.json`` together: arms, comparisons, what the probes and neurons were, and how it was all made."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, read_json
from neureasoner.data_builders.families import FAMILIES
from neureasoner.evaluation.arms import ARMS, RIVALS, VANILLA
from neureasoner.evaluation.benchmarks.registry import BENCHMARKS
from neureasoner.evaluation.config import PAPER, EvaluateConfig
from neureasoner.evaluation.metrics import (
    LEVEL,
    SUBSETS,
    Outcome,
    accuracy_interval,
    answer_classes,
    by_problem,
    compare,
    cons_at_k,
    costs,
    pass_at_k,
    resampled_means,
    speedup,
    split_by,
    summarise,
)
from neureasoner.evaluation.problems import is_program, source_of
from neureasoner.evaluation.runner import equivalence
from neureasoner.model_files import resolve
from neureasoner.models import default_device
from neureasoner.traces import Problem

SCHEMA = 1
LEVELS = ("intra", "inter", "instance")
SECONDS = (  # how they are taken
    "wall clock of decoding, without loading and judging; a batch's is shared by its rows according to their tokens, "
    "probe tokens included, and kept with each response, so an interrupted run counts every response once; arms take "
    "turns batch by batch (after those that they take numbers from), so a machine that is busy for a while slows all"
)
VOTES = (4, 8, 16, 32, 64)  # k of Cons@k


def curves(
    outcomes: Sequence[Outcome], problems: Mapping[str, Problem], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """``pass_at`` and ``cons`` by k, each with its interval: what several samples of a problem are worth together.

    Cons@k costs k responses. Neither is defined for an arm that votes already, Cons@k not for programs.
    """
    rows = by_problem(outcomes)
    samples = min(map(len, rows.values()))
    found: dict[str, dict[str, Any]] = {"pass_at": {}, "cons": {}}
    if samples < 2 or any(o.responses > 1 for o in outcomes):
        return found
    correct = [[o.correct for o in group[:samples]] for group in rows.values()]

    def entry(values: Any) -> dict[str, Any]:
        return {
            "accuracy": float(values.mean()),
            "accuracy_ci": accuracy_interval(values, resampled_means(values[:, None], resamples, seed)[:, 0]),
        }

    powers = [2**i for i in range(samples.bit_length())]
    found["pass_at"] = {str(k): entry(pass_at_k(correct, k)) for k in powers}
    sizes = [k for k in VOTES if k <= samples]
    if sizes and not any(is_program(problems[i]) for i in rows):
        classes = [
            answer_classes([o.answer for o in group[:samples]], equivalence(problems[i])) for i, group in rows.items()
        ]
        tokens = sum(o.tokens for o in outcomes) / len(outcomes)
        found["cons"] = {
            str(k): {**entry(cons_at_k(classes, correct, k, seed=seed)), "tokens_mean": k * tokens} for k in sizes
        }
    return found


def arm_result(
    name: str, outcomes: Sequence[Outcome], config: EvaluateConfig, problems: Sequence[Problem]
) -> dict[str, Any]:
    """One entry of ``arms``. ``truncated`` is a share of responses, ``seconds`` wall time of decoding."""
    how = {"resamples": config.resamples, "seed": config.seed}
    answers = sum(o.responses for o in outcomes)
    return {
        "name": name,
        "about": ARMS[name].about,
        **summarise(outcomes, **how),
        "truncated": sum(o.truncated * o.responses for o in outcomes) / answers,
        "triggers_per_trace": sum(o.triggers for o in outcomes) / answers,
        "seconds": round(sum(o.seconds for o in outcomes), 2),
        "responses_per_answer": answers / len(outcomes),
        "drawn_from": "server" if config.endpoint and ARMS[name].plain else "here",
        **costs(outcomes, **how),
        **curves(outcomes, {p.id: p for p in problems}, **how),
        "by_family": split_by(outcomes, lambda o: o.family, **how),
        "by_difficulty": split_by(outcomes, lambda o: o.difficulty, **how),
        "by_family_difficulty": {
            family: split_by([o for o in outcomes if o.family == family], lambda o: o.difficulty, **how)
            for family in sorted({o.family for o in outcomes})
        },
    }


def _speedup(rows: Sequence[Outcome], outcomes: Mapping[str, Sequence[Outcome]], config: EvaluateConfig) -> Any:
    """``speedup`` against vanilla, where it ran here too."""
    against = outcomes.get(VANILLA, ())
    return speedup(rows, against, config.resamples, config.seed) if against else {"speedup": None, "speedup_ci": None}


def comparisons(outcomes: Mapping[str, Sequence[Outcome]], config: EvaluateConfig) -> list[dict[str, Any]]:
    """Every arm against vanilla, and the rivalries of ``RIVALS``, paired by problem."""
    pairs = [(name, VANILLA) for name in outcomes if name != VANILLA and VANILLA in outcomes]
    pairs += [(a, b) for a, rivals in RIVALS.items() for b in rivals if a in outcomes and b in outcomes]
    how = {"resamples": config.resamples, "seed": config.seed}
    return [{"arm": a, "against": b, **compare(outcomes[a], outcomes[b], **how)} for a, b in pairs]


def command_line() -> str:
    """The command that runs, for the records."""
    ours = Path(sys.argv[0]).name in ("neureasoner", "cli.py", "__main__.py")
    return shlex.join(["neureasoner" if ours else sys.argv[0], *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from neureasoner.probes.detectors.probe import git_revision

    found = {"neureasoner": __version__, "git": git_revision(), "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def split_of(problems: str) -> str:
    """The split that is recorded beside the file (a benchmark's own if none was asked for), or ``unknown``."""
    mark = Path(problems).parent / "stage.json"
    named = str(read_json(mark).get("config", {}).get("split", "")) if mark.is_file() else ""
    known = BENCHMARKS.get(str(source_of(problems).get("benchmark", "")))
    return named or (known.split if known else "") or "unknown"


def differences(config: EvaluateConfig) -> dict[str, list[Any]]:
    """Settings that are not the paper's: ``{name: [ours, the paper's]}``."""
    return {k: [getattr(config, k), v] for k, v in PAPER.items() if getattr(config, k) != v}


def probes_of(config: EvaluateConfig) -> dict[str, Any]:
    """Per level: feature set, window, threshold, and the test figures with controls where ``probes fit`` left them."""
    out: dict[str, Any] = {}
    fitted = read_json(config.probes_results).get("levels", {}) if config.probes_results else {}
    for level in LEVELS:
        file = Path(resolve(config.model)) / "probes" / level / "probe.json"
        entry: dict[str, Any] = {}
        if file.is_file():
            info = read_json(file)
            entry |= {
                "features": info["features"]["name"],
                "window": info["features"]["window"],
                "threshold": info["threshold"],
                "seed": info.get("notes", {}).get("seed"),
                "split": info.get("notes", {}).get("split"),
                "test": info.get("notes", {}).get("test"),
            }
        if level in fitted:
            entry |= {"chosen": fitted[level].get("chosen"), "paper": fitted[level].get("paper")}
            entry["controls"] = fitted[level].get("controls", {})
        if entry:
            out[level] = entry
    return out


def neurons_of(config: EvaluateConfig) -> dict[str, Any]:
    """Per level: the site string that was selected, and the layer."""
    if config.neurons:
        found = read_json(config.neurons)
        return {
            name: {"site": level["site"], "layer": found.get("layer"), "random": found.get("random", {}).get(name)}
            for name, level in found.get("levels", {}).items()
        }
    out = {}
    for level in LEVELS:
        file = Path(resolve(config.model)) / "probes" / "paper" / level / "probe.json"
        if file.is_file():
            info = read_json(file)
            out[level] = {"site": info["features"]["channels"], "layer": info.get("layer"), "random": None}
    return out


def build(
    config: EvaluateConfig,
    base: str,
    problems: Sequence[Problem],
    outcomes: Mapping[str, Sequence[Outcome]],
    skipped: Mapping[str, str],
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole of ``results.json``. ``extras``: numbers that arms took from each other (rates, votes, budgets)."""
    return {
        "schema": SCHEMA,
        "arms": [
            arm_result(name, rows, config, problems) | _speedup(rows, outcomes, config)
            for name, rows in outcomes.items()
        ],
        "comparisons": comparisons(outcomes, config),
        "skipped": dict(skipped),
        "probes": probes_of(config),
        "neurons": neurons_of(config),
        "judge": read_json(config.judge_results) if config.judge_results else {},
        **extras,
        "seeds": {
            "sampling": config.seed,
            "bootstrap": config.seed,
            "samples": config.samples,
            "pairing": "sample s of batch b has one seed in all arms",
        },
        "sampling": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "batch_size": config.batch_size,
            "differs_from_paper": differences(config) if any(p.family not in FAMILIES for p in problems) else {},
        },
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over problems",
            "resamples": config.resamples,
            "seconds": SECONDS,
            "truncated": "a truncated response is wrong and costs max_new_tokens",
            "p": "two-sided sign-flip permutation by problem",
            "cons": f"ties to the first seen, missing answers abstain; over at most {SUBSETS} subsets of one draw",
        },
        "problems": {
            "file": config.problems,
            "fingerprint": file_fingerprint([config.problems]),
            "n": len(problems),
            "split": split_of(config.problems),
            "families": sorted({p.family for p in problems}),
            "source": source_of(config.problems),
        },
        "model": config.model,
        "base": base,
        "device": config.device or str(default_device()),
        "versions": versions(),
        "command": command_line(),
    }
