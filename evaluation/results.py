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
from neureasoner.evaluation.arms import ARMS, RIVALS, VANILLA
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.metrics import LEVEL, Outcome, compare, split_by, summarise
from neureasoner.traces import Problem

SCHEMA = 1
LEVELS = ("intra", "inter", "instance")


def arm_result(name: str, outcomes: Sequence[Outcome], config: EvaluateConfig) -> dict[str, Any]:
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
        "by_family": split_by(outcomes, lambda o: o.family, **how),
        "by_difficulty": split_by(outcomes, lambda o: o.difficulty, **how),
        "by_family_difficulty": {
            family: split_by([o for o in outcomes if o.family == family], lambda o: o.difficulty, **how)
            for family in sorted({o.family for o in outcomes})
        },
    }


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
    """The split that ``data problems`` recorded beside the file, or ``unknown``."""
    mark = Path(problems).parent / "stage.json"
    return str(read_json(mark).get("config", {}).get("split", "unknown")) if mark.is_file() else "unknown"


def probes_of(config: EvaluateConfig) -> dict[str, Any]:
    """Per level: feature set, window, threshold, and the test figures with controls where ``probes fit`` left them."""
    out: dict[str, Any] = {}
    fitted = read_json(config.probes_results).get("levels", {}) if config.probes_results else {}
    for level in LEVELS:
        file = Path(config.model) / "probes" / level / "probe.json"
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
        file = Path(config.model) / "probes" / "paper" / level / "probe.json"
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
    """The whole of ``results.json``. ``extras``: numbers that arms took from each other (coin rates, votes)."""
    return {
        "schema": SCHEMA,
        "arms": [arm_result(name, rows, config) for name, rows in outcomes.items()],
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
        },
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over problems",
            "resamples": config.resamples,
            "truncated": "a truncated response is wrong and costs max_new_tokens",
        },
        "problems": {
            "file": config.problems,
            "fingerprint": file_fingerprint([config.problems]),
            "n": len(problems),
            "split": split_of(config.problems),
            "families": sorted({p.family for p in problems}),
        },
        "model": config.model,
        "base": base,
        "versions": versions(),
        "command": command_line(),
    }
