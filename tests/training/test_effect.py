"""A run that trains nothing is refused before it, or noticed after it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from neureasoner import models
from neureasoner.data_builders.encoding import IGNORE, trigger_ids
from neureasoner.errors import UserError
from neureasoner.training import masks, sft
from neureasoner.training.batches import TriggerTrainer
from neureasoner.training.effect import Moved, check_rates, digests, updates_of


def settings(tmp_path: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **more)


def argv(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--data", str(data), "--out", str(out), "--learning_rate", "1e-2", *more]


@pytest.mark.parametrize("rows", [1, 60, 64])
def test_one_update_is_made_at_a_rate_that_trains(
    model_folder: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    """With every default: the warmup, a share of one update, is none, and the run says so."""
    lines = train_file.read_text().splitlines()
    train_file.write_text("\n".join((lines * 6)[:rows]) + "\n")
    sft.main(*sft.parse(argv(model_folder, train_file, tmp_path / "out", "--logging_steps", "1")))
    assert "warmup_steps 0.05 of 1 update: 0" in capsys.readouterr().out
    before, after = (load_file(f / "model.safetensors") for f in (model_folder, tmp_path / "out"))
    assert all(not torch.equal(before[k], after[k]) for k in before)
    assert json.loads((tmp_path / "out" / "log.json").read_text())[0]["learning_rate"] == 1e-2


@pytest.mark.parametrize("rows", [1, 64])
def test_one_update_that_is_all_warmup_is_refused_before_the_model(
    model_folder: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    lines = train_file.read_text().splitlines()
    train_file.write_text("\n".join((lines * 6)[:rows]) + "\n")
    with pytest.raises(UserError, match=r"1 update.*learning_rate.*warmup_steps.*batch_size"):
        sft.main(*sft.parse(argv(model_folder, train_file, tmp_path / "out", "--warmup_steps", "1")))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "more", [["--warmup_steps", "0"], ["--batch_size", "4"], ["--num_train_epochs", "2"], ["--max_steps", "2"]]
)
def test_what_the_line_advises_helps(model_folder: Path, train_file: Path, tmp_path: Path, more: list[str]) -> None:
    out = tmp_path / "out"
    sft.main(*sft.parse(argv(model_folder, train_file, out, "--save_strategy", "no", "--logging_steps", "1", *more)))
    before, after = (load_file(f / "model.safetensors") for f in (model_folder, out))
    assert all(not torch.equal(before[k], after[k]) for k in before)
    rates = [h["learning_rate"] for h in json.loads((out / "log.json").read_text()) if "learning_rate" in h]
    assert max(rates) > 0


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"warmup_steps": 1},
    {"warmup_steps": 0.05},
    {"warmup_steps": 0.5, "num_train_epochs": 2},
    {"warmup_steps": 50},
    {"lr_scheduler_type": "cosine", "warmup_steps": 1},
    {"lr_scheduler_type": "constant", "warmup_steps": 9},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9},
    {"max_steps": 1, "warmup_steps": 1},
    {"max_steps": 2, "warmup_steps": 1},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    {"per_device_train_batch_size": 5, "dataloader_drop_last": True},
    {"per_device_train_batch_size": 3, "dataloader_drop_last": True, "warmup_steps": 1},
]


@pytest.mark.parametrize("more", SCHEDULES, ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_the_forecast_is_what_a_trainer_does(tmp_path: Path, more: dict[str, Any], rows: int) -> None:
    """Oracle: the stock Trainer on one number, its updates and the learning rates it used."""
    from transformers import Trainer, TrainerCallback

    args = settings(tmp_path, **{"per_device_train_batch_size": 8, "num_train_epochs": 1, "logging_steps": 1} | more)
    args.disable_tqdm = True
    rates: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    class Number(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
            return {"loss": (x * self.weight).sum()}

    data: Any = [{"x": torch.ones(1), "labels": 0} for _ in range(rows)]
    if args.dataloader_drop_last and rows < args.per_device_train_batch_size:
        with pytest.raises(UserError, match="make no update"):
            check_rates(args, rows)
        return
    Trainer(Number(), args, train_dataset=data, callbacks=[Look()]).train()
    assert updates_of(args, rows) == len(rates)
    if max(rates) > 0:
        assert check_rates(args, rows) == len(rates)
    elif args.warmup_steps < 1:  # a share that the Trainer rounded up to all
        assert check_rates(args, rows) == len(rates)
        rates.clear()
        Trainer(Number(), args, train_dataset=data, callbacks=[Look()]).train()
        assert max(rates) > 0
    else:
        with pytest.raises(UserError, match="learning_rate is 0"):
            check_rates(args, rows)


def test_a_warmup_longer_than_the_run_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    check_rates(settings(tmp_path, max_steps=3, warmup_steps=100), 7, say=said.append)
    assert "warmup_steps 100" in said[0] and "3 updates" in said[0]
    check_rates(settings(tmp_path, max_steps=3, warmup_steps=1), 7, say=said.append)
    assert len(said) == 1


def test_packs_are_counted_where_rows_are_packed(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    more = ["--packing", "true", "--max_length", "1024", "--batch_size", "6"]
    with pytest.raises(UserError, match=r"1 update.*batch_size"):  # twelve rows, few packs
        sft.main(*sft.parse(argv(model_folder, train_file, tmp_path / "out", *more, "--warmup_steps", "1")))
    sft.main(*sft.parse(argv(model_folder, train_file, tmp_path / "out", *more, "--warmup_steps", "0")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_digest_changes_with_any_single_value(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(7, 11).to(dtype)
    (before,) = digests([tensor])
    for place in range(77):
        other = tensor.clone()
        flat = other.view(-1)
        flat[place] = torch.nextafter(flat[place].float(), torch.tensor(math.inf)) if dtype == torch.float32 else 9
        assert digests([other]) != [before]
    assert digests([tensor.clone()]) == [before] == digests([tensor.T.contiguous().T])


def test_frozen_models_are_refused_and_unmoved_tensors_named(make_model: Callable[..., Any]) -> None:
    model = make_model()
    accelerator = SimpleNamespace(device="cpu", reduce=lambda x, _: x)
    trainer = SimpleNamespace(model=model, accelerator=accelerator, state=SimpleNamespace(global_step=3))
    moved = Moved(model)
    with pytest.raises(UserError, match=r"3 updates changed no weight.*the hint"):
        moved.check(trainer, "the hint")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "model.norm.weight":
                parameter.view(-1)[-1] += 1
    assert moved.unmoved(trainer) == ["model.norm.weight"]
    assert "1 of" in moved.check(trainer, "the hint") and "model.norm.weight" in moved.check(trainer, "the hint")
    with torch.no_grad():
        model.model.norm.weight += 1
    assert moved.check(trainer, "the hint") == ""
    model.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        Moved(model)


def test_a_run_that_moved_nothing_leaves_nothing(
    model_folder: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's step does nothing; the checkpoints, which are the base, are not there to be resumed."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    out = tmp_path / "out"
    more = ["--max_steps", "3", "--save_steps", "1", "--batch_size", "4"]
    with pytest.raises(UserError, match="3 updates changed no weight"):
        sft.main(*sft.parse(argv(model_folder, train_file, out, *more)))
    assert not list(out.glob("*"))
    monkeypatch.undo()
    assert sft.main(*sft.parse(argv(model_folder, train_file, out, *more, "--seed", "1")))["steps"] == 3


def test_weights_too_coarse_for_their_updates_are_told(
    model_folder: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dtype", "bfloat16", "--learning_rate", "1e-6", "--max_steps", "2", "--batch_size", "4"]
    sft.main(*sft.parse(argv(model_folder, train_file, tmp_path / "out", *more)))
    said = capsys.readouterr().out
    assert "dtype bfloat16: updates below its precision are lost" in said and "trained tensors did not move" in said


@pytest.mark.parametrize("value", ["0", "-1"])
def test_max_grad_norm_0_switches_clipping_off(
    model_folder: Path, train_file: Path, tmp_path: Path, value: str
) -> None:
    more = ["--max_steps", "2", "--batch_size", "4", "--warmup_steps", "0"]
    finals = []
    for norm in (value, "1e9"):
        out = tmp_path / norm
        sft.main(*sft.parse(argv(model_folder, train_file, out, *more, "--max_grad_norm", norm)))
        finals.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])


def test_rows_without_a_label_are_refused(
    tiny_tokenizer: Any, make_row: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = masks.encode
    monkeypatch.setattr(masks, "encode", lambda *a: {**real(*a), "labels": [IGNORE] * len(real(*a)["labels"])})
    with pytest.raises(UserError, match=r"none of the .* tokens has a label"):
        masks.encode_all([make_row("plain")], tiny_tokenizer, trigger_ids(tiny_tokenizer))


def test_a_gradient_of_nothing_is_noticed(
    model_folder: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TriggerTrainer.compute_loss

    def none(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs) * 0.0

    monkeypatch.setattr(TriggerTrainer, "compute_loss", none)
    with pytest.raises(UserError, match="changed no weight"):
        sft.main(*sft.parse(argv(model_folder, train_file, tmp_path / "out", "--max_steps", "2", "--batch_size", "4")))
