"""The three experiments: which decisions, which sets of features, which comparisons.

Legend: as in ``smollm2_fitting``. The first measure of a table is the one to judge by; the differences are of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from smollm2_fitting import FOLDS, Table, codes, compare, measures, one_hot, with_logs
from smollm2_recording import load_shards

from neureasoner.artifacts import read_json, write_json
from neureasoner.probes.detectors.metrics import interval

Sets = dict[str, tuple[Sequence[str], str]]
CHOSEN, MLP, RANDOM, ALL = (
    "spectra, 32 chosen neurons",
    "spectra, 32 chosen neurons, MLP",
    "spectra, 32 random neurons",
    "spectra, all 1,536 neurons",
)
MOST = ("entropy", "residual", "spectral")
FEWEST = 10  # training decisions of a class, for a table to be fitted
INSIDE: Sets = {
    CHOSEN: (("spectral",), "logistic"),
    MLP: (("spectral",), "mlp"),
    RANDOM: (("random",), "logistic"),
    ALL: (("all spectra",), "logistic"),
    "entropy": (("entropy",), "logistic"),
    "residual": (("residual",), "logistic"),
    "entropy + spectra": (("entropy", "spectral"), "logistic"),
    "entropy + residual": (("entropy", "residual"), "logistic"),
    "entropy + residual + spectra": (MOST, "logistic"),
    "shuffled labels: spectra, MLP": (("spectral",), "mlp"),
    "shuffled labels: entropy + residual + spectra": (MOST, "logistic"),
}
DIFFERENCES = [
    (CHOSEN, RANDOM),
    (MLP, CHOSEN),
    ("entropy + spectra", "entropy"),
    ("entropy + residual + spectra", "entropy + residual"),
]


def table_of(
    arrays: dict[str, np.ndarray],
    notes: Sequence[dict[str, Any]],
    stratum: str,
    extra: dict[str, np.ndarray],
    seed: int,
) -> Table:
    """Decisions of one experiment, with problems dealt into folds by a seeded shuffle."""
    problem = codes([n["problem"] for n in notes])
    place = np.random.default_rng(seed).permutation(problem.max() + 1)
    extra = {"length": with_logs([n["length"] for n in notes]), **extra}
    y = np.array([n["y"] for n in notes])
    return Table(arrays, extra, y, problem, place[problem] % FOLDS, np.array([str(n[stratum]) for n in notes]))


def wrong_by(notes: Sequence[dict[str, Any]], key: str) -> dict[str, list[int]]:
    """``{value: [decisions, failing ones]}``."""
    total, failing = Counter(str(n[key]) for n in notes), Counter(str(n[key]) for n in notes if n["y"])
    return {k: [total[k], failing[k]] for k in sorted(total)}


def gsm8k(folder: Path, seed: int, bootstrap: int) -> dict[str, Any]:
    """Experiment A."""
    arrays, notes, cost = load_shards(folder)
    extra = {
        "source": one_hot([n["source"] for n in notes]),
        "question": arrays["question"],
        "chain mean": arrays["residual"][:, 2],
    }
    table = table_of(arrays, notes, "source", extra, seed)
    question = "question alone (residual before the chain)"
    sets: Sets = {
        "source model": (("source",), "logistic"),
        "length": (("length",), "logistic"),
        question: (("question",), "logistic"),
        "length + spectra": (("length", "spectral"), "logistic"),
        "residual, mean over the chain": (("chain mean",), "logistic"),
        **INSIDE,
    }
    more = [
        (CHOSEN, "length"),
        ("length + spectra", "length"),
        ("residual", question),
        ("entropy + residual", question),
    ]
    found = compare(
        table, sets, ("within", "pooled", "problem"), [*DIFFERENCES, *more], bootstrap=bootstrap, seed=seed
    )  # fmt: skip
    return {
        "tables": {"chains": found},
        "wrong": wrong_by(notes, "source"),
        "trend": trend(table, notes, bootstrap, seed),
        "cost": cost,
    }


def trend(table: Table, notes: Sequence[dict[str, Any]], bootstrap: int, seed: int) -> list[dict[str, Any]]:
    """AUROC within source of a line's mean entropy and surprisal, nothing fitted, by line counted from the end."""
    out = []
    for back in range(1, 6):
        rows = np.array([len(n["lines"]) >= back for n in notes])
        read = measures(table.take(rows), ("within",), bootstrap, seed)["within"]
        values = np.array([n["lines"][-back] for n, r in zip(notes, rows, strict=True) if r])
        found = {name: interval(read(values[:, i])) for i, name in enumerate(("entropy", "surprisal"))}
        out.append({"back": back, "n": int(rows.sum()), **found})
    return out


def fewest(table: Table) -> int:
    """Decisions of the rarer class in the training part that has fewest of them."""
    return min(int((table.y[table.roles(test)[0]] == c).sum()) for test in range(FOLDS) for c in (0, 1))


def skyt1(folder: Path, seed: int, bootstrap: int) -> dict[str, Any]:
    """Experiment B: every cut, all traces and the finished ones. A table with too few of a class is left out."""
    arrays, notes, cost = load_shards(folder)
    extra = {
        "identity": one_hot([f"{n['dataset']}/{n['source']}" for n in notes]),
        "whole": with_logs([n["length"][:1] for n in notes]),
        "length": with_logs([n["length"][1:] for n in notes]),  # lines so far; the tokens are N for all
        "question": arrays["question"],
    }
    table = table_of(arrays, notes, "dataset", extra, seed)
    question = "question alone (residual before the thought)"
    sets: Sets = {
        "data set and source model": (("identity",), "logistic"),
        "length of the whole thought (known only at its end)": (("whole",), "logistic"),
        "lines in the first N tokens": (("length",), "logistic"),
        question: (("question",), "logistic"),
        **INSIDE,
    }
    more = [(CHOSEN, "lines in the first N tokens"), ("residual", question), ("entropy + residual", question)]
    datasets = sorted(set(table.stratum))
    cut, finished = np.array([n["cut"] for n in notes]), np.array([n["finished"] for n in notes])
    tables, wrong = {}, {}
    for n in sorted(set(cut)):
        for name, rows in ((f"N = {n}", cut == n), (f"N = {n}, finished thoughts", (cut == n) & finished)):
            names = ("within", "pooled", *datasets) if name == f"N = {n}" else ("within", "pooled")
            some = table.take(rows)
            if fewest(some) >= FEWEST:  # else only counted
                tables[name] = compare(some, sets, names, [*DIFFERENCES, *more], bootstrap=bootstrap, seed=seed)
            wrong[name] = wrong_by([x for x, r in zip(notes, rows, strict=True) if r], "dataset")
    per_problem = max(Counter(n["problem"] for n in notes if n["cut"] == min(cut)).values())
    return {"tables": tables, "wrong": wrong, "per_problem": per_problem, "cost": cost}


def chains(folder: Path, seed: int, bootstrap: int) -> dict[str, Any]:
    """Experiment C: every window; lines are compared with those at the same place that calculate the same way."""
    arrays, notes, cost = load_shards(folder)
    for note in notes:
        note["line"] = note["length"][0]
        note["operation"] = ("addition", "subtraction", "multiplication")[note["task"][:3].index(1.0)]
        note["kind of line"] = f"{note['line']}/{note['operation']}"
    extra = {"task": np.array([[*n["task"], *np.log1p(n["task"][3:])] for n in notes])}
    table = table_of(arrays, notes, "kind of line", extra, seed)
    sets: Sets = {
        "length and position": (("length",), "logistic"),
        "the task (operation, numbers, right result)": (("task",), "logistic"),
        "task + entropy + residual": (("task", "entropy", "residual"), "logistic"),
        **INSIDE,
    }
    task = "the task (operation, numbers, right result)"
    more = [(CHOSEN, task), ("entropy", task), ("residual", task), ("task + entropy + residual", task)]
    window = np.array([n["window"] for n in notes])
    tables = {
        f"window of {w} lines": compare(
            table.take(window == w), sets, ("within", "pooled"), [*DIFFERENCES, *more], bootstrap=bootstrap, seed=seed
        )
        for w in sorted(set(window))
    }
    once = [n for n in notes if n["window"] == window.min()]
    return {
        "tables": tables,
        "kinds": dict(Counter(n["kind"] for n in once)),
        "wrong": {key: wrong_by(once, key) for key in ("operation", "line")},
        "tokens": float(np.mean([n["length"][2] for n in once])),
        "cost": cost,
    }


def fit_all(work: Path, seed: int, bootstrap: int, only: Sequence[str]) -> None:
    """The experiments named that are recorded, into ``results.json``; others that stand there stay."""
    path = work / "results.json"
    out: dict[str, Any] = read_json(path) if path.is_file() else {}
    if (out.get("seed"), out.get("bootstrap")) != (seed, bootstrap):
        out = {"seed": seed, "bootstrap": bootstrap}
    for function in (gsm8k, skyt1, chains):
        name = function.__name__
        if name in only and any((work / name).glob("*.safetensors")):
            begin = time.monotonic()
            out[name] = function(work / name, seed, bootstrap)
            out[name]["minutes"] = round((time.monotonic() - begin) / 60, 1)
            write_json(path, out)
