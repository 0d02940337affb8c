"""Baselines that are plans: NoThinking, a thinking budget, a penalty on wait-like words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.inference.baselines import BASELINES, baseline
from neureasoner.inference.baselines.plans import CLOSE, WAIT_WORDS
from neureasoner.inference.plan import Plan, Trigger
from neureasoner.traces import NO_THINKING

SHIPPED = Path(__file__).parents[3] / "configs" / "plans"
GREEDY = {"temperature": 0.0, "max_new_tokens": 40}


def test_vanilla_is_plain_generation(talker, tokenizer, prompts, kit) -> None:
    model = talker()
    plain = kit.sample(model, tokenizer, prompts, max_new_tokens=30, temperature=0.6, seed=5)
    ours = baseline("vanilla", model, tokenizer).generate(prompts, max_new_tokens=30, temperature=0.6, seed=5)
    assert [g.response_ids for g in ours] == [g.response_ids for g in plain]
    assert not any(any(g.forced) or g.events or g.probe_tokens for g in ours)


@pytest.mark.parametrize(
    ("name", "settings"), [("alpha_one", {"n_think": 9.0}), ("think_or_not", {}), ("budget_forcing", {"budget": 9})]
)
def test_another_plan_does_not_silently_replace_a_decoder(name, settings, talker, tokenizer) -> None:
    with pytest.raises(UserError, match=rf"baseline {name} decides by code of its own, so plan none cannot"):
        baseline(name, talker(), tokenizer, **settings).with_plan(Plan("none", ()))


def test_no_thinking_is_the_shipped_plan_and_counts_its_prefill(talker, tokenizer, prompts, loop) -> None:
    model = talker()
    steered = baseline("no_thinking", model, tokenizer)
    assert steered.plan == Plan.load(SHIPPED / "no_thinking.yaml")
    ids = tokenizer.encode(NO_THINKING, add_special_tokens=False)
    for prompt, g in zip(prompts, steered.generate(prompts, **GREEDY), strict=True):
        assert g.response_ids[: len(ids)] == ids and loop.forced_places(g) == list(range(len(ids)))
        after, _ = loop.by_hand(model, prompt + ids, 40 - len(ids), tokenizer.eos_token_id)
        assert g.response_ids[len(ids) :] == after
    loop.single_runs(steered, prompts, **GREEDY)


@pytest.mark.parametrize("budget", [1, 7, 8])
def test_a_thinking_budget_closes_at_that_token(budget, talker, tokenizer, prompts, loop) -> None:
    model, close = talker(), tokenizer.encode(CLOSE, add_special_tokens=False)
    steered = baseline("thinking_budget", model, tokenizer, tokens=budget)
    out = steered.generate(prompts, **GREEDY)
    for prompt, g in zip(prompts, out, strict=True):
        ids, forced = loop.by_hand(
            model, prompt, 40, tokenizer.eos_token_id, before=lambda o: close if len(o) == budget else None
        )
        assert g.response_ids == ids and loop.forced_places(g) == forced
        assert [(e["rule"], e["token"]) for e in g.events] == [("budget", budget)]
        assert g.to_trace("t", None).meta["forced"] == forced  # type: ignore[arg-type]
    loop.single_runs(steered, prompts, **GREEDY)


def test_a_thinking_that_ended_within_its_budget_is_let_alone(leaning, tokenizer, prompts) -> None:
    model = leaning({"</think>": 24.0})
    plain = baseline("vanilla", model, tokenizer).generate(prompts, **GREEDY)
    budget = max(g.thinking_tokens for g in plain) + 1
    assert budget < 30, "the model closes its thinking by itself"
    ours = baseline("thinking_budget", model, tokenizer, tokens=budget).generate(prompts, **GREEDY)
    assert [g.response_ids for g in ours] == [g.response_ids for g in plain] and not any(g.events for g in ours)


def test_the_shipped_budget_plan_is_the_builders(talker, tokenizer) -> None:
    steered = baseline("thinking_budget", talker(), tokenizer, tokens=1024)
    assert steered.plan == Plan.load(SHIPPED / "thinking_budget.yaml")


def test_wait_like_words_lose_the_penalty_in_every_spelling(leaning, tokenizer, prompts, loop) -> None:
    model = leaning({"Wait": 9.0, " that": 4.0})
    steered = baseline("wait_penalty", model, tokenizer, penalty=7.5, words=("wait", "that"))
    bias = torch.zeros(model.lm_head.out_features)
    spelled = set()
    for i in range(len(tokenizer)):  # an own walk through the vocabulary, by decoded text
        text = tokenizer.decode([i])
        if text.strip().lower() in ("wait", "that"):
            bias[i] = -7.5
            spelled.add(text)
    assert {"Wait", " that"} <= spelled
    out = steered.generate(prompts, **GREEDY)
    plain = baseline("vanilla", model, tokenizer).generate(prompts, **GREEDY)
    assert any("Wait" in g.text for g in plain)
    for prompt, g in zip(prompts, out, strict=True):
        assert g.response_ids == loop.by_hand(model, prompt, 40, tokenizer.eos_token_id, bias=bias)[0]
        assert not any(g.forced)
    loop.single_runs(steered, prompts, **GREEDY)


def test_the_default_penalty_forbids(leaning, tokenizer, prompts) -> None:
    out = baseline("wait_penalty", leaning({"Wait": 9.0}), tokenizer).generate(prompts, **GREEDY)
    assert not any("Wait" in g.text for g in out)
    assert WAIT_WORDS[0] == "wait" and len(set(WAIT_WORDS)) == 17


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("wait", {}, "unknown baseline 'wait'; known: vanilla, "),
        ("vanilla", {"k": 1}, "baseline vanilla has no setting 'k'; it takes none"),
        ("thinking_budget", {}, "baseline thinking_budget needs the setting 'tokens'"),
        ("thinking_budget", {"tokens": 0}, "must be at least 1, got 0; for 0 use no_thinking"),
        ("wait_penalty", {"words": ["zzzz"]}, "none of zzzz is a single token"),
        ("budget_forcing", {"budget": 0}, "budget must be at least 1, got 0"),
        ("alpha_one", {"n_think": 0.0}, "n_think must be above 0, got 0.0"),
        ("alpha_one", {"n_think": 9.0, "alpha": float("nan")}, "alpha must be above 0, got nan"),
        ("think_or_not", {"ratio": 0.0}, "ratio must lie in"),
        ("think_or_not", {"options": "A"}, "two or more different letters, got 'A'"),
        ("think_or_not", {"options": "Aß"}, "option 'ß' is no single token"),
        ("think_or_not", {"min_chars": 0}, "min_chars must be at least 1, got 0"),
        ("think_or_not", {"stub": "So:"}, "must end in an open brace, got 'So:'"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(name, settings, message, talker, tokenizer) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        baseline(name, talker(), tokenizer, **settings)


def test_every_baseline_is_built_by_its_name(talker, tokenizer) -> None:
    needs = {"thinking_budget": {"tokens": 5}, "budget_forcing": {"budget": 5}, "alpha_one": {"n_think": 5.0}}
    model = talker()
    for name in BASELINES:
        assert baseline(name, model, tokenizer, **needs.get(name, {})).plan.name == name


def test_a_budget_that_the_cap_leaves_no_room_for_is_refused(talker, tokenizer, prompts) -> None:
    for name, key in (("thinking_budget", "tokens"), ("budget_forcing", "budget")):
        steered = baseline(name, talker(), tokenizer, **{key: 20})
        with pytest.raises(UserError, match="can never fire: it waits for more steps or tokens than max_new_tokens"):
            steered.generate(prompts, max_new_tokens=20)


def test_min_tokens_belongs_to_rules_that_are_evaluated_again(tmp_path) -> None:
    with pytest.raises(UserError, match="min_tokens must be at least 0, got -1"):
        Trigger(always=True, min_tokens=-1)
    with pytest.raises(UserError, match="remove immediate, every, consecutive and min_tokens"):
        Trigger(always=True, at_step=2, min_tokens=3)
    budget = {"always": True, "immediate": True, "min_tokens": 9}
    rules = [
        {"name": "budget", "trigger": budget, "action": {"force": "</think>"}},
        {"name": "second", "trigger": {"always": True, "at_step": 2}, "action": {"force": "So"}},
    ]
    plan = Plan.from_dict({"name": "p", "rules": rules})  # two steps may close before token 9, so it is alive
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path) == plan and "min_tokens: 9" in (tmp_path / "plan.yaml").read_text()
