"""The required controls: plans made of plans, and what they do when run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.controls import flipped, measured_rates, no_op, random_direction, random_trigger
from neureasoner.inference.decode import Generation
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.writes import writes_of
from neureasoner.sites import Layout

_spec = importlib.util.spec_from_file_location("steering_by_hand", Path(__file__).parent / "by_hand.py")
assert _spec and _spec.loader
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)
steer = by_hand.steer

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(2))
SIZES = {"sizes": {"neuron": 48, "head": 4}}
DIRECTIONS = {
    "dense": Direction({"residual:0": VECTOR}, "positive = up"),
    "sparse": Direction({"neuron:1[3,9]": torch.tensor([5.0, -6.0])}, "positive = up", info=SIZES),
}
DENSE = Rule("dense", Trigger(decode=True), Action(add=True), direction="dense", strength=Strength(0.5))
SPARSE = Rule("sparse", Trigger(gate="g"), Action(add=True), ("neuron:1[3,9]",), "sparse", Strength(0.8))
FORCE = Rule("force", Trigger(oracle="often", max=3, cooldown=1), Action("<INTRA>"))
SEAL = Rule("seal", Trigger(boundary=True), Action(add=True), direction="dense")
LATE = Rule("late", Trigger(oracle="often", max=2, duration=5), Action(add=True), direction="sparse")
PLAN = Plan("all", (DENSE, SPARSE, FORCE, LATE), conflicts="order")
ORACLES = {"often": lambda row: row.steps % 3 == 1}


class Gate:
    threshold, model_fingerprint, channels = 0.5, "any", np.array([[0, 1]])

    def predict_proba(self, values: Any) -> np.ndarray:
        return np.array([0.9 if len(v) % 2 else 0.1 for v in values])

    def check(self, model: Any) -> None:
        pass


def test_no_op_is_plain_generation(talker, tokenizer, prompts, kit):
    plan = no_op(PLAN)
    assert [r.trigger.max for r in plan.rules] == [1, 1, 0, 2] and plan.rules[0].strength.value == 0
    assert plan.names == PLAN.names and plan.name == "all, no-op"
    out = steer(talker(), tokenizer, prompts, plan, DIRECTIONS, oracles=ORACLES, gates={"g": Gate()}, max_new_tokens=60)
    plain = kit.sample(talker(), tokenizer, prompts)
    assert [g.response_ids for g in out] == [p.response_ids for p in plain]
    assert all(e["strength"] == 0 and e["tokens"] == 0 for g in out for e in g.events), "alarms are still logged"
    assert any(g.events for g in out)


def test_flipped_adds_the_negative(make_model, tokenizer, prompts):
    plan = flipped(PLAN)
    assert [r.strength.value for r in plan.rules] == [-0.5, -0.8, 1.0, -1.0]
    assert flipped(plan).rules == PLAN.rules
    one = Plan("one", (DENSE,))
    negative = {"dense": -DIRECTIONS["dense"]}
    a = steer(make_model(), tokenizer, prompts, flipped(one), DIRECTIONS)
    b = steer(make_model(), tokenizer, prompts, one, negative)
    c = steer(make_model(), tokenizer, prompts, one, DIRECTIONS)
    assert [g.response_ids for g in a] == [g.response_ids for g in b] != [g.response_ids for g in c]
    with pytest.raises(UserError, match="no rule has a sign to flip"):
        flipped(Plan("x", (FORCE, Rule("s", Trigger(always=True), Action(set=0.0), ("neuron:0[1]",)))))


def test_random_directions_have_the_norm_and_run(make_model, tokenizer, prompts):
    plan, drawn = random_direction(PLAN, DIRECTIONS, seed=4)
    for name, old in DIRECTIONS.items():
        assert list(drawn[name].norms().values()) == pytest.approx(list(old.norms().values()))
    assert not torch.equal(drawn["dense"].values["residual:0"], VECTOR)
    [site] = drawn["sparse"].sites
    assert site != "neuron:1[3,9]" and plan.rule("sparse").site == (site,), "a site that is named moves along"
    assert plan.rule("force") == FORCE and plan.rule("dense") == DENSE
    again = random_direction(PLAN, DIRECTIONS, seed=4)[1]
    assert torch.equal(again["dense"].values["residual:0"], drawn["dense"].values["residual:0"])
    out = steer(make_model(), tokenizer, prompts, plan, drawn, oracles=ORACLES, gates={"g": Gate()})
    assert {e["rule"] for g in out for e in g.events} >= {"dense", "sparse"}
    with pytest.raises(UserError, match="no rule has a direction to draw"):
        random_direction(Plan("x", (FORCE,)), {}, 0)


@pytest.mark.parametrize("seed", range(4))
def test_random_neurons_move_as_many_deviations(make_model, seed):
    """A strength in deviations edits the control's activations by the norm it edits the direction's by."""
    site, sizes = "neuron:1[3,9,20]", {"sizes": {"neuron": 48}}
    old = Direction(
        {site: torch.tensor([1.0, 2.0, 3.0])}, "positive = test", info=sizes | {"std": {site: [10.0, 1.0, 0.1]}}
    )
    rule = Rule("r", Trigger(always=True), Action(add=True), direction="d", strength=Strength(unit="sigma"))
    plan, drawn = random_direction(Plan("p", (rule,)), {"d": old}, seed)
    layout = Layout.of(make_model())
    moved = [writes_of(r, d, layout)[0].vector.double() for r, d in ((rule, old), (plan.rules[0], drawn["d"]))]
    ratio = np.array([1 / 10, 2, 3 / 0.1])
    np.testing.assert_allclose(moved[0][0], np.array([1, 2, 3]) / np.sqrt((ratio**2).mean()), rtol=1e-6)
    assert float(moved[1].norm()) == pytest.approx(float(moved[0].norm()), rel=1e-6)
    [(where, values)] = drawn["d"].values.items()
    kept = dict(zip(values.abs().tolist(), drawn["d"].info["std"][where], strict=True))
    assert kept == {1.0: 10.0, 2.0: 1.0, 3.0: 0.1}, "each size keeps its own deviation"


def test_rates_are_counted_from_the_event_log():
    def g(events: list[dict[str, Any]], scores: list[tuple[str, int]], thinking: int = 100) -> Generation:
        rows = [{"rule": r, "token": t, "score": 0.0, "step": 0} for r, t in scores]
        return Generation([1], [2], "", False, thinking, [], events=events, scores=rows)

    def event(rule: str, token: int, suppressed: bool = False, **more: Any) -> dict[str, Any]:
        return {"rule": rule, "token": token, "suppressed": suppressed} | more

    low = Rule("low", Trigger(oracle="x", max=3), Action("<INTER>"))
    plan = Plan("t", (FORCE, low, LATE, SPARSE, SEAL, DENSE))
    runs = [
        g(
            [event("force", 30), event("low", 30, True), event("seal", 8, strength=1.0, tokens=6)],
            [("force", 10), ("force", 30), ("low", 10), ("low", 30), ("low", 50), ("late", 30), ("sparse", 0)],
        ),
        g(
            [event("low", 20), event("late", 20, strength=1.0, tokens=5), event("sparse", 0, strength=0.8, tokens=9)],
            [("force", 20), ("low", 20), ("late", 20), ("sparse", 0)],
            thinking=40,
        ),
        g([], [("sparse", 0)], thinking=5),
    ]
    rates = measured_rates(runs, plan)
    assert rates == {
        "force": pytest.approx(1 / 3),  # 30 of 10, 20, 30: a lower rule that wins does not stand in its way
        "low": pytest.approx(1 / 3),  # 10, 50, 20; at 30 the rule of higher priority won
        "late": pytest.approx(1 / 2),
        "sparse": pytest.approx(1 / 3),
        "seal": pytest.approx(6 / (84 + 24)),
    }


def test_random_triggers_act_as_often(talker, tokenizer, prompts):
    model = talker(seed=1)
    many = prompts * 8
    plan = Plan("t", (SPARSE, Rule("seal", Trigger(boundary=True), Action(add=True), direction="dense")))
    settings: dict[str, Any] = {"max_new_tokens": 80, "temperature": 1.0, "gates": {"g": Gate()}}
    out = steer(model, tokenizer, many, plan, DIRECTIONS, **settings)
    rates = measured_rates(out, plan)
    assert 0 < rates["sparse"] < 1 and 0 < rates["seal"] < 1
    control = random_trigger(plan, rates)
    assert control.rule("sparse").trigger == Trigger(gate=rates["sparse"])
    assert control.rule("seal").trigger == Trigger(
        random=rates["seal"], immediate=True, duration=1, cooldown=0, max=None
    )
    coin = steer(model, tokenizer, many, control, DIRECTIONS, **settings)
    for name, most in (("sparse", 0.25), ("seal", 0.06)):
        assert abs(measured_rates(coin, control)[name] - rates[name]) < most
    assert {len(g.events) > 0 for g in coin} == {True}


def test_random_triggers_of_alarms_keep_budgets_and_refuse_what_has_no_rate():
    plan = random_trigger(PLAN, {"force": 0.2, "late": 0.3, "sparse": 0.4})
    assert plan.rule("force").trigger == Trigger(random=0.2, max=3, cooldown=1)
    assert plan.rule("late").trigger == Trigger(random=0.3, max=2, duration=5)
    assert plan.rule("dense") == DENSE and plan.name == "all, random trigger"
    with pytest.raises(UserError, match="no rule waits for an alarm"):
        random_trigger(Plan("x", (DENSE,)), {})
    both = Rule("both", Trigger(gate="g", probe="p"), Action(add=True), direction="dense")
    with pytest.raises(UserError, match="rule both: a gate and an alarm together"):
        random_trigger(Plan("x", (both,)), {"both": 0.1})
