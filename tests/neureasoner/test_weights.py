"""Folders that cannot be loaded: each is refused in one line that names the file or weight and the fix."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neureasoner.cli import main
from neureasoner.errors import UserError
from neureasoner.models import load, load_tokenizer, stored_dtype

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15237\n"
WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_model: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    make_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(whole: Path, make_model: Any) -> Path:
    folder = whole.with_name("shards")
    shutil.copytree(whole, folder)
    (folder / WEIGHTS).unlink()
    make_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def copied(folder: Path, tmp_path: Path, change: Change) -> str:
    shutil.copytree(folder, tmp_path / "m")
    change(tmp_path / "m")
    return str(tmp_path / "m")


def writes(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def sets(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(old | values))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Change:
    def change(folder: Path) -> None:
        held = load_file(folder / file)
        edit(held)
        save_file(held, folder / file, metadata={"format": "pt"})

    return change


def renamed(name: str, to: str) -> Change:
    return lambda folder: (folder / name).rename(folder / to)


def refused(folder: str) -> str:
    with pytest.raises(UserError) as info:
        load(folder, device="cpu")
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("part", [0.5, 0.999])
def test_a_file_that_was_cut_short(whole: Path, tmp_path: Path, part: float) -> None:
    size = (whole / WEIGHTS).stat().st_size

    def cut(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(part * size)])

    told = refused(copied(whole, tmp_path, cut))
    assert WEIGHTS in told and f"{int(part * size)} of {size}" in told


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"<!DOCTYPE html><html>" * 30, struct.pack("<Q", 4) + b"{x}}", struct.pack("<Q", 2) + b"[]"],
)
def test_a_file_of_another_kind(whole: Path, tmp_path: Path, content: bytes) -> None:
    assert f"m/{WEIGHTS}" in refused(copied(whole, tmp_path, writes(WEIGHTS, content)))


def test_a_header_that_was_cut_short(whole: Path, tmp_path: Path) -> None:
    head = (whole / WEIGHTS).read_bytes()[:500]
    assert "500 of" in refused(copied(whole, tmp_path, writes(WEIGHTS, head)))


NO_FILE: dict[str, Change] = {
    "folder": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("what", NO_FILE)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", WEIGHTS])
def test_what_is_there_but_is_no_file(whole: Path, tmp_path: Path, name: str, what: str) -> None:
    """A hub's cache is made of links; without the file behind it, its settings would be gone without a word."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        NO_FILE[what](folder / name)

    with pytest.raises(UserError, match=rf"m/{name}: is no file"):
        load(copied(whole, tmp_path, change), device="cpu")


def test_a_file_that_may_not_be_read(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = Path.open

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == WEIGHTS:
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"{WEIGHTS}: cannot be read \(Permission denied\)"):
        load(str(whole), device="cpu")


def test_weights_without_their_config(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json") as told:
        load(copied(whole, tmp_path, lambda folder: (folder / "config.json").unlink()))
    assert "another name" not in str(told.value), "the weights have the right one"


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "merges.txt"])
def test_a_git_lfs_pointer(whole: Path, tmp_path: Path, name: str) -> None:
    told = refused(copied(whole, tmp_path, writes(name, POINTER)))
    assert f"m/{name}" in told and "git lfs pull" in told


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index"],
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_a_file_that_holds_no_json_object(sharded: Path, tmp_path: Path, name: str, content: bytes) -> None:
    name = name if name.endswith(".json") else f"{name}.json"
    assert f"m/{name}" in refused(copied(sharded, tmp_path, writes(name, content)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (sets("config.json", hidden_size="64"), "hidden_size"),
        (sets("config.json", dtype="floaty"), "floaty"),
        (sets("config.json", model_type=3), "3"),
        (sets("config.json", hidden_act="nope"), "nope"),
        (sets("config.json", num_attention_heads=0), "zero"),
        (sets("config.json", rope_parameters={"rope_type": "nope"}), "nope"),
        (sets("config.json", pad_token_id=10**9), "pad_token_id"),
        (sets("generation_config.json", eos_token_id="x"), "eos_token_id"),
        (sets("generation_config.json", cache_implementation="zzz"), "zzz"),
        (sets("generation_config.json", watermarking_config=3), "generation_config"),
        (sets("tokenizer_config.json", padding_side="up"), "up"),
        (sets("tokenizer_config.json", eos_token=5), "eos_token"),
        (sets("tokenizer_config.json", model_max_length="a"), "tokenizer"),
        (writes("tokenizer.json", b"{}"), "tokenizer"),
        (sets("tokenizer.json", model={"type": "nope"}), "tokenizer"),
    ],
)
def test_settings_that_make_no_sense(whole: Path, tmp_path: Path, change: Change, named: str) -> None:
    assert named in refused(copied(whole, tmp_path, change))


def test_shards_that_are_missing_or_cut_short(sharded: Path, tmp_path: Path) -> None:
    names = sorted(f.name for f in sharded.glob("*.safetensors"))
    told = refused(copied(sharded, tmp_path / "a", lambda f: [(f / n).unlink() for n in names[2:4]]))
    assert names[2] in told and f"2 of {len(names)}" in told
    content = (sharded / names[1]).read_bytes()
    assert names[1] in refused(copied(sharded, tmp_path / "b", writes(names[1], content[:-3])))
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    file = index["weight_map"][DOWN]
    told = refused(copied(sharded, tmp_path / "c", tensors(lambda held: held.pop(DOWN), file)))
    assert DOWN in told
    for places in ({}, [], {"a": 3}):
        told = refused(
            copied(sharded, tmp_path / f"d{places}", sets("model.safetensors.index.json", weight_map=places))
        )
        assert "weight_map" in told
    load(str(sharded), device="cpu")


def test_weights_that_would_be_random(whole: Path, tmp_path: Path) -> None:
    told = refused(copied(whole, tmp_path / "a", tensors(lambda held: held.pop(DOWN))))
    assert f"1: {DOWN}" in told
    gone = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"]
    told = refused(copied(whole, tmp_path / "b", tensors(lambda held: [held.pop(k) for k in gone])))
    assert "8: " in told and gone[1] in told and "5 more" in told
    told = refused(copied(whole, tmp_path / "c", tensors(lambda held: held.pop("lm_head.weight"))))
    assert "lm_head.weight" in told


def test_a_config_of_another_model(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = json.loads((whole / "config.json").read_text())["vocab_size"]
    told = refused(copied(whole, tmp_path / "a", sets("config.json", vocab_size=rows + 64)))
    assert str(rows) in told and str(rows + 64) in told and "lm_head.weight" in told
    assert "LOAD REPORT" not in capfd.readouterr().err  # told in one line
    told = refused(copied(whole, tmp_path / "b", sets("config.json", num_hidden_layers=1)))
    assert "model.layers.1." in told
    assert "model.layers.2." in refused(copied(whole, tmp_path / "c", sets("config.json", num_hidden_layers=3)))
    extra = {"model.layers.0.mlp.down_proj.bias": torch.ones(32)}
    assert next(iter(extra)) in refused(copied(whole, tmp_path / "d", tensors(lambda held: held.update(extra))))


def test_weights_that_are_no_fault(whole: Path, tmp_path: Path, make_model: Any, tiny_tokenizer: Any) -> None:
    """Tied ones are stored once; old checkpoints hold buffers; a base model's names lack the prefix."""
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in (0, 1)}
    load(copied(whole, tmp_path / "a", tensors(lambda held: held.update(buffers))), device="cpu")
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / WEIGHTS)
    load(str(tmp_path / "tied"), device="cpu")

    def bare(held: dict[str, torch.Tensor]) -> None:
        for name in list(held):
            held[name.removeprefix("model.")] = held.pop(name)

    load(copied(tmp_path / "tied", tmp_path / "b", tensors(bare)), device="cpu")
    with pytest.warns(UserWarning, match=r"v_head\.weight"):
        head = {"v_head.weight": torch.ones(1, 32)}
        load(copied(whole, tmp_path / "c", tensors(lambda held: held.update(head))), device="cpu")


METHODS = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"},
    {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    {"quant_method": "a-method-of-tomorrow"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m["quant_method"]))
def test_quantised_folders_are_refused_by_name(whole: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    told = refused(copied(whole, tmp_path, sets("config.json", quantization_config=method)))
    assert method["quant_method"] in told and "unquantised" in told


def test_quantised_weights_without_a_word_in_the_config(whole: Path, tmp_path: Path) -> None:
    narrow = {DOWN: torch.ones(32, 48).to(torch.float8_e4m3fn)}
    told = refused(copied(whole, tmp_path / "a", tensors(lambda held: held.update(narrow))))
    assert DOWN in told and "F8_E4M3" in told
    packed = DOWN.replace("weight", "qweight")
    change = tensors(lambda held: held.update({packed: held.pop(DOWN).to(torch.int32)}))
    assert packed in refused(copied(whole, tmp_path / "b", change))
    assert "quantised" in refused(copied(whole, tmp_path / "c", sets("config.json", compression_config={"bits": 4})))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("pytorch_model.bin", "pickled"),
        ("pytorch_model-00001-of-00002.bin", "pickled"),
        ("consolidated.00.pth", "pickled"),
        ("model-Q4_K_M.gguf", "GGUF"),
        ("weights.safetensors", "name"),
        ("notes.md", "no weights"),
    ],
)
def test_weights_of_other_kinds(whole: Path, tmp_path: Path, name: str, word: str) -> None:
    told = refused(copied(whole, tmp_path / "a", renamed(WEIGHTS, name)))
    assert word in told and WEIGHTS in told
    if word == "GGUF":
        bare = copied(whole, tmp_path / "b", lambda f: ((f / "config.json").unlink(), renamed(WEIGHTS, name)(f)))
        assert name in refused(bare)


def test_an_adapter_says_how_it_becomes_a_model(whole: Path, tmp_path: Path, make_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    for told in (
        refused(str(tmp_path / "adapter")),
        refused(copied(whole, tmp_path, writes("adapter_config.json", b"{}"))),
    ):
        assert "training merge" in told


def test_a_tokenizer_without_its_vocabulary(whole: Path, tmp_path: Path) -> None:
    def bare(folder: Path, kind: str) -> None:
        (folder / "tokenizer.json").unlink()
        special = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False, "special": True}
        named = {"tokenizer_class": kind, "added_tokens_decoder": {"2": special}, "eos_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))

    for kind in ("Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"):
        told = refused(copied(whole, tmp_path / kind, lambda f, kind=kind: bare(f, kind)))
        assert "tokenizer" in told
    with pytest.raises(UserError, match=r"vocabulary.*tokenizer\.json"):
        load_tokenizer(str(tmp_path / "Qwen2Tokenizer" / "m"))


def test_a_tokenizer_that_needs_a_package(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def old(folder: Path) -> None:
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("\nLlamaTokenizer requires the SentencePiece library but it was not found.\nInstall it")

    folder = copied(whole, tmp_path, old)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    told = refused(folder)
    assert "SentencePiece library" in told and "pip install sentencepiece" in told


def test_a_tokenizer_that_drops_text(whole: Path, tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        held = json.loads((folder / "tokenizer.json").read_text())
        held["model"] |= {"vocab": {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps(held))

    told = refused(copied(whole, tmp_path, half))
    assert r"('T.\nW:ABC" in told


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_tokenizer_larger_than_the_model(tmp_path: Path, make_model: Any, tiny_tokenizer: Any, arch: str) -> None:
    n = max(tiny_tokenizer.get_vocab().values()) + 1
    for rows in (n - 1, n, n + 7):
        make_model(arch, vocab_size=rows).save_pretrained(tmp_path / str(rows))
        tiny_tokenizer.save_pretrained(tmp_path / str(rows))
    told = refused(str(tmp_path / str(n - 1)))
    assert f" {n - 1} rows" in told and f"resize_token_embeddings({n}" in told
    for rows in (n, n + 7):  # Transformers gives a Qwen2 folder an <|endoftext|> of its own; it is not the model's
        _, tokenizer = load(str(tmp_path / str(rows)), device="cpu")
        assert tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_tokenizer_without_end_or_padding(tmp_path: Path, make_model: Any, tiny_tokenizer: Any, arch: str) -> None:
    n = max(tiny_tokenizer.get_vocab().values()) + 1
    make_model(arch, vocab_size=n, eos_token_id=None, pad_token_id=None).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    sets("tokenizer_config.json", pad_token=None)(tmp_path)
    _, tokenizer = load(str(tmp_path), device="cpu")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    sets("tokenizer_config.json", eos_token=None)(tmp_path)
    _, tokenizer = load(str(tmp_path), device="cpu")
    assert tokenizer.eos_token is None and tokenizer.pad_token is None


def test_hub_ids_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("no-such-org/no-such-model", "tinyy", "bad name"):
        told = refused(name)
        assert name in told and "hub id" in told
        with pytest.raises(UserError, match="hub id"):
            load_tokenizer(name)


def test_the_stored_dtype_is_told_or_refused(whole: Path, tmp_path: Path) -> None:
    assert stored_dtype(str(whole)) == torch.float32
    assert stored_dtype(copied(whole, tmp_path / "a", sets("config.json", dtype="bfloat16"))) == torch.bfloat16
    with pytest.raises(UserError, match=r"config\.json"):
        stored_dtype(copied(whole, tmp_path / "b", writes("config.json", b"")))


def test_bugs_are_not_dressed_up(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def raises(error: BaseException) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    for bug in (KeyboardInterrupt(), AssertionError("a bug"), TypeError("unexpected keyword argument")):
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raises(bug))
        with pytest.raises(type(bug)):
            load(str(whole), device="cpu")
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raises(full))
    told = refused(str(whole))
    assert "20 GiB" in told and "device_map" in told


def test_the_command_line_ends_with_code_2(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(whole, tmp_path, sets("config.json", quantization_config={"quant_method": "gptq", "bits": 4}))
    assert main(["doctor", "--model", folder]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gptq" in error
