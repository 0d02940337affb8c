"""Plan files: what is shipped, what is refused, and how controls are made of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from neureasoner.errors import UserError
from neureasoner.inference.plan import Plan, Rule, Trigger

SHIPPED = Path(__file__).parents[2] / "configs" / "plans" / "neureasoner.yaml"


def test_every_shipped_plan_loads_and_survives_a_round_trip(tmp_path):
    for path in SHIPPED.parent.glob("*.yaml"):
        plan = Plan.load(path)
        plan.save(tmp_path / path.name)
        assert Plan.load(tmp_path / path.name) == plan
        assert plan.folder == path.parent


def test_the_shipped_plan_is_the_papers():
    plan = Plan.load(SHIPPED)
    assert plan.names == ["instance", "inter", "intra"]
    assert [r.trigger.max for r in plan.rules] == [1, 2, 3]
    assert plan.rule("instance").trigger.at_step == 4
    assert plan.rule("instance").action.force == "Okay, I have finished thinking.\n</think>\n\n"
    assert plan.probe_paths == ["probes/instance", "probes/inter", "probes/intra"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrulez: []", "unknown key 'rulez'; known: name, rules"),
        ("rules: []", "key 'name' is missing"),
        ("name: x\nrules: 3", "rules must be a list"),
        ("- 1", "expected keys and values, got list"),
        ("name: [", r"line 1: not YAML"),
        ("{name: x, rules: [{name: a, trigger: {probe: p}}]}", r"rules\[0\]: key 'action' is missing"),
        (
            "{name: x, rules: [{name: a, trigger: {prob: p}, action: {force: t}}]}",
            r"rules\[0\].trigger: unknown key 'prob'",
        ),
        (
            "{name: x, rules: [{name: a, trigger: {}, action: {force: t}}]}",
            r"rules\[0\].trigger: .* exactly one of .* none",
        ),
        (
            "{name: x, rules: [{name: a, trigger: {probe: p, always: true}, action: {force: t}}]}",
            "got probe and always",
        ),
        (
            "{name: x, rules: [{name: a, trigger: {probe: p, max: two}, action: {force: t}}]}",
            "max must be int, got 'two'",
        ),
        (
            "{name: x, rules: [{name: a, trigger: {probe: p, max: true}, action: {force: t}}]}",
            "max must be int, got True",
        ),
        ("{name: x, rules: [{name: a, trigger: {random: 2}, action: {force: t}}]}", "probability between 0 and 1"),
        (
            "{name: x, rules: [{name: a, trigger: {random: 0.1, threshold: 1}, action: {force: t}}]}",
            "threshold belongs",
        ),
        (
            "{name: x, rules: [{name: a, trigger: {probe: p, at_step: 0}, action: {force: t}}]}",
            "at_step must be at least 1",
        ),
        ("{name: x, rules: [{name: a, trigger: {probe: p}, action: {force: ''}}]}", "force needs a text"),
    ],
)
def test_a_bad_plan_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Plan.load(tmp_path)
    assert str(tmp_path / "plan.yaml") in str(error.value) and "\n" not in str(error.value)


def test_select_and_replace_triggers():
    plan = Plan.load(SHIPPED)
    assert plan.select(["intra", "inter"]).names == ["inter", "intra"], "the plan's order is kept"
    assert plan.select([]).rules == ()
    with pytest.raises(UserError, match="has no rule 'itra'; it has instance, inter, intra"):
        plan.select(["itra"])
    random = plan.replace_triggers(
        {"intra": {"random": 0.0}, "instance": {"oracle": "easy"}, "inter": {"threshold": 0.9}}
    )
    assert random.rule("intra").trigger == Trigger(random=0.0, cooldown=1, max=3)
    assert random.rule("instance").trigger == Trigger(oracle="easy", at_step=4)
    assert random.rule("inter").trigger == Trigger(probe="probes/inter", threshold=0.9, max=2)
    assert random.rule("intra").trigger.source == "random" and random.folder == plan.folder
    with pytest.raises(UserError, match="unknown key 'treshold'"):
        plan.replace_triggers({"intra": {"treshold": 1}})


def test_names_are_unique():
    rule: Rule = Plan.load(SHIPPED).rules[0]
    with pytest.raises(UserError, match="two rules are named instance"):
        Plan("x", (rule, rule))


def test_a_missing_plan_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such plan file"):
        Plan.load(tmp_path)
