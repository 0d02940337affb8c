"""A model with several end tokens: every stage ends a response with the first of them, and none shows or counts it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.data_builders.config import RolloutsConfig
from neureasoner.data_builders.pairs import Row, Writer
from neureasoner.data_builders.pairs_config import PairsConfig
from neureasoner.data_builders.rollouts import sample_rollouts
from neureasoner.errors import UserError
from neureasoner.inference.plan import Plan
from neureasoner.inference.steered import SteeredModel
from neureasoner.sampler import sample
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.traces import Problem, read_traces, write_rows

SECOND = "<|end_of_text|>"


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [SECOND]}, replace_extra_special_tokens=False)
    return tokenizer


def chain(make_model: Callable[..., Any], ids: list[int]) -> Any:
    """A real model whose greedy continuation of ``ids[0]`` is the rest of ``ids``, each at most once among them."""
    model = make_model("llama", hidden_size=128, tie_word_embeddings=False)
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    with torch.no_grad():
        embeddings.copy_(torch.nn.functional.normalize(torch.randn_like(embeddings), dim=-1))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head.zero_()
        for a, b in pairwise(ids):
            head[b] += 10 * embeddings[a]
    return model


@pytest.fixture(params=["<|im_end|>", SECOND])
def writer(request: Any, make_model: Callable[..., Any], tokenizer: Any) -> tuple[Any, int, list[int]]:
    """(model, the id that ends, the ids written): ``So the sum`` and an end."""
    end = tokenizer.convert_tokens_to_ids(request.param)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    said = tokenizer.encode(" check again", add_special_tokens=False)
    written = [prompt[-1], *said, end]
    assert len(set(written)) == len(written)
    model = chain(make_model, written)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(SECOND), tokenizer.eos_token_id]
    return model, end, written[1:]


@pytest.fixture
def folder(writer: Any, tokenizer: Any, tmp_path: Path) -> Path:
    writer[0].save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    problems = [Problem(str(i), "gsm8k", 1, f"Question {i}?", "4") for i in range(3)]
    write_rows(tmp_path / "p.jsonl", problems)
    return tmp_path


def test_the_sampler_ends_with_either(writer: Any, tokenizer: Any) -> None:
    model, _, said = writer
    ends = eos_ids(model, tokenizer)
    assert len(ends) == 2
    prompts = [[5, 6, said[0]], [said[1]]]
    done = sample(model, prompts, Sampling(20, 0.0), ends=ends, pad=pad_id(tokenizer)).rows
    assert [(row.ids, row.finished) for row in done] == [(said[1:], True), (said[2:], True)]


def test_generate_neither_streams_nor_counts_it(writer: Any, tokenizer: Any) -> None:
    model, _, said = writer
    shown: list[str] = []
    steered = SteeredModel(model, tokenizer, Plan("none"))
    (g,) = steered.generate(["hi"], max_new_tokens=20, temperature=0, on_text=lambda text, _: shown.append(text))
    assert "".join(shown) == " check again"
    assert (g.response_ids, g.finished, g.thinking_tokens) == (said, True, len(said) - 1)
    assert [(s.token_end, s.closed) for s in g.steps] == [(len(said) - 1, False)]


def test_rollouts_are_finished(writer: Any, folder: Path, tokenizer: Any) -> None:
    """Greedy rows in one batch; the shipped files read back hold no padding."""
    _, _, said = writer
    how = {"problems": str(folder / "p.jsonl"), "out": str(folder / "r"), "max_new_tokens": 20, "temperature": 0.0}
    sample_rollouts(RolloutsConfig(model=str(folder / "m"), **how))
    for trace in read_traces(folder / "r" / "traces.jsonl"):
        assert (trace.response_ids, trace.finished, trace.thinking_end) == (said, True, len(said) - 1)
        assert [s.token_end for s in trace.steps] == [len(said) - 1]


def test_pairs_stop_there(writer: Any, tokenizer: Any) -> None:
    model, _, said = writer
    config = PairsConfig(model="x", problems="x", out="x", max_new_tokens=20, temperature=1e-6)
    rows = [Row(Problem("p", "gsm8k", 1, "?", "4"), "p", [7, 8, said[0]]), Row(None, "q", [said[1]])]  # type: ignore[arg-type]
    pairs = Writer(model, tokenizer, config)
    new, _ = pairs.write(rows, 0, 1)
    assert new == [said[1:], said[2:]]
    assert pairs.write(rows, 2, 1)[0] == new, "no step closes before the end"
    assert pairs.trace(rows[0], new[0]).finished


def test_a_tokenizer_without_end_or_padding_runs_to_the_cap(
    make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = tokenizer.pad_token = None
    model = make_model()
    model.generation_config.eos_token_id = None
    done = SteeredModel(model, tokenizer, Plan("none")).generate(["hi", "how are you?"], max_new_tokens=5)
    assert [(len(g.response_ids), g.finished) for g in done] == [(5, False)] * 2


@pytest.mark.parametrize(
    "given", [np.array([5, 9]), {5, 9}, torch.tensor([5, 9]), (5, 9)], ids=lambda x: type(x).__name__
)
def test_a_list_of_any_kind(make_model: Callable[..., Any], tokenizer: Any, given: Any) -> None:
    model = make_model()
    model.generation_config.eos_token_id = given
    assert set(eos_ids(model, tokenizer)) == {5, 9, tokenizer.eos_token_id}


@pytest.mark.parametrize("given", ["x", "5", 5.0, [[5]], True])
def test_an_end_that_is_no_id_is_named(make_model: Callable[..., Any], tokenizer: Any, given: Any) -> None:
    model = make_model()
    model.generation_config.eos_token_id = given
    with pytest.raises(UserError, match="eos_token_id"):
        eos_ids(model, tokenizer)


def test_the_folder_keeps_its_list(writer: Any, folder: Path) -> None:
    """The case rests on it: the list stands in generation_config.json, the tokenizer knows one."""
    assert len(json.loads((folder / "m" / "generation_config.json").read_text())["eos_token_id"]) == 2
