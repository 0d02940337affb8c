"""Nothing of a model folder's ``generation_config.json`` but its end tokens changes what is generated, or how."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.forward import cache_argument
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.steered import SteeredModel
from neureasoner.models import load

DENSE = Direction({"residual:0": 5 * torch.randn(32, generator=torch.Generator().manual_seed(3))}, "positive = test")
PLANS = {
    "plain": Plan("none"),
    "always": Plan("a", (Rule("r", Trigger(always=True), Action(add=True), direction="d"),)),
    "decode": Plan("d", (Rule("r", Trigger(decode=True), Action(add=True), direction="d"),)),
    "forced": Plan("f", (Rule("f", Trigger(random=0.4, cooldown=0), Action("<INTRA>")),)),
}
LEFT = [
    {"repetition_penalty": 1.8}, {"top_k": 1, "do_sample": True}, {"min_p": 0.9, "do_sample": True},
    {"typical_p": 0.05, "do_sample": True}, {"epsilon_cutoff": 0.5, "do_sample": True}, {"eta_cutoff": 0.5},
    {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(40, 200))}, {"begin_suppress_tokens": [5, 6]},
    {"bad_words_ids": [[i] for i in range(40, 90)]}, {"sequence_bias": [[[44], 30.0]]}, {"max_time": 1e-9},
    {"exponential_decay_length_penalty": [2, 5.0]}, {"forced_eos_token_id": 2}, {"forced_bos_token_id": 7},
    {"encoder_repetition_penalty": 2.0}, {"stop_strings": ["a", "\n"]}, {"return_dict_in_generate": True},
    {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3},
    {"guidance_scale": 2.0}, {"max_length": 3}, {"min_length": 60}, {"min_new_tokens": 60}, {"output_scores": True},
    {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"temperature": 9.0},
    {"renormalize_logits": True}, {"remove_invalid_values": True}, {"token_healing": True},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m") / "model"
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def leave(folder: Path, left: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0} | left))


def answers(folder: Path, left: dict[str, Any], plan: Plan) -> list[Any]:
    leave(folder, left)
    model, tokenizer = load(str(folder), device="cpu")
    steered, done = SteeredModel(model, tokenizer, plan, directions={"d": DENSE}), []
    for temperature in (0.0, 0.9):
        how = {"max_new_tokens": 16, "temperature": temperature, "seed": 4}
        done += [(g.response_ids, g.events) for g in steered.generate(["12 + 30?", "Who?"], **how)]
    return done


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, list[Any]]:
    return {name: answers(folder, {}, plan) for name, plan in PLANS.items()}


@pytest.mark.parametrize("left", LEFT, ids=lambda x: next(iter(x)))
def test_settings_left_in_the_folder_change_nothing(
    folder: Path, reference: dict[str, list[Any]], left: dict[str, Any]
) -> None:
    for name in ("plain", "decode"):
        assert answers(folder, left, PLANS[name]) == reference[name]


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_saved_without_a_cache_is_steered_alike(
    folder: Path, reference: dict[str, list[Any]], plan: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    try:
        assert answers(folder, {"use_cache": False, "prefill_chunk_size": 3}, PLANS[plan]) == reference[plan]
    finally:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("how", [{"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
def test_stock_generate_without_a_cache_is_refused_under_a_rule_that_counts_tokens(
    folder: Path, how: dict[str, Any], stock_config: Callable[..., Any]
) -> None:
    """There ``decode`` would miss what is read again, or act on each piece of a prompt."""
    leave(folder, {})
    model, tokenizer = load(str(folder), device="cpu")
    ids = tokenizer.encode("12 + 30? Who is it?")
    for name in ("decode", "always"):
        steered = SteeredModel(model, tokenizer, PLANS[name], directions={"d": DENSE})
        with steered.controller().watch([ids]) as watch:
            run = lambda: model.generate(  # noqa: E731
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                generation_config=stock_config(model, tokenizer, 6, **how),
                logits_processor=[watch],
                **({cache_argument(model): DynamicCache()} if "prefill_chunk_size" in how else {}),
            )
            if name == "always" and "use_cache" not in how:
                assert run().shape[1] == len(ids) + 6
            else:
                with pytest.raises(RuntimeError, match=f"{next(iter(how))}"):
                    run()


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [("do_sample", False, "; temperature=0 is"), ("max_length", 9, "use max_new_tokens"), ("num_beams", 2, "; beam"),
     ("repetition_penalty", 1.2, ""), ("stop_strings", ["a"], ""), ("input_ids", [[5]], "prompts")],
)  # fmt: skip
def test_an_argument_that_is_not_taken_is_named(folder: Path, name: str, value: Any, instead: str) -> None:
    model, tokenizer = load(str(folder), device="cpu")
    with pytest.raises(UserError, match=f"'{name}'.*{instead}"):
        SteeredModel(model, tokenizer, PLANS["plain"]).generate(["a"], **{name: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", None), ("seed", 1.5), ("seed", "1"), ("batch_size", None), ("batch_size", 2.5),
     ("num_return_sequences", 2.0), ("num_return_sequences", None)],
)  # fmt: skip
def test_a_setting_of_another_type_is_named(folder: Path, key: str, value: Any) -> None:
    model, tokenizer = load(str(folder), device="cpu")
    with pytest.raises(UserError, match=f"{key} .*{value!r}"):
        SteeredModel(model, tokenizer, PLANS["plain"]).generate(["a"], **{key: value})


def test_prompts_are_checked_before_the_first_is_answered(folder: Path) -> None:
    model, tokenizer = load(str(folder), device="cpu")
    asked: list[int] = []
    with pytest.raises(UserError, match="prompt 2 has token id 99999"):
        SteeredModel(model, tokenizer, PLANS["plain"]).generate(
            ["a", "b", [99999]], batch_size=1, max_new_tokens=2, progress=lambda done, _: asked.append(done)
        )
    assert not asked


@pytest.mark.parametrize("given", [2.0, ["a", "b"], [1.0], None, iter([1.0, 2.0]), [[1.0, 2.0]]])
def test_strengths_that_are_no_numbers_a_row_are_named(folder: Path, given: Any) -> None:
    model, tokenizer = load(str(folder), device="cpu")
    rule = Rule("r", Trigger(decode=True), Action(add=True), direction="d", strength=Strength(per_row=True))
    steered = SteeredModel(model, tokenizer, Plan("x", (rule,)), directions={"d": DENSE})
    with pytest.raises(UserError, match="rule r: 2 finite"):
        steered.generate(["a", "b"], max_new_tokens=2, strengths={"r": given})
    with pytest.raises(UserError, match="rule 'r'"):
        SteeredModel(model, tokenizer, PLANS["plain"]).generate(["a"], strengths={"r": given})


def test_one_site_to_record_may_be_bare(folder: Path) -> None:
    model, tokenizer = load(str(folder), device="cpu")
    [one] = SteeredModel(model, tokenizer, PLANS["plain"]).generate("a", max_new_tokens=3, record="residual:1")
    assert one.series["residual:1"].shape == (len(one.response_ids) - 1, 32)


def test_several_responses_a_prompt(folder: Path) -> None:
    """Those of the prompts written out; a greedy one twice is the same twice."""
    model, tokenizer = load(str(folder), device="cpu")
    steered = SteeredModel(model, tokenizer, PLANS["forced"])
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "batch_size": 3}
    got = [g.response_ids for g in steered.generate(["a", "b"], num_return_sequences=2, **how)]
    assert got == [g.response_ids for g in steered.generate(["a", "a", "b", "b"], **how)] and got[0] != got[1]


def test_top_k_and_min_p_cut(folder: Path) -> None:
    model, tokenizer = load(str(folder), device="cpu")
    steered = SteeredModel(model, tokenizer, PLANS["plain"])
    greedy = [g.response_ids for g in steered.generate(["a", "b"], temperature=0, max_new_tokens=9)]
    for how in ({"top_k": 1}, {"min_p": 0.999999}):
        assert [g.response_ids for g in steered.generate(["a", "b"], max_new_tokens=9, **how)] == greedy
    for key, value in (("top_k", -1), ("min_p", 1.0), ("temperature", float("nan")), ("top_p", 0.0)):
        with pytest.raises(UserError, match=key):
            steered.generate(["a"], **{key: value})
