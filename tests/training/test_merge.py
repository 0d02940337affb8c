"""LoRA: what it trains and saves, an interrupted run, and the plain checkpoint that merging makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA
from neureasoner.training import sft
from neureasoner.training.merge import merge
from neureasoner.training.tools_config import MergeConfig


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options: dict[str, Any] = {"model": model, "data": data, "out": out, "batch_size": 4, "learning_rate": 1e-2}
    options |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "lora": 4, "warmup_steps": 0}
    return [str(x) for k, v in options.items() for x in (f"--{k}", v)] + list(more)


@pytest.fixture
def make_folder(tmp_path: Path, make_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Path]:
    def make(**settings: Any) -> Path:
        folder = tmp_path / "base"
        make_model(**settings).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


def logits_by_hand(base: Path, adapter: Path, ids: list[int]) -> torch.Tensor:
    """The adapted model from its files alone: W + scale · B A on every linear layer, new rows put into the matrices."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    parts = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    size = model.config.vocab_size
    model.resize_token_embeddings(max(size, max(ids) + 1), mean_resizing=False)
    with torch.no_grad():  # Qwen2's tokenizer class brings a token that the matrix of this test lacks
        for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            matrix[size:] = matrix[:size].mean(0)
    assert sum(p.numel() for p in parts.values()) < 10_000, "no whole matrix is in the adapter"
    weights, used = dict(model.named_parameters(remove_duplicate=False)), 0
    with torch.no_grad():
        for key, a in parts.items():
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                b = parts[key.replace("lora_A", "lora_B")]
                weights[name] += config["lora_alpha"] / config["r"] * b @ a
                used += 1
        for module, rows in config["trainable_token_indices"].items():
            name = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}[module]
            found = [v for k, v in parts.items() if f"{module}.token_adapter" in k]
            assert len(found) == 1, "the rows are saved"
            weights[f"{name}.weight"][rows] = found[0]
        assert used == 7 * len(model.model.layers), "every linear layer is adapted"
        return model.eval()(torch.tensor([ids])).logits


@pytest.mark.parametrize(
    ("arch", "tied", "spare"), [("qwen3", True, 5), ("qwen3", False, 5), ("llama", False, 0), ("qwen2", True, 0)]
)
def test_merged_model_equals_adapter(
    make_folder: Callable[..., Path], train_file: Path, tmp_path: Path, tiny_tokenizer: Any, arch: str, tied: bool,
    spare: int,
) -> None:  # fmt: skip
    from neureasoner.models import load

    base = make_folder(arch=arch, tie_word_embeddings=tied, vocab_size=len(tiny_tokenizer) + spare)
    out, plain = tmp_path / "lora", tmp_path / "plain"
    summary = sft.main(*sft.parse(arguments(base, train_file, out)))
    assert not (out / "model.safetensors").exists() and summary["loss"][1] < summary["loss"][0]
    ids = [i for t in (INTRA, INTER) for i in summary["triggers"][t]]
    text = tiny_tokenizer("Again: 3 + 4 = 7.").input_ids
    text = [*text, ids[0], *text, ids[1], *text]
    wanted = logits_by_hand(base, out, text)

    told = merge(MergeConfig(str(out), str(plain)))
    assert told["triggers"] == summary["triggers"] and told["dtype"] == "float32"
    model, tokenizer = load(str(plain))
    got = model(torch.tensor([text])).logits
    torch.testing.assert_close(got[..., ids], wanted[..., ids], atol=1e-3, rtol=0)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert {INTRA, INTER} <= set(tokenizer.all_special_tokens)
    assert not list(plain.glob("adapter*")) and (plain / "stage.json").is_file()
    assert merge(MergeConfig(str(out), str(plain))) == told

    # only the triggers' rows moved, and they did move, in both matrices
    first, _ = load(str(base))
    known = len(tiny_tokenizer)
    for one, two in (
        (first.get_input_embeddings(), model.get_input_embeddings()),
        (first.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert torch.equal(one.weight[:known], two.weight[:known])
        assert (two.weight[ids] - one.weight[:known].mean(0)).abs().amax(1).gt(1e-3).all()


def test_a_killed_adapter_run_goes_on_to_the_same_weights(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    more = ["--lora_dropout", "0.1"]
    sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "whole", *more)))
    with pytest.raises(KeyboardInterrupt):
        sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "killed", *more)), [Stop()])
    sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "killed", *more)))
    one, two = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "killed"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_bad_merges_are_named(
    model_folder: Path, make_folder: Callable[..., Path], train_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--adapter"):
        MergeConfig()
    with pytest.raises(UserError, match="plain model, nothing is to be merged"):
        merge(MergeConfig(str(model_folder), str(tmp_path / "x")))
    out = tmp_path / "lora"
    sft.main(*sft.parse(arguments(model_folder, train_file, out, "--max_steps", "1")))
    other = make_folder(hidden_size=24)
    with pytest.raises(UserError, match="does not fit the base"):
        merge(MergeConfig(str(out), str(tmp_path / "x"), model=str(other)))
    with pytest.raises(UserError, match="dtype 'int7'"):
        MergeConfig(str(out), str(tmp_path / "x"), dtype="int7")
    for name, text in (
        ("adapter_model.safetensors", "cannot be read"),
        ("tokenizer.json", "tokenizer cannot be loaded"),
    ):
        broken = tmp_path / name.split(".")[0]
        shutil.copytree(out, broken)
        (broken / name).write_bytes((broken / name).read_bytes()[:40])
        with pytest.raises(UserError, match=text):
            merge(MergeConfig(str(broken), str(tmp_path / "x")))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not name its base"):
        merge(MergeConfig(str(out), str(tmp_path / "x")))
