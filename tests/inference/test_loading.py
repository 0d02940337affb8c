"""A steered checkpoint loads in every dtype and place, and its own probes, directions and gates know it there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference import SteeredModel
from neureasoner.inference.config import GenerateConfig
from neureasoner.inference.generate import generate
from neureasoner.inference.plan import Plan
from neureasoner.models import fingerprint, input_device, load, resolve

RULE = {"name": "r", "trigger": {"decode": True}, "direction": "d", "site": ["residual:1"], "action": {"add": True}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float16])
def test_the_shipped_checkpoint_knows_its_probes_in_every_dtype(dtype: Any) -> None:
    steered = SteeredModel.from_pretrained("tiny-steered", dtype=dtype, device="cpu")
    assert str(steered.model.dtype).endswith(str(dtype).removeprefix("torch."))
    assert steered.probes


def test_directions_made_in_one_dtype_serve_in_the_others() -> None:
    plan = Plan.from_dict({"name": "p", "rules": [RULE]})
    base, tokenizer = load("tiny", device="cpu")
    made = Direction({"residual:1": torch.ones(192)}, "positive = x", "tiny", fingerprint(base))
    for dtype in ("bfloat16", "float16"):
        model, _ = load("tiny", device="cpu", dtype=dtype)
        SteeredModel(model, tokenizer, plan, directions={"d": made})
        with torch.no_grad():  # one neuron of one block is enough to be another model
            model.model.layers[3].mlp.down_proj.weight[:, 5].zero_()
        with pytest.raises(UserError, match=made.fingerprint):
            SteeredModel(model, tokenizer, plan, directions={"d": made})


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}, {"model": "disk", "lm_head": "disk"}])
def test_a_checkpoint_takes_a_device_map(place: Any) -> None:
    steered = SteeredModel.from_pretrained("tiny-steered", device_map=place)
    assert input_device(steered.model).type in ("cpu", "cuda")
    with pytest.raises(UserError, match="device_map"):
        SteeredModel.from_pretrained("tiny-steered", device="cpu", device_map=place)


def test_generate_takes_dtype_and_device_map(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def from_pretrained(*_: Any, **settings: Any) -> Any:
        seen.update(settings)
        raise UserError("enough")

    monkeypatch.setattr(SteeredModel, "from_pretrained", from_pretrained)
    for given, expected in (({"dtype": "float16", "device_map": "auto"}, ("float16", "auto")), ({}, (None, None))):
        with pytest.raises(UserError, match="enough"):
            generate(GenerateConfig("tiny-steered", ["hi"], **given))
        assert (seen["dtype"], seen["device_map"]) == expected


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    shutil.copytree(resolve("tiny-steered"), tmp_path / "s")
    weights = tmp_path / "s" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors.*cut short"):
        SteeredModel.from_pretrained(tmp_path / "s", device="cpu")


@pytest.mark.parametrize("command", ["assemble", "bake", "sizing"])
def test_commands_refuse_a_broken_config(command: str, tmp_path: Path) -> None:
    from neureasoner.inference.assemble import assemble
    from neureasoner.inference.bake import bake
    from neureasoner.inference.bake_config import BakeConfig
    from neureasoner.inference.config import AssembleConfig
    from neureasoner.training.sizing import shape

    folder = tmp_path / "m"
    shutil.copytree(resolve("tiny-steered"), folder)
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps({"name": "none", "rules": []}))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        if command == "assemble":
            assemble(AssembleConfig(str(folder), out=str(tmp_path / "o"), plan=str(plan)))
        elif command == "bake":
            bake(BakeConfig(str(folder), str(tmp_path / "o"), plan=str(plan)))
        else:
            shape(str(folder))
