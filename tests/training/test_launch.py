"""Launch layouts and recipes: all parse; those that a CPU can run give the loss curve of a single process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from neureasoner.errors import UserError
from neureasoner.training import sft
from neureasoner.training.checkpoints import last_whole
from neureasoner.training.sizing import needs, shape
from neureasoner.training.tools_config import PAPER_MODELS, SizingConfig

ROOT = Path(__file__).parents[2]
LAYOUTS = {p.stem: p for p in (ROOT / "configs" / "accelerate").glob("*.yaml")}
RECIPES = sorted(p for p in (ROOT / "configs" / "recipes").glob("*/sft*.yaml"))


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"])
def test_layouts_are_read_by_accelerate(name: str) -> None:
    """By the launcher itself, up to the environment it gives to the processes."""
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    config = load_config_from_file(str(LAYOUTS[name]))
    kind = {"cpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert str(config.distributed_type).rsplit(".", 1)[-1] == kind
    assert config.num_processes == (1 if name == "cpu" else 8)
    if name == "cpu":
        return
    args = launch.launch_command_parser().parse_args(["--config_file", str(LAYOUTS[name]), "training/sft.py"])
    args, _, _ = launch._validate_launch_command(args)
    if kind == "DEEPSPEED":
        args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # launch_command does this
        _, env = prepare_deepspeed_cmd_env(args)
        assert env["ACCELERATE_USE_DEEPSPEED"] == "true" and env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[4]
        device = "cpu" if name == "zero3_offload" else "none"
        assert env["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] == device
        assert env["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == device
        if name != "zero2":  # without it the model that is saved is empty
            assert env["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
            assert env["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true"
    else:
        env = prepare_multi_gpu_env(args)
        assert ("ACCELERATE_USE_FSDP" in env) == (name == "fsdp2")
        if name == "fsdp2":
            assert env["FSDP_VERSION"] == "2" and env["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_no_layout_is_forgotten() -> None:
    assert set(LAYOUTS) == {"cpu", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: "/".join(p.parts[-2:]))
def test_recipes_parse_and_fit(path: Path, tmp_path: Path) -> None:
    """Known keys only; the paper's values unless the recipe is the tiny reasoner's; enough GPUs for the layout."""
    argv = ["--config", str(path), "--data", "x", "--out", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    script, args = sft.parse(argv)
    name = path.parent.name
    if name == "tiny":
        return
    assert name in PAPER_MODELS and script.model.endswith(f"/{name}")
    assert (args.num_train_epochs, script.batch_size, args.warmup_steps, args.max_length) == (1, 64, 0.05, 16_384)
    assert args.lr_scheduler_type == "cosine" and args.gradient_checkpointing and not script.mask_failure
    assert args.learning_rate == (1e-4 if script.lora else 1e-5) and script.trigger_init == "mean"
    assert bool(script.lora) == path.stem.endswith("lora")
    text = path.read_text()
    layout = text.split("configs/accelerate/")[1].split(".yaml")[0]
    devices = int(text.split("--num_processes ")[1].split()[0]) if "--num_processes" in text else 8
    assert f"--config configs/recipes/{name}/{path.name}" in text and layout in LAYOUTS
    size = needs(shape(name), layout, SizingConfig(devices=devices, lora=script.lora))
    assert size["total"] < 80 * 2**30


def test_every_model_of_the_paper_has_a_recipe() -> None:
    found = {p.parent.name for p in RECIPES if p.name == "sft.yaml"}
    assert found == {*PAPER_MODELS, "tiny"}
    large = {m for m in PAPER_MODELS if m.endswith(("32B", "70B"))}
    assert {p.parent.name for p in RECIPES if p.name == "sft_lora.yaml"} == large


def test_deepspeed_on_a_cpu_is_set_up_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    script, args = sft.parse(["--data", "x", "--out", "y", "--use_cpu", "true", "--bf16", "false"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="leave use_cpu and ACCELERATE_USE_CPU out"):
        sft.check_machine(script, args)


# ---- Two processes on the CPU


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options: dict[str, Any] = {"model": model, "data": data, "out": out, "batch_size": 4, "learning_rate": 1e-2}
    options |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "warmup_steps": 0}
    return [str(x) for k, v in options.items() for x in (f"--{k}", v)] + list(more)


def losses(out: Path) -> list[float]:
    return [h["loss"] for h in json.loads((out / "log.json").read_text()) if "loss" in h]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--packing", "true"), ("--lora", "4")], ids=["all", "packing", "lora"])
@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3", "zero3_offload"])
def test_two_processes_give_the_curve_of_one(
    model_folder: Path, train_file: Path, tmp_path: Path, layout: str, more: tuple[str, ...]
) -> None:
    """And their checkpoints can be resumed. DeepSpeed compiles parts of itself on its first use: minutes.

    The base has rows without an identity, so that new ones are drawn in every layout.
    """
    weights = load_file(model_folder / "model.safetensors")
    weights["model.embed_tokens.weight"][40:70] = weights["model.embed_tokens.weight"][40]
    save_file(weights, model_folder / "model.safetensors", {"format": "pt"})
    if layout != "ddp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if layout.startswith("zero3") and "--lora" in more:
        pytest.skip("PEFT initialises trained rows on CUDA only under ZeRO-3")
    if layout == "zero3_offload" and more:
        pytest.skip("the same code as zero3; compiling for it once is enough")
    sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "one", *more)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAYOUTS[layout])]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command += [str(ROOT / "training" / "sft.py"), *arguments(model_folder, train_file, tmp_path / "two", *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": str(layout == "ddp").lower()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drawn anew" in done.stdout
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    name = "adapter_model.safetensors" if "--lora" in more else "model.safetensors"
    one, two = (load_file(tmp_path / out / name) for out in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-3
    folder = tmp_path / "two" / "checkpoints"
    assert any(folder.glob("checkpoint-4/global_step*")) == layout.startswith("zero"), "it was what it says"

    before = losses(tmp_path / "two")
    shutil.rmtree(folder / "checkpoint-4")
    (tmp_path / "two" / "stage.json").rename(tmp_path / "two" / "stage.started.json")  # as if killed after step 2
    assert str(last_whole(folder)).endswith("checkpoint-2")
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "resuming from checkpoint-2" in again.stdout, again.stdout + again.stderr
    assert losses(tmp_path / "two") == pytest.approx(before, rel=1e-5)


def test_yaml_files_say_how_they_are_used() -> None:
    for path in [*LAYOUTS.values(), *RECIPES]:
        assert path.read_text().startswith("# ") and isinstance(yaml.safe_load(path.read_text()), dict), path
