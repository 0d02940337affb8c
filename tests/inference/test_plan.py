"""Plan files: what is shipped, what is refused, and how controls are made of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from neureasoner.errors import UserError
from neureasoner.inference.plan import Plan, Rule, Strength, Trigger

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


STEER = "trigger: {always: true}, direction: d, action: {add: true}"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("trigger: {always: true, decode: true}, action: {force: t}", "got always and decode"),
        ("trigger: {gate: 1.5}, action: {force: t}", "gate must be a folder or a probability between 0 and 1, got 1.5"),
        ("trigger: {gate: true}, action: {force: t}", "gate must be str or float, got True"),
        ("trigger: {always: true, threshold: 0.5}, action: {force: t}", "threshold belongs to a probe or gate"),
        ("trigger: {probe: p, duration: 0}, direction: d, action: {add: true}", "duration must be at least 1"),
        ("trigger: {always: true}, action: {}", "an action needs exactly one of force, add, .*; got none"),
        ("trigger: {always: true}, action: {add: true, scale: true}", "got add and scale"),
        ("trigger: {always: true}, action: {add: true}", "add needs a direction: name its folder"),
        ("trigger: {always: true}, direction: d, action: {force: t}", "force takes no direction"),
        ("trigger: {always: true}, direction: 3, action: {add: true}", "direction must be a folder, got 3"),
        ("trigger: {always: true}, action: {set: 0.0}", "set needs a site, such as neuron"),
        ("trigger: {always: true}, action: {set: yes}", "set must be float, got True"),
        ("trigger: {always: true}, site: logits, direction: d, action: {add: true}", "'logits' cannot be written"),
        ("trigger: {always: true}, site: logits:*, direction: d, action: {add: true}", "logits has no blocks"),
        ("trigger: {always: true}, site: residual, direction: d, action: {add: true}", "needs a layer"),
        ("trigger: {always: true}, site: [3], direction: d, action: {add: true}", "site must be a site such as"),
        ("trigger: {always: true}, site: residual:1, action: {force: t}", "force takes no site"),
        ("trigger: {always: true}, action: {add_logits: {}}", "add_logits needs tokens and their biases"),
        ("trigger: {always: true}, action: {add_logits: [a]}", r"add_logits must be \{token: number\}, got \['a'\]"),
        ("trigger: {always: true}, action: {add_logits: {a: 1}}, strength: {relative: true}", "takes no relative"),
        ("trigger: {always: true}, action: {force: t, pieces: true}, strength: 2", "a forced text has no strength"),
        (f"{STEER}, strength: two", "value must be float, got 'two'"),
        (f"{STEER}, strength: {{vaule: 1}}", "unknown key 'vaule'; known: value, relative, schedule, per_row, unit"),
        (f"{STEER}, strength: {{schedule: [[0, 1], [0, 2]]}}", "must rise from 0"),
        (f"{STEER}, strength: {{schedule: 3}}", r"schedule must be \[\[token, factor\], ...\], got 3"),
        (f"{STEER}, strength: {{unit: std}}", "unit must be one of raw, sigma, got 'std'"),
        (f"{STEER}, strength: .inf", "a strength must be finite"),
        ("trigger: {decode: true}, action: {force: t}", "decode belongs to tensor actions"),
        ("trigger: {always: true, duration: 3}, action: {force: t}", "duration belongs to tensor actions"),
        ("trigger: {start: true}, direction: d, action: {add: true}", "start belongs to forced texts"),
        (
            "trigger: {boundary: true, max: 3}, direction: d, action: {add: true}",
            "max belongs to probe, random and oracle",
        ),
        ("trigger: {always: true, at_step: 3}, direction: d, action: {add: true}", "at_step belongs to probe, random"),
    ],
)
def test_a_bad_rule_is_refused_by_name(tmp_path, rule, message):
    (tmp_path / "plan.yaml").write_text(f"name: x\nrules: [{{name: odd, {rule}}}]")
    with pytest.raises(UserError, match=message) as error:
        Plan.load(tmp_path)
    assert str(tmp_path / "plan.yaml") in str(error.value) and "rules[0]" in str(error.value)


FORCE = "action: {force: x}"
BUDGET = "trigger: {always: true, immediate: true"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([f"trigger: {{probe: p, max: 0}}, {FORCE}"], "r0 can never fire: max is 0"),
        ([f"trigger: {{random: 0}}, {FORCE}"], "r0 can never fire: random is a coin of probability 0"),
        (["trigger: {gate: 0.0}, direction: d, action: {add: true}"], "gate is a coin of probability 0"),
        (["trigger: {gate: g, threshold: 1}, direction: d, action: {add: true}"], "score is at most 1 and never above"),
        ([f"trigger: {{probe: p, at_step: 3, min_steps: 4}}, {FORCE}"], "at_step is 3, before min_steps 4"),
        (
            [f"trigger: {{always: true}}, {FORCE}", f"trigger: {{probe: p, at_step: 4}}, {FORCE}"],
            "r1 .* rule r0 always comes",
        ),
        ([f"trigger: {{start: true}}, {FORCE}", f"trigger: {{start: true}}, {FORCE}"], "r1 .* start is evaluated once"),
        (
            ["trigger: {start: true}, action: {force: 'ok</think>'}", f"trigger: {{probe: p}}, {FORCE}"],
            "r1 can never fire: rule r0 closes the thinking before the first token",
        ),
        (
            [f"trigger: {{always: true, max: null}}, {FORCE}", f"trigger: {{probe: p, min_steps: 2}}, {FORCE}"],
            "r1 can never fire: rule r0 forces its text wherever this one is evaluated, and comes first",
        ),
        (
            [
                "trigger: {always: true, at_step: 1}, action: {force: </think>}",
                f"trigger: {{oracle: o, min_steps: 3}}, {FORCE}",
            ],
            "r1 can never fire: rule r0 closes the thinking after 1 step, and it waits for more",
        ),
        (
            [
                f"{BUDGET}, min_tokens: 10}}, action: {{force: </think>}}",
                f"trigger: {{random: 0.5, min_tokens: 500}}, {FORCE}",
            ],
            "r1 can never fire: rule r0 closes the thinking after 10 tokens",
        ),
        ([f"trigger: {{probe: p, threshold: .nan}}, {FORCE}"], "threshold is not a number"),
        (["trigger: {always: true}, site: residual:0, action: {set: .nan}"], "need finite numbers"),
        (["trigger: {always: true}, action: {add_logits: {a: .inf}}"], "need finite numbers"),
    ],
)
def test_a_rule_that_can_never_fire_is_refused(tmp_path, rules, message):
    rows = ", ".join(f"{{name: r{i}, {rule}}}" for i, rule in enumerate(rules))
    (tmp_path / "plan.yaml").write_text(f"name: x\nrules: [{rows}]")
    with pytest.raises(UserError, match=message):
        Plan.load(tmp_path)


def test_rules_that_may_fire_are_kept(tmp_path):
    rows = [
        f"trigger: {{always: true, min_steps: 5}}, {FORCE}",  # at_step 4 comes before it
        f"trigger: {{probe: p, at_step: 4, min_steps: 4}}, {FORCE}",
        f"trigger: {{random: 0.5, gate: g}}, {FORCE}",
        "trigger: {gate: g, decode: true, threshold: 0.9}, direction: d, action: {add: true}, strength: 0",
        f"trigger: {{always: true, max: null, cooldown: 3, min_steps: 9}}, {FORCE}",
        f"trigger: {{probe: p, cooldown: 2, min_steps: 9}}, {FORCE}",  # waits less than the one before it
        f"trigger: {{probe: p, immediate: true, cooldown: 3, min_steps: 9}}, {FORCE}",  # is asked within steps
    ]
    rows = [f"{{name: r{i}, {row}}}" for i, row in enumerate(rows)]
    (tmp_path / "plan.yaml").write_text(f"name: x\nrules: [{', '.join(rows)}]")
    assert len(Plan.load(tmp_path).rules) == 7
    rows = [  # the second may come before the first, which is then not evaluated, and the third goes on
        "{name: a, trigger: {always: true, at_step: 1}, action: {force: </think>}}",
        f"{{name: b, trigger: {{probe: p, immediate: true}}, {FORCE}}}",
        f"{{name: c, trigger: {{oracle: o, min_steps: 3}}, {FORCE}}}",
    ]
    (tmp_path / "plan.yaml").write_text(f"name: x\nrules: [{', '.join(rows)}]")
    assert len(Plan.load(tmp_path).rules) == 3


def test_two_biases_of_one_logit_need_a_policy(tmp_path):
    def plan(a: str, b: str, policy: str = "") -> Plan:
        rows = [f"{{name: r{i}, trigger: {{always: true}}, action: {{add_logits: {x}}}}}" for i, x in enumerate((a, b))]
        (tmp_path / "plan.yaml").write_text(f"name: x\n{policy}\nrules: [{', '.join(rows)}]")
        return Plan.load(tmp_path)

    with pytest.raises(UserError, match=r"rules r0 and r1 both bias the logit of 'Wait', and the plan has no policy"):
        plan("{Wait: -1, So: 1}", "{Wait: -2}")
    with pytest.raises(UserError, match="the plan says `conflicts: refuse`"):
        plan("{Wait: -1}", "{Wait: -2}", "conflicts: refuse")
    assert plan("{Wait: -1}", "{Wait: -2}", "conflicts: order").conflicts == "order"
    assert len(plan("{Wait: -1}", "{So: -2}").rules) == 2


def test_two_rules_at_one_site_need_a_policy(tmp_path):
    def plan(a: str, b: str, policy: str = "") -> Plan:
        rows = [f"{{name: r{i}, {STEER}, site: {site}}}" for i, site in enumerate((a, b))]
        (tmp_path / "plan.yaml").write_text(f"name: x\n{policy}\nrules: [{', '.join(rows)}]")
        return Plan.load(tmp_path)

    text = "rules r0 and r1 both write residual:1, and the plan has no policy; set `conflicts: order`"
    with pytest.raises(UserError, match=text):
        plan("[residual:0, residual:1]", "residual:1")
    with pytest.raises(UserError, match=r"both write neuron:1\[4,5\], and the plan says `conflicts: refuse`"):
        plan("'neuron:1[4,5]'", "'neuron:1[5]'", "conflicts: refuse")
    with pytest.raises(UserError, match="conflicts must be order or refuse, got 'first'"):
        plan("residual:0", "residual:1", "conflicts: first")
    assert plan("residual:1", "residual:1", "conflicts: order").conflicts == "order"
    assert len(plan("'neuron:1[4,5]'", "'neuron:1[6]'").rules) == 2
    with pytest.raises(UserError, match=r"rule r0 writes neuron:1\[2,3\] and neuron:1\[3,4\], which overlap"):
        plan("['neuron:1[2,3]', 'neuron:1[3,4]']", "residual:1", "conflicts: order")


def test_every_key_survives_a_round_trip(tmp_path):
    text = """
name: whole
conflicts: order
rules:
  - {name: a, trigger: {gate: gates/x, decode: true, threshold: 0.4}, direction: d, site: "residual:*",
     action: {add: true}, strength: {value: 0.5, relative: true, schedule: [[0, 1.0], [50, 0.5]], per_row: true}}
  - {name: b, trigger: {boundary: true}, direction: d, site: ["neuron:1[2,3]", "neuron:2[0]"], action: {scale: true},
     strength: {unit: sigma}}
  - {name: c, trigger: {probe: p, duration: 5, max: null, consecutive: 2}, site: "head:0[1]",
     action: {set: 0.0}, strength: 0.5}
  - {name: d, trigger: {start: true, gate: 0.25}, action: {force: "x", pieces: true}}
  - {name: e, trigger: {oracle: o, immediate: true, min_steps: 2, cooldown: 0},
     action: {add_logits: {Wait: -3, "<INTRA>": 1.5}}}
  - {name: f, trigger: {always: true}, direction: d, action: {add_keep_norm: true}}
"""
    (tmp_path / "plan.yaml").write_text(text)
    plan = Plan.load(tmp_path)
    plan.save(tmp_path / "again.yaml")
    assert Plan.load(tmp_path / "again.yaml") == plan
    assert plan.rule("a").strength == Strength(0.5, True, ((0, 1.0), (50, 0.5)), True)
    assert plan.rule("c").trigger.max is None and plan.rule("b").site == ("neuron:1[2,3]", "neuron:2[0]")
    assert plan.rule("e").action.add_logits == {"Wait": -3, "<INTRA>": 1.5}
    assert plan.direction_paths == ["d"] and plan.gate_paths == ["gates/x"] and plan.probe_paths == ["p"]
    assert [r.source for r in plan.rules] == ["decode", "boundary", "probe", "start", "oracle", "always"]
    coin = plan.replace_triggers({"a": {"gate": 0.3}, "c": {"random": 0.1}})
    assert coin.rule("a").trigger == Trigger(gate=0.3, decode=True), "the threshold goes with the gate it belonged to"
    assert coin.rule("c").trigger == Trigger(random=0.1, duration=5, max=None, consecutive=2)


def test_a_schedule_is_lines_between_its_points():
    strength = Strength(2.0, schedule=((10, 1.0), (20, 0.5), (40, 0.0)))
    assert [strength.at(t) for t in (0, 10, 15, 20, 30, 40, 99)] == pytest.approx([2, 2, 1.5, 1, 0.5, 0, 0])
    assert not strength.zero and Strength(0.0).zero and Strength(schedule=((0, 0.0), (9, 0.0))).zero


def test_a_shipped_plan_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Plan.load("seal").to_dict() == Plan.load("configs/plans/seal.yaml").to_dict()
    with pytest.raises(UserError, match=r"sael: no such plan file, .*seal"):
        Plan.load("sael")
