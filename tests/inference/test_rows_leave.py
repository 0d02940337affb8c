"""Rows that have ended leave the batch and nothing else changes: against stock ``generate``, and with all rows kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neureasoner import sampler
from neureasoner.directions import Direction
from neureasoner.inference.controller import Controller
from neureasoner.inference.decode import Generation, generate_batch
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
    monkeypatch.setattr(sampler, "LEAST", 0.0)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``never()``: from here on every row stays."""
    return lambda: monkeypatch.setattr(sampler, "LEAST", 1.0)


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


def by_stock_generate(model: Any, prompts: Any, config: Any) -> list[list[int]]:
    ids, mask = left_padded(prompts, config.pad_token_id, "cpu")
    torch.manual_seed(5)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
    ends = set(config.eos_token_id)
    return [row[: next((t + 1 for t, i in enumerate(row) if i in ends), len(row))] for row in out]


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 9}, {"temperature": 1.2, "min_p": 0.05}],
    ids=str,
)
def test_the_tokens_are_those_of_stock_generate(model, tokenizer, many, widths, stock_config, how):
    more = {k: v for k, v in how.items() if k != "temperature"}
    want = by_stock_generate(model, many, stock_config(model, tokenizer, TOKENS, how["temperature"], 0.95, **more))
    stock = list(widths)
    widths.clear()
    got = run(model, tokenizer, many, **how)
    assert [g.response_ids for g in got] == want
    assert len(widths) == len(stock) and set(stock) == {16}
    assert sum(widths) < (0.6 if how["temperature"] else 0.9) * sum(stock)


def test_the_model_reads_no_row_longer_than_its_answer(model, tokenizer, many, widths, often):
    lengths = [len(g.response_ids) for g in run(model, tokenizer, many)]
    assert len(set(lengths)) > 5
    # forward t reads token t - 1; the last token of a row is never read. Equal prompts are read once.
    assert widths == [len(set(map(str, many))), *(sum(n > t for n in lengths) for t in range(1, max(lengths)))]


@pytest.mark.parametrize("name", RULES)
def test_a_plan_does_the_same_with_and_without(model, tokenizer, many, widths, often, never, name):
    plan = Plan("test", tuple(RULES[name]))
    record = ["residual:1", "neuron:0[3,5]", "logits"]
    got = run(model, tokenizer, many, plan, record=record)
    assert widths[-1] < 16
    never()
    want = run(model, tokenizer, many, plan, record=record)
    assert widths[-1] == 16
    assert sum(len(g.events) for g in want) >= 5
    for a, b in zip(got, want, strict=True):
        assert (a.response_ids, a.forced, a.events, a.finished) == (b.response_ids, b.forced, b.events, b.finished)
        for site in record:
            assert a.series[site].shape == (len(a.response_ids) - 1, b.series[site].shape[1])
            np.testing.assert_allclose(a.series[site], b.series[site], atol=2e-5)


def test_strengths_given_by_row_stay_with_their_rows(model, tokenizer, many, often, never):
    plan = Plan("t", (Rule("r", Trigger(always=True), ADD, direction="d", strength=Strength(per_row=True)),))
    strengths = {"r": [(-1) ** i * i / 8 for i in range(16)]}
    got = run(model, tokenizer, many, plan, strengths=strengths)
    never()
    want = run(model, tokenizer, many, plan, strengths=strengths)
    assert [g.response_ids for g in got] == [g.response_ids for g in want]


@pytest.mark.parametrize("name", [None, "forced", "boundary", "together"])
def test_rows_not_asked_for_change_nothing_in_the_others(model, tokenizer, many, widths, often, name):
    plan = None if name is None else Plan("test", tuple(RULES[name]))
    record = ["residual:1", "neuron:0[3,5]"] if plan else []
    whole = run(model, tokenizer, many, plan, record=record)
    widths.clear()
    only = [i % 3 == 1 for i in range(16)]
    some = run(model, tokenizer, many, plan, record=record, only=only)
    assert widths[0] == (16 if plan else len(set(map(str, many)))) and max(widths[1:]) == sum(only) == 5
    for a, b, wanted in zip(some, whole, only, strict=True):
        if wanted:
            assert (a.response_ids, a.events, a.scores) == (b.response_ids, b.events, b.scores)
            for site in record:  # the others left before anything was kept
                np.testing.assert_allclose(a.series[site], b.series[site], atol=2e-5)
        else:
            assert len(a.response_ids) == 1 and not a.events
