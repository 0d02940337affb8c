"""Rows that have ended leave the batch and nothing else changes: against stock ``generate``, and with all rows kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.inference import decode, narrowing
from neureasoner.inference.controller import Controller
from neureasoner.inference.decode import Generation, generate_batch, generation_config
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.sampling import left_padded

TOKENS = 90
DENSE = Direction({"residual:0": torch.randn(32, generator=torch.Generator().manual_seed(3))}, "positive = test")
ADD = Action(add=True)
RULES = {
    "forced": [Rule("f", Trigger(random=0.3, cooldown=0), Action("<INTRA>"))],
    "always": [Rule("r", Trigger(always=True), ADD, direction="d")],
    "boundary": [Rule("r", Trigger(boundary=True), ADD, direction="d", strength=Strength(3.0))],
    "decode": [Rule("r", Trigger(decode=True), ADD, direction="d", strength=Strength(0.5))],
    "gated by a coin": [Rule("r", Trigger(always=True, gate=0.5), ADD, direction="d")],
    "thinking": [
        Rule("r", Trigger(decode=True, phase="think"), ADD, direction="d", strength=Strength(0.5, draw=(0, 1)))
    ],
    "tokens": [Rule("r", Trigger(tokens=tuple("0123456789")), ADD, direction="d", strength=Strength(3.0))],
    "lasting": [Rule("r", Trigger(random=0.3, duration=3), ADD, direction="d", strength=Strength(3.0))],
    "logits": [Rule("b", Trigger(always=True), Action(add_logits={"7": 2.0}))],
    "together": [
        Rule("f", Trigger(random=0.2, cooldown=1), Action("<INTER>")),
        Rule("s", Trigger(boundary=True), ADD, direction="d", strength=Strength(2.0)),
        Rule("b", Trigger(boundary=True), Action(add_logits={"9": 2.0})),
    ],
}


@pytest.fixture(scope="module")
def model(talker: Any) -> Any:
    return talker(eos=2.5)


@pytest.fixture(scope="module")
def many(prompts: list[list[int]]) -> list[list[int]]:
    return prompts * 4


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row that ends leaves at once."""
    monkeypatch.setattr(narrowing, "EVERY", 1)
    monkeypatch.setattr(narrowing, "LEAST", 0.0)


@pytest.fixture
def widths(model: Any) -> Any:
    """How many rows the first block reads in each forward."""
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    yield seen
    handle.remove()


def run(model: Any, tokenizer: Any, prompts: Any, plan: Plan | None = None, **settings: Any) -> list[Generation]:
    how = {"max_new_tokens": TOKENS, "temperature": 0.8, "seed": 5} | settings
    record = how.pop("record", ())
    controller = None
    if plan is not None:
        controller = Controller(model, tokenizer, plan, directions={"d": DENSE}, record=record)
    return generate_batch(model, tokenizer, prompts, controller=controller, **how)


def by_stock_generate(model: Any, tokenizer: Any, prompts: Any, temperature: float) -> list[list[int]]:
    config = generation_config(model, tokenizer, TOKENS, temperature, 0.95)
    ids, mask = left_padded(prompts, config.pad_token_id, "cpu")
    torch.manual_seed(5)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
    ends = set(config.eos_token_id)
    return [row[: next((t + 1 for t, i in enumerate(row) if i in ends), len(row))] for row in out]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("every", [1, 8])
def test_the_tokens_are_those_of_stock_generate(model, tokenizer, many, widths, monkeypatch, every, temperature):
    want = by_stock_generate(model, tokenizer, many, temperature)
    stock = list(widths)
    widths.clear()
    monkeypatch.setattr(narrowing, "EVERY", every)
    got = run(model, tokenizer, many, temperature=temperature)
    assert [g.response_ids for g in got] == want
    assert len(widths) == len(stock) and set(stock) == {16}
    assert sum(widths) < (0.6 if temperature else 0.9) * sum(stock)


def test_the_model_reads_no_row_longer_than_its_answer(model, tokenizer, many, widths, often):
    lengths = [len(g.response_ids) for g in run(model, tokenizer, many)]
    assert len(set(lengths)) > 5
    # forward t reads token t - 1; the last token of a row is never read
    assert widths == [16, *(sum(n > t for n in lengths) for t in range(1, max(lengths)))]


@pytest.mark.parametrize("name", RULES)
def test_a_plan_does_the_same_with_and_without(model, tokenizer, many, widths, often, monkeypatch, name):
    plan = Plan("test", tuple(RULES[name]))
    record = ["residual:1", "neuron:0[3,5]", "logits"]
    got = run(model, tokenizer, many, plan, record=record)
    assert widths[-1] < 16
    monkeypatch.setattr(decode, "finished_rows_leave", lambda *_: nullcontext())
    want = run(model, tokenizer, many, plan, record=record)
    assert widths[-1] == 16
    assert sum(len(g.events) for g in want) >= 5
    for a, b in zip(got, want, strict=True):
        assert (a.response_ids, a.forced, a.events, a.finished) == (b.response_ids, b.forced, b.events, b.finished)
        for site in record:
            assert a.series[site].shape == (len(a.response_ids) - 1, b.series[site].shape[1])
            np.testing.assert_allclose(a.series[site], b.series[site], atol=2e-5)


def test_strengths_given_by_row_stay_with_their_rows(model, tokenizer, many, often, monkeypatch):
    plan = Plan("t", (Rule("r", Trigger(always=True), ADD, direction="d", strength=Strength(per_row=True)),))
    strengths = {"r": [(-1) ** i * i / 8 for i in range(16)]}
    got = run(model, tokenizer, many, plan, strengths=strengths)
    monkeypatch.setattr(decode, "finished_rows_leave", lambda *_: nullcontext())
    want = run(model, tokenizer, many, plan, strengths=strengths)
    assert [g.response_ids for g in got] == [g.response_ids for g in want]


def test_one_row_sets_no_hook(model, tokenizer, prompts):
    with narrowing.finished_rows_leave(model, 1, [2]):
        assert not model._forward_pre_hooks and not model._forward_hooks


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ZeroDivisionError), narrowing.finished_rows_leave(model, 3, [2]):
        raise ZeroDivisionError
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_cache_of_another_kind_keeps_its_rows(model, tokenizer, many, widths, often, monkeypatch):
    want = [g.response_ids for g in run(model, tokenizer, many)]
    widths.clear()
    monkeypatch.setattr(narrowing, "DynamicCache", type("Other", (), {}))
    assert [g.response_ids for g in run(model, tokenizer, many)] == want
    assert set(widths) == {16}
