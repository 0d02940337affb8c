"""Promises 1-4 and 11 of docs/architecture.md, and the control checks of core.md §1.14, on a random model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList

from neureasoner.forward import cache_argument
from neureasoner.inference.controller import Controller
from neureasoner.inference.decode import generate_batch
from neureasoner.sites import read_sites

PROBE = {"probe": "p", "max": 2}


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_promise_1_thresholds_that_never_fire_change_nothing(talker, tokenizer, prompts, kit, temperature):
    model = talker(eos=2.0, seed=1)
    probe = kit.FakeProbe(lambda n, s: True, kit.FakeFeatures(read=tuple(kit.SITES)))
    plan = kit.plan_of(inter=("<INTER>", {**PROBE, "threshold": 1.0}), intra=("<INTRA>", {**PROBE, "threshold": 1.0}))
    settings = {"temperature": temperature, "max_new_tokens": 80, "seed": 7}
    watched = kit.sample(model, tokenizer, prompts, plan, {"p": probe}, **settings)
    plain = kit.sample(model, tokenizer, prompts, **settings)
    assert [g.response_ids for g in watched] == [g.response_ids for g in plain]
    assert sum(len(g.scores) for g in watched) > 8 and not any(g.events or any(g.forced) for g in watched)
    assert len({len(g.response_ids) for g in plain}) > 1, "rows should end at different times"

    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    torch.manual_seed(7)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}
    stock = model.generate(
        ids,
        attention_mask=(ids != tokenizer.pad_token_id).long(),
        max_new_tokens=80,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(sampling if temperature else {"do_sample": False}),
    )
    for row, g in zip(stock[:, width:].tolist(), watched, strict=True):
        assert row[: len(g.response_ids)] == g.response_ids


def test_promise_1_the_processor_returns_the_scores_it_got(talker, tokenizer, prompts, kit):
    model = talker()
    controller = Controller(model, tokenizer, kit.plan_of(intra=("<INTRA>", {"random": 0.0})))
    with controller.watch(prompts) as watch:
        scores = torch.randn(len(prompts), 10)
        before = scores.clone()
        assert watch(torch.zeros(len(prompts), 5, dtype=torch.long), scores) is scores
        assert torch.equal(scores, before)


def test_promise_2_a_batch_equals_single_runs(talker, tokenizer, prompts, kit):
    model = talker(eos=1.0, seed=1)
    probe = kit.FakeProbe(lambda n, s: n % 3 == 0, kit.FakeFeatures(read=tuple(kit.SITES)))
    plan = kit.plan_of(
        inter=("<INTER>", {"random": 0.7, "max": 1}),
        intra=("<INTRA>", {"probe": "p", "max": 1}),
    )
    together = kit.sample(model, tokenizer, prompts, plan, {"p": probe}, record=kit.SITES, max_new_tokens=90)
    assert {e["rule"] for g in together for e in g.events} == {"inter", "intra"}
    assert len({len(g.response_ids) for g in together}) > 1 and any(g.finished for g in together)
    for i, g in enumerate(together):
        [alone] = kit.sample(
            model, tokenizer, [prompts[i]], plan, {"p": probe}, record=kit.SITES, max_new_tokens=90, indices=[i]
        )
        assert alone.response_ids == g.response_ids and alone.forced == g.forced
        assert [e["token"] for e in alone.events] == [e["token"] for e in g.events]
        for site in kit.SITES:
            rows = len(alone.series[site])
            np.testing.assert_allclose(g.series[site][:rows], alone.series[site], atol=2e-5)


def test_promise_2_cached_decoding_equals_one_full_forward(talker, tokenizer, prompts, kit):
    model = talker()
    plan = kit.plan_of(intra=("<INTRA>", {"always": True, "max": 2}))
    for g in kit.sample(model, tokenizer, prompts, plan, record=kit.SITES):
        full: dict[str, torch.Tensor] = {}
        ids = torch.tensor([g.prompt_ids + g.response_ids])
        with torch.no_grad(), read_sites(model, [s for s in kit.SITES if s != "logits"], full.__setitem__):
            logp = model(ids).logits[0].float().log_softmax(-1)
        begin, n = len(g.prompt_ids), len(g.series["logits"])
        assert n == len(g.response_ids) - 1  # the last token is never read
        for site, values in full.items():
            np.testing.assert_allclose(g.series[site], values[0, begin : begin + n], atol=2e-5)
        drawn = logp[begin - 1 : begin - 1 + n]
        entropy = -(drawn.exp() * drawn).sum(-1)
        surprise = -drawn.gather(1, ids[0, begin : begin + n, None])[:, 0]
        np.testing.assert_allclose(g.series["logits"], torch.stack([entropy, surprise], 1), atol=2e-5)


def test_promise_3_forced_tokens_are_like_prompt_tokens_and_count(talker, tokenizer, prompts, kit, stock_config):
    model, text = talker(), "Okay, I was wrong. <INTRA>"
    forced = tokenizer.encode(text, add_special_tokens=False)
    controller = Controller(model, tokenizer, kit.plan_of(intra=(text, {"always": True})))
    prompt = prompts[1]
    with controller.watch([prompt]) as watch:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=stock_config(model, tokenizer, 50),
            logits_processor=LogitsProcessorList([watch]),
            return_dict_in_generate=True,
            output_logits=True,
        )
    ids = out.sequences[0].tolist()
    at = len(prompt) + watch.rows[0].events[0]["token"]
    assert ids[at : at + len(forced)] == forced and len(ids) == len(prompt) + 50  # forced ones are among the 50
    cache = getattr(out, cache_argument(model))
    assert cache.get_seq_length() == len(ids) - 1
    with torch.no_grad():
        full = model(out.sequences).logits[0]
    seen = torch.stack(out.logits)[:, 0]
    torch.testing.assert_close(seen, full[len(prompt) - 1 : -1], atol=1e-4, rtol=1e-4)
    end = at + len(forced)
    [again] = generate_batch(model, tokenizer, [ids[:end]], max_new_tokens=len(ids) - end, temperature=0.0)
    assert again.response_ids == ids[end:]


def test_a_probe_that_fires_once_gives_one_trigger_there(talker, tokenizer, prompts, kit):
    """core.md §1.14, third check."""
    model = talker()
    [plain] = kit.sample(model, tokenizer, prompts[:1])
    bounds = [s.token_end for s in plain.steps if s.closed]
    at = bounds[2]
    probe = kit.FakeProbe(lambda n, s: n == at)
    [g] = kit.sample(model, tokenizer, prompts[:1], kit.plan_of(intra=("<INTRA>", PROBE)), {"p": probe})
    [event] = g.events
    assert event == {
        "step": 2,
        "token": at,
        "rule": "intra",
        "score": 0.9,
        "threshold": 0.5,
        "action": "<INTRA>",
        "suppressed": False,
    }
    assert g.response_ids[:at] == plain.response_ids[:at]
    assert g.response_ids[at] == tokenizer.convert_tokens_to_ids("<INTRA>")
    assert g.forced == [t == at for t in range(60)] and len(g.response_ids) == 60
    with torch.no_grad():
        greedy = model(torch.tensor([g.prompt_ids + g.response_ids])).logits[0].argmax(-1).tolist()
    expected = greedy[len(g.prompt_ids) - 1 : -1]
    assert [t for t, f in zip(g.response_ids, g.forced, strict=True) if not f] == [
        t for t, f in zip(expected, g.forced, strict=True) if not f
    ]


def test_promise_4_a_lost_hook_is_an_error(talker, tokenizer, prompts, kit):
    model = talker()

    def lose(row: Any) -> bool:
        if row.steps == 2:
            model.model.layers[1].mlp.down_proj._forward_pre_hooks.clear()
        return False

    plan = kit.plan_of(watch=("<INTRA>", PROBE), lose=("<INTER>", {"oracle": "lose"}))
    probe = kit.FakeProbe()
    with pytest.raises(RuntimeError, match=r"site neuron:1\[3,5\]: its hook fired 0 times for response token \d+"):
        kit.sample(model, tokenizer, prompts, plan, {"p": probe}, oracles={"lose": lose})
    assert hooks(model) == 0, "hooks are removed after an error too"


def test_promise_4_a_hook_that_fires_twice_is_an_error(talker, tokenizer, prompts, kit):
    model = talker()
    controller = Controller(model, tokenizer, kit.plan_of(watch=("<INTRA>", PROBE)), {"p": kit.FakeProbe()})
    with controller.watch(prompts[:1]) as watch:
        ids = torch.tensor(prompts[:1])
        watch(ids, model(ids).logits[:, -1])
        more = torch.cat([ids, ids[:, :1]], 1)
        logits = model(more).logits[:, -1]
        model(more)
        with pytest.raises(RuntimeError, match="fired 2 times"):
            watch(more, logits)
    with controller.watch(prompts[:1]) as watch:
        watch(ids, model(ids).logits[:, -1])
        model(more)
        with pytest.raises(RuntimeError, match="assisted"):
            watch(torch.cat([more, more], 1), logits)


def test_promise_11_two_generations_share_no_state(talker, tokenizer, prompts, kit):
    model = talker()
    plan = kit.plan_of(
        instance=("Okay, I have finished thinking.\n</think>\n\n", {"oracle": "late"}),
        inter=("<INTER>", {"random": 0.3, "max": 1}),
        intra=("<INTRA>", {"probe": "p", "max": 2, "consecutive": 2}),
    )
    probe = kit.FakeProbe(lambda n, s: True)
    controller = Controller(model, tokenizer, plan, {"p": probe}, oracles={"late": lambda row: row.steps >= 8})
    settings: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.7, "seed": 3}
    state = torch.get_rng_state()
    first = generate_batch(model, tokenizer, prompts, controller=controller, **settings)
    generate_batch(model, tokenizer, prompts[:2], controller=controller, **(settings | {"seed": 4}))
    again = generate_batch(model, tokenizer, prompts, controller=controller, **settings)
    assert {e["rule"] for g in first for e in g.events} == {"instance", "inter", "intra"}
    for a, b in zip(first, again, strict=True):
        assert (a.response_ids, a.events, a.scores, a.forced) == (b.response_ids, b.events, b.scores, b.forced)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"
    assert hooks(model) == 0


def test_no_hooks_without_sites(talker, tokenizer, prompts, kit):
    model = talker()
    controller = Controller(model, tokenizer, kit.plan_of(intra=("<INTRA>", {"always": True})))
    with controller.watch(prompts):
        assert hooks(model) == 0
