"""Rules as weights: the baked model, saved and loaded by plain Transformers, has the hooked model's logits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.bake import bake, bake_into
from neureasoner.inference.bake_config import BakeConfig
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.rows import RowState
from neureasoner.inference.steered import SteeredModel
from neureasoner.inference.steering import Steering, SteeringRun
from neureasoner.models import fingerprint
from neureasoner.steps import Separators, StepSegmenter

D, HD = 32, 12
RNG = torch.Generator().manual_seed(5)


def vector(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


DIRECTIONS = {
    "residual": Direction({"residual:0": vector(D), "residual:1": vector(D)}, "positive = test"),
    "mlp_out": Direction({"mlp_out:1": vector(D)}, "positive = test"),
    "attn_out": Direction({"attn_out:0": vector(D)}, "positive = test"),
    "neuron": Direction(
        {"neuron:1[40,3]": vector(2) * 4}, "positive = test", info={"std": {"neuron:1[40,3]": [0.5, 3]}}
    ),
    "head": Direction({"head:1[2,0]": vector(2, HD) * 3}, "positive = test"),
}


def rule(action: str, direction: str | None, s: float = 0.6, site: tuple[str, ...] = (), **parts: Any) -> Rule:
    made = Action(set=0.0) if action == "set" else Action(**{action: True})  # type: ignore[arg-type]
    settings: dict[str, Any] = {"trigger": Trigger(always=True), "strength": Strength(s)} | parts
    return Rule(f"{action}-{direction}-{len(site)}", action=made, direction=direction, site=site, **settings)


ADDS = [rule("add", kind) for kind in ("residual", "mlp_out", "attn_out", "neuron", "head")]
ADDS.append(rule("add", "neuron", site=("neuron:1[40,3]",), strength=Strength(0.6, unit="sigma")))
EDITS = [rule("scale", kind) for kind in ("mlp_out", "attn_out", "neuron", "head")]
EDITS += [
    rule("scale", "attn_out", 1.0, ("head:0[1,3]",)),  # ThinkEdit
    rule("set", None, 1.0, ("neuron:0[1,2]",)),
    rule("set", None, 0.5, ("head:1[3]",)),
]
# Inputs, outputs and the residual of one projection, with the order mattering in each.
MIXED = [
    rule("add", "neuron", 1.0),
    rule("scale", "neuron", 0.7, ("neuron:1[40,3]",)),
    rule("add", "mlp_out", 0.5),
    rule("scale", "mlp_out", 0.9, ("mlp_out:1",)),
    rule("add", "residual", 0.4),
]


def logits(model: Any, tokenizer: Any, prompt: list[int], plan: Plan | None = None) -> torch.Tensor:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        if plan is None:
            return model(ids).logits
        row = RowState(0, StepSegmenter(Separators.of(tokenizer)), tokenizer)
        with SteeringRun(Steering(model, tokenizer, plan, DIRECTIONS), [row]).hooks():
            return model(ids).logits


def check(
    make: Any, tokenizer: Any, prompt: list[int], rules: list[Rule], folder: Path | None = None, **how: Any
) -> Any:
    """Baked equals hooked, and not the model as it was. Returns what stock code makes of the baked config and tensors;
    with ``folder`` it is saved and loaded by plain Transformers."""
    plan = Plan("t", tuple(rules), conflicts="order")
    want, before = logits(make(), tokenizer, prompt, plan), logits(make(), tokenizer, prompt)
    baked = bake_into(make(), tokenizer, plan, DIRECTIONS, **how)
    if folder is None:
        stock = type(baked)(baked.config).eval()
        stock.load_state_dict(baked.state_dict(), strict=True)
    else:
        baked.save_pretrained(folder)
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock, tokenizer, prompt), want, atol=2e-4, rtol=1e-4)
    assert (want - before).abs().max() > 0.01
    return stock


@pytest.mark.parametrize("one", [*ADDS, *EDITS], ids=lambda r: r.name)
def test_llama_takes_every_bakeable_rule(make_model, tokenizer, prompts, one):
    baked = check(lambda: make_model("llama"), tokenizer, prompts[1], [one])
    biased = {n.split(".")[-2] for n, p in baked.named_parameters() if n.endswith("bias") and bool(p.any())}
    into = (
        "o_proj"
        if {"attn_out", "head"} & {(one.direction or ""), *(s.split(":")[0] for s in one.site)}
        else "down_proj"
    )
    assert biased == ({into} if one.action.add else set()), "the biases that come along are 0"
    assert baked.config.mlp_bias == (one.action.add and into == "down_proj")
    assert baked.config.attention_bias == (one.action.add and into == "o_proj")


@pytest.mark.parametrize("rules", [MIXED, MIXED[::-1]], ids=["in order", "reversed"])
def test_rules_at_one_projection_are_baked_in_the_order_they_act(make_model, tokenizer, prompts, tmp_path, rules):
    check(lambda: make_model("llama", tie_word_embeddings=True), tokenizer, prompts[1], rules, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_qwen2_is_written_as_a_llama(make_model, tokenizer, prompts, tmp_path, tied):
    def make() -> Any:
        model = make_model(
            "qwen2", tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 700.0}
        )
        with torch.no_grad():
            for layer in model.model.layers:
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(layer.self_attn, name).bias.normal_(generator=torch.Generator().manual_seed(3))
        return model

    baked = check(make, tokenizer, prompts[1], [ADDS[0], EDITS[0]], tmp_path, as_llama=True)
    assert isinstance(baked, LlamaForCausalLM) and baked.config.rope_parameters["rope_theta"] == 700.0
    assert not any(bool(layer.mlp.up_proj.bias.any()) for layer in baked.model.layers)
    text = "add-residual-0: down_proj of a stock qwen2 has no bias to add to; set as_llama to write it as a Llama"
    with pytest.raises(UserError, match=text):
        bake_into(make(), tokenizer, Plan("t", (ADDS[0],)), DIRECTIONS)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
@pytest.mark.parametrize("one", EDITS, ids=lambda r: r.name)
def test_edits_without_bias_keep_the_architecture(make_model, tokenizer, prompts, arch, one):
    baked = check(lambda: make_model(arch), tokenizer, prompts[1], [one])
    biased = {n.split(".")[-2] for n, _ in baked.named_parameters() if n.endswith("bias")}
    assert baked.config.model_type == arch and biased == ({"q_proj", "k_proj", "v_proj"} if arch == "qwen2" else set())


REFUSED = {
    "its trigger is decode": rule("add", "residual", trigger=Trigger(decode=True)),
    "its trigger is boundary": rule("add", "residual", trigger=Trigger(boundary=True)),
    "its trigger is gate g": rule("add", "residual", trigger=Trigger(gate="g", always=True)),
    "its trigger is probe": rule("add", "residual", trigger=Trigger(probe="p")),
    "not a constant \\(schedule\\)": rule("add", "residual", strength=Strength(schedule=((0, 1.0), (5, 2.0)))),
    "not a constant \\(per_row\\)": rule("add", "residual", strength=Strength(per_row=True)),
    "not a constant \\(relative\\)": rule("add", "residual", strength=Strength(relative=True)),
    "not linear": rule("add_keep_norm", "mlp_out"),
    "earlier blocks wrote": rule("scale", "residual"),
    "only for neurons or heads, to 0": Rule("s", Trigger(always=True), Action(set=2.0), ("neuron:0[1]",)),
    "force acts on the text": Rule("f", Trigger(always=True), Action("<INTRA>")),
    "add_logits acts on the scores": Rule("l", Trigger(always=True), Action(add_logits={"<INTRA>": 1.0})),
}


@pytest.mark.parametrize("text", REFUSED)
def test_every_other_rule_is_refused_by_name_and_nothing_is_changed(make_model, tokenizer, text):
    model = make_model("llama")
    before = fingerprint(model)
    plan = Plan("t", (ADDS[0], replace(REFUSED[text], name="odd")), conflicts="order")
    with pytest.raises(UserError, match=f"plan t cannot be baked: odd: .*{text}") as error:
        bake_into(model, tokenizer, plan, DIRECTIONS)
    assert "add-residual" not in str(error.value) and fingerprint(model) == before
    assert not model.config.mlp_bias


def test_all_reasons_are_told_at_once(make_model, tokenizer):
    plan = Plan("t", (ADDS[0], rule("scale", "residual", site=("residual:0",))), conflicts="order")
    text = "scale-residual-1: .*earlier blocks wrote.*"
    with pytest.raises(UserError, match="norms on queries and keys") as error:
        bake_into(make_model("qwen3"), tokenizer, plan, DIRECTIONS)
    assert re.search(text, str(error.value)) and "add-residual-0: down_proj of a stock qwen3" in str(error.value)
    with pytest.raises(UserError, match="as_llama: a qwen3 is not written as a Llama"):
        bake_into(make_model("qwen3"), tokenizer, Plan("t", (EDITS[0],)), DIRECTIONS, as_llama=True)
    think = Plan("t", (EDITS[4], rule("scale", "attn_out", 0.2)), conflicts="order")
    with pytest.raises(UserError, match="scale-attn_out-1: rule scale-attn_out-0 writes the same o_proj"):
        bake_into(make_model("llama"), tokenizer, think, DIRECTIONS)


def test_the_stage_writes_a_plain_folder_that_generates_as_the_plan_does(make_model, tokenizer, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = DIRECTIONS["residual"]
    Direction(made.values, made.meaning, "m", fingerprint(model)).save(tmp_path / "directions/bias")
    plan = Plan("b", (Rule("bias", Trigger(always=True), Action(add=True), (), "directions/bias", Strength(0.5)),))
    plan.save(tmp_path / "plan.yaml")
    config = BakeConfig(str(tmp_path / "model"), str(tmp_path / "baked"), str(tmp_path / "plan.yaml"))
    summary = bake(config)
    assert summary["rules"] == ["bias"] and summary["architecture"] == "LlamaForCausalLM"
    assert bake(config) == summary, "done already"
    hooked = SteeredModel(model, tokenizer, Plan.load(tmp_path / "plan.yaml"))
    plain = SteeredModel.from_pretrained(tmp_path / "baked", Plan("none"), device="cpu")
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 30}
    questions = ["12 + 30?", "Tell me."]
    a, b = hooked.generate(questions, **settings), plain.generate(questions, **settings)
    assert [g.response_ids for g in a] == [g.response_ids for g in b]
    with pytest.raises(UserError, match=r"holds no plan.yaml; name a plan file"):
        bake(BakeConfig(str(tmp_path / "model"), str(tmp_path / "other")))
    with pytest.raises(UserError, match="key 'out' is empty"):
        BakeConfig("m", "")
