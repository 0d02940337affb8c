"""``training bias-table``: arms are the models they say, differences are paired, controls are chosen on validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.artifacts import write_json
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.errors import UserError
from neureasoner.evaluation import bias_table as module
from neureasoner.evaluation.bias_table import BASE, Arm, arm_model, bias_table, first_tokens, markdown
from neureasoner.models import fingerprint, load
from neureasoner.traces import Problem, write_rows
from neureasoner.training.bias_config import BiasTableConfig
from neureasoner.training.policy_measure import Answered, measure
from neureasoner.training.vectors import bias_vectors, direction_of

COST = {"trained_parameters": 64, "optimizer_bytes": 520, "learning_rate": 0.1, "steps": 3}
COST |= {"seconds": {"step": 9.87, "sampling": 5.0}}  # type: ignore[dict-item]
IDS = torch.tensor([[5, 9, 2, 7]])


@pytest.fixture
def base(tmp_path: Path, make_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def runs(base: Path, tmp_path: Path, make_model: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, str]:
    """A vectors run and a full run, as `training bias` leaves them."""
    model, _ = load(str(base), device="cpu")
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(2)) * 3
    direction_of(values, "positive = test", "m", fingerprint(model)).save(tmp_path / "v" / "direction")
    make_model(seed=8).save_pretrained(tmp_path / "f" / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "f" / "model")
    for name, arm in (("v", "vectors"), ("f", "full")):
        write_json(tmp_path / name / "stage.json", {"name": "training bias", "summary": {"arm": arm, **COST}})
    return {"vectors": str(tmp_path / "v"), "full": str(tmp_path / "f")}


@pytest.fixture
def config(base: Path, runs: dict[str, str], tmp_path: Path) -> Callable[..., BiasTableConfig]:
    write_rows(tmp_path / "test.jsonl", make_problems(["arithmetic", "words"], 6, "test", 3))
    write_rows(tmp_path / "held.jsonl", make_problems(["arithmetic"], 3, "validation", 4))

    def make(**changes: Any) -> BiasTableConfig:
        settings: dict[str, Any] = {"model": str(base), "problems": str(tmp_path / "test.jsonl"), "arms": runs}
        settings |= {"out": str(tmp_path / "out"), "max_new_tokens": 5, "resamples": 200, "batch_size": 4}
        return BiasTableConfig(**(settings | changes))

    return make


def test_arms_are_what_they_say(base: Path, runs: dict[str, str], make_model: Callable[..., Any]) -> None:
    plain, _ = load(str(base), device="cpu")
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(2)) * 3
    with torch.no_grad(), bias_vectors(plain, values):
        wanted = {"vectors": plain(IDS).logits}
    with torch.no_grad():
        wanted |= {BASE: plain(IDS).logits, "full": make_model(seed=8)(IDS).logits}
        for name in (BASE, "vectors", "full"):
            with arm_model(str(base), runs.get(name, ""), "cpu") as (model, tokenizer):
                torch.testing.assert_close(model(IDS).logits, wanted[name])
                assert tokenizer.pad_token_id is not None


def test_first_tokens_are_the_likeliest(base: Path, make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    from neureasoner.prompts import prompt_text

    problems = make_problems(["arithmetic", "words"], 5, "validation", 4)
    model = make_model()
    total = torch.zeros(model.config.vocab_size)
    with torch.no_grad():
        for p in problems:  # oracle: one at a time, no padding
            ids = tiny_tokenizer(prompt_text(tiny_tokenizer, p.question), return_tensors="pt").input_ids
            total += model(ids).logits[0, -1].softmax(-1)
    total[tiny_tokenizer.all_special_ids] = 0
    wanted = [tiny_tokenizer.decode([i]) for i in total[: len(tiny_tokenizer)].topk(4).indices.tolist()]
    assert first_tokens(model, tiny_tokenizer, problems, "{question}", 4) == wanted


def test_measure_counts_the_prefix_and_cuts_off(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    problems = make_problems(["words"], 3, "test", 1)
    how: dict[str, Any] = {"samples": 2, "temperature": 1.0, "max_new_tokens": 4, "batch_size": 6, "seed": 0}
    answers = measure(make_model(), tiny_tokenizer, problems, **how)
    assert [(a.problem, a.sample) for a in answers] == [(p.id, s) for p in problems for s in range(2)]
    assert all(a.truncated and not a.correct and a.tokens == 4 for a in answers)


def test_the_prefix_begins_the_response(
    make_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neureasoner.prompts import prompt_text
    from neureasoner.sampler import Drawn
    from neureasoner.training import policy_measure

    problem = Problem("s", "arithmetic", 1, "Calculate 3 + 4 * 2.", "11")
    seen: list[list[int]] = []

    def fixed(model: Any, prompts: list[list[int]], *_: Any, **__: Any) -> list[Drawn]:
        seen.extend(prompts)
        return [Drawn(tiny_tokenizer("{11}<|im_end|>").input_ids, True) for _ in prompts]

    monkeypatch.setattr(policy_measure, "sample_all", fixed)
    begun = "</think> \\boxed"
    how: dict[str, Any] = {"samples": 1, "temperature": 0.0, "max_new_tokens": 9, "batch_size": 2, "seed": 0}
    (answer,) = measure(make_model(), tiny_tokenizer, [problem], prefix=begun, template="Now: {question}", **how)
    text = prompt_text(tiny_tokenizer, "Now: Calculate 3 + 4 * 2.")
    assert seen == [tiny_tokenizer(text).input_ids + tiny_tokenizer(begun).input_ids]
    n = len(tiny_tokenizer(begun).input_ids) + len(tiny_tokenizer("{11}<|im_end|>").input_ids)
    assert answer == Answered("s", "arithmetic", 1, 0, True, n, False)


def test_the_table(
    config: Callable[..., BiasTableConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: dict[str, str]
) -> None:
    """With known answers: the figures are those of NumPy, the prefix the one that did best on validation problems."""
    calls: list[tuple[str, str, float, int]] = []
    fails: set[str] = {"full"}

    def known(self: Any, model: Any, tokenizer: Any, arm: Arm, problems: Any, temperature: float, tag: str) -> Any:
        calls.append((tag, arm.name, temperature, len(problems)))
        if arm.name in fails:
            fails.clear()
            raise KeyboardInterrupt
        solved = {BASE: 1, "vectors": 4, "full": 0, "template_only": 2, "first_token": 3, "prefix1": 2}
        n = solved.get(arm.name, 1)
        return [
            {"problem": p.id, "family": p.family, "difficulty": p.difficulty, "sample": 0, "correct": i < n}
            | {"tokens": 10 + i, "truncated": i == 5}
            for i, p in enumerate(problems)
        ]

    monkeypatch.setattr(module.Table, "_measure", known)
    settings = config(control_template="Think. {question}", prefixes=3, validation=str(tmp_path / "held.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        bias_table(settings)
    before = len(calls)
    bias_table(settings)
    assert [c[1] for c in calls[before:]] == ["full", "full"], "only what was not measured yet"
    assert [c for c in calls if c[0] == "validation"] == [("validation", f"prefix{i}", 1.0, 3) for i in range(3)]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["arms"]) == [BASE, "template_only", "first_token", "vectors", "full"]
    assert found["prefix"]["chosen"] == list(found["prefix"]["validation"])[1] == found["arms"]["first_token"]["prefix"]
    row = found["arms"]["vectors"]["temperatures"]["1"]
    assert row["accuracy"] == pytest.approx(4 / 6) and row["tokens_mean"] == pytest.approx(12.5)
    assert row["truncated"] == pytest.approx(1 / 6)
    assert row["against_base"]["accuracy_delta"] == pytest.approx(0.5)
    low, high = row["against_base"]["accuracy_delta_ci"]
    assert 0 <= low < 0.5 < high <= 1
    assert {f: v["n_problems"] for f, v in row["families"].items()} == {"arithmetic": 3, "words": 3}
    assert found["arms"]["vectors"]["trained_parameters"] == 64 and found["arms"][BASE]["steps"] is None
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| vectors | 64 | 520 B | 0.1 | 3 | 9.9 | 5.0 |" in text and "+50.0 [" in text and "greedy" in text
    assert text == markdown(found) and (tmp_path / "out" / "accuracy.png").stat().st_size > 1000


def test_it_runs_for_real(config: Callable[..., BiasTableConfig], tmp_path: Path) -> None:
    settings = config(temperatures=[0.0], prefixes=1, validation=str(tmp_path / "held.jsonl"), kinds=["arithmetic:1"])
    summary = bias_table(settings)
    assert summary["problems"] == 1 and set(summary["accuracy"]) == {BASE, "first_token", "vectors", "full"}
    assert bias_table(settings) == summary


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "key 'arms' is empty"),
        ({"arms": {"base": "x"}}, "'base' is taken by a control"),
        ({"temperatures": []}, "must hold numbers from 0 up"),
        ({"prefixes": 2}, "key 'validation' is missing"),
        ({"control_template": "Think."}, "'control_template' must hold {question}"),
        ({"samples": 0}, "'samples' must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant(config: Callable[..., BiasTableConfig], changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_runs_that_do_not_fit(config: Callable[..., BiasTableConfig], runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished `training bias` run"):
        bias_table(config(arms={"vectors": str(tmp_path / "none")}))
    only_full = {"full": runs["full"]}
    with pytest.raises(UserError, match="no arm trains vectors"):
        bias_table(config(arms=only_full, prefixes=1, validation=str(tmp_path / "held.jsonl")))
    with pytest.raises(UserError, match="holds no problem of countdown:1"):
        bias_table(config(kinds=["countdown:1"], out=str(tmp_path / "o2")))
    swapped = config(model=runs["full"] + "/model", out=str(tmp_path / "o3"), temperatures=[0.0])
    with pytest.raises(UserError, match="was made on model 'm'"):
        bias_table(swapped)
