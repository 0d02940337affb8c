"""Templates that delete thinking, with their own texts (TRL carries them): the thinking is in the ids and it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from neureasoner.data_builders.encoding import IGNORE, prompt_text
from neureasoner.data_builders.layouts import Reconstruction
from neureasoner.traces import write_rows
from neureasoner.training import sft
from neureasoner.training.templates import open_once

R1, QWEN3 = "deepseek_r1_distill", "qwen3"
# The first release of R1's template, which left it to the model to open the thinking.
CHANGES = {"r1_first": (R1, "<｜Assistant｜><think>\\n'}}{% endif %}", "<｜Assistant｜>'}}{% endif %}")}
PROMPTS = {
    R1: "<｜User｜>What is 3?<｜Assistant｜><think>\n",
    "r1_first": "<｜User｜>What is 3?<｜Assistant｜>",
    QWEN3: "<|im_start|>user\nWhat is 3?<|im_end|>\n<|im_start|>assistant\n",
}


def with_template(tokenizer: Any, name: str) -> Any:
    source, old, new = CHANGES.get(name, (name, "", ""))
    text = (files("trl") / "chat_templates" / f"{source}.jinja").read_text(encoding="utf-8")
    assert old in text
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = text.replace(old, new) if old else text
    return changed


@pytest.mark.parametrize("name", [R1, "r1_first", QWEN3])
def test_templates_delete_thinking_when_they_render_it(tiny_tokenizer: Any, name: str) -> None:
    """What this is all about; if it fails, the templates have changed and the detour is no longer needed."""
    tokenizer = with_template(tiny_tokenizer, name)
    turns = [("user", "What is 3?"), ("assistant", "<think>\nI count.\n</think>\n\nThree."), ("user", "And 4?")]
    text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert "Three." in text and "I count." not in text
    assert prompt_text(tokenizer, "What is 3?") == PROMPTS[name]


@pytest.mark.parametrize("written", ["", "<think>\n", "<think>"])
@pytest.mark.parametrize("name", [R1, "r1_first", QWEN3])
def test_thinking_is_in_the_ids_and_trains(
    make_model: Callable[..., Any], make_row: Callable[..., Reconstruction], tiny_tokenizer: Any, tmp_path: Path,
    name: str, written: str,
) -> None:  # fmt: skip
    """Rows of which the response opens the thinking (a model's own) and does not (imported): the same tokens."""
    tokenizer = with_template(tiny_tokenizer, name)
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plain = [make_row(level, i) for i, level in enumerate(("intra", "inter", "plain"))]
    n = len(written)
    moved = [
        replace(
            row,
            response=written + row.response,
            **{k: v and (v[0] + n, v[1] + n) for k in ("failure_span", "trigger_span", "block_span")
               for v in [getattr(row, k)]},
        )
        for row in plain
    ]  # fmt: skip
    write_rows(tmp_path / "train.jsonl", moved)
    argv = ["--model", tmp_path / "model", "--data", tmp_path / "train.jsonl", "--out", tmp_path / "out"]
    argv += ["--warmup_steps", "0"]
    trainer, _ = sft.build(*sft.parse([str(a) for a in [*argv, "--mask_failure", "true"]]))
    saved = trainer.processing_class
    for row, item in zip(plain, trainer.train_dataset, strict=True):
        ids, labels = item["input_ids"], item["labels"]
        prompt = prompt_text(saved, row.prompt)
        opening = "" if name == R1 else "<think>" if written == "<think>" else "<think>\n"
        assert saved.decode(ids) == prompt + opening + row.response + "<|im_end|>"
        assert ids.count(saved.convert_tokens_to_ids("<think>")) == 1
        n_prompt = len(saved(prompt).input_ids)
        assert set(labels[:n_prompt]) == {IGNORE}
        trained = saved.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORE])
        text = opening + row.response + "<|im_end|>"
        if row.trigger_span and row.failure_span:  # the spans have moved with the text
            (a, b), (f, g) = row.trigger_span, row.failure_span
            text = opening + row.response[:f] + row.response[g - 1 : a] + row.response[b:] + "<|im_end|>"
        assert trained == text and trained.index("Let me see.") < trained.index("</think>")


def test_a_row_without_thinking_is_left_alone(tiny_tokenizer: Any, make_row: Callable[..., Reconstruction]) -> None:
    tokenizer = with_template(tiny_tokenizer, QWEN3)
    row = replace(make_row("plain"), response="Seven.")
    assert open_once([row], tokenizer) == [row]
    assert open_once([make_row("intra")], tiny_tokenizer) == [make_row("intra")]


def test_a_template_that_closes_the_thinking_does_not_open_it(
    tiny_tokenizer: Any, make_row: Callable[..., Reconstruction]
) -> None:
    tokenizer = with_template(tiny_tokenizer, QWEN3)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "enable_thinking is defined and enable_thinking is false", "true"
    )
    assert prompt_text(tokenizer, "?").endswith("</think>\n\n")
    [row] = open_once([make_row("intra")], tokenizer)
    assert row.response == "<think>\n" + make_row("intra").response
