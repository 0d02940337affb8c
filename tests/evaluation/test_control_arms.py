"""The controls of a plan as arms: which a plan can be put under, and what they do to a steered model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.evaluation.arms import ARMS, choose, controls_of, with_rules
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.steered import SteeredModel

FORCED = Rule("intra", Trigger(probe="p"), Action("<INTRA>"))
ADDED = Rule("calm", Trigger(decode=True), Action(add=True), direction="d", strength=Strength(2.0))
SET = Rule("mute", Trigger(always=True), Action(set=0.0), ("neuron:1[3]",))


def test_a_plan_is_put_under_the_controls_that_fit_it() -> None:
    assert controls_of(Plan("t", (FORCED,))) == {"random", "oracle"}
    assert controls_of(Plan("t", (ADDED,))) == {"flipped", "random_direction"}
    assert controls_of(Plan("t", (SET,))) == set()
    assert controls_of(Plan("t", (FORCED, ADDED, SET))) == {"random", "oracle", "flipped", "random_direction"}


def test_arms_of_controls_that_do_not_fit_are_refused_by_name_and_left_out_otherwise() -> None:
    def chosen(rule: Rule, *names: str) -> tuple[set[str], dict[str, str]]:
        arms, skipped = choose(names, [rule.name], False, controls=controls_of(Plan("t", (rule,))))
        return {a.name for a in arms}, skipped

    names, skipped = chosen(ADDED)
    assert {"full", "flipped", "random_direction"} <= names and not {"random_trigger", "oracle_trigger"} & names
    assert skipped["random_trigger"] == "no rule of the plan forces a text on an alarm that a coin could pull"
    names, skipped = chosen(FORCED)
    assert {"full", "random_trigger"} <= names and not {"flipped", "random_direction"} & (names | set(skipped))
    with pytest.raises(UserError, match="arm 'random_trigger' cannot run: no rule of the plan forces a text"):
        chosen(ADDED, "random_trigger")
    with pytest.raises(UserError, match="arm 'random_direction' cannot run: no rule of the plan has a direction"):
        chosen(FORCED, "random_direction")


def test_what_the_arms_do(make_model: Any, tiny_tokenizer: Any) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(7))
    direction = Direction({"residual:0": vector}, "positive = test")
    steered = SteeredModel(make_model(), tiny_tokenizer, Plan("t", (ADDED,)), directions={"d": direction})

    def ids(model: SteeredModel) -> list[list[int]]:
        return [g.response_ids for g in model.generate(["12 + 30?", "Who?"], max_new_tokens=12, temperature=0.0)]

    plain, full = ids(with_rules(steered, ARMS["sft_only"])), ids(with_rules(steered, ARMS["full"]))
    other_way = steered.with_plan(steered.plan, {"d": Direction({"residual:0": -vector}, "positive = test")})
    assert ids(with_rules(steered, ARMS["flipped"])) == ids(other_way) not in (plain, full)
    drawn = with_rules(steered, ARMS["random_direction"])
    value = drawn.directions["d"].values["residual:0"]
    assert value.norm() == pytest.approx(float(vector.norm()), rel=1e-5)
    assert abs(float(value @ vector)) < 0.6 * float(vector @ vector)
    assert ids(drawn) == ids(with_rules(steered, ARMS["random_direction"])) not in (plain, full)
    assert ids(steered) == full, "the model itself is as it was"
