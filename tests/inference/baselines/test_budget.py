"""Budget forcing against an own loop without a cache."""

from __future__ import annotations

import pytest

from neureasoner.inference.baselines import baseline
from neureasoner.inference.baselines.budget import STUB
from neureasoner.inference.baselines.plans import CLOSE
from neureasoner.traces import NO_THINKING

GREEDY = {"temperature": 0.0, "max_new_tokens": 45}


@pytest.mark.parametrize("no_thinking", [False, True])
def test_at_the_budget_the_stub_is_forced(no_thinking, leaning, tokenizer, prompts, loop) -> None:
    """Some rows are still thinking at the budget, some are answering: the first are closed before the stub."""
    model = leaning({"</think>": 23.0})
    encode, close = tokenizer.encode, tokenizer.convert_tokens_to_ids("</think>")
    start = encode(NO_THINKING, add_special_tokens=False) if no_thinking else []
    budget = len(start) + 9
    stubs = [encode(t + STUB, add_special_tokens=False) for t in (CLOSE, "\n\n")]

    def before(out: list[int]) -> list[int] | None:
        if not out:
            return start
        return (stubs[close in out] if len(out) == budget else None) or None

    steered = baseline("budget_forcing", model, tokenizer, budget=budget, no_thinking=no_thinking)
    out = steered.generate(prompts, **GREEDY)
    for prompt, g in zip(prompts, out, strict=True):
        ids, forced = loop.by_hand(model, prompt, 45, tokenizer.eos_token_id, before)
        assert g.response_ids == ids and loop.forced_places(g) == forced
    fired = [e["rule"] for g in out for e in g.events]
    assert set(fired) == ({"no_thinking", "stub"} if no_thinking else {"close", "stub"}), "both cases occur"
    assert all(g.text.count(STUB) == 1 for g in out)
    loop.single_runs(steered, prompts, **GREEDY)


def test_a_response_that_ends_within_the_budget_is_let_alone(talker, tokenizer, prompts) -> None:
    model = talker(eos=4.0)
    plain = baseline("vanilla", model, tokenizer).generate(prompts, **GREEDY)
    budget = max(len(g.response_ids) for g in plain)
    assert budget < 45 and all(g.finished for g in plain)
    ours = baseline("budget_forcing", model, tokenizer, budget=budget).generate(prompts, **GREEDY)
    assert [g.response_ids for g in ours] == [g.response_ids for g in plain]
