"""``evaluation compare``: what changed between two runs, problem by problem.

Only like is compared with like: the same problems, samples, seeds and decoding. Whatever else differs (the model, the
arm, where it ran) is what the comparison is about, and is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neureasoner.artifacts import file_fingerprint, write_json
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import VANILLA
from neureasoner.evaluation.compare_config import CompareConfig
from neureasoner.evaluation.metrics import LEVEL, Outcome, by_problem, compare
from neureasoner.evaluation.run_folder import arm_traces, load_results
from neureasoner.evaluation.runner import outcomes
from neureasoner.evaluation.store import key_of
from neureasoner.printable import safe
from neureasoner.traces import Trace


def _arm(run: str, results: Mapping[str, Any], wanted: str) -> str:
    names = [a["name"] for a in results["arms"]]
    wanted = wanted or (names[0] if len(names) == 1 else VANILLA)
    if wanted not in names:
        raise UserError(f"{run} has no arm '{wanted}'; it has {', '.join(names)}")
    return wanted


def _listed(values: set[str]) -> str:
    return ", ".join(sorted(values)[:3]) + (", …" if len(values) > 3 else "")


def mismatch(a: Mapping[str, Any], b: Mapping[str, Any], left: Sequence[Trace], right: Sequence[Trace]) -> list[str]:
    """What differs between two runs that must not: settings, problems, gold answers, seeds. By name."""
    found = []
    keys = ("temperature", "top_p", "max_new_tokens", "batch_size")
    pairs = [(k, a["sampling"].get(k), b["sampling"].get(k)) for k in keys]
    pairs += [(k, a["seeds"].get(k), b["seeds"].get(k)) for k in ("samples", "sampling")]
    for key, x, y in pairs:
        if x != y:
            found.append(f"{'seed' if key == 'sampling' else key} ({x} and {y})")
    ours, theirs = ({t.problem.id: t.problem for t in rows} for rows in (left, right))
    for one, other, which in ((ours, theirs, "first"), (theirs, ours, "second")):
        if alone := set(one) - set(other):
            found.append(f"{len(alone)} problems that only the {which} has ({_listed(alone)})")
    changed = {i for i in set(ours) & set(theirs) if ours[i] != theirs[i]}
    if changed:
        found.append(f"question or answer of {len(changed)} problems ({_listed(changed)})")
    if not found:
        # a vote draws several responses to a problem; its first has the seed of the sample
        seeds = [{(k.problem, k.sample): k.seed for k in map(key_of, rows) if k.vote == 0} for rows in (left, right)]
        votes = [max(key_of(t).vote for t in rows) for rows in (left, right)]
        if seeds[0].keys() != seeds[1].keys():
            found.append("samples of some problems")
        elif votes[0] == votes[1] and seeds[0] != seeds[1]:
            found.append("seeds of some samples (other batches)")
    return found


def flips(left: Sequence[Outcome], right: Sequence[Outcome]) -> dict[str, list[dict[str, Any]]]:
    """Problems whose share of right answers rose (``to_right``) or fell (``to_wrong``), the largest changes first."""
    ours, theirs = by_problem(left), by_problem(right)
    found: dict[str, list[dict[str, Any]]] = {"to_right": [], "to_wrong": []}
    for problem, rows in ours.items():
        counts = [sum(o.correct for o in side) for side in (rows, theirs[problem])]
        if counts[0] != counts[1]:
            answers = [[o.answer for o in side] for side in (rows, theirs[problem])]
            row = {"problem": problem, "a": counts[0], "b": counts[1], "samples": len(rows), "answers": answers}
            found["to_right" if counts[1] > counts[0] else "to_wrong"].append(row)
    for changed in found.values():
        changed.sort(key=lambda row: -abs(row["b"] - row["a"]))
    return found


def compare_runs(config: CompareConfig) -> dict[str, Any]:
    """Stage ``evaluation compare``. Prints, and writes compare.json where ``out`` is given.

    The difference is b minus a. Raises UserError naming all that keeps the two from being compared.
    """
    a, b = load_results(config.a), load_results(config.b)
    arm_a = _arm(config.a, a, config.arm_a)
    arm_b = _arm(config.b, b, config.arm_b or arm_a)
    files = [Path(run) / "traces" / f"{arm}.jsonl" for run, arm in ((config.a, arm_a), (config.b, arm_b))]
    if len(set(f.resolve() for f in files)) == 1:
        raise UserError(f"{config.a}, {arm_a}: is compared with itself; name another arm with --arm_b")
    left, right = arm_traces(config.a, arm_a), arm_traces(config.b, arm_b)
    differs = mismatch(a, b, left, right)
    if differs:
        raise UserError(f"{config.a} and {config.b} cannot be compared; they differ in {'; '.join(differs)}")
    cap = a["sampling"]["max_new_tokens"]
    x, y = outcomes(left, cap), outcomes(right, cap)
    found = {
        "a": {"run": config.a, "arm": arm_a, "model": a["model"], "fingerprint": file_fingerprint(files[:1])},
        "b": {"run": config.b, "arm": arm_b, "model": b["model"], "fingerprint": file_fingerprint(files[1:])},
        **compare(y, x, config.resamples, config.seed),
        "accuracy": [sum(o.correct for o in rows) / len(rows) for rows in (x, y)],
        "samples": a["seeds"]["samples"],
        **flips(x, y),
        "intervals": {"level": LEVEL, "resamples": config.resamples, "seed": config.seed},
    }
    if config.out:
        write_json(Path(config.out) / "compare.json", found)
    _print(found, {t.problem.id: t.problem.answer for t in left}, config.flips)
    return found


def _print(found: Mapping[str, Any], golds: Mapping[str, str], most: int) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def say(line: str, style: str = "") -> None:
        console.print(Text(safe(line), style=style), soft_wrap=True)

    a, b = found["a"], found["b"]
    say(f"a: {a['arm']} of {a['run']} ({a['model']}), {100 * found['accuracy'][0]:.1f} % right")
    say(f"b: {b['arm']} of {b['run']} ({b['model']}), {100 * found['accuracy'][1]:.1f} % right")
    low, high = (100 * v for v in found["accuracy_delta_ci"])
    few, many = (100 * v for v in found["tokens_relative_ci"])
    say(
        f"b − a: {100 * found['accuracy_delta']:+.1f} points [{low:+.1f}, {high:+.1f}], p = {found['accuracy_p']:.4f}; "
        f"{100 * found['tokens_relative']:+.1f} % tokens [{few:+.1f}, {many:+.1f}]; {found['n_problems']} problems × "
        f"{found['samples']}, 95 % intervals by problem",
        "bold",
    )
    for key, name, style in (("to_right", "flipped to right", "green"), ("to_wrong", "flipped to wrong", "red")):
        rows = found[key]
        say(f"{name}: {len(rows)}", style)
        for row in rows[:most]:
            said = [(answers[0] or "nothing").partition("\n")[0][:40] for answers in row["answers"]]
            many = f"{row['a']} → {row['b']} of {row['samples']} right"
            changed = many if row["samples"] > 1 else f"{said[0]} → {said[1]}"
            say(f"  {row['problem']}: {changed} (gold {golds[row['problem']][:40]})")
        if len(rows) > most:
            say(f"  … and {len(rows) - most} more (--flips)")
