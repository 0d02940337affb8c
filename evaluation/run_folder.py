"""The folder of an evaluation as those read it who show, compare or record it: ``results.json`` and ``traces/``.

A shape says what must be there: a type, ``None``, a tuple of alternatives, ``[a, b]`` a list of just these or
``[a, ...]`` of any length, a mapping of keys (``key?`` may be missing, ``*``: any keys, ``#``: any whole numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json
from neureasoner.errors import UserError
from neureasoner.evaluation.store import check_once, key_of
from neureasoner.stages import MARK, STARTED
from neureasoner.traces import Trace, read_traces

NUMBER = (int, float)
MAYBE = (int, float, None)
PAIR = [NUMBER, NUMBER]
SUMMARY = {"accuracy": NUMBER, "accuracy_ci": PAIR, "tokens_mean": NUMBER, "n_problems": int}
CURVE = {"*": {"accuracy": NUMBER, "accuracy_ci": PAIR}}
ARM = SUMMARY | {
    "name": str,
    "about": str,
    "tokens_ci": PAIR,
    "n_samples": int,
    "truncated": NUMBER,
    "triggers_per_trace": NUMBER,
    "seconds": NUMBER,
    "responses_per_answer": NUMBER,
    "forced_mean": NUMBER,
    "probe_tokens_mean": NUMBER,
    "seconds_per_problem": MAYBE,
    "seconds_per_problem_ci": (None, [MAYBE, MAYBE]),
    "seconds_per_solved": MAYBE,
    "seconds_per_solved_ci": (None, [MAYBE, MAYBE]),
    "speedup?": MAYBE,
    "speedup_ci?": (None, [MAYBE, MAYBE]),
    "pass_at": CURVE,
    "cons": CURVE,
    "by_family": {"*": SUMMARY},
    "by_family_difficulty": {"*": {"#": SUMMARY}},
}
COMPARISON = {
    "arm": str,
    "against": str,
    "accuracy_delta": NUMBER,
    "accuracy_delta_ci": PAIR,
    "accuracy_shown": bool,
    "tokens_relative": NUMBER,
    "tokens_relative_ci": PAIR,
    "tokens_shown": bool,
}
FITTED = {"name": str, "test": {"*": object}}
RESULTS = {
    "arms": [ARM, ...],
    "comparisons": [COMPARISON, ...],
    "skipped": {"*": str},
    "probes": {
        "*": {
            "chosen?": (None, FITTED),
            "paper?": (None, FITTED),
            "controls?": {"*": (None, FITTED)},
        }
    },
    "neurons": {"*": {"site": (str, None)}},
    "seeds": {"sampling": int, "bootstrap": int, "samples": int, "pairing": str},
    "sampling": {
        "temperature": NUMBER,
        "top_p": NUMBER,
        "max_new_tokens": int,
        "differs_from_paper?": {"*": [object, object]},
    },
    "intervals": {"level": NUMBER, "method": str, "resamples": int, "truncated": str},
    "problems": {"file": str, "n": int, "split": str, "families": [str, ...], "source?": {"*": object}},
    "votes?": {"k": int},
    "random_rates?": {"*": NUMBER},
    "closings?": {"share": {"*": NUMBER}},
    "sandbox?": {"level": str, "user": str, "held": [str, ...]},
    "device?": str,
    "model": str,
    "base": str,
    "versions": {"*": str},
    "command": str,
}


def wrong(value: Any, shape: Any, where: str = "") -> str:
    """What keeps a JSON value from having a shape, named by its place; nothing if it has it."""
    at = where or "it"
    if isinstance(shape, tuple):
        found = [wrong(value, one, where) for one in shape]
        return "" if "" in found else found[-1] if isinstance(value, dict | list) else f"{at} is not what it should be"
    if shape is None or isinstance(shape, type):
        good = value is None if shape is None else isinstance(value, shape)
        return "" if good else f"{at} is not what it should be"
    if not isinstance(value, type(shape)):
        return f"{at} is not a {'list' if isinstance(shape, list) else 'mapping'}"
    dot = f"{where}." if where else ""
    if isinstance(shape, list):
        every = [shape[0]] * len(value) if shape[-1] is ... else shape
        if len(every) != len(value):
            return f"{at} has {len(value)} entries, not {len(every)}"
        parts = [(x, one, f"{where}[{i}]") for i, (x, one) in enumerate(zip(value, every, strict=True))]
    elif "*" in shape or "#" in shape:
        if strange := [k for k in value if "#" in shape and not k.isdecimal()]:
            return f"{dot}{strange[0]} is not a whole number"
        parts = [(x, next(iter(shape.values())), f"{dot}{k}") for k, x in value.items()]
    else:
        if missing := [k for k in shape if k not in value and not k.endswith("?")]:
            return f"{dot}{missing[0]} is missing"
        names = ((k, k.removesuffix("?")) for k in shape)
        parts = [(value[name], shape[k], f"{dot}{name}") for k, name in names if name in value]
    return next(filter(None, (wrong(*part) for part in parts)), "")


def load_results(run: str | Path) -> dict[str, Any]:
    """``results.json`` of an evaluation. Raises UserError saying what the folder is, or what is wrong in the file."""
    folder = Path(run)
    mark: Any = next((read_json(folder / m) for m in (MARK, STARTED) if (folder / m).is_file()), {})
    stage = str(mark.get("name", "")) if isinstance(mark, dict) else ""
    if stage not in ("", "evaluate"):
        page = "; its own page is results.md" if (folder / "results.md").is_file() else ""
        raise UserError(
            f"{run} is what `neureasoner {stage}` wrote{page}; name a folder that `neureasoner evaluate` wrote"
        )
    file = folder / "results.json"
    if not file.is_file():
        todo = "run the same `neureasoner evaluate` again, it goes on where it stopped"
        todo = todo if stage else "name the folder that `neureasoner evaluate` wrote"
        raise UserError(f"{run} holds no results.json; {todo}")
    results = read_json(file)
    found = wrong(results, RESULTS) or ("" if results["arms"] else "arms is empty")
    if found:
        raise UserError(
            f"{file}: {found}; it is damaged, or another stage or version wrote it: run `neureasoner evaluate` again, "
            "into another folder"
        )
    return dict(results)


def arm_traces(run: str | Path, arm: str) -> list[Trace]:
    """The traces of one arm. Raises UserError if there are none, or if one is there twice."""
    file = Path(run) / "traces" / f"{arm}.jsonl"
    traces = read_traces(file)
    check_once(map(key_of, traces), file)
    return traces


def load_traces(run: str | Path, names: Sequence[str]) -> dict[str, list[Trace]]:
    """Traces by arm, of those arms that have some. Raises as ``arm_traces``."""
    return {name: arm_traces(run, name) for name in names if (Path(run) / "traces" / f"{name}.jsonl").is_file()}
