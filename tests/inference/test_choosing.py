"""Triggers that choose tokens (``tokens``, ``phase``), windows of evaluation, strengths drawn or taken from a score:
each held against a loop written by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.forward import cache_argument
from neureasoner.inference.bake import refusal
from neureasoner.inference.controller import Controller
from neureasoner.inference.controls import random_trigger
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.plan_yaml import rule_from_dict, rule_to_dict
from neureasoner.inference.rules import Rule as Ruled

_spec = importlib.util.spec_from_file_location("choosing_by_hand", Path(__file__).parent / "by_hand.py")
assert _spec and _spec.loader
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)
rule, steer = by_hand.rule, by_hand.steer

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(7))
DENSE = Direction({"residual:0": VECTOR}, "positive = test")
SITE = ("residual:0",)


def by_loop(model: Any, tokenizer: Any, prompt: list[int], acts: Any, tokens: int = 50) -> tuple[list[int], int]:
    """Greedy, one prompt: ``acts(ids so far, is it the prompt's forward)`` says whether the vector is added."""
    ids: list[int] = []
    count = 0

    def edit(h: torch.Tensor, _: torch.Tensor, prefill: bool) -> torch.Tensor:
        nonlocal count
        if acts(ids, prefill):
            count += 1
            h[:, -1] += 1.5 * VECTOR
        return h

    handles = by_hand.install(model, {("residual", 0): edit})
    with torch.no_grad():
        cache, given = None, torch.tensor([prompt])
        for _ in range(tokens):
            out = model(given, use_cache=True, **{cache_argument(model): cache})
            cache = getattr(out, cache_argument(model))
            ids.append(int(out.logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
            given = torch.tensor([[ids[-1]]])
    for handle in handles:
        handle.remove()
    return ids, count


CHOICES = {
    "tokens": ({"tokens": "?"}, lambda ids, prefill, listed, close: not prefill and ids[-1] in listed),
    "tokens of the thinking": (
        {"tokens": "?", "phase": "think"},
        lambda ids, prefill, listed, close: not prefill and ids[-1] in listed and close not in ids,
    ),
    "thinking": ({"decode": True, "phase": "think"}, lambda ids, prefill, listed, close: close not in ids),
    "answer": ({"decode": True, "phase": "answer"}, lambda ids, prefill, listed, close: close in ids),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_rule_acts_at_the_tokens_it_chooses_alone(talker, tokenizer, prompts, kit, name):
    model = talker(eos=-2.0, close=4.0 if name == "answer" else -1.0, seed=2)
    plain = kit.sample(model, tokenizer, prompts, max_new_tokens=50)
    often = np.bincount([t for g in plain for t in g.response_ids if t >= 5]).argsort()[::-1]
    vocabulary = {i: t for t, i in tokenizer.get_vocab().items()}
    listed = [int(i) for i in often if i in vocabulary][:4]
    trigger, acts = CHOICES[name]
    trigger = trigger | ({"tokens": tuple(vocabulary[i] for i in listed)} if "tokens" in trigger else {})
    plan = rule({"add": True}, trigger, site=SITE, strength=Strength(1.5))
    got = steer(model, tokenizer, prompts, plan, DENSE, max_new_tokens=50)
    assert any(g.response_ids != p.response_ids for g, p in zip(got, plain, strict=True))
    total = 0
    for g in got:
        ids, count = by_loop(
            model,
            tokenizer,
            g.prompt_ids,
            lambda ids, p: acts(ids, p, listed, tokenizer.convert_tokens_to_ids("</think>")),
        )
        assert g.response_ids == ids
        assert sum(e["tokens"] for e in g.events) == count
        total += count
    assert total >= 3


def test_a_logit_rule_acts_after_its_tokens_alone(talker, tokenizer, prompts, kit):
    model = talker(eos=-30.0)
    [plain] = kit.sample(model, tokenizer, prompts[:1], max_new_tokens=20)
    vocabulary = {i: t for t, i in tokenizer.get_vocab().items()}
    after = plain.response_ids[4]
    wanted = next(i for i in sorted(vocabulary) if i > 30 and i not in plain.response_ids)
    plan = rule({"add_logits": {vocabulary[wanted]: 1000.0}}, {"tokens": (vocabulary[after],)}, direction=None)
    [g] = steer(model, tokenizer, prompts[:1], plan, {}, max_new_tokens=20)
    follows = [b == wanted for a, b in zip(g.response_ids, g.response_ids[1:], strict=False) if a == after]
    assert follows and all(follows)
    others = [b for a, b in zip(g.response_ids, g.response_ids[1:], strict=False) if a != after]
    assert wanted not in [*others, g.response_ids[0]]


def test_every_and_max_tokens_say_when_a_rule_is_evaluated(talker, tokenizer, prompts):
    model = talker(eos=-30.0, close=-30.0)
    asked: list[int] = []

    def never(row: Any) -> bool:
        asked.append(len(row.tokens))
        return False

    trigger = {"oracle": "o", "every": 7, "min_tokens": 10, "max_tokens": 40}
    steer(
        model,
        tokenizer,
        prompts[:1],
        rule({"add": True}, trigger, site=SITE),
        DENSE,
        oracles={"o": never},
        max_new_tokens=60,
    )
    assert asked == [14, 21, 28, 35]


def test_a_drawn_strength_is_one_number_a_response(talker, tokenizer, prompts):
    model = talker(eos=-30.0)
    plan = rule({"add": True}, {"decode": True}, site=SITE, strength=Strength(2.0, draw=(0.1, 0.3)))
    settings: dict[str, Any] = {"max_new_tokens": 12}
    runs = [steer(model, tokenizer, prompts, plan, DENSE, **settings) for _ in range(2)]
    drawn = [g.events[0]["strength"] for g in runs[0]]
    assert drawn == [g.events[0]["strength"] for g in runs[1]]
    assert len(set(drawn)) == len(prompts) and all(0.2 <= s <= 0.6 for s in drawn)
    for g, s in zip(runs[0], drawn, strict=True):
        given = rule({"add": True}, {"decode": True}, site=SITE, strength=Strength(s))
        [alone] = steer(model, tokenizer, [g.prompt_ids], given, DENSE, **settings)
        assert alone.response_ids == g.response_ids


def test_a_strength_by_score_is_the_score_at_which_the_rule_fired(talker, tokenizer, prompts, kit):
    model = talker(eos=-30.0)
    probe = kit.FakeProbe(lambda n, s: True, kit.FakeFeatures(read=tuple(kit.SITES)))
    trigger = {"probe": "p", "threshold": 0.2, "duration": 3, "max": None}
    plan = rule({"add": True}, trigger, site=SITE, strength=Strength(-2.0, by_score=True))
    found = steer(model, tokenizer, prompts, plan, DENSE, probes={"p": probe}, max_new_tokens=60)
    events = [e for g in found for e in g.events]
    assert events and all(e["strength"] == pytest.approx(-2.0 * e["score"]) for e in events)


def test_values_go_to_yaml_and_back():
    written = Ruled(
        "r",
        Trigger(tokens=("Wait", "So"), phase="think"),
        Action(add=True),
        direction="d",
        strength=Strength(0.5, draw=(0.0, 1.0)),
    )
    row = rule_to_dict(written)
    assert row["trigger"] == {"tokens": ["Wait", "So"], "phase": "think"} and row["strength"]["draw"] == [0.0, 1.0]
    assert rule_from_dict(row, "here") == written
    assert "not a constant (draw)" in refusal(
        Ruled("r", Trigger(always=True), Action(add=True), direction="d", strength=written.strength), []
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{tokens: Wait}", "tokens must be a list of texts"),
        ("{tokens: []}", "tokens needs at least one token"),
        ("{tokens: [a], decode: true}", "exactly one of"),
        ("{always: true, phase: think}", "phase belongs to decode and tokens"),
        ("{decode: true, phase: both}", "phase must be think or answer"),
        ("{decode: true, every: 4}", "every belongs to probe, random and oracle"),
        ("{random: 0.5, every: 0}", "every must be at least 1"),
        ("{random: 0.5, every: 4, immediate: true}", "immediate is every token"),
        ("{random: 0.5, max_tokens: 5, min_tokens: 9}", "max_tokens is 5, before it is first evaluated"),
        ("{random: 0.5, max_tokens: 5, every: 9}", "max_tokens is 5, before it is first evaluated"),
        ("{decode: true}, strength: {by_score: true}", "by_score needs the score of a probe or gate"),
        ("{decode: true}, strength: {draw: [1, 0]}", r"draw must be \[low, high\]"),
        ("{decode: true}, strength: {draw: 1}", r"draw must be \[number, number\]"),
    ],
)
def test_bad_values_are_named(tmp_path, row, message):
    (tmp_path / "plan.yaml").write_text(
        f"name: x\nrules: [{{name: r, direction: d, action: {{add: true}}, trigger: {row}}}]"
    )
    with pytest.raises(UserError, match=message):
        Plan.load(tmp_path)


def test_forced_texts_take_no_chosen_tokens():
    with pytest.raises(UserError, match="tokens belongs to tensor actions"):
        Rule("r", Trigger(tokens=("a",)), Action("x"))


def test_what_the_tokenizer_lacks_is_named(make_model, tokenizer):
    plan = Plan("t", (rule({"add": True}, {"tokens": ("no single token",)}, site=SITE),))
    with pytest.raises(UserError, match=r"rule r: tokens: 'no single token' is \d+ tokens of this tokenizer"):
        Controller(make_model(), tokenizer, plan, directions={"d": DENSE})


def test_a_coin_takes_the_place_of_chosen_tokens_in_the_thinking_alone():
    def plan(**more: Any) -> Plan:
        return Plan("t", (Rule("r", Trigger(tokens=("a",), **more), Action(add=True), SITE, "d"),))

    [coin] = random_trigger(plan(phase="think"), {"r": 0.25}).rules
    assert coin.trigger.random == 0.25 and coin.trigger.immediate and coin.trigger.duration == 1
    with pytest.raises(UserError, match="rule r acts at tokens of the answer too"):
        random_trigger(plan(), {"r": 0.25})
