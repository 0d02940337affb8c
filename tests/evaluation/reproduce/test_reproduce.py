"""``reproduce``: the paper's figures as its text describes them, the pages, and two tables from their recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from neureasoner.artifacts import read_json, write_json
from neureasoner.commands import COMMANDS
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.errors import UserError
from neureasoner.evaluation.metrics import Outcome
from neureasoner.evaluation.reproduce.config import READS, ReproduceConfig
from neureasoner.evaluation.reproduce.consistency import curves, votes
from neureasoner.evaluation.reproduce.paper import choose, paper
from neureasoner.evaluation.reproduce.reproduce import reproduce
from neureasoner.evaluation.reproduce.tables import WRITERS, Found, pair, table1, table2, table4, table6, table7
from neureasoner.traces import read_traces

ROOT = Path(__file__).parents[3]


def test_every_table_has_a_page_and_a_recipe(monkeypatch: Any) -> None:
    from neureasoner.floor_config import RunConfig
    from neureasoner.run import load_recipe

    monkeypatch.chdir(ROOT)  # paths in a recipe count from the repository's root
    assert set(WRITERS) == set(READS)
    for table, command in READS.items():
        file = ROOT / "configs" / "recipes" / "tiny" / f"reproduce_{table}.yaml"
        stages = load_recipe(RunConfig(str(file)))[2]
        assert any(s.command is COMMANDS[command] for s in stages)
        # probes fit refuses neurons that were chosen on another split
        split = {s.settings["seed"] for s in stages if s.label.startswith(("probes locate", "probes fit", "probes of"))}
        assert len(split) <= 1


def test_the_papers_figures_are_those_its_text_speaks_of() -> None:
    found = paper()
    # core.md 1.12 and 1.13: ranges that the text derives from the tables
    longer = [b / a - 1 for rows in found["table6"].values() for a, b in rows.values()]
    assert len(longer) == 36 and min(longer) == pytest.approx(0.061, abs=6e-4)
    assert max(longer) == pytest.approx(0.087, abs=6e-4) and np.mean(longer) == pytest.approx(0.071, abs=6e-4)
    rows = {**{(m, b): t for m, t in found["table1"].items() for b in t["Vanilla"]}}
    gains = [(t["NeuReasoner"][b][0] - t["Vanilla"][b][0], t["NeuReasoner"][b][1] / t["Vanilla"][b][1] - 1)
             for (_, b), t in rows.items()]  # fmt: skip
    assert max(g for g, _ in gains) == pytest.approx(7.8) and min(g for g, _ in gains) == pytest.approx(0.3)
    assert min(t for _, t in gains) == pytest.approx(-0.633, abs=1e-3)
    assert max(t for _, t in gains) == pytest.approx(-0.196, abs=1e-3)
    aime = [r["AIME24"][0] for t in found["table5"].values() for r in t.values()]
    aime += [r["AIME25"][0] for t in found["table1"].values() for r in t.values()]
    assert len(aime) == 6 * 9 + 3 + 4 * 9 and all(abs(a * 0.9 - round(a * 0.9)) < 0.05 for a in aime)
    for model, variants in found["table2"].items():
        if model == "R1-Distill-Qwen-32B":
            assert variants["full"]["MATH500"] == found["table1"][model]["NeuReasoner"]["MATH500"]
            assert {tuple(w[4]) for w in found["table7"][model].values()} == {tuple(variants["full"]["MATH500"])}


def test_which_model_is_printed_beside_ours() -> None:
    assert choose("table1", "tiny") == ("R1-Distill-Qwen-32B", False)
    assert choose("table1", "Qwen/Qwen3-8B") == ("Qwen3-8B", True)
    assert choose("table1", "models/deepseek-r1-distill-llama-8b") == ("R1-Distill-Llama-8B", True)
    assert choose("table2", "Qwen/Qwen3-8B") == ("R1-Distill-Qwen-32B", False)  # Table 2 has two models
    assert choose("table6", "Qwen/Qwen3-8B", "Qwen3-32B") == ("Qwen3-32B", False)
    assert choose("figure5", "tiny")[0] == "R1-Distill-Qwen-32B"
    with pytest.raises(UserError, match=r"table7 has no figures of 'Qwen3-8B'.*it has R1-Distill-Qwen-32B"):
        choose("table7", "tiny", "Qwen3-8B")


def arm(name: str, accuracy: float, tokens: float) -> dict[str, Any]:
    return {"name": name, "accuracy": accuracy, "tokens_mean": tokens, "accuracy_ci": [accuracy - 0.1, accuracy + 0.1]}


def against(a: str, b: str, delta: float, tokens: float) -> dict[str, Any]:
    return {"arm": a, "against": b, "accuracy_delta": delta, "accuracy_delta_ci": [delta - 0.01, delta + 0.02]} | {
        "tokens_relative": tokens, "tokens_relative_ci": [tokens - 0.1, tokens + 0.1]}  # fmt: skip


def page(write: Any, results: dict[str, Any], tmp_path: Path, of: str = "R1-Distill-Qwen-32B") -> dict[str, list[str]]:
    """Cells of each row by its first cell."""
    found = Found(results, dict.fromkeys(results, tmp_path), tmp_path, of)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in write(found) if line.startswith("|")]
    return {r[0]: r[1:] for r in rows}


def test_methods_beside_the_papers(tmp_path: Path) -> None:
    r = {"arms": [arm("vanilla", 0.5, 200), arm("full", 0.6, 150), arm("random_trigger", 0.4, 210)]}
    r["comparisons"] = [against("full", "vanilla", 0.1, -0.25), against("random_trigger", "vanilla", -0.1, 0.05)]
    rows = page(table1, {"GSM8K": r}, tmp_path, "Qwen3-8B")
    assert rows["method"] == ["ours: GSM8K", "against vanilla", "paper: GSM8K"]  # a benchmark of both stands alone
    assert rows["Vanilla (`vanilla`)"] == ["50.0 [40.0, 60.0] / 200", "–", "94.1 / 1573"]
    assert rows["NeuReasoner (`full`)"] == [
        "60.0 [50.0, 70.0] / 150",
        "+10.0 points [+9.0, +12.0], -25% tokens [-35%, -15%]",
        "94.6 / 588 (+0.5, -63 %)",
    ]
    assert rows["DAST"] == ["–", "–", "94.1 / 483 (+0.0, -69 %)"]
    assert rows["random_trigger"][0].startswith("40.0") and rows["random_trigger"][2] == "–"
    r["arms"] += [arm("alpha_one", 0.3, 100)]  # of the paper's methods, but not in its table of the 32B model
    other = page(table1, {"words": r}, tmp_path)
    assert other["AlphaOne (`alpha_one`)"][0] == "30.0 [20.0, 40.0] / 100"
    assert other["method"][2:] == [
        f"paper: {b}" for b in ("AIME25", "MATH500", "GSM8K", "GPQA-Diamond", "LiveCodeBench")
    ]
    assert pair(None) == "–" and pair([50.0, 100]) == "50.0 / 100"


def test_ablation_and_windows(tmp_path: Path) -> None:
    names = ["none", "without_intra", "without_inter", "without_instance", "all"]
    r = {"arms": [arm(n, 0.5 + i / 100, 100 + i) for i, n in enumerate(names)], "comparisons": []}
    r["comparisons"] = [against("all", n, 0.04 - i / 100, 0.01) for i, n in enumerate(names[:-1])]
    rows = page(table2, {"words": r}, tmp_path)
    assert rows["without intra"][:2] == ["51.0 [41.0, 61.0] / 101", "+3.0 points [+2.0, +5.0], +1% tokens [-9%, +11%]"]
    assert rows["without instance"][2:4] == ["95.8 / 2389", "+0.5 points, -45% tokens"]
    assert rows["full"][1] == rows["full"][3] == "–"
    with pytest.raises(UserError, match="stage 'words' has no arm without_inter; it needs the parts"):
        page(table2, {"words": {**r, "arms": [a for a in r["arms"] if a["name"] != "without_inter"]}}, tmp_path)
    names = [f"{level}_{w}" for level in ("intra", "inter", "instance") for w in (2, 8)]
    r = {"arms": [arm(n, 0.5, 100) for n in names] + [arm("all", 0.6, 90)]}
    r["comparisons"] = [against("all", n, 0.1, -0.1) for n in names]
    rows = page(table7, {"words": r}, tmp_path)
    assert rows["inter"][:6] == [
        "50.0 [40.0, 60.0] / 100", "60.0 [50.0, 70.0] / 90", "50.0 [40.0, 60.0] / 100",
        "96.1 / 1345", "96.3 / 1318", "96.4 / 1328",
    ]  # fmt: skip
    assert rows["inter"][6:] == ["-10.0 points [-12.0, -9.0]"] * 2  # the comparison turned round
    same = [{**c, "accuracy_delta": 0.0, "accuracy_delta_ci": [0.0, 0.0]} for c in r["comparisons"]]
    assert page(table7, {"words": {**r, "comparisons": same}}, tmp_path)["intra"][6] == "+0.0 points [+0.0, +0.0]"
    with pytest.raises(UserError, match="has no arm intra_2"):
        page(table7, {"words": {**r, "arms": r["arms"][1:]}}, tmp_path)


def test_probes_and_times(tmp_path: Path) -> None:
    def m(mean: float) -> dict[str, float]:
        return {"mean": mean, "sd": 0.01}

    def v(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    sets = [{"set": s, "control": False, "balanced": {"accuracy": v(a), "recall": v(0.7)}}
            for s, a in (("spectral", 0.6), ("entropy", 0.8))]  # fmt: skip
    run = {"tokens": {"accuracy": m(0.99), "recall": m(0.98)}, "trajectories": {"accuracy": m(0.6), "recall": m(0.5)}}
    entry = {"table_4": run, "sets": sets, "chosen": "entropy"}
    levels = {"intra": entry, "inter": {**entry, "table_4": {"skipped": "3 are too few"}}}
    rows = page(table4, {"report": {"levels": levels}}, tmp_path)
    assert rows["intra"] == [
        "0.871 / 0.848", "0.990 ± 0.010 / 0.980 ± 0.010", "0.600 ± 0.010 / 0.500 ± 0.010",
        "0.600 [0.500, 0.700] / 0.700 [0.600, 0.800]", "0.800 [0.700, 0.900] / 0.700 [0.600, 0.800]",
    ]  # fmt: skip
    assert rows["inter"][1] == "not run: 3 are too few"
    arms = {
        n: {"seconds": s, "tokens": t} for n, s, t in (("plain", 10.0, 500), ("watched", 11.0, 500), ("free", 9.0, 400))
    }
    r = {"arms": arms, "watching": {"value": 0.1, "ci": [0.05, 0.15]}, "device": "cpu"}
    r |= {"free": {"value": -0.1, "ci": None}, "free_tokens": {"value": -0.2, "ci": [-0.3, -0.1]}}
    rows = page(table6, {"words": r}, tmp_path, "Qwen3-8B")
    equal, free = (rows[f"ours: words, {k}"] for k in ("equal tokens (watched, nobody intervenes)", "running free"))
    assert equal == ["10.0", "11.0", "+10.0 % [+5.0, +15.0]", "500 in both"]
    assert free == ["10.0", "9.0", "-10.0 %", "-20.0 % [-30.0, -10.0]"]
    assert rows["paper: GSM8K"] == ["347", "371", "+6.9 %", "not given"]


def test_votes_equal_an_explicit_count() -> None:
    """Every subset of 4 out of 5 samples, counted by hand in a loop."""
    from itertools import combinations

    answers = {"p0": ["1", "1", "2", "2", None], "p1": ["3", "4", "4", "5", "4"]}
    gold = {"p0": "2", "p1": "4"}
    problems = {p.id: p for p in make_problems(["arithmetic"], 2, "test", 0)}
    problems = dict(zip(answers, problems.values(), strict=True))
    rows = [
        Outcome(i, "arithmetic", 1, s, a == gold[i], 5.0, answer=a)
        for i, listed in answers.items()
        for s, a in enumerate(listed)
    ]
    found = votes(rows, problems, 0)
    assert list(found) == [4]
    for i, (name, listed) in enumerate(answers.items()):
        right = []
        for subset in combinations(listed, 4):
            known = [a for a in subset if a is not None]
            best = max(dict.fromkeys(known), key=known.count)  # the first of equals
            right.append(best == gold[name])
        assert found[4][i] == pytest.approx(np.mean(right))


@pytest.fixture
def recipe(checkpoint: Path, tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """``recipe(stage)``: a recipe of one stage on the random checkpoint, its settings filled in."""

    def make(stage: dict[str, Any]) -> str:
        fixed = {"model": str(checkpoint / "model"), "problems": str(checkpoint / "data" / "problems.jsonl")}
        fixed |= {"max_new_tokens": 32, "batch_size": 6, "resamples": 100, "temperature": 1.0, "device": "cpu"}
        command, settings = next((k, v) for k, v in stage.items() if k != "as")
        built = {**stage, command: {**fixed, "out": "run:it", **settings}}
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({"name": "r", "out": str(tmp_path / "run"), "stages": [built]}))
        return str(file)

    return make


def test_table2_end_to_end(recipe: Callable[..., str], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = recipe({"combine": {"arms": "minus", "samples": 1}, "as": "words"})
    done = reproduce(ReproduceConfig("table2", file))
    text = (tmp_path / "run" / "table2.md").read_text()
    assert done["file"] == str(tmp_path / "run" / "table2.md") and done["same"] is False
    assert text.strip() in capsys.readouterr().out
    assert "**Another model.**" in text and "R1-Distill-Qwen-32B" in text and "6 test problems; one sample each" in text
    full = next(a for a in read_json(tmp_path / "run" / "it" / "results.json")["arms"] if a["name"] == "all")
    assert f"{100 * full['accuracy']:.1f} [" in next(line for line in text.splitlines() if line.startswith("| full |"))
    from neureasoner.evaluation.combination import Combination

    monkeypatch.setattr(Combination, "run", lambda *a: pytest.fail("ran again"))
    assert reproduce(ReproduceConfig("table2", file, paper="R1-Distill-Llama-70B"))["paper"] == "R1-Distill-Llama-70B"


def test_figure5_end_to_end(recipe: Callable[..., str], tmp_path: Path) -> None:
    file = recipe({"evaluate": {"arms": ["vanilla", "full"], "samples": 5, "show_examples": 0}, "as": "words"})
    done = reproduce(ReproduceConfig("figure5", file))
    assert done["figures"] == ["figure5.png"] and (tmp_path / "run" / "figure5.png").stat().st_size > 5000
    text = (tmp_path / "run" / "figure5.md").read_text()
    assert "| 4 | " in text and "| 8 | " not in text and "5 samples each" in text
    results = read_json(tmp_path / "run" / "it" / "results.json")
    found = curves(tmp_path / "run" / "it", ["vanilla", "full"], results)
    values = [found["arms"][a][4]["accuracy"] for a in ("vanilla", "full")]
    assert found["difference"][4]["accuracy"] == pytest.approx(values[1] - values[0])
    few = [t for t in read_traces(tmp_path / "run" / "it" / "traces" / "full.jsonl") if t.meta["sample"] < 3]
    from neureasoner.traces import write_rows

    for name in ("vanilla", "full"):
        write_rows(tmp_path / "few" / "traces" / f"{name}.jsonl", few)
    with pytest.raises(UserError, match="needs at least 4 samples"):
        curves(tmp_path / "few", ["vanilla", "full"], results)


def test_what_cannot_be_reproduced_is_named_first(recipe: Callable[..., str], monkeypatch: Any) -> None:
    from neureasoner.evaluation.reproduce import reproduce as module

    monkeypatch.setattr(module, "run_recipe", lambda *a: pytest.fail("ran"))
    file = recipe({"combine": {"arms": "minus"}, "as": "words"})
    with pytest.raises(UserError, match="no stage `evaluate`, which table1 is written from"):
        reproduce(ReproduceConfig("table1", file))
    with pytest.raises(UserError, match="'table3' is not reproduced here; known: table1"):
        ReproduceConfig("table3", file)
    with pytest.raises(UserError, match="has no figures of 'Qwen3-8B'"):
        reproduce(ReproduceConfig("table2", file, paper="Qwen3-8B"))
    with pytest.raises(UserError, match="recipe 'nowhere' is not shipped"):
        reproduce(ReproduceConfig("table2", "nowhere"))


VARIANTS = {f"{level}_{w}": {level: "x"} for level in ("intra", "inter", "instance") for w in (2, 8)}


@pytest.mark.parametrize(
    ("table", "command", "settings", "said"),
    [
        ("figure5", "evaluate", {"arms": ["vanilla", "full"], "samples": 2}, "draws 2 samples .* needs at least 4"),
        ("figure5", "evaluate", {"arms": ["vanilla", "intra"], "samples": 64}, "has no arm full; name both"),
        ("figure5", "evaluate", {"arms": ["random_trigger"], "samples": 64}, "has no arm vanilla; name both"),
        ("table2", "combine", {"arms": "whole"}, "has no arm without_intra, without_inter, without_instance; it needs"),
        ("table2", "combine", {"parts": {"intra": ["intra"], "rest": ["inter", "instance"]}}, "no arm without_intra"),
        ("table7", "combine", {"arms": "whole"}, "has no arm intra_2, intra_8, .*instance_8; it needs probes"),
        ("table7", "combine", {"variants": dict(list(VARIANTS.items())[:-1])}, "has no arm instance_8; it needs"),
    ],
)
def test_what_a_stage_will_not_show_is_named_first(
    recipe: Callable[..., str], monkeypatch: Any, table: str, command: str, settings: dict[str, Any], said: str
) -> None:
    from neureasoner.evaluation.reproduce import reproduce as module

    monkeypatch.setattr(module, "run_recipe", lambda *a: pytest.fail("ran"))
    with pytest.raises(UserError, match=f"stage 'words'.* {said}"):
        reproduce(ReproduceConfig(table, recipe({command: settings, "as": "words"})))


def test_what_is_set_beside_the_recipe_counts(monkeypatch: Any) -> None:
    from neureasoner.evaluation.reproduce import reproduce as module

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "run_recipe", lambda *a: pytest.fail("ran"))
    with pytest.raises(UserError, match=r"stage 'generated problems' draws 2 samples .* at least 4: set samples=64"):
        reproduce(ReproduceConfig("figure5", set=["generated problems.samples=2"]))


@pytest.mark.parametrize(
    ("table", "command", "settings"),
    [
        ("figure5", "evaluate", {"arms": ["vanilla", "random_trigger"], "samples": 4}),
        ("figure5", "evaluate", {"samples": 64}),
        ("table2", "combine", {"arms": "factorial"}),
        ("table2", "combine", {"arms": "minus", "model": "run:made later"}),
        ("table7", "combine", {"arms": "whole", "variants": VARIANTS}),
    ],
)
def test_a_recipe_that_will_show_all_of_it_runs(
    recipe: Callable[..., str], monkeypatch: Any, table: str, command: str, settings: dict[str, Any]
) -> None:
    from neureasoner.evaluation.reproduce import reproduce as module

    monkeypatch.setattr(module, "run_recipe", lambda *a: pytest.fail("ran"))
    with pytest.raises(pytest.fail.Exception, match="ran"):
        reproduce(ReproduceConfig(table, recipe({command: settings, "as": "words"})))


def test_shipped_recipes_will_show_all_of_it(monkeypatch: Any) -> None:
    from neureasoner.evaluation.reproduce import reproduce as module

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "run_recipe", lambda *a: pytest.fail("ran"))
    for table in READS:
        with pytest.raises(pytest.fail.Exception, match="ran"):
            reproduce(ReproduceConfig(table))


def test_figure5_of_programs_is_refused_first(
    recipe: Callable[..., str], programs: tuple[str, str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    from neureasoner.evaluation.reproduce import reproduce as module

    monkeypatch.setattr(module, "run_recipe", lambda *a: pytest.fail("ran"))
    there = recipe({"evaluate": {"samples": 64, "problems": programs[0]}})
    with pytest.raises(UserError, match=r"stage 'evaluate': .*a\.jsonl asks for programs, which have no majority"):
        reproduce(ReproduceConfig("figure5", there))
    text = yaml.safe_load(Path(recipe({"evaluate": {"samples": 64, "problems": "run:lcb/problems.jsonl"}})).read_text())
    text["stages"].insert(0, {"evaluation benchmark": {"name": "livecodebench", "out": "run:lcb"}})
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match="asks for programs"):
        reproduce(ReproduceConfig("figure5", str(tmp_path / "made.yaml")))


def test_the_papers_own_model_is_said_to_be_it(recipe: Callable[..., str], tmp_path: Path) -> None:
    file = recipe({"combine": {"arms": "minus", "samples": 1}, "as": "MATH500"})
    reproduce(ReproduceConfig("table2", file))
    results = read_json(tmp_path / "run" / "it" / "results.json")
    write_json(
        tmp_path / "run" / "it" / "results.json", results | {"base": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B"}
    )
    done = reproduce(ReproduceConfig("table2", file))
    text = (tmp_path / "run" / "table2.md").read_text()
    assert done["same"] and done["paper"] == "R1-Distill-Llama-70B" and "the same model" in text
    assert "Another model" not in text
