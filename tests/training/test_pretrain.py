"""``training/pretrain.py``: a run and its continuation, and what is refused before the corpus is made."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neureasoner.data_builders import corpus
from neureasoner.errors import UserError
from neureasoner.training import pretrain

SMALL = {"examples": 60, "hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 2, "kv_heads": 1}
SMALL |= {"head_dim": 16, "per_device_train_batch_size": 8, "save_steps": 2}


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    """The corpus's own is learned from it, which takes seconds."""
    monkeypatch.setattr(corpus, "build_tokenizer", lambda seed: copy.deepcopy(tiny_tokenizer))


def argv(out: Path, *more: str) -> list[str]:
    options: dict[str, Any] = SMALL | {"output_dir": out, "logging_steps": 1, "disable_tqdm": True, "max_steps": 4}
    return [str(x) for k, v in options.items() for x in (f"--{k}", v)] + list(more)


def test_a_run_that_is_continued_ends_where_one_run_does(tmp_path: Path) -> None:
    pretrain.main(argv(tmp_path / "whole", "--lr_scheduler_type", "constant"))
    for steps in ("2", "4", "4"):  # the last has nothing left to do, and does nothing
        pretrain.main(argv(tmp_path / "parts", "--lr_scheduler_type", "constant", "--max_steps", steps))
    one, two = (load_file(tmp_path / o / "model.safetensors") for o in ("whole", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    state = json.loads((tmp_path / "parts" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [h["step"] for h in state["log_history"] if "loss" in h] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--learning_rate", "0"], "learning_rate"),
        (["--max_steps", "0"], "max_steps"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "eval_strategy"),
        (["--train_sampling_strategy", "random"], "train_sampling_strategy"),
        (["--data_seed", "3"], "data_seed"),
        (["--report_to", "wandbb"], "report_to 'wandbb'"),
        (["--fp16", "true", "--use_cpu", "true"], "fp16"),
        (["--resume_from_checkpoint", "/nope"], "resume_from_checkpoint"),
        (["--push_to_hub", "true"], "push_to_hub"),
        (["--load_best_model_at_end", "true", "--save_strategy", "no"], "load_best_model_at_end"),
        (["--learning_rat", "1"], "did you mean '--learning"),
        (["--kv_heads", "3"], "kv_heads 3"),
        (["--layers", "0"], "layers"),
    ],
)
def test_bad_settings_are_one_line_before_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], match: str
) -> None:
    monkeypatch.setattr(corpus, "build_tokenizer", lambda *_: pytest.fail("the corpus was begun"))
    with pytest.raises(UserError, match=match) as e:
        pretrain.main(argv(tmp_path / "out", *more))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--max_steps", "1", "--warmup_steps", "1"], r"1 update.*learning_rate.*warmup_steps"),
        (["--examples", "3"], "examples 3"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type"),
    ],
)
def test_what_would_train_nothing_is_refused(tmp_path: Path, more: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        pretrain.main(argv(tmp_path / "out", *more))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_did_not_move_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(UserError, match="changed no weight"):
        pretrain.main(argv(tmp_path / "out", "--save_strategy", "no"))


def test_a_truncated_file_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("examples: [1")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(pretrain.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: ") and "c.yaml" in said and said.count("\n") == 1
