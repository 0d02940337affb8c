"""An evaluation's folder, read: what is damaged, or another stage's, is an error by name and never a traceback."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from neureasoner.artifacts import read_json, write_json, write_text
from neureasoner.cli import main
from neureasoner.errors import UserError
from neureasoner.evaluation.compare import compare_runs
from neureasoner.evaluation.compare_config import CompareConfig
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.report import draw, page
from neureasoner.evaluation.results import build
from neureasoner.evaluation.run_folder import load_results, load_traces, wrong
from neureasoner.evaluation.runner import outcomes
from neureasoner.evaluation.show import show
from neureasoner.evaluation.viewer.config import ShowConfig
from neureasoner.evaluation.viewer.terminal import terminal
from neureasoner.stages import StageFolder
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Step, Trace, write_rows


def trace(i: int, arm: str, sample: int) -> Trace:
    problem = Problem(f"p{i}", "arithmetic", i, f"{i} + 1?", "4")
    right = (i + sample + len(arm)) % 2 == 0
    labels = Labels(right, "4" if right else "5", IntraLabel(), InterLabel())
    meta = {"arm": arm, "sample": sample, "seed": sample, "seconds": 0.5}
    return Trace(f"p{i}#{sample}", problem, [1], [1] * (9 + i), "text\n\n", [Step(0, 6, 0, 5)], True, labels, meta=meta)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two arms of three problems with four samples."""
    rows = {arm: [trace(i, arm, s) for i in range(1, 4) for s in range(4)] for arm in ("vanilla", "full")}
    for arm, traces in rows.items():
        write_rows(tmp_path / "run" / "traces" / f"{arm}.jsonl", traces)
    problems = [t.problem for t in rows["full"][::4]]
    write_rows(tmp_path / "problems.jsonl", problems)
    config = EvaluateConfig("model", str(tmp_path / "problems.jsonl"), str(tmp_path / "run"), samples=4, resamples=20)
    found = build(config, "base", problems, {k: outcomes(v, 512) for k, v in rows.items()}, {"inter": "why"}, {})
    fitted = {"name": "spectral", "window": 2, "test": {"auroc": {"value": 0.9, "low": 0.8, "high": 1.0}}}
    found["probes"] = {"intra": {"chosen": fitted, "paper": None, "controls": {"length": fitted}, "window": 2}}
    found["neurons"] = {"intra": {"site": "neuron:1[2]", "layer": 1, "random": None}}
    found |= {"random_rates": {"intra": 0.1}, "votes": {"k": 2, "full_tokens": 3.0, "answer_tokens": 1.0}}
    write_json(tmp_path / "run" / "results.json", found)
    return tmp_path / "run"


def readers(run: Path) -> None:
    """Everything that reads a finished evaluation, but for the recording."""
    console = Console(file=io.StringIO(), width=90)
    terminal(ShowConfig(str(run), traces=1), console)
    show(run, 1, console)
    results, traces = load_results(run), load_traces(run, ["vanilla", "full"])
    page(results, traces, draw(results, traces), 4)
    compare_runs(CompareConfig(str(run), str(run), arm_b="full", resamples=20))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of a list the first entry's."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def test_no_damage_is_a_traceback(run: Path) -> None:
    """Each place in turn taken away, or something else put there: an error that names the file, or no matter."""
    whole, refused, fine = read_json(run / "results.json"), 0, 0
    readers(run)
    for path in list(places(whole)):
        for new in (None, "gone", [], {}, 7, "<b>"):
            damaged = copy.deepcopy(whole)
            at = damaged
            for key in path[:-1]:
                at = at[key]
            if new == "gone":
                at.pop(path[-1])
            else:
                at[path[-1]] = new
            (run / "results.json").write_text(json.dumps(damaged), encoding="utf-8")
            try:
                load_results(run)
            except UserError as e:
                assert str(e).startswith(f"{run / 'results.json'}: ") and "run `neureasoner evaluate` again" in str(e)
                refused += 1
                continue
            if new in ("gone", 7):  # what the check lets through, the readers must bear (or name, as a lost arm)
                with contextlib.suppress(UserError):
                    readers(run)
                fine += 1
    assert refused > 500 and fine > 50


@pytest.mark.parametrize("text", ["{}", "[]", "null", "3", '{"arms": []}', '{"arms": {}}', "{", ""])
def test_files_that_are_nothing_of_the_kind(run: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(run / "results.json", text)
    for line in (["show", run], ["report", run], ["details", run], ["compare", run, run]):
        assert main(["evaluation", *map(str, line)]) == 2
        assert f"error: {run / 'results.json'}" in capsys.readouterr().err


def test_other_stages_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("combine", "ablate", "probes fit"):
        folder = run.parent / stage.replace(" ", "_")
        StageFolder(folder, stage, CompareConfig("a", "b")).finish({})
        write_json(folder / "results.json", {"arms": [{"name": "all"}], "problems": 3})
        for line in (["show", folder], ["report", folder], ["compare", run, folder]):
            assert main(["evaluation", *map(str, line)]) == 2
            said = capsys.readouterr().err
            assert f"{folder} is what `neureasoner {stage}` wrote; name a folder that `neureasoner evaluate`" in said
    write_text(folder / "results.md", "x")
    with pytest.raises(UserError, match=r"wrote; its own page is results\.md; name"):
        load_results(folder)


def test_folders_without_results(run: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json; name the folder that `neureasoner evaluate` wrote"):
        load_results(run.parent)
    StageFolder(run.parent / "killed", "evaluate", CompareConfig("a", "b"))
    with pytest.raises(UserError, match=r"holds no results\.json; run the same `neureasoner evaluate` again"):
        load_results(run.parent / "killed")


def test_a_doubled_row_is_an_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "traces" / "full.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[2]]))
    with pytest.raises(UserError, match=r"full\.jsonl: full, problem 'p1', sample 2, vote 0, seed 2 is there twice"):
        load_traces(run, ["vanilla", "full"])
    for line in (["show", run], ["report", run], ["compare", run, run, "--arm_b", "full"]):
        assert main(["evaluation", *map(str, line)]) == 2
        assert "is there twice" in capsys.readouterr().err
    assert list(load_traces(run, ["vanilla", "absent"])) == ["vanilla"]


def test_shapes() -> None:
    assert wrong(3, (int, None)) == wrong(None, (int, None)) == wrong({"a": 1}, {"a": int, "b?": str}) == ""
    assert wrong({"a": [1, "x"]}, {"a": [int, ...]}) == "a[1] is not what it should be"
    assert wrong({"a": [1]}, {"a": [int, int]}) == "a has 1 entries, not 2"
    assert wrong({}, {"a": int}) == "a is missing" and wrong({"a": 1, "b": 2}, {"a": int, "b?": str}).startswith("b is")
    assert wrong({"x": {"k": {}}}, {"*": {"#": {}}}) == "x.k is not a whole number"
    assert wrong([], {"a": int}) == "it is not a mapping" and wrong({"a": {}}, {"a": [int, ...]}) == "a is not a list"
    assert wrong([1], (None, [str])) == "[0] is not what it should be"
