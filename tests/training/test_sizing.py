"""Memory by formula: against real models' counts, a real run's gradients and optimizer, and saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.training import sft
from neureasoner.training.sizing import GIB, needs, shape, shape_of, sizing
from neureasoner.training.tools_config import LAYOUTS, PAPER_MODELS, SizingConfig

# Parameter counts as the Hub shows them (the sum of the tensors in each checkpoint's index).
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "Qwen3-32B": 32_762_123_264,
    "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_papers_models_have_their_published_count(name: str) -> None:
    """And a real model of this shape, built without memory, has it too."""
    import transformers

    size = shape(f"somebody/{name}")
    assert size.parameters() == PUBLISHED[name]
    kind = "Llama" if "Llama" in name else "Qwen3" if "Qwen3" in name else "Qwen2"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.neurons, head_dim=size.head_dim,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        tie_word_embeddings=size.tied,
    )  # fmt: skip
    assert shape_of(config) == size
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    assert sum(p.numel() for p in model.parameters()) == size.parameters()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_models_are_counted_exactly(make_model: Callable[..., Any], arch: str, tied: bool) -> None:
    more = {"head_dim": 8} if arch == "qwen2" else {}
    model = make_model(arch=arch, tie_word_embeddings=tied, **more)
    assert shape_of(model.config).parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_blocks_activations_are_those_that_backward_keeps(make_model: Callable[..., Any], arch: str) -> None:
    model = make_model(arch=arch, **({"head_dim": 8} if arch == "qwen2" else {}))
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
    held: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        held.append(x)  # so that no address is used twice
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(1, 200, 32, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(200)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.model.layers[0](x, position_embeddings=positions, attention_mask=None)
    measured = sum(size for place, size in kept.items() if place not in own)
    assert 4 * shape_of(model.config).block_activations(200) == measured


@pytest.mark.parametrize("lora", [0, 4])
def test_gradients_and_optimizer_of_a_run(model_folder: Path, train_file: Path, tmp_path: Path, lora: int) -> None:
    from transformers import TrainerCallback

    seen: dict[str, int] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["gradients"] = sum(p.grad.nbytes for p in kwargs["model"].parameters() if p.grad is not None)

    argv = ["--model", model_folder, "--data", train_file, "--out", tmp_path / "out", "--batch_size", 4]
    argv += ["--lora", lora, "--max_steps", 1, "--use_cpu", "true", "--bf16", "false", "--save_strategy", "no"]
    argv += ["--warmup_steps", 0]
    trainer, _ = sft.build(*sft.parse([str(a) for a in argv]), [Look()])
    trainer.train()
    moments = sum(v.nbytes for s in trainer.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg"))
    config = SizingConfig(devices=1, lora=lora)
    base = trainer.model.get_base_model() if lora else trainer.model
    found = needs(shape_of(base.config), "ddp", config)
    assert (seen["gradients"], moments) == (found["gradients"], found["optimizer"])
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert found["weights"] - (2 * shape_of(base.config).parameters() if lora else 0) == trained


def test_layouts_share_what_they_say() -> None:
    size, n = shape("Qwen3-8B"), PUBLISHED["Qwen3-8B"]
    found = {k: needs(size, k, SizingConfig(devices=8)) for k in LAYOUTS}
    state = {k: sum(v[p] for p in ("weights", "gradients", "optimizer")) for k, v in found.items()}
    assert state == pytest.approx(
        {"ddp": 16 * n, "zero2": (2 + 14 / 8) * n, "zero3": 2 * n, "fsdp2": 2 * n, "zero3_offload": 0}
    )
    assert found["zero3_offload"]["host"] == 16 * n and found["zero3"]["host"] == 0
    more = needs(size, "zero3", SizingConfig(devices=8, checkpointing=False))["activations"]
    assert more > 10 * found["zero3"]["activations"]
    assert all(v["total"] == pytest.approx(1.1 * sum(x for k, x in v.items() if k not in ("total", "host")))
               for v in found.values())  # fmt: skip


def test_command_prints_a_table_and_bad_input_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = sizing(SizingConfig(models=["Qwen3-8B", "tiny"], layouts=["ddp", "zero3"]))
    text = capsys.readouterr().out
    assert "8.19 B" in text and "✗" in text and "zero3" in text
    wanted = round(needs(shape("Qwen3-8B"), "zero3", SizingConfig())["total"] / GIB, 2)
    assert result["Qwen3-8B"]["zero3"]["total"] == wanted and set(result["tiny"]) == {"ddp", "zero3"}
    with pytest.raises(UserError, match="layout 'zero9'"):
        SizingConfig(layouts=["zero9"])
    with pytest.raises(UserError, match="devices must be positive"):
        SizingConfig(devices=0)
    with pytest.raises(UserError, match="no such model folder"):
        shape("./missing")

    class Other:
        model_type = "mamba"

    with pytest.raises(UserError, match="'mamba'"):
        shape_of(Other())
