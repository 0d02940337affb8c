"""Bias vectors: what they add, what trains, that they stay float32, and the way through a Direction and a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.models import fingerprint
from neureasoner.training.vectors import BiasVectors, bias_vectors, direction_of, stacked

IDS = torch.tensor([[5, 9, 2, 7, 11, 3], [4, 4, 8, 1, 6, 2]])


def drawn(seed: int = 1, scale: float = 0.5, shape: tuple[int, int] = (2, 32)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_biased_down_proj(model: Any, values: torch.Tensor) -> Any:
    """The oracle: the same model whose down projections have a bias (core.md §4.1)."""
    model = copy.deepcopy(model)
    for layer, value in zip(model.model.layers, values, strict=True):
        old = layer.mlp.down_proj
        new = torch.nn.Linear(old.in_features, old.out_features, bias=True)
        new.weight.data.copy_(old.weight)
        new.bias.data.copy_(value)
        layer.mlp.down_proj = new
    return model


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_equals_a_bias_of_down_proj_at_every_position(make_model: Callable[..., Any], arch: str) -> None:
    model, values = make_model(arch), drawn()
    with torch.no_grad():
        before = model(IDS).logits
        wanted = with_biased_down_proj(model, values)(IDS).logits
        with bias_vectors(model, values):
            got = model(IDS).logits
        after = model(IDS).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (got - before).abs().amax(-1).min() > 1e-3, "every position moves, the first too"
    assert torch.equal(before, after), "detached without a trace"


def test_zeros_change_nothing_and_a_copy_adds_its_own(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with torch.no_grad():
        before = model(IDS).logits
        vectors = BiasVectors(model)
        assert torch.equal(model(IDS).logits, before)
        other = copy.deepcopy(model)
        vectors.set(drawn())
        assert torch.equal(other(IDS).logits, before)
        assert not torch.equal(model(IDS).logits, before)


def test_only_the_vectors_train_and_their_gradient_is_right(make_model: Callable[..., Any]) -> None:
    model, values = make_model(), drawn()
    vectors = BiasVectors(model, values)
    vectors.freeze_rest()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 and sum(p.numel() for p in trained.values()) == 2 * 32
    twin = with_biased_down_proj(model, values)  # deep copy: it has the vectors too, so its biases replace them
    for layer in twin.model.layers:
        layer.bias_vector.bias.data.zero_()
        layer.mlp.down_proj.requires_grad_(True)
    for one in (model, twin):
        one(IDS).logits.pow(2).mean().backward()
    for vector, layer in zip(vectors.parameters, twin.model.layers, strict=True):
        torch.testing.assert_close(vector.grad, layer.mlp.down_proj.bias.grad, atol=1e-6, rtol=1e-4)
        assert vector.grad is not None and vector.grad.norm() > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_trainer_never_decays_them(make_model: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = make_model()
    vectors = BiasVectors(model)
    vectors.freeze_rest()
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.5, use_cpu=True, report_to="none")
    optimizer = Trainer(model=model, args=arguments).create_optimizer()
    groups = {g["weight_decay"]: g["params"] for g in optimizer.param_groups}
    assert not groups[0.5] and [id(p) for p in groups[0.0]] == [id(p) for p in vectors.parameters]


def test_stay_float32_in_a_bfloat16_model(make_model: Callable[..., Any]) -> None:
    fine = torch.full((2, 32), 0.5 + 1e-4)  # bfloat16 would make it 0.5
    model = make_model()
    vectors = BiasVectors(model, fine)
    vectors.freeze_rest()
    model.to(torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.requires_grad for p in vectors.parameters)
    assert torch.equal(vectors.stack(), fine)
    out = model(IDS).logits
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in vectors.parameters)
    loaded = BiasVectors(make_model().to(torch.bfloat16), fine)
    assert torch.equal(loaded.stack(), fine)


def test_through_a_direction_on_disk(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, values = make_model(), drawn()
    made = direction_of(values, "positive = as trained", "m", fingerprint(model), {"steps": 3})
    made.save(tmp_path / "d")
    loaded = Direction.load(tmp_path / "d")
    assert loaded.sites == ["residual:0", "residual:1"] and loaded.info["steps"] == 3
    assert torch.equal(stacked(loaded, 2), values)
    assert torch.equal(torch.stack(list(loaded.values.values())), values)
    with torch.no_grad():
        with bias_vectors(model, values):
            wanted = model(IDS).logits
        with bias_vectors(model, loaded):
            assert torch.equal(model(IDS).logits, wanted)
    with pytest.raises(UserError, match="made on model 'm'"), bias_vectors(make_model(seed=5), loaded):
        pass


def test_the_hook_equals_the_plan(make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The same tokens, greedy, from a model with vectors and from the shipped plan with their direction."""
    import shutil

    from neureasoner.inference.plan import Plan
    from neureasoner.inference.steered import SteeredModel

    shipped = Path(__file__).parents[2] / "configs" / "plans" / "bias_only.yaml"
    model, values = make_model(), drawn(scale=2.0)
    direction_of(values, "positive = as trained", "m", fingerprint(model)).save(tmp_path / "directions" / "bias_only")
    plan = Plan.load(shutil.copy(shipped, tmp_path / "plan.yaml"))
    prompt = [5, 9, 2, 7]
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with bias_vectors(model, values):
        wanted = model.generate(torch.tensor([prompt]), **how)[0, 4:].tolist()
    plain = model.generate(torch.tensor([prompt]), **how)[0, 4:].tolist()
    steered = SteeredModel(model, tiny_tokenizer, plan, {})
    (got,) = steered.generate([prompt], max_new_tokens=12, temperature=0)
    assert wanted != plain
    assert got.response_ids == wanted[: len(got.response_ids)] and len(got.response_ids) > 2


@pytest.mark.parametrize(("arch", "as_llama"), [("llama", False), ("qwen2", True)])
def test_the_hook_equals_the_baked_model_read_by_plain_transformers(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, arch: str, as_llama: bool
) -> None:
    from transformers import AutoModelForCausalLM

    from neureasoner.inference.bake import bake_into
    from neureasoner.inference.plan import Plan

    shipped = Path(__file__).parents[2] / "configs" / "plans" / "bias_only.yaml"
    model, values = make_model(arch), drawn(scale=2.0)
    with torch.no_grad(), bias_vectors(model, values):
        wanted = model(IDS).logits
    directions = {"directions/bias_only": direction_of(values, "positive = as trained")}
    baked = bake_into(model, tiny_tokenizer, Plan.load(shipped), directions, as_llama=as_llama)
    baked.save_pretrained(tmp_path / "baked")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    assert type(plain).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_blocks_a_direction_does_not_name_get_zeros() -> None:
    one = Direction({"residual:1": torch.ones(4)}, "positive = more")
    assert torch.equal(stacked(one, 3), torch.tensor([[0.0] * 4, [1.0] * 4, [0.0] * 4]))
    with pytest.raises(UserError, match="no residual:LAYER"):
        stacked(Direction({"mlp_out:0": torch.ones(4)}, "positive = more"), 2)
    with pytest.raises(UserError, match="has 1 blocks"):
        stacked(one, 1)


def test_refusals(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with pytest.raises(UserError, match=r"\[2, 32\], got \[3, 32\]"):
        BiasVectors(model, torch.zeros(3, 32))
    with pytest.raises(UserError, match="NaN or infinity"):
        BiasVectors(model, torch.full((2, 32), float("nan")))
    vectors = BiasVectors(model)
    with pytest.raises(UserError, match="already"):
        BiasVectors(model)
    vectors.detach()
    BiasVectors(model)
    with pytest.raises(UserError, match="not supported"):
        BiasVectors(torch.nn.Linear(2, 2))
