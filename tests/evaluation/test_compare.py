"""``evaluation compare``: flips, the paired difference, and what must not be compared."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from neureasoner.artifacts import read_json, write_json
from neureasoner.errors import UserError
from neureasoner.evaluation.compare import compare_runs
from neureasoner.evaluation.compare_config import CompareConfig
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.results import build
from neureasoner.evaluation.runner import batch_seed, outcomes
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows


def run(folder: Path, right: dict[str, list[list[bool]]], **changes: Any) -> str:
    """An evaluation's folder: by arm, right answers by problem and sample."""
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 100, "batch_size": 4}
    seed, question = changes.pop("seed", 0), changes.pop("question", "How many?")
    model, served = changes.pop("model", "m"), changes.pop("names", "p")
    samples = len(next(iter(right.values()))[0])
    found = {}
    for arm, rows in right.items():
        traces = found[arm] = list[Trace]()
        for (i, row), s in product(enumerate(rows), range(samples)):
            problem = Problem(f"{served}{i}", "gsm8k", 1, question, "4")
            labels = Labels(row[s], "4" if row[s] else "5", IntraLabel(), InterLabel())
            meta = {"arm": arm, "sample": s, "vote": 0, "seed": batch_seed(seed, s, 0)}
            traces.append(Trace(f"p{i}#{s}", problem, [1], [1] * (10 + i), "t", [], True, labels, meta=meta))
        write_rows(folder / "traces" / f"{arm}.jsonl", traces)
    problems = [t.problem for t in traces[::samples]]
    write_rows(folder / "problems.jsonl", problems)
    config = EvaluateConfig(model, str(folder / "problems.jsonl"), str(folder), samples=samples, seed=seed, resamples=9)
    results = build(config, "base", problems, {arm: outcomes(rows, 100) for arm, rows in found.items()}, {}, {})
    write_json(folder / "results.json", results | {"sampling": results["sampling"] | sampling | changes})
    return str(folder)


def test_flips_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", {"vanilla": [[True], [False], [False], [False], [True]]})
    b = run(tmp_path / "b", {"full": [[False], [True], [True], [True], [True]]}, model="other")
    found = compare_runs(CompareConfig(a, b, arm_b="full", out=str(tmp_path / "c")))
    assert [r["problem"] for r in found["to_right"]] == ["p1", "p2", "p3"]
    assert [r["problem"] for r in found["to_wrong"]] == ["p0"]
    assert found["accuracy"] == [0.4, 0.8] and found["accuracy_delta"] == pytest.approx(0.4)
    # +++- : of 16 flips, those with |sum| >= 2: 4 choose 0, 1, 3, 4 plus signs: 1 + 4 + 4 + 1
    assert found["accuracy_p"] == pytest.approx(10 / 16)
    assert found["accuracy_delta_ci"][0] <= 0.4 <= found["accuracy_delta_ci"][1]
    assert read_json(tmp_path / "c" / "compare.json") == found
    said = capsys.readouterr().out
    assert "flipped to right: 3" in said and "p1: 5 → 4 (gold 4)" in said and "p0: 4 → 5" in said
    assert "b − a: +40.0 points" in said and "p = 0.6250" in said


def test_several_samples_count_as_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", {"vanilla": [[True, False], [False, False]], "full": [[False, True], [True, True]]})
    found = compare_runs(CompareConfig(a, a, arm_b="full"))
    assert not found["to_wrong"] and found["to_right"] == [
        {"problem": "p1", "a": 0, "b": 2, "samples": 2, "answers": [["5", "5"], ["4", "4"]]}
    ], "another sample of p0 is right, as many as before: no flip"
    assert "0 → 2 of 2 right" in capsys.readouterr().out
    assert found["accuracy_delta"] == 0.5 and found["n_problems"] == 2


def test_what_differs_is_named(tmp_path: Path) -> None:
    rows = {"vanilla": [[True], [False]]}
    a = run(tmp_path / "a", rows)
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"temperature \(0.6 and 1.0\)", {"temperature": 1.0}),
        (r"max_new_tokens \(100 and 50\); batch_size \(4 and 8\)", {"max_new_tokens": 50, "batch_size": 8}),
        (r"seed \(0 and 7\)", {"seed": 7}),
        (r"question or answer of 2 problems \(p0, p1\)", {"question": "How many now?"}),
        (r"2 problems that only the first has \(p0, p1\); 2 problems that only the second has \(q0", {"names": "q"}),
    ]
    for i, (said, changes) in enumerate(cases):
        with pytest.raises(UserError, match="cannot be compared; they differ in .*" + said):
            compare_runs(CompareConfig(a, run(tmp_path / f"b{i}", rows, **changes)))
    with pytest.raises(UserError, match=r"samples \(1 and 2\)"):
        compare_runs(CompareConfig(a, run(tmp_path / "two", {"vanilla": [[True, True], [True, True]]})))
    with pytest.raises(UserError, match="1 problems that only the first has"):
        compare_runs(CompareConfig(a, run(tmp_path / "short", {"vanilla": [[True]]})))


def test_other_seeds_behind_equal_settings_are_noticed(tmp_path: Path) -> None:
    rows = {"vanilla": [[True], [False]]}
    a, b = run(tmp_path / "a", rows), run(tmp_path / "b", rows, seed=7)
    results = read_json(tmp_path / "b" / "results.json")
    results["seeds"]["sampling"] = 0
    write_json(tmp_path / "b" / "results.json", results)
    with pytest.raises(UserError, match="seeds of some samples"):
        compare_runs(CompareConfig(a, b))


def test_bad_input(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"vanilla": [[True]], "full": [[True]]})
    with pytest.raises(UserError, match=r"holds no results\.json"):
        compare_runs(CompareConfig(a, str(tmp_path)))
    with pytest.raises(UserError, match="has no arm 'sft'; it has vanilla, full"):
        compare_runs(CompareConfig(a, a, arm_b="sft"))
    with pytest.raises(UserError, match="is compared with itself"):
        compare_runs(CompareConfig(a, a))
    with pytest.raises(UserError, match="key 'b' is empty"):
        CompareConfig(a, "")


def test_real_evaluations_and_the_command(settings: Callable[..., Any], tmp_path: Path, capsys: Any) -> None:
    from neureasoner.cli import main
    from neureasoner.evaluation.evaluate import evaluate

    for name, arms in (("x", ["vanilla", "full"]), ("y", ["full"])):
        evaluate(settings(arms=arms, out=str(tmp_path / name), max_new_tokens=24, show_examples=0))
    capsys.readouterr()
    assert main(["evaluation", "compare", str(tmp_path / "x"), str(tmp_path / "y"), "--arm_b", "full"]) == 0
    assert "a: vanilla of" in (said := capsys.readouterr().out) and "6 problems × 1" in said
    same = compare_runs(CompareConfig(str(tmp_path / "x"), str(tmp_path / "y"), arm_a="full"))
    assert same["accuracy_delta"] == 0 and same["accuracy_p"] == 1 and not same["to_right"] + same["to_wrong"]
