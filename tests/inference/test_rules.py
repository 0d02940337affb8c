"""Order, budgets, cooldowns, windows and the end of the thinking; what a plan may not ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from neureasoner.errors import UserError
from neureasoner.inference.controller import Controller
from neureasoner.inference.plan import Action
from neureasoner.probes.detectors.sequential import Sequential

CLOSE = "Okay, I have finished thinking.\n</think>\n\n"


def ends(g: Any) -> list[int]:
    """Where steps closed, step by step."""
    return [s.token_end for s in g.steps if s.closed]


@pytest.mark.parametrize(("cooldown", "stride"), [(1, 2), (2, 3), (4, 5)])
def test_cooldown_counts_full_steps_after_the_block(talker, tokenizer, prompts, kit, cooldown, stride):
    plan = kit.plan_of(intra=("<INTRA>", {"always": True, "max": 3, "cooldown": cooldown}))
    [g] = kit.sample(talker(seed=1), tokenizer, prompts[3:], plan, temperature=1.0, max_new_tokens=120)
    assert len(ends(g)) > 2 * stride
    # fires at step 0; the next step is the block; `cooldown` full steps; fires again
    assert [e["step"] for e in g.events] == [0, stride, 2 * stride]
    assert [e["token"] for e in g.events] == [ends(g)[e["step"]] for e in g.events]
    assert g.triggers == 3 and sum(g.forced) == 3


def test_budget_and_min_steps(talker, tokenizer, prompts, kit):
    plan = kit.plan_of(
        intra=("<INTRA>", {"always": True, "max": 2, "min_steps": 3}), off=("x", {"always": True, "max": 0})
    )
    for g in kit.sample(talker(), tokenizer, prompts, plan, max_new_tokens=120):
        assert [e["step"] for e in g.events] == [2, 4]


def test_the_first_rule_wins_and_the_others_are_logged(talker, tokenizer, prompts, kit):
    plan = kit.plan_of(
        inter=("<INTER>", {"probe": "p", "max": 1}),
        intra=("<INTRA>", {"probe": "q", "max": 1}),
    )
    probes = {"p": kit.FakeProbe(lambda n, s: s >= 2), "q": kit.FakeProbe(lambda n, s: s >= 2)}
    [g] = kit.sample(talker(), tokenizer, prompts[:1], plan, probes)
    rules = [(e["step"], e["rule"], e["suppressed"]) for e in g.events]
    # a suppressed rule keeps its budget; its window starts anew after the block
    assert rules == [(1, "inter", False), (1, "intra", True), (4, "intra", False)]
    assert g.response_ids[g.events[0]["token"]] == tokenizer.convert_tokens_to_ids("<INTER>")
    [h] = kit.sample(talker(), tokenizer, prompts[:1], plan.select(["intra"]), probes)
    assert [(e["step"], e["rule"]) for e in h.events] == [(1, "intra")]


def test_the_window_starts_anew_after_a_block(talker, tokenizer, prompts, kit):
    features = kit.FakeFeatures()
    probe = kit.FakeProbe(lambda n, s: s == 3, features)
    [g] = kit.sample(
        talker(),
        tokenizer,
        prompts[:1],
        kit.plan_of(intra=("<INTRA>", {"probe": "p"})),
        {"p": probe},
        max_new_tokens=80,
    )
    assert [e["step"] for e in g.events] == [2]
    # max 1: nothing is evaluated once the budget is spent
    assert [len(bounds) - 1 for _, bounds in features.seen] == [1, 2, 3]

    features = kit.FakeFeatures()
    probe = kit.FakeProbe(lambda n, s: s == 3, features)
    plan = kit.plan_of(intra=("<INTRA>", {"probe": "p", "max": 2}))
    [g] = kit.sample(talker(), tokenizer, prompts[:1], plan, {"p": probe}, record=["neuron:1[3,5]"], max_new_tokens=80)
    assert [e["step"] for e in g.events] == [2, 6]
    values, bounds = features.seen[3]  # the first full step after the block, alone
    start, stop = ends(g)[3], ends(g)[4]
    assert bounds == [0, stop - start]
    np.testing.assert_array_equal(values["neuron:1[3,5]"], g.series["neuron:1[3,5]"][start:stop])


def test_closing_the_thinking_ends_the_watch(talker, tokenizer, prompts, kit):
    features = kit.FakeFeatures(level="instance", window=4)
    plan = kit.plan_of(
        instance=(CLOSE, {"probe": "p", "at_step": 4}),
        intra=("<INTRA>", {"oracle": "at", "max": 5}),
    )
    calls: list[tuple[int, int]] = []

    def at(row: Any) -> bool:
        calls.append((row.index, row.steps))
        assert row.thinking and len(row.tokens) == row.bounds[-1] and row.text.endswith("\n")
        return row.index == 1 and row.steps == 1

    probe = kit.FakeProbe(lambda n, s: True, features)
    out = kit.sample(talker(), tokenizer, prompts[:2], plan, {"p": probe}, oracles={"at": at}, max_new_tokens=100)
    ids = tokenizer.encode(CLOSE, add_special_tokens=False)
    watched, repaired = out
    event = next(e for e in watched.events if e["rule"] == "instance")
    assert event["step"] == 3 and event["token"] == ends(watched)[3]
    assert watched.response_ids[event["token"] : event["token"] + len(ids)] == ids
    close = tokenizer.convert_tokens_to_ids("</think>")
    assert watched.thinking_tokens == watched.response_ids.index(close) and len(watched.response_ids) == 100
    # the instance probe sees everything from the first token, and nothing at all once a block stands there
    assert {e["rule"] for e in repaired.events} == {"intra"}
    assert {tuple(b) for _, b in features.seen} == {(0, *ends(watched)[:4])}
    assert [c for c in calls if c[0] == 0] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert (1, 1) in calls and (1, 2) not in calls  # step 2 is the block


def test_a_prompt_that_closed_the_thinking_is_not_watched(talker, tokenizer, prompts, kit):
    closed = prompts[0] + tokenizer.encode(CLOSE, add_special_tokens=False)
    plan = kit.plan_of(intra=("<INTRA>", {"always": True}))
    a, b = kit.sample(talker(), tokenizer, [closed, prompts[0]], plan)
    assert not a.events and a.thinking_tokens == 0 and a.steps == [] and b.events


def test_immediate_and_consecutive(talker, tokenizer, prompts, kit):
    [plain] = kit.sample(talker(), tokenizer, prompts[:1])
    features = kit.FakeFeatures()
    probe = kit.FakeProbe(lambda n, s: n > 1, features)
    plan = kit.plan_of(intra=("<INTRA>", {"probe": "p", "immediate": True, "consecutive": 3}))
    [g] = kit.sample(talker(), tokenizer, prompts[:1], plan, {"p": probe})
    assert [e["token"] for e in g.events] == [4]
    assert [b[-1] for _, b in features.seen] == [1, 2, 3, 4]
    assert g.response_ids[:4] == plain.response_ids[:4]


def test_a_probes_own_rule_decides_and_starts_anew_after_an_intervention(talker, tokenizer, prompts, kit):
    steps = []
    probe = kit.FakeProbe(lambda n, s: steps.append(s) is None, rule=Sequential("consecutive", m=3))
    plan = kit.plan_of(intra=("<INTRA>", {"probe": "p", "max": 2}))
    [g] = kit.sample(talker(), tokenizer, prompts[:1], plan, {"p": probe}, max_new_tokens=120)
    assert len(g.events) == 2 and steps.index(3) == 2
    first, second = ([s["step"] for s in g.scores if s["step"] == e["step"]] for e in g.events)
    assert len(first) == len(second) == 1, "two scores in a row said nothing, the third fired"
    again = steps[steps.index(3) + 1 :]
    assert again[:3] == [again[0], again[0] + 1, again[0] + 2], "three more before it fires again"


def test_random_triggers_depend_on_seed_and_row_only(talker, tokenizer, prompts, kit):
    plan = kit.plan_of(intra=("<INTRA>", {"random": 0.25, "max": 20}))
    settings = {"max_new_tokens": 200}
    out = kit.sample(talker(), tokenizer, prompts * 4, plan, **settings)
    tried = sum(len(g.scores) for g in out)
    assert 0.13 < sum(g.triggers for g in out) / tried < 0.37, "about one in four evaluations"
    [one] = kit.sample(talker(), tokenizer, [prompts[2]], plan, indices=[2], **settings)
    assert [e["token"] for e in one.events] == [e["token"] for e in out[2].events]
    assert [e["token"] for e in out[2].events] != [e["token"] for e in out[6].events]


def test_what_a_plan_may_not_ask_for(talker, tiny_tokenizer, tokenizer, make_model, kit):
    model = talker()
    plan = kit.plan_of(intra=("<INTRA>", {"always": True}))
    with pytest.raises(UserError, match=r"trigger token <INTRA> that the tokenizer lacks; train with training/sft.py"):
        Controller(model, tiny_tokenizer, plan)
    assert len(Action("<INTRA>", pieces=True).ids(tiny_tokenizer)) > 1
    probe = kit.plan_of(intra=("<INTRA>", {"probe": "probes/intra"}))
    with pytest.raises(UserError, match="rule intra: probe probes/intra was not loaded"):
        Controller(model, tokenizer, probe, {})
    with pytest.raises(UserError, match="oracle 'judge' was not given"):
        Controller(model, tokenizer, kit.plan_of(intra=("<INTRA>", {"oracle": "judge"})))
    instance = kit.FakeProbe(features=kit.FakeFeatures(level="instance", window=8))
    with pytest.raises(UserError, match="at_step is 4, but p was fitted on the first 8 steps"):
        Controller(model, tokenizer, kit.plan_of(i=(CLOSE, {"probe": "p", "at_step": 4})), {"p": instance})
    with pytest.raises(UserError, match="set at_step"):
        Controller(model, tokenizer, kit.plan_of(i=(CLOSE, {"probe": "p"})), {"p": instance})
    far = kit.FakeProbe(features=kit.FakeFeatures(read=("neuron:9[0]",)))
    with pytest.raises(UserError, match="layer 9 is out of range"):
        Controller(model, tokenizer, kit.plan_of(i=("<INTRA>", {"probe": "p"})), {"p": far})
    with pytest.raises(UserError, match="is empty"):
        kit.sample(model, tokenizer, [[]])
    with pytest.raises(UserError, match="top_p"):
        kit.sample(model, tokenizer, [[1]], top_p=0.0)


class _Foreign:
    model_fingerprint = "a"

    def check(self, model: Any) -> None:
        raise UserError("probe was fitted on another model")


def test_a_probe_of_another_model_is_refused_unless_accepted(talker, tokenizer, kit):
    probe = kit.FakeProbe()
    foreign = type("Foreign", (_Foreign, type(probe)), {})(features=kit.FakeFeatures(), model_fingerprint="a")
    plan = kit.plan_of(i=("<INTRA>", {"probe": "p"}))
    with pytest.raises(UserError, match="another model"):
        Controller(talker(), tokenizer, plan, {"p": foreign})
    Controller(talker(), tokenizer, plan, {"p": foreign}, accept=["a"])
