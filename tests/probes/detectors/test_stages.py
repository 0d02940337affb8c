"""locate, fit and report end to end on a random model whose traces differ in what the failing paragraph says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neureasoner.errors import UserError
from neureasoner.probes.attribution.locate import locate
from neureasoner.probes.attribution.spans import loop_openings
from neureasoner.probes.config import FitConfig, LocateConfig
from neureasoner.probes.detectors import tables
from neureasoner.probes.detectors.fit import fit
from neureasoner.probes.detectors.probe import Probe
from neureasoner.probes.detectors.report import report
from neureasoner.probes.detectors.report_config import ReportConfig
from neureasoner.probes.labels import Closing
from neureasoner.steps import segment
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, read_traces, write_rows

GOOD = [
    "Okay, let me think about {} + {} = 42.",
    "First I try {} * {} - 5 = 19.",
    "Tom has {} apples and buys {} more.",
]
WRONG = "Wait, that does not reach {}: none are left {}"
LOOP = "Another route: {} * 4 = 24. Let me check again {}"
EASY = "How many are left? None. How many? {} {}"


def judged_traces(tokenizer, n=100, seed=0):
    rng = np.random.default_rng(seed)
    fill = lambda text: text.format(*rng.integers(10, 99, 2)) + " more" * rng.integers(12) + ".\n\n"  # noqa: E731
    out = []
    for p in range(n):
        easy = p % 2 == 0
        for s in range(2):
            parts = [fill(EASY if easy else GOOD[int(rng.integers(3))]) for i in range(6)]
            wrong = int(rng.integers(6)) if rng.random() < 0.5 else None
            loop = None
            if wrong is not None:
                parts[wrong] = fill(WRONG)
            elif rng.random() < 0.7:
                parts += [fill(LOOP) for _ in range(5)]
                loop = (6, 11)
            ids = tokenizer("".join(parts) + "</think>\n\nDone.", add_special_tokens=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
            prompt = tokenizer(f"<think>\nQuestion {p}", add_special_tokens=False)["input_ids"]
            steps, thinking = segment(ids, tokenizer)
            labels = Labels(
                easy,
                "1",
                IntraLabel(wrong is not None, step=wrong),
                InterLabel(loop is not None, steps=loop, attempts=[7, 8, 9] if loop else []),
            )
            problem = Problem(f"p{p}", "f", 1, "q", "a")
            text = tokenizer.decode(ids)
            out.append(
                Trace(f"p{p}#{s}", problem, prompt, ids, text, steps, True, labels, meta={"thinking_tokens": thinking})
            )
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_model, tiny_tokenizer):
    """A folder with a model, judged traces, and what locate and fit made of them."""
    root = tmp_path_factory.mktemp("probes")
    make_model().save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    write_rows(root / "traces.jsonl", judged_traces(tiny_tokenizer))
    locate(locate_config(root))
    fit(fit_config(root))
    return root


def locate_config(root, **more):
    base = {"model": str(root / "model"), "traces": str(root / "traces.jsonl"), "out": str(root / "neurons")}
    return LocateConfig(**(base | {"neurons": 6, "heads": 2, "max_traces": 20, "first_steps": 2} | more))


def fit_config(root, **more):
    base = {
        "model": str(root / "model"),
        "traces": str(root / "traces.jsonl"),
        "neurons": str(root / "neurons" / "neurons.json"),
        "out": str(root / "fit"),
    }
    small = {"candidates": ["spectral", "entropy+residual"], "intra": [2], "inter": [2, 4], "instance": [2]}
    quick = {"epochs": 12, "hidden": 32, "bootstrap": 50, "weight_decay": [0.01]}
    return FitConfig(**(base | small | quick | more))


def test_neurons_json(work):
    neurons = json.loads((work / "neurons" / "neurons.json").read_text())
    assert set(neurons["levels"]) == {"intra", "inter", "instance"} and neurons["layer"] == 1
    assert neurons["mode"] == "depass"
    for level, kind, n in (("intra", "neuron", 6), ("inter", "head", 2), ("instance", "neuron", 6)):
        entry = neurons["levels"][level]
        assert entry["site"].startswith(f"{kind}:1[") and len(set(entry["indices"])) == n
        assert 0 <= neurons["joint"][level]["heads"] <= 1
        if level != "inter":
            assert not set(json.loads("[" + neurons["random"][level].split("[")[1])) & set(entry["indices"])
    split = json.loads((work / "fit" / "split.json").read_text())
    assert {split[p] for p in neurons["problems"]} == {"train"}
    assert (work / "neurons" / "experts.png").stat().st_size > 1000
    assert (work / "neurons" / "spectrum.png").stat().st_size > 1000


def test_planted_failures_are_found_and_beat_the_controls(work):
    results = json.loads((work / "fit" / "results.json").read_text())
    assert set(results["levels"]) == {"intra", "inter", "instance"} and not results["warnings"]
    assert {"seed", "command", "version", "split", "intervals"} <= set(results)
    for level, entry in results["levels"].items():
        area = entry["chosen"]["test"]["auroc"]
        assert area["value"] > 0.8 and area["low"] <= area["value"] <= area["high"], (level, area)
        assert entry["chosen"]["validation_auroc"] == max(c["validation_auroc"] for c in entry["candidates"])
        assert entry["paper"]["name"] == "spectral"
        assert entry["controls"]["random"]["channels"] != entry["paper"]["channels"]
        probe = Probe.load(work / "fit" / level)
        assert probe.features.name == entry["chosen"]["name"]
        assert probe.threshold == entry["chosen"]["test"]["threshold"]
        assert Probe.load(work / "fit" / "paper" / level).features.parts == ("spectral",)
    intra = results["levels"]["intra"]
    assert intra["chosen"]["test"]["auroc"]["value"] > intra["controls"]["length"]["test"]["auroc"]["value"] + 0.1
    assert intra["chosen"]["test"]["delay_steps"]["value"] < 1
    assert intra["chosen"]["test"]["false_alarms_per_1000_tokens"]["value"] < 5


def forecasts(traces):
    """Closing costs nothing from the fourth step of an easy trace on, and three answers in four anywhere else."""
    rows = []
    for t in traces:
        for step in (1, 3, 5):
            free = t.labels.correct and step >= 3
            end = t.steps[step].token_end
            left = 4.0 * (len(t.response_ids) - end)
            rows.append(
                Closing(
                    t.id, t.problem.id, t.problem.family, 1, 2, step, end, 4, 4, 4 if free else 1, 4, 8.0, left, free
                )
            )
    return rows


def closing_config(work, tmp_path, out="fit", **more):
    write_rows(tmp_path / "closings.jsonl", forecasts(read_traces(work / "traces.jsonl")))
    quick = {
        "closings": str(tmp_path / "closings.jsonl"),
        "candidates": ["entropy+residual"],
        "inter": [2],
        "epochs": 8,
    }
    return fit_config(work, out=str(tmp_path / out), **(quick | more))


def test_an_exit_is_fitted_where_closing_costs_nothing(work, tmp_path, capsys):
    results = fit(closing_config(work, tmp_path))
    entry = results["levels"]["instance"]
    found, area = entry["exit"], entry["chosen"]["test"]["auroc"]["value"]
    probe = Probe.load(tmp_path / "fit" / "instance")
    assert (probe.features.exit_from, probe.features.window) == (2, 2) and not probe.features.once
    assert area > 0.8 and found["chosen"]["auroc"]["value"] == area
    assert found["chosen"]["threshold"] == probe.threshold == entry["chosen"]["test"]["threshold"]
    assert found["family"]["within_family"]["value"] == 0.5 and set(found["chosen"]["families"]) == {"f"}
    # half of the traces are hard: closing all costs three in four of their answers, closing the easy ones nothing
    assert found["always"]["points"]["value"] < -50 < found["chosen"]["points"]["value"] - 40
    assert found["chosen"]["tokens_saved"]["value"] > 5
    assert found["chosen"]["validation_utility"] > found["validation_utility_of_never_closing"]
    solved, hopeless = (found["chosen"][k]["traces"] for k in ("solved", "hopeless"))
    assert solved + hopeless == results["split"]["test"]["traces"]
    assert {"threshold", "validation", "test"} == set(found["curve"][0])
    assert "closing the thinking from step 2 on" in " ".join(capsys.readouterr().out.split())
    # the paper's pairs stay, as the control: read once, of easy and hard questions
    paper = Probe.load(tmp_path / "fit" / "paper" / "instance")
    assert paper.features.once and entry["paper"]["test"]["n"] == results["split"]["test"]["traces"]
    assert not results["warnings"]


def test_an_exit_that_does_not_pay_is_said_to(work, tmp_path):
    results = fit(closing_config(work, tmp_path, price=0.0))
    assert [w for w in results["warnings"] if "'price'" in w and w.startswith("instance")]
    with pytest.raises(UserError, match="'price'"):
        closing_config(work, tmp_path, price=-1.0)
    with pytest.raises(UserError, match="'instance'"):
        closing_config(work, tmp_path, instance=[1])


@pytest.mark.slow
def test_report_draws_figures(work, capsys):
    small = {
        "estimators": ["logistic"],
        "compared": ["logistic"],
        "curve": [6, 12],
        "repeats": 1,
        "bootstrap": 30,
        "trajectories": 8,
    }
    done = report(ReportConfig(fit=str(work / "fit"), out=str(work / "report"), **small))
    levels = ["intra", "inter", "instance"]
    assert done["figures"] == [*(f"{n}_report.png" for n in levels), *(f"{n}.png" for n in levels)]
    assert all((work / "report" / f).stat().st_size > 1000 for f in done["figures"])
    assert "AUROC" in capsys.readouterr().out
    found = json.loads((work / "report" / "report.json").read_text())["levels"]
    for level, entry in found.items():
        sets = {e["set"]: e for e in entry["sets"]}
        assert {"spectral", "random", "random block", "length", "entropy+residual+trend"} <= set(sets), level
        assert entry["chosen"] == max(
            (s for s in sets if not sets[s]["control"]),
            key=lambda s: (round(sets[s]["validation_auroc"], 3), -s.count("+")),
        )
        assert {e["trajectories"] for e in entry["curve"]["spectral"]} > {6, 12}
        assert {e["smaller"] for e in entry["nested"]["logistic"]} >= {"entropy", "residual"}
        assert 4 <= entry["table_4"]["drawn"] <= 8 and {"tokens", "trajectories", "samples"} <= set(entry["table_4"])
    assert "algorithm-2 log" in {e["set"] for e in found["inter"]["sets"]}
    text = (work / "report" / "report.md").read_text()
    assert all(f"## {level}" in text for level in levels) and "nan" not in text and "{'" not in text
    with pytest.raises(UserError, match="probes fit first"):
        report(ReportConfig(fit=str(work), out=str(work / "no")))


def test_a_finished_fit_returns_at_once_and_other_settings_are_refused(work, monkeypatch):
    monkeypatch.setattr("neureasoner.models.load", lambda name: pytest.fail("loaded a model"))
    assert set(fit(fit_config(work))["levels"]) == {"intra", "inter", "instance"}
    with pytest.raises(UserError, match="other settings"):
        fit(fit_config(work, seed=5))


@pytest.mark.slow
def test_report_examines_an_exit(work, tmp_path):
    fit(closing_config(work, tmp_path))
    small = {"estimators": ["logistic"], "compared": ["logistic"], "curve": [6], "repeats": 1, "bootstrap": 20}
    report(ReportConfig(fit=str(tmp_path / "fit"), out=str(tmp_path / "report"), levels=["instance"], **small))
    entry = json.loads((tmp_path / "report" / "report.json").read_text())["levels"]["instance"]
    assert "skipped" in entry["table_4"] and entry["window"] == 2
    best = next(e for e in entry["sets"] if e["set"] == entry["chosen"])
    assert best["test"]["auroc"]["value"] > 0.8


@pytest.mark.slow
def test_promise_9_a_killed_fit_goes_on_where_it_stopped(work, monkeypatch, tmp_path):
    real, calls = tables.record, []

    def counting(model, tokenizer, traces, *rest, **more):
        calls.append(len(traces))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, tokenizer, traces, *rest, **more)

    monkeypatch.setattr(tables, "record", counting)
    config = fit_config(work, out=str(tmp_path / "fit"), candidates=["entropy"], inter=[2], epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fit(config)
    fit(config)
    assert sum(calls) == 200 + calls[1] and not list((tmp_path / "fit").rglob("*.tmp"))
    again = fit_config(work, out=str(tmp_path / "again"), candidates=["entropy"], inter=[2], epochs=2)
    whole, resumed = fit(again), fit(config)
    assert whole["levels"] == resumed["levels"]


def test_neurons_of_another_model_or_split_are_refused(work, make_model, tiny_tokenizer, tmp_path):
    make_model(seed=9).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="run probes locate on this model"):
        fit(fit_config(work, model=str(tmp_path / "other"), out=str(tmp_path / "a")))
    with pytest.raises(UserError, match="held out here"):
        fit(fit_config(work, seed=3, out=str(tmp_path / "b")))
    with pytest.raises(UserError, match="different parts"):
        fit(fit_config(work, candidates=["spektral"], out=str(tmp_path / "c")))
    with pytest.raises(UserError, match="layers 0 to 1"):
        locate(locate_config(work, layer=2, out=str(tmp_path / "d")))


@pytest.mark.slow
def test_a_control_that_overlaps_the_selection_is_said_to(work, tmp_path, capsys):
    done = locate(locate_config(work, heads=3, mode="direct", out=str(tmp_path / "neurons")))
    assert json.loads((tmp_path / "neurons" / "neurons.json").read_text())["mode"] == "direct"
    assert done["warnings"] == [w for w in done["warnings"] if "shares 2 of them" in w and "'heads' to at most 2" in w]
    assert len(done["warnings"]) == 1 and "warning: inter: 3 of a block's 4 heads" in capsys.readouterr().out


def test_levels_without_failures_are_left_out_with_a_warning(work, tiny_tokenizer, tmp_path):
    traces = judged_traces(tiny_tokenizer, 30)
    for t in traces:
        t.labels.inter = InterLabel()
        t.labels.correct = False
    write_rows(tmp_path / "traces.jsonl", traces)
    more = {"traces": str(tmp_path / "traces.jsonl")}
    done = locate(locate_config(work, out=str(tmp_path / "neurons"), **more))
    assert set(done["levels"]) == {"intra"} and len(done["warnings"]) == 2
    results = fit(
        fit_config(work, neurons=str(tmp_path / "neurons" / "neurons.json"), out=str(tmp_path / "fit"), **more)
    )
    assert set(results["levels"]) == {"intra"} and len(results["warnings"]) == 2
    assert not (tmp_path / "fit" / "inter").exists()
    for t in traces:
        t.labels.intra = IntraLabel()
    write_rows(tmp_path / "clean.jsonl", traces)
    with pytest.raises(UserError, match="no neurons could be located"):
        locate(locate_config(work, out=str(tmp_path / "none"), traces=str(tmp_path / "clean.jsonl")))


def test_repeated_attempts_without_a_segmenting_judge(tiny_tokenizer):
    trace = next(t for t in judged_traces(tiny_tokenizer) if t.labels.inter.is_stagnant)
    assert loop_openings(trace) == [7, 8, 9]
    trace.labels.inter.attempts = []
    assert loop_openings(trace)[0] == 6 and len(loop_openings(trace)) >= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intra": [1]}, "'intra'"),
        ({"false_alarm_rate": 1.0}, "'false_alarm_rate'"),
        ({"validation": 0.6, "test": 0.5}, "'validation'"),
        ({"candidates": []}, "'candidates'"),
        ({"weight_decay": []}, "'weight_decay'"),
        ({"epochs": 0}, "'epochs'"),
    ],
)
def test_wrong_settings_name_the_key(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        fit_config(tmp_path, **settings)
