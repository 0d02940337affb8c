"""``training/sft.py``: the batch that trains, an interrupted run, a finished one, bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.data_builders.encoding import IGNORE, TooLong, encode_row, prompt_text
from neureasoner.data_builders.layouts import Reconstruction, read_reconstructions
from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA
from neureasoner.training import sft
from neureasoner.training.batches import LikeLengths
from neureasoner.training.checkpoints import last_whole
from neureasoner.training.masks import encode, encode_all
from neureasoner.training.triggers import trigger_ids

SCRIPT = Path(__file__).parents[2] / "training" / "sft.py"
EOS = "<|im_end|>"


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = {"model": model, "data": data, "out": out, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"max_steps": 4, "save_steps": 2}
    return [str(x) for k, v in options.items() for x in (f"--{k}", v)] + list(more)


def spans_of(flags: list[bool], ids: list[int], tokenizer: Any) -> list[str]:
    """Texts of the runs of tokens for which ``flags`` is true."""
    runs: list[list[int]] = []
    for i, flag in enumerate(flags):
        if flag and (i == 0 or not flags[i - 1]):
            runs.append([])
        if flag:
            runs[-1].append(ids[i])
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("mask_failure", [False, True])
def test_promise_6_labels_are_ignored_exactly_on_prompt_and_trigger(
    model_folder: Path, train_file: Path, tmp_path: Path, added: bool, mask_failure: bool
) -> None:
    """Read from the collated batches of the trainer's own dataloader, with triggers of one id and of several."""
    more = ["--per_device_train_batch_size", "4", "--add_triggers", str(added), "--mask_failure", str(mask_failure)]
    trainer, about = sft.build(*sft.parse(arguments(model_folder, train_file, tmp_path / "out", *more)))
    tokenizer = trainer.processing_class
    assert all((len(ids) == 1) == added for ids in about["triggers"].values())
    by_text = {prompt_text(tokenizer, r.prompt) + r.response + EOS: r for r in read_reconstructions(train_file)}
    seen = set()
    for batch in trainer.get_train_dataloader():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            n = int(mask.sum())
            assert (labels[n:] == IGNORE).all(), "padding does not train"
            ids, labels = ids[:n].tolist(), labels[:n].tolist()
            assert all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True))
            text = tokenizer.decode(ids)
            row = by_text[text]
            seen.add(row.id)
            prompt, response = prompt_text(tokenizer, row.prompt), row.response + EOS
            masked = spans_of([label == IGNORE for label in labels], ids, tokenizer)
            trained = spans_of([label != IGNORE for label in labels], ids, tokenizer)
            if row.trigger_span is None:
                assert masked == [prompt] and trained == [response]
                continue
            (a, b), (f, g) = row.trigger_span, row.failure_span or (0, 0)
            if mask_failure:  # the token that closes the failed step, '.\n\n' here, trains
                assert masked == [prompt, row.response[f : g - 1], row.response[a:b]]
                assert trained == [response[:f], ".\n\n", response[b:]]
            else:
                assert masked == [prompt, row.response[a:b]]
                assert trained == [response[:a], response[b:]], "the failure trains, as in the paper"
                ignored = [i for i, label in enumerate(labels) if label == IGNORE]
                n_prompt = len(tokenizer(prompt).input_ids)
                wanted = about["triggers"][row.response[a:b]]
                assert [ids[i] for i in ignored[n_prompt:]] == wanted, "exactly the forced ids"
    assert len(seen) == 12


def test_failure_mask_keeps_a_separator_of_its_own(
    tiny_tokenizer: Any, make_row: Callable[..., Reconstruction]
) -> None:
    row = make_row("intra")
    assert row.failure_span
    start, end = row.failure_span[0], row.failure_span[1] - 1  # ends before '.\n\n'
    shorter = Reconstruction(**{**vars(row), "failure_span": (start, end)})
    encoded = encode_row(shorter, tiny_tokenizer, trigger_ids(tiny_tokenizer), mask_failure=True)
    hidden = [i for i, (a, b) in enumerate(encoded.spans) if a < end and b > start]
    assert {encoded.labels[i] for i in hidden} == {IGNORE}
    assert tiny_tokenizer.decode([encoded.input_ids[hidden[-1]]]) == "8"
    assert encoded.labels[hidden[-1] + 1] == encoded.input_ids[hidden[-1] + 1]


def test_a_row_is_never_cut(tiny_tokenizer: Any, make_row: Callable[..., Reconstruction]) -> None:
    ids, rows = trigger_ids(tiny_tokenizer), [make_row("intra", i, steps=1 + 20 * (i == 2)) for i in range(3)]
    long = len(encode(rows[2], tiny_tokenizer, ids)["input_ids"])
    with pytest.raises(TooLong, match=f"{long} tokens, more than max_length {long - 1}"):
        encode(rows[2], tiny_tokenizer, ids, max_length=long - 1)
    with pytest.raises(UserError, match="too_long: drop"):
        encode_all(rows, tiny_tokenizer, ids, max_length=long - 1)
    said: list[str] = []
    kept, counts = encode_all(rows, tiny_tokenizer, ids, max_length=long - 1, too_long="drop", say=said.append)
    assert len(kept) == 2 and counts["dropped"] == 1 and "1 of 3 rows" in said[0]
    with pytest.raises(UserError, match="no row fits"):
        encode_all(rows, tiny_tokenizer, ids, max_length=5, too_long="drop", say=said.append)


def test_rows_that_do_not_match_their_tokens_are_refused(
    tiny_tokenizer: Any, make_row: Callable[..., Reconstruction]
) -> None:
    ids, row = trigger_ids(tiny_tokenizer), make_row("plain")
    row.response = f"{INTRA}\n" + row.response
    with pytest.raises(UserError, match="holds 1 triggers"):
        encode(row, tiny_tokenizer, ids)
    row.response = "\n\n" + row.response
    with pytest.raises(UserError, match="merge with the end of the prompt"):
        encode(row, tiny_tokenizer, ids)


def test_an_eos_in_the_response_is_not_doubled(tiny_tokenizer: Any, make_row: Callable[..., Reconstruction]) -> None:
    ids, row = trigger_ids(tiny_tokenizer), make_row("plain")
    plain = encode(row, tiny_tokenizer, ids)
    row.response += EOS
    assert encode(row, tiny_tokenizer, ids) == plain and plain["labels"][-1] == tiny_tokenizer.eos_token_id


class Stop(Exception):
    """Stands for kill -9 in a test that stays in one process."""


def killer(step: int) -> Any:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Stop

    return Kill()


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_promise_9_a_killed_run_goes_on_to_the_same_weights(
    model_folder: Path, train_file: Path, tmp_path: Path, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two epochs of three updates; killed in the second, with a half-written checkpoint lying about."""
    from safetensors.torch import load_file

    def run(out: str, *callbacks: Any) -> dict[str, Any]:
        more = ["--max_steps", "6", "--train_sampling_strategy", order, "--eval_share", "0.1"]
        return sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / out, *more)), callbacks)

    whole = run("whole")
    with pytest.raises(Stop):
        run("killed", killer(5))
    half = tmp_path / "killed" / "checkpoints" / "checkpoint-5"
    shutil.copytree(tmp_path / "killed" / "checkpoints" / "checkpoint-4", half)
    (half / "trainer_state.json").write_text('{"global_step": 5, "log_')
    assert not (tmp_path / "killed" / "stage.json").exists()
    capsys.readouterr()
    resumed = run("killed")
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    assert resumed["steps"] == 6 and resumed["loss"] == whole["loss"]
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "killed"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    log = json.loads((tmp_path / "killed" / "log.json").read_text())
    assert [h["step"] for h in log if "loss" in h] == [1, 2, 3, 4, 5, 6], "every update once"
    assert run("killed") == resumed and "nothing to do" in capsys.readouterr().out


def test_the_folder_holds_a_plain_model_and_no_pickle(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    from neureasoner.models import load

    out = tmp_path / "out"
    summary = sft.main(*sft.parse(arguments(model_folder, train_file, out, "--max_steps", "1", "--warmup_steps", "0")))
    files = {p.name for p in out.iterdir() if p.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "stage.json", "log.json", "loss.png"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pth", ".tmp"))]
    model, tokenizer = load(str(out))
    assert trigger_ids(tokenizer) == summary["triggers"] and len(summary["triggers"][INTER]) == 1
    assert model.config.use_cache


@pytest.mark.parametrize("lora", ["0", pytest.param("4", marks=pytest.mark.slow)])
def test_activation_checkpointing_changes_no_loss(
    model_folder: Path, train_file: Path, tmp_path: Path, lora: str
) -> None:
    from torch.nn.modules.module import register_module_forward_pre_hook

    passes: list[str] = []  # of MLPs: those of checkpointed blocks run forward once more in the backward pass
    counter = register_module_forward_pre_hook(
        lambda module, *_: passes.append("") if type(module).__name__.endswith("MLP") else None
    )

    def losses(name: str, *more: str) -> list[float]:
        given = ("--max_steps", "3", "--lora", lora, "--learning_rate", "1e-2", "--logging_steps", "1", *more)
        sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / name, *given)))
        return [h["loss"] for h in json.loads((tmp_path / name / "log.json").read_text()) if "loss" in h]

    plain, once = losses("plain"), len(passes)
    checkpointed = losses("again", "--activation_checkpointing", "true")
    counter.remove()
    assert checkpointed == pytest.approx(plain, abs=1e-5) and plain[0] != plain[-1]
    assert len(passes) - once == 2 * once


def test_other_settings_in_the_same_folder_are_refused(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    argv = arguments(model_folder, train_file, tmp_path / "out", "--max_steps", "1", "--warmup_steps", "0")
    sft.main(*sft.parse(argv))
    with pytest.raises(UserError, match="other settings"):
        sft.main(*sft.parse([*argv, "--learning_rate", "0.5"]))
    sft.main(*sft.parse([*argv, "--logging_steps", "7"]))  # does not change the weights


def test_only_whole_checkpoints_count(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sft.main(*sft.parse(arguments(model_folder, train_file, out)))
    folder = out / "checkpoints"
    assert last_whole(folder) == str(folder / "checkpoint-4")
    for name in ("optimizer.pt", "model.safetensors", "trainer_state.json", "scheduler.pt", "rng_state.pth"):
        copy = shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-9")
        state = json.loads((copy / "trainer_state.json").read_text()) | {"global_step": 9}
        (copy / "trainer_state.json").write_text(json.dumps(state))
        assert last_whole(folder) == str(copy)
        (copy / name).unlink()
        assert last_whole(folder) == str(folder / "checkpoint-4"), name
        shutil.rmtree(copy)
    weights = folder / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert last_whole(folder) == str(folder / "checkpoint-2")
    assert last_whole(tmp_path / "nothing") is None


def test_like_lengths_is_a_permutation_that_epoch_and_seed_fix() -> None:
    lengths = [(i * 37) % 101 for i in range(1003)]
    sampler = LikeLengths(lengths, 8, 1)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1003)) and list(sampler) == orders[-1]
    assert orders[0] != orders[1]
    spread = [max(b) - min(b) for i in range(0, 1000, 8) for b in [[lengths[j] for j in orders[0][i : i + 8]]]]
    assert sum(spread) / len(spread) < 10


def test_paper_defaults() -> None:
    script, args = sft.parse(["--data", "x", "--out", "y"])
    assert (script.batch_size, script.mask_failure) == (64, False)
    assert (args.num_train_epochs, args.learning_rate, args.warmup_steps) == (1, 1e-5, 0.05)
    assert (str(args.lr_scheduler_type.value), args.max_length) == ("cosine", 16_384)
    assert args.use_cpu != torch.cuda.is_available() and args.bf16 == torch.cuda.is_available()


def test_recipe_parses_and_the_command_line_wins() -> None:
    recipe = str(SCRIPT.parents[1] / "configs" / "recipes" / "tiny" / "sft.yaml")
    script, args = sft.parse(["--config", recipe, "--data", "x", "--out", "y", "--learning_rate", "1e-4"])
    assert (script.mask_failure, script.batch_size, args.learning_rate) == (True, 8, 1e-4)
    assert args.max_length is not None and args.max_length > 1024


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--data", "x"], "--out"),
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--data", "x", "--out", "y", "--learning_rat", "1"], "learning_rat"),
        (["--data", "x", "--out", "y", "--learning_rate", "fast"], "learning_rate"),
        (["--data", "x", "--out", "y", "--eval_share", "2"], "eval_share"),
        (["--data", "x", "--out", "y", "--too_long", "cut"], "too_long"),
    ],
)
def test_bad_arguments_are_one_line(argv: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as e:
        sft.parse(argv)
    assert "\n" not in str(e.value)


def test_unknown_yaml_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: x\nout: y\nlearnin_rate: 1\n")
    with pytest.raises(UserError, match="learnin_rate"):
        sft.parse(["--config", str(tmp_path / "c.yaml")])


def test_bad_rows_are_named(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    lines = train_file.read_text().splitlines()
    row = json.loads(lines[0]) | {"level": "other"}
    train_file.write_text("\n".join([lines[1], json.dumps(row)]))
    with pytest.raises(UserError, match="line 2: level 'other'"):
        sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "out")))
    with pytest.raises(UserError, match="no multiple"):
        more = ["--per_device_train_batch_size", "3"]
        train_file.write_text(lines[0])
        sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "out", *more)))
    assert list((tmp_path / "out").iterdir()) == [], "nothing is left that would refuse the corrected run"


def test_bad_settings_and_rows_are_told_before_the_model_is_loaded(
    model_folder: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neureasoner import models

    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded first"))

    def refused(text: str, *more: str) -> None:
        with pytest.raises(UserError, match=text):
            sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "out", *more)))

    n = len({json.loads(line)["problem"]["id"] for line in train_file.read_text().splitlines()})
    refused(f"eval_share 0.99 of {n} problems holds out {n}, so nothing is left to train on", "--eval_share", "0.99")
    refused(f"eval_share 0.001 of {n} problems holds out 0, so nothing is left to eval", "--eval_share", "0.001")
    refused("no multiple", "--per_device_train_batch_size", "3")
    train_file.write_text("{}\n")
    refused("line 1")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_none_stop_the_run(
    model_folder: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from neureasoner.training.batches import TriggerTrainer

    real = TriggerTrainer.compute_loss

    def broken(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and what == "gradient":
            next(model.parameters()).register_hook(lambda g: g * float("inf"))
        loss = real(self, model, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 and what == "loss" else loss

    monkeypatch.setattr(TriggerTrainer, "compute_loss", broken)
    with pytest.raises(UserError, match=rf"step 2: the {what} .*lower learning_rate"):
        sft.main(*sft.parse(arguments(model_folder, train_file, tmp_path / "out", "--save_steps", "1")))
    assert not (tmp_path / "out" / "stage.json").exists()
    assert [p.name for p in (tmp_path / "out" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]


def test_help_does_not_import_torch() -> None:
    began = time.time()
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "--mask_failure" in done.stdout and "accelerate launch" in done.stdout and time.time() - began < 5


@pytest.mark.slow
def test_promise_9_accelerate_launch_killed_and_run_again(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    """A real launch, a real kill -9 once the first checkpoint is whole, the same command again."""
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", "1"]  # two threads thrash where the cores are shared
    more = ["--max_steps", "60", "--save_steps", "5"]
    command = [*launch, str(SCRIPT), *arguments(model_folder, train_file, out, *more)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        for _ in range(2400):
            if last_whole(out / "checkpoints") or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            import os

            os.killpg(process.pid, signal.SIGKILL)
    said = process.communicate()[0]
    assert last_whole(out / "checkpoints") and not (out / "stage.json").exists(), said
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming from checkpoint-" in done.stdout, done.stdout + done.stderr
    log = [h["step"] for h in json.loads((out / "log.json").read_text()) if "loss" in h]
    assert log == list(range(1, 61))
    again = subprocess.run(command, capture_output=True, text=True)
    assert "nothing to do" in again.stdout
