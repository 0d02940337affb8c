"""The required controls, as transformations of a plan (related.md §G): any plan gets them free.

Usage::

    steered.with_plan(no_op(steered.plan))
    steered.with_plan(flipped(steered.plan))
    steered.with_plan(*random_direction(steered.plan, steered.directions, seed=0))
    steered.with_plan(random_trigger(steered.plan, measured_rates(generations, steered.plan)))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.decode import Generation
from neureasoner.inference.plan import Plan, Rule
from neureasoner.inference.rules import EVENTS
from neureasoner.probes.features import MIN_TOKENS


def _each(plan: Plan, kind: str, change: Any) -> Plan:
    return replace(plan, name=f"{plan.name}, {kind}", rules=tuple(change(rule) for rule in plan.rules))


def _paced(rule: Rule) -> bool:
    """Whether it acts at some thinking tokens, by what they are. Raises UserError for one that also does in answers."""
    if rule.source == "tokens" and rule.trigger.phase != "think":
        raise UserError(
            f"rule {rule.name} acts at tokens of the answer too, where no coin is thrown; set `phase: think` in its "
            "trigger"
        )
    return rule.source in ("boundary", "tokens")


def no_op(plan: Plan) -> Plan:
    """Every rule watched and none acting: strengths are 0, texts are never forced. Equals plain generation."""

    def still(rule: Rule) -> Rule:
        if rule.forces:
            return replace(rule, trigger=replace(rule.trigger, max=0))
        return replace(rule, strength=replace(rule.strength, value=0.0))

    return _each(plan, "no-op", still)


def flipped(plan: Plan) -> Plan:
    """The sign of every strength turned. Forced texts and ``set`` have none and stay. Raises UserError if none has."""

    def turn(rule: Rule) -> Rule:
        if rule.forces or rule.action.kind == "set":
            return rule
        return replace(rule, strength=replace(rule.strength, value=-rule.strength.value))

    turned = _each(plan, "sign flipped", turn)
    if turned.rules == plan.rules:
        raise UserError(f"plan {plan.name}: no rule has a sign to flip")
    return turned


def random_direction(plan: Plan, directions: Mapping[str, Direction], seed: int) -> tuple[Plan, dict[str, Direction]]:
    """The same plan along random directions of equal norm at each site (neurons and heads: others of the block).

    ``directions`` by the plan's names; returned likewise, to be given to ``with_plan``. Raises UserError if no rule has
    a direction.
    """
    if not plan.direction_paths:
        raise UserError(f"plan {plan.name}: no rule has a direction to draw at random")
    drawn = {name: directions[name].random_like(seed) for name in plan.direction_paths}

    def elsewhere(rule: Rule) -> Rule:
        if rule.direction is None:
            return rule
        moved = dict(zip(directions[rule.direction].sites, drawn[rule.direction].sites, strict=True))
        return replace(rule, site=tuple(moved.get(site, site) for site in rule.site))

    return _each(plan, f"random direction {seed}", elsewhere), drawn


def random_trigger(plan: Plan, rates: Mapping[str, float]) -> Plan:
    """The same plan with its alarms pulled by a coin at the rates of ``measured_rates``.

    Probe, oracle and random rules are evaluated where they were, within their budgets and cooldowns; a gate becomes a
    coin for each row; a rule at boundaries, or at chosen tokens of the thinking, acts on any thinking token. Rules that
    act everywhere stay.
    """

    def coin(rule: Rule) -> dict[str, Any]:
        change: dict[str, Any] = {}
        rate = rates.get(rule.name, 0.0)
        if isinstance(rule.trigger.gate, str):
            change["gate"] = rate
        elif _paced(rule):
            return {"random": rate, "immediate": True, "duration": 1, "cooldown": 0, "max": None, "phase": None}
        if rule.source in EVENTS:
            change["random"] = rate
        return change

    changes = {rule.name: change for rule in plan.rules if (change := coin(rule))}
    if not changes:
        raise UserError(f"plan {plan.name}: no rule waits for an alarm, so there is none to draw at random")
    both = [r.name for r in plan.rules if {"gate", "random"} <= set(changes.get(r.name, {}))]
    if both:
        raise UserError(
            f"plan {plan.name}, rule {both[0]}: a gate and an alarm together have no single rate to draw at"
        )
    return replace(plan.replace_triggers(changes), name=f"{plan.name}, random trigger")


def measured_rates(generations: Iterable[Generation], plan: Plan) -> dict[str, float]:
    """How often each rule acted, of the times it could have, in a previous run of ``plan``.

    Alarms: per evaluation in which no rule of higher priority won. Gates: per response. Boundaries: per thinking token
    at which a coin may be thrown. Rules that act everywhere are left out.
    """
    order = plan.priority
    could, did = dict.fromkeys(order, 0), dict.fromkeys(order, 0)
    for g in generations:
        acted = [e for e in g.events if not e["suppressed"]]
        winner = {e["token"]: order.index(e["rule"]) for e in acted if "strength" not in e}
        for rank, rule in enumerate(map(plan.rule, order)):
            mine = [e for e in acted if e["rule"] == rule.name]
            if _paced(rule) and rule.trigger.gate is None:
                could[rule.name] += max(0, g.thinking_tokens - MIN_TOKENS)
                did[rule.name] += sum(e["tokens"] for e in mine)
                continue
            asked = [s["token"] for s in g.scores if s["rule"] == rule.name]
            could[rule.name] += sum(not rule.forces or winner.get(token, rank) >= rank for token in asked)
            did[rule.name] += len(mine)
    rates = {name: min(1.0, did[name] / could[name]) if could[name] else 0.0 for name in order}
    return {r.name: rates[r.name] for r in plan.rules if r.source in EVENTS or _paced(r) or r.trigger.gate is not None}
