"""Loading by name, refusals, and fingerprints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner import model_files, models
from neureasoner.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, make_model: Any, tiny_tokenizer: Any) -> Path:
    make_model().save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_fingerprint_survives_saving_and_dtype(
    tmp_path: Path, make_model: Any, tiny_tokenizer: Any, arch: str, tied: bool
) -> None:
    model = make_model(arch, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = models.load(str(tmp_path), device="cpu")
    assert models.fingerprint(loaded) == models.fingerprint(model)
    assert loaded.dtype == torch.float32 and not loaded.training
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None
    half, _ = models.load(str(tmp_path), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and models.fingerprint(half) == models.fingerprint(model)


def test_fingerprint_tells_models_apart(make_model: Any) -> None:
    model = make_model()
    twin = copy.deepcopy(model)
    assert models.fingerprint(twin) == models.fingerprint(model) == models.fingerprint(make_model(seed=0))
    with torch.no_grad():
        twin.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert len({models.fingerprint(m) for m in (model, twin, make_model(seed=1), make_model("llama"))}) == 4
    twin = copy.deepcopy(model)
    twin.resize_token_embeddings(model.config.vocab_size + 2)
    assert models.fingerprint(twin) != models.fingerprint(model)


def test_names_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.resolve("org/name") == "org/name"
    with pytest.raises(UserError, match=r"holds no config\.json"):
        models.resolve(str(tmp_path))
    for name in ("./absent", "/absent/model", "a/b/c"):
        with pytest.raises(UserError, match="no such model folder"):
            models.resolve(name)
    monkeypatch.setitem(model_files.SHIPPED, "tiny", tmp_path)
    with pytest.raises(UserError, match="'tiny' is not in this installation"):
        models.resolve("tiny")
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve("tiny") == str(tmp_path)


def test_unknown_architecture_is_refused_by_name_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*not supported"):
        models.load(str(tmp_path), device="cpu")


def test_promise_10_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(str(folder), device="cpu")


def test_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="dtype"):
        models.load(str(folder), device="cpu", dtype="float99")


def test_ids_go_where_the_embedding_runs(make_model: Any, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    assert models.input_device(make_model()) == torch.device("cpu")
    for offloaded in (
        cpu_offload(make_model(), execution_device=torch.device("cpu")),
        disk_offload(make_model(), str(tmp_path / "off"), execution_device=torch.device("cpu")),
    ):
        assert offloaded.device.type == "meta"
        assert models.input_device(offloaded) == torch.device("cpu")
        add_hook_to_module(offloaded.get_input_embeddings(), ModelHook(), append=True)
        assert models.input_device(offloaded) == torch.device("cpu")
    with pytest.raises(UserError, match="meta"):
        models.input_device(make_model().to("meta"))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "auto", torch.int32, "nn"])
def test_weights_are_floats(folder: Path, dtype: Any) -> None:
    with pytest.raises(UserError, match="dtype"):
        models.load(str(folder), device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "gpu"}, "gpu"),
        ({"device": "meta"}, "meta"),
        ({"device": "cpu", "device_map": "auto"}, "device_map"),
        ({"device_map": "nope"}, "balanced"),
        ({"device_map": 99}, "99"),
        ({"device_map": {"": "cuda:99"}}, "cuda:99"),
        ({"device_map": {"": None}}, "None"),
    ],
)
def test_devices_that_are_not_there(folder: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        models.load(str(folder), **settings)


@pytest.mark.parametrize("place", ["auto", "balanced", "sequential", "cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_device_map_places_the_weights(folder: Path, place: Any) -> None:
    if torch.cuda.is_available() and place in ("auto", "balanced", "sequential"):
        pytest.skip("this machine has more than a CPU")
    model, _ = models.load(str(folder), device_map=place)
    assert model.dtype == torch.float32 and not model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_weights_may_stay_on_disk(folder: Path) -> None:
    plain, tokenizer = models.load(str(folder), device="cpu")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    parts |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    spread, _ = models.load(str(folder), device_map=parts)
    assert spread.lm_head.weight.device.type == "meta"
    ids = tokenizer("Okay, let me think", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(spread(ids).logits, plain(ids).logits)
    assert models.fingerprint(spread) == models.fingerprint(plain)
    assert models.input_device(spread) == torch.device("cpu")
