"""An exit: a probe read at every step from K on that closes the thinking; and what no closing rule may cut off."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neureasoner.errors import UserError
from neureasoner.inference.assemble import assemble
from neureasoner.inference.config import AssembleConfig
from neureasoner.inference.controller import Controller
from neureasoner.inference.controls import measured_rates
from neureasoner.inference.steered import SteeredModel
from neureasoner.models import fingerprint
from neureasoner.probes.detectors.probe import Probe
from neureasoner.probes.features import FeatureSet

CLOSE = "Okay, I have finished thinking.\n</think>\n\n"


def ends(g: Any) -> list[int]:
    """Where steps closed, step by step."""
    return [s.token_end for s in g.steps if s.closed]


class Kept:
    """A real feature set that keeps what it computed."""

    def __init__(self, features: FeatureSet):
        self.features, self.out = features, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.features, name)

    def compute(self, series: Any, bounds: Any) -> tuple[np.ndarray, bool]:
        x, valid = self.features.compute(series, bounds)
        self.out.append((list(bounds), x, valid))
        return x, valid


@pytest.mark.parametrize("window", [2, 4])
def test_promise_5_an_exit_reads_at_every_step_what_is_read_offline(talker, tokenizer, prompts, kit, window):
    """Behind a block too: there the window begins anew, and the steps go on counting."""
    name, sites = "entropy+residual+spectral+trend+length", ["neuron:1[3,5]", "residual:0", "logits"]
    features = FeatureSet.named(name, "instance", window, sites[0], sites[1], exit_from=3)
    kept = Kept(features)
    probe = kit.FakeProbe(features=kept)
    probe.predict_proba = lambda x: np.full(len(x), 0.1)
    plan = kit.plan_of(
        instance=(CLOSE, {"probe": "p", "min_steps": 3}), intra=("<INTRA>", {"oracle": "fifth", "max": 1})
    )
    oracles = {"fifth": lambda row: row.steps == 8}
    [g] = kit.sample(
        talker(), tokenizer, prompts[:1], plan, {"p": probe}, oracles=oracles, record=sites, max_new_tokens=120
    )
    at = ends(g)
    block = g.events[0]["step"] + 1
    assert len(at) > block + 4 and block == 8
    # at every step from the 3rd on, then from the second full step after the block on
    seen = [*range(3, block + 1), *range(block + 3, len(at) + 1)]
    assert len(kept.out) == len(seen)
    decided = 0
    for n, (bounds, x, valid) in zip(seen, kept.out, strict=True):
        begin = 0 if n <= block else at[block]
        own = [b - begin for b in [0, *at[:n]] if b >= begin]
        assert bounds == own
        offline, ok = features.compute({s: g.series[s][begin:] for s in sites}, own)
        np.testing.assert_allclose(x, offline, rtol=0, atol=1e-9)
        assert ok == valid
        decided += valid
    assert decided > 0


def test_an_exit_fires_at_any_step_from_k_on(talker, tokenizer, prompts, kit):
    for when, step in ((1, 3), (5, 5)):
        probe = kit.FakeProbe(lambda n, s, w=when: s >= w, kit.FakeFeatures("instance", exit_from=3))
        plan = kit.plan_of(instance=(CLOSE, {"probe": "p", "min_steps": 3}))
        [g] = kit.sample(talker(), tokenizer, prompts[:1], plan, {"p": probe}, max_new_tokens=100)
        assert [(e["rule"], e["step"]) for e in g.events] == [("instance", step - 1)]
        assert g.thinking_tokens < len(g.response_ids) and CLOSE in g.text


@pytest.mark.parametrize(
    "trigger", [{}, {"cooldown": 0}, {"cooldown": 1}, {"cooldown": 4}, {"immediate": True, "cooldown": 0}]
)
def test_no_closing_rule_cuts_the_correction_after_a_block_off(talker, tokenizer, prompts, kit, trigger):
    plan = kit.plan_of(
        intra=("<INTRA>", {"oracle": "second"}), instance=(CLOSE, {"always": True, "min_steps": 3, **trigger})
    )
    for g in kit.sample(
        talker(), tokenizer, prompts, plan, oracles={"second": lambda r: r.steps == 2}, max_new_tokens=120
    ):
        assert [e["rule"] for e in g.events] == ["intra", "instance"]
        at, block = g.events[1]["token"], ends(g)[2]
        rest = max(2, trigger.get("cooldown", 1))
        assert [e for e in ends(g) if block < e <= at] == ends(g)[3 : 3 + rest], "two full steps stand after the block"
        assert at == ends(g)[2 + rest], "and no more than asked for"


@pytest.mark.parametrize("order", list(permutations(["instance", "inter", "intra"])))
def test_a_closing_rule_comes_last_at_a_boundary_whatever_the_plans_order(talker, tokenizer, prompts, kit, order):
    texts = {"instance": CLOSE, "inter": "<INTER>", "intra": "<INTRA>"}
    plan = kit.plan_of(**{name: (texts[name], {"oracle": "now", "max": 1, "min_steps": 2}) for name in order})
    [g] = kit.sample(
        talker(), tokenizer, prompts[:1], plan, oracles={"now": lambda r: r.steps >= 2}, max_new_tokens=120
    )
    first = [e for e in g.events if e["token"] == g.events[0]["token"]]
    repairs = [n for n in order if n != "instance"]
    assert [(e["rule"], e["suppressed"]) for e in first] == [
        (repairs[0], False),
        (repairs[1], True),
        ("instance", True),
    ]
    assert [e["rule"] for e in g.events if not e["suppressed"]] == [*repairs, "instance"]
    assert plan.priority == [*repairs, "instance"]
    # where a repair won, closing was asked but could not act, so a coin in its place would not have been thrown
    assert len({s["token"] for s in g.scores if s["rule"] == "instance"}) == 2
    assert measured_rates([g], plan)["instance"] == 1


def test_a_plan_follows_the_kind_of_its_instance_probe(talker, tokenizer, kit):
    once = kit.plan_of(
        instance=(CLOSE, {"probe": "p", "at_step": 4, "threshold": 0.7}), intra=("<INTRA>", {"probe": "q"})
    )
    leave = {"p": kit.FakeProbe(features=kit.FakeFeatures("instance", 2, exit_from=3)), "q": kit.FakeProbe()}
    paper = {"p": kit.FakeProbe(features=kit.FakeFeatures("instance", 6)), "q": kit.FakeProbe()}
    exits = once.fit_windows(leave)
    t = exits.rule("instance").trigger
    assert (t.at_step, t.min_steps, t.threshold) == (None, 3, 0.7) and exits.rule("intra") == once.rule("intra")
    Controller(talker(), tokenizer, exits, leave)
    back = exits.fit_windows(paper).rule("instance").trigger
    assert (back.at_step, back.min_steps) == (6, 0)
    Controller(talker(), tokenizer, exits.fit_windows(paper), paper)
    later = kit.plan_of(instance=(CLOSE, {"probe": "p", "min_steps": 6, "consecutive": 2})).fit_windows(leave)
    assert later.rule("instance").trigger.min_steps == 6, "a plan may wait longer"
    assert later.fit_windows(paper).rule("instance").trigger.at_step == 6
    with pytest.raises(UserError, match="an exit; remove at_step"):
        Controller(talker(), tokenizer, once, leave)
    with pytest.raises(UserError, match=r"min_steps is 2.*from step 3 on"):
        Controller(talker(), tokenizer, kit.plan_of(instance=(CLOSE, {"probe": "p", "min_steps": 2})), leave)
    with pytest.raises(UserError, match="set at_step"):
        Controller(talker(), tokenizer, exits, paper)


def test_a_checkpoint_of_an_exit_asks_at_every_step_and_its_paper_arm_once(make_model, tokenizer, tmp_path):
    """The shipped plan, as it is, with the probes that `probes fit` writes beside each other."""
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    kinds = {"instance": FeatureSet.named("entropy+residual", "instance", 2, residual="residual:0", exit_from=3)}
    kinds["paper/instance"] = FeatureSet.named("spectral", "instance", 2, "neuron:1[3,5]")
    rng = np.random.default_rng(0)
    for name, features in kinds.items():
        x, y = rng.normal(size=(24, features.dim(32))), np.arange(24) % 2
        probe = Probe(features, model="m", model_fingerprint=fingerprint(model), hidden=8, epochs=1).fit(x, y)
        probe.threshold = 0.0 if "paper" in name else 0.999999
        probe.save(tmp_path / "probes" / name)
    folders = {"model": str(tmp_path / "base"), "probes": str(tmp_path / "probes"), "out": str(tmp_path / "steered")}
    config = AssembleConfig(**folders, plan=str(Path(__file__).parents[2] / "configs" / "plans" / "neureasoner.yaml"))
    with pytest.warns(UserWarning, match="is dropped"):
        assemble(config)
    steered = SteeredModel.from_pretrained(tmp_path / "steered", device="cpu")
    t = steered.plan.rule("instance").trigger
    assert (t.at_step, t.min_steps) == (None, 3)
    out = steered.generate(["12 + 30?"] * 8, temperature=1.5, max_new_tokens=300, seed=2)
    asked = [[s["step"] for s in g.scores] for g in out]
    assert max(map(len, asked)) > 2 and all(a == sorted(set(a)) and a[:1] >= [2] for a in asked if a)
    paper = steered.paper()
    assert (paper.plan.rule("instance").trigger.at_step, paper.plan.rule("instance").trigger.min_steps) == (2, 0)
    scores = [g.scores for g in paper.generate(["12 + 30?"] * 8, temperature=1.5, max_new_tokens=300, seed=2)]
    assert {tuple(s["step"] for s in row) for row in scores} <= {(), (1,)} and any(scores)
