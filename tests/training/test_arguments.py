"""What a user writes for ``training/sft.py``: used, refused by name, or told to have no effect; never replaced."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner import models
from neureasoner.errors import UserError
from neureasoner.training import sft
from neureasoner.training.arguments import checkpointing

NEEDED = ["--data", "x", "--out", "y"]


def refused(match: str, *argv: str) -> None:
    with pytest.raises(UserError, match=match) as e:
        sft.parse([*NEEDED, *argv])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("key", "value", "harmless"),
    [
        ("model_init_kwargs", '{"dtype": "bfloat16"}', None),
        ("trust_remote_code", "true", "false"),
        ("dataset_text_field", "text", None),
        ("dataset_kwargs", '{"skip_prepare_dataset": false}', None),
        ("truncation_mode", "keep_start", None),
        ("completion_only_loss", "false", "true"),
        ("assistant_only_loss", "true", "false"),
        ("label_names", "targets", "labels"),
        ("auto_find_batch_size", "true", "false"),
        ("save_only_model", "true", "false"),
        ("push_to_hub", "true", "false"),
        ("load_best_model_at_end", "true", "false"),
        ("gradient_accumulation_steps", "8", "64"),
        ("output_dir", "z", "y"),
        ("eval_strategy", "steps", "no"),
        ("eval_on_start", "true", "false"),
        ("save_strategy", "best", "epoch"),
        ("save_total_limit", "0", "1"),
        ("save_steps", "0", "0.5"),
        ("chat_template_path", "/nope.jinja", None),
        ("per_device_train_batch_size", "0", "2"),
        ("per_device_train_batch_size", "3", "4"),
        ("learning_rate", "0", "1e-9"),
        ("learning_rate", "nan", "1"),
        ("max_steps", "0", "-1"),
        ("num_train_epochs", "0", "0.5"),
        ("seed", "-1", "7"),
        ("dtype", "float8", "bfloat16"),
        ("trigger_init", "zero", "keep"),
        ("triggers", "<A> <A>", "<A> <B>"),
        ("lr_scheduler_kwargs", "{num_cycles", '{"num_cycles": 2}'),
        ("report_to", "wandbb", None),
    ],
)
def test_a_key_is_refused_by_name_and_its_harmless_value_is_not(key: str, value: str, harmless: str | None) -> None:
    if key == "report_to":  # asked of the machine, with the others that depend on it
        with pytest.raises(UserError, match=r"report_to 'wandbb'.*did you mean 'wandb'"):
            sft.check_machine(*sft.parse([*NEEDED, "--report_to", value]))
        return
    refused(key, f"--{key}", *value.split(" ")) if key == "triggers" else refused(key, f"--{key}", value)
    if harmless is not None:
        sft.parse([*NEEDED, f"--{key}", *(harmless.split(" ") if key == "triggers" else [harmless])])


def test_what_is_refused_on_the_command_line_is_refused_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for text, match in {
        "gradient_accumulation_steps: 8": "batch_size 64 in passes of 1 rows makes it 64",
        "assistant_only_loss: true": "assistant_only_loss True",
        "learning_rate: 0": "learning_rate must be",
        "max_steps: 0": "max_steps 0 makes no update",
    }.items():
        config.write_text(text)
        refused(match, "--config", str(config))


def test_accumulation_that_follows_from_the_batch_is_taken() -> None:
    sft.parse(
        [*NEEDED, "--batch_size", "8", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    )
    refused("makes it 4; leave it out, or set batch_size to 10", "--batch_size", "8", "--per_device_train_batch_size",
            "2", "--gradient_accumulation_steps", "5")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("learning_rate: [1", r"c.yaml, line 2: not YAML|c.yaml, line 1: not YAML"),
        ("just text", "expected key: value pairs"),
        ("batch_size: null", "key 'batch_size' has no value"),
        ("learning_rate: [1e-3]", "key 'learning_rate' takes one value"),
        ("learning_rate: {a: 1}", "key 'learning_rate' takes one value"),
        ("learnin_rate: 1", "key 'learnin_rate' is unknown; did you mean 'learning_rate'"),
        ("max_length: 1.5", "max_length"),
        ("packing: perhaps", "packing"),
        ("optim: nonsense", "optim"),
    ],
)
def test_a_bad_file_is_one_line_with_its_key(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    refused(match, "--config", str(tmp_path / "c.yaml"))


def test_a_file_is_read_like_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUREASONER_TEST", raising=False)
    (tmp_path / "c.yaml").write_text(
        "save_strategy: no\nlearning_rate: 1e-3\ntriggers: <A>\ntrigger_init: mean\nmax_length: null\nreport_to: none\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nbatch_size: 8\nenv: {NEUREASONER_TEST: 1}\n"
    )
    script, args = sft.parse([*NEEDED, f"--config={tmp_path / 'c.yaml'}", "--batch_size", "16"])
    assert (script.triggers, script.batch_size, args.learning_rate, args.max_length) == (["<A>"], 16, 1e-3, None)
    assert (args.save_strategy, args.report_to, args.lr_scheduler_kwargs) == ("no", [], {"num_cycles": 2})
    assert os.environ["NEUREASONER_TEST"] == "1"
    monkeypatch.delenv("NEUREASONER_TEST")


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--config"], "--config needs a YAML file"),
        (["--learning_rat", "1"], "option '--learning_rat' is unknown; did you mean '--learning"),
        (["stray"], "option 'stray' is unknown"),
        (["--accelerator_config", "{x"], "accelerator_config: not JSON"),
        (["--accelerator_config", '{"zz": 1}'], "zz"),
    ],
)
def test_a_bad_command_line_is_one_line(argv: list[str], match: str) -> None:
    refused(match, *argv)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--lora_alpha", "8"], "lora_alpha has no effect: lora is 0"),
        (["--lora_alpha", "8", "--lora", "4"], ""),
        (["--eval_packing", "true"], "eval_packing has no effect"),
        (["--eval_packing", "true", "--packing", "true"], ""),
        (["--per_device_eval_batch_size", "2"], "per_device_eval_batch_size has no effect"),
        (["--per_device_eval_batch_size", "2", "--eval_share", "0.1"], ""),
        (["--shuffle_dataset", "true"], "shuffle_dataset has no effect"),
        (["--disable_tqdm", "false"], "disable_tqdm has no effect"),
        (["--disable_tqdm", "true"], ""),
        (["--trigger_descriptions", "a", "b"], "trigger_descriptions has no effect"),
        (["--trigger_descriptions", "a", "b", "--trigger_init", "description"], ""),
        (["--hub_model_id", "me/it"], "hub_model_id has no effect"),
        ([], ""),
    ],
)
def test_what_has_no_effect_is_said_once(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    sft.parse([*NEEDED, *argv])
    out = capsys.readouterr().out
    assert out.count("has no effect") == bool(told) and told in out


def test_evaluation_options_that_contradict_each_other_are_refused() -> None:
    refused("eval_share", "--eval_share", "0.1", "--eval_strategy", "no")
    refused("eval_steps 5 needs eval_strategy: steps", "--eval_share", "0.1", "--eval_steps", "5")
    _, args = sft.parse([*NEEDED, "--eval_share", "0.1", "--eval_strategy", "steps", "--eval_steps", "5"])
    assert (args.eval_strategy, args.eval_steps) == ("steps", 5)


def test_the_two_names_of_checkpointing_are_one_option() -> None:
    for value in ("true", "false"):
        _, args = sft.parse([*NEEDED, "--gradient_checkpointing", value])
        assert getattr(args, checkpointing()) == args.gradient_checkpointing == (value == "true")
    _, args = sft.parse(NEEDED)
    assert args.gradient_checkpointing == torch.cuda.is_available(), "and not TRL's own default"
    if checkpointing() != "gradient_checkpointing":
        refused("gradient_checkpointing", "--gradient_checkpointing", "true", "--activation_checkpointing", "false")


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--fp16", "true"], "fp16 needs a GPU"),
        (["--attention", "flsh"], "attention 'flsh' is unknown"),
        (["--attention", "flex_attention"], "attention 'flex_attention' needs a GPU"),
        (["--activation_offloading", "true"], "activation_offloading needs a GPU"),
        (["--accelerator_config", '{"split_batches": true}'], "split_batches"),
        (["--max_length", "-1"], "max_length must be positive"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(argv: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        sft.check_machine(*sft.parse([*NEEDED, "--use_cpu", "true", *argv]))


def test_every_logger_that_is_not_installed_is_refused() -> None:
    from transformers.integrations import integration_utils as known

    missing = set(known.INTEGRATION_TO_CALLBACK) - {*known.get_available_reporting_integrations(), "flyte"}
    assert missing, "no machine has them all"
    for name in sorted(missing):
        with pytest.raises(UserError, match=f"report_to '{name}'.*not installed"):
            sft.check_machine(*sft.parse([*NEEDED, "--report_to", name]))
    sft.check_machine(*sft.parse([*NEEDED, "--report_to", "all"]))


def test_fp16_alone_does_not_meet_our_own_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sft.presets({})["bf16"] and sft.presets({"fp16": False})["bf16"]
    assert not sft.presets({"fp16": True})["bf16"] and not sft.presets({"fp16": "True"})["bf16"]


def test_a_refusal_is_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sft.py", *NEEDED, "--assistant_only_loss", "true"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(sft.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: assistant_only_loss") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--eos_token", "<nope>"], "eos_token '<nope>'"),
        (["--pad_token", "<nope>"], "pad_token '<nope>'"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type 'cosine_with_min_lr'"),
        (["--resume_from_checkpoint", "/nope/checkpoint-3"], "/nope/checkpoint-3 is no folder"),
        (["--dataloader_drop_last", "true", "--batch_size", "16", "--per_device_train_batch_size", "16"], "batch_size"),
    ],
)
def test_settings_against_rows_and_tokenizer_come_before_the_model(
    model_folder: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], match: str
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    argv = ["--model", str(model_folder), "--data", str(train_file), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=match):
        sft.main(*sft.parse([*argv, "--batch_size", "4", *more]))
    assert not list((tmp_path / "out").glob("*")), "corrected settings may use the folder"


def test_a_template_file_is_used_for_the_rows_and_saved(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("Q: {{ messages[0].content }}\nA:\n<think>")
    argv = [
        "--model",
        str(model_folder),
        "--data",
        str(train_file),
        "--out",
        str(tmp_path / "out"),
        "--batch_size",
        "4",
    ]
    trainer, _ = sft.build(*sft.parse([*argv, "--chat_template_path", str(template)]))
    texts: list[Any] = [trainer.processing_class.decode(ids) for ids in trainer.train_dataset["input_ids"]]
    assert all(t.startswith("Q: What is 3 + 4") and "\nA:\n<think>Let me" in t for t in texts)
    assert trainer.processing_class.chat_template == template.read_text()
    template.write_text("{% if x")
    with pytest.raises(UserError, match="chat_template_path"):
        sft.build(*sft.parse([*argv, "--chat_template_path", str(template)]))


def test_rows_end_with_the_eos_token_that_was_asked_for(
    model_folder: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--model",
        str(model_folder),
        "--data",
        str(train_file),
        "--out",
        str(tmp_path / "out"),
        "--batch_size",
        "4",
    ]
    trainer, _ = sft.build(*sft.parse([*argv, "--eos_token", "<|im_start|>", "--pad_token", "<|im_end|>"]))
    tokenizer = trainer.processing_class
    eos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.eos_token_id == eos == trainer.model.config.eos_token_id
    assert tokenizer.pad_token == "<|im_end|>"
    for row in trainer.train_dataset:
        assert row["input_ids"][-1] == row["labels"][-1] == eos
    assert "rows end with '<|im_start|>'" in capsys.readouterr().out
