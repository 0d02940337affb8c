"""One checkpoint has one fingerprint, whatever it is loaded as; other weights have another."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.fingerprints import fingerprint, known_as, weights
from neureasoner.models import load

# What version 0.1 wrote; artifacts of that version, the shipped ones among them, name their model so.
OLD = {"tiny": "b9afede47d410d19", "tiny-steered": "1c0df89a360fd6ff"}


@pytest.fixture
def saved(tmp_path: Path, make_model: Any, tiny_tokenizer: Any) -> Callable[..., Path]:
    """``saved(arch, dtype, tied, shards)``: a folder whose values reach from 1e-9 to 1e3, as trained ones may."""

    def save(arch: str = "qwen3", dtype: Any = torch.float32, tied: bool = False, shards: bool = False) -> Path:
        model = make_model(arch, tie_word_embeddings=tied)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(10 ** torch.empty_like(p).uniform_(-8, 2))
        model.to(dtype).save_pretrained(tmp_path / arch, **({"max_shard_size": "10KB"} if shards else {}))
        tiny_tokenizer.save_pretrained(tmp_path / arch)
        return tmp_path / arch

    return save


@pytest.mark.parametrize("name", OLD)
def test_the_shipped_models_keep_the_names_their_artifacts_know(name: str) -> None:
    found = {d: fingerprint(load(name, device="cpu", dtype=d)[0]) for d in ("float32", "bfloat16", "float16")}
    assert len(set(found.values())) == 1
    assert OLD[name] in known_as(found["float16"])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_one_checkpoint_in_three_dtypes(saved: Callable[..., Path], arch: str, dtype: Any, tied: bool) -> None:
    folder = str(saved(arch, dtype, tied))
    found = {d: fingerprint(load(folder, device="cpu", dtype=d)[0]) for d in ("float32", "bfloat16", "float16")}
    assert len(set(found.values())) == 1, found


def test_float16_models_not_loaded_by_us_and_moved_folders(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved(shards=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected = fingerprint(load(str(folder), device="cpu")[0])
    for model in (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16),
        load(str(folder), device="cpu")[0].half(),
        copy.deepcopy(load(str(folder), device="cpu", dtype="float16")[0]),
    ):
        assert fingerprint(model) == expected
    monkeypatch.chdir(folder.parent)
    model = load(folder.name, device="cpu", dtype="float16")[0]
    monkeypatch.chdir("/")
    assert fingerprint(model) == expected
    os.rename(folder, folder.with_name("gone"))  # the values there cannot be seen: the rounded ones count
    assert fingerprint(model) != expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_change_is_seen(saved: Callable[..., Path], dtype: str, tied: bool) -> None:
    folder = str(saved("qwen2", tied=tied))
    seen = {fingerprint(load(folder, device="cpu", dtype=dtype)[0])}

    def changed(change: Callable[[Any], Any]) -> None:
        model = load(folder, device="cpu", dtype=dtype)[0]
        with torch.no_grad():
            change(model)
        found = fingerprint(model)
        assert found not in seen
        seen.add(found)

    for neuron in (0, 17, 47):
        changed(lambda m, n=neuron: m.model.layers[1].mlp.down_proj.weight[:, n].mul_(1.5))
        changed(lambda m, n=neuron: m.model.layers[0].mlp.gate_proj.weight[n].mul_(-1))
    for i in range(1, 32, 10):
        changed(lambda m, i=i: m.model.norm.weight[i : i + 1].add_(0.25))
    changed(lambda m: m.model.layers[0].self_attn.q_proj.bias.add_(1))
    changed(lambda m: m.get_input_embeddings().weight[7].copy_(m.get_input_embeddings().weight[8]))
    changed(lambda m: m.resize_token_embeddings(m.config.vocab_size + 2))

    def swap(model: Any) -> None:
        """Neuron 3 and 4 change places: the same function, other addresses."""
        mlp = model.model.layers[0].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
            weight[[3, 4]] = weight[[4, 3]]

    changed(swap)


def test_what_was_written_by_hand_is_the_models_own(saved: Callable[..., Path], make_model: Any) -> None:
    model = make_model()
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) == fingerprint(make_model(seed=0))
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).to(torch.bfloat16))
    assert len({fingerprint(m) for m in (model, make_model(seed=1), make_model("llama"), make_model("qwen2"))}) == 4
    loaded = load(str(saved()), device="cpu", dtype="float16")[0]
    before = fingerprint(loaded)
    with torch.no_grad():
        loaded.lm_head.weight[5, 5] += 1
        changed = fingerprint(loaded)
        loaded.lm_head.weight[5, 5] -= 1
    assert changed != before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("where", ["cpu", "disk", "hooked"])
def test_offloaded_weights_are_the_same_weights(
    saved: Callable[..., Path], tmp_path: Path, tied: bool, dtype: str, where: str
) -> None:
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    folder = str(saved("llama", tied=tied))
    expected = fingerprint(load(folder, device="cpu")[0])
    model, _ = load(folder, device="cpu", dtype=dtype)
    if where == "disk":
        model = disk_offload(model, str(tmp_path / "offloaded"), execution_device=torch.device("cpu"))
    else:
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    if where == "hooked":
        add_hook_to_module(model.lm_head, ModelHook(), append=True)
    assert model.lm_head.weight.device.type == "meta"
    assert fingerprint(model) == expected
    assert model.lm_head.weight.device.type == "meta"  # nothing was left in memory
    assert all(value.device.type != "meta" for _, value in weights(model))


def test_weights_that_are_nowhere(make_model: Any) -> None:
    with pytest.raises(UserError, match=r"lm_head\.weight.*meta"):
        fingerprint(make_model().to("meta"))


def test_artifacts_of_older_versions_are_known(saved: Callable[..., Path], tmp_path: Path) -> None:
    from neureasoner.directions import Direction
    from neureasoner.probes.recording.store import SeriesStore

    model, _ = load(str(saved()), device="cpu")
    new, old = known_as(fingerprint(model))
    assert new.startswith(old) and len(old) == 16
    for name in (new, old):
        Direction({"residual:0": torch.ones(32)}, "positive = x", "m", name).check(model)
    foreign = Direction({"residual:0": torch.ones(32)}, "positive = x", "m", "0" * 16)
    foreign.check(model, accept=[old])
    with pytest.raises(UserError, match="0" * 16):
        foreign.check(model)
    names = {"tokenizer_fingerprint": "t"}
    SeriesStore.create(tmp_path / "s", {"tokens": 1}, model_fingerprint=old, **names)
    SeriesStore.create(tmp_path / "s", {"tokens": 1}, model_fingerprint=new, **names)
    with pytest.raises(UserError, match="model fingerprint"):
        SeriesStore.create(tmp_path / "s", {"tokens": 1}, model_fingerprint="0" * 16 + "-" + "0" * 16, **names)


def test_a_card_of_either_version_accepts_the_bases_artifacts(tmp_path: Path) -> None:
    import shutil

    from neureasoner.inference import SteeredModel
    from neureasoner.models import resolve

    folder = tmp_path / "steered"
    shutil.copytree(resolve("tiny-steered"), folder)
    base = fingerprint(load("tiny", device="cpu")[0])
    for file in folder.glob("probes/*/probe.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_fingerprint": OLD["tiny"]}))
    card = json.loads((folder / "neureasoner.json").read_text())
    for known in known_as(base):
        (folder / "neureasoner.json").write_text(json.dumps(card | {"base_fingerprint": known}))
        SteeredModel.from_pretrained(folder, device="cpu")
    (folder / "neureasoner.json").write_text(json.dumps(card | {"base_fingerprint": ""}))
    with pytest.raises(UserError, match=OLD["tiny"]):
        SteeredModel.from_pretrained(folder, device="cpu")
