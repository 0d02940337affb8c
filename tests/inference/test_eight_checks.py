"""What to test first (related.md §G, end): eight checks, each named by its number, under plans that steer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.inference.bake import bake_into
from neureasoner.inference.controller import Controller
from neureasoner.inference.controls import no_op
from neureasoner.inference.decode import generate_batch
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.rows import RowState
from neureasoner.inference.steering import Steering, SteeringRun
from neureasoner.sites import read_sites
from neureasoner.steps import Separators, StepSegmenter, segment

_spec = importlib.util.spec_from_file_location("steering_by_hand", Path(__file__).parent / "by_hand.py")
assert _spec and _spec.loader
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

D, HD = 32, 12
RNG = torch.Generator().manual_seed(11)
VECTOR = torch.randn(D, generator=RNG)
DIRECTIONS = {
    "dense": Direction({"residual:0": VECTOR, "residual:1": VECTOR.flip(0)}, "positive = test"),
    "sparse": Direction({"neuron:0[3,9]": torch.tensor([2.0, -4.0])}, "positive = test"),
    "heads": Direction({"head:1[0,3]": torch.randn(2, HD, generator=RNG)}, "positive = test"),
}


def rule(name: str, action: str, trigger: dict[str, Any], direction: str, value: float = 1.0, **strength: Any) -> Rule:
    made = Action(**{action: True})  # type: ignore[arg-type]
    return Rule(name, Trigger(**trigger), made, direction=direction, strength=Strength(value, **strength))


# Every kind of place, position and action together.
EVERYTHING = Plan(
    "everything",
    (
        rule("bias", "add", {"always": True}, "dense", 0.3),
        rule("neurons", "add", {"decode": True}, "sparse"),
        rule("heads", "scale", {"boundary": True}, "heads"),
        rule("late", "add_keep_norm", {"random": 0.5, "immediate": True, "duration": 3, "max": 4}, "dense", 0.5),
        Rule("wait", Trigger(oracle="fourth"), Action("<INTRA>")),
        Rule("calm", Trigger(decode=True), Action(add_logits={"<think>": -3.0})),
    ),
    conflicts="order",
)
ORACLES = {"fourth": lambda row: row.steps == 4}


def sample(model: Any, tokenizer: Any, prompts: Any, plan: Plan = EVERYTHING, **settings: Any) -> list[Any]:
    record = settings.pop("record", ())
    controller = Controller(model, tokenizer, plan, directions=DIRECTIONS, oracles=ORACLES, record=record)
    settings = {"max_new_tokens": 60, "temperature": 0.0, "seed": 5} | settings
    return generate_batch(model, tokenizer, prompts, controller=controller, **settings)


def test_check_1_reading_then_adding_at_a_site_is_a_manual_edit_of_the_state(make_model, tokenizer, prompts):
    model = make_model()
    plan = Plan("first", (Rule("r", Trigger(always=True), Action(add=True), ("residual:0",), "dense"),))
    before: dict[str, torch.Tensor] = {}
    ids = torch.tensor([prompts[1]])
    with torch.no_grad(), read_sites(model, ["residual:0"], before.__setitem__):
        model(ids)
    run = SteeringRun(Steering(model, tokenizer, plan, DIRECTIONS), [row(tokenizer, 0)])
    after: dict[str, torch.Tensor] = {}
    with torch.no_grad(), run.hooks(), read_sites(model, ["residual:0"], after.__setitem__):
        steered = model(ids).logits
    assert torch.equal(after["residual:0"], before["residual:0"] + VECTOR)
    hidden = before["residual:0"] + VECTOR
    for layer in model.model.layers[1:]:  # the rest of the model by hand, from the edited state on
        position = torch.arange(ids.shape[1])[None]
        rotary = model.model.rotary_emb(hidden, position)
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        with torch.no_grad():
            hidden = layer(hidden, attention_mask=mask, position_ids=position, position_embeddings=rotary)
    with torch.no_grad():
        by_hand_logits = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(steered, by_hand_logits, atol=1e-4, rtol=1e-4)


def row(tokenizer: Any, index: int) -> RowState:
    return RowState(index, StepSegmenter(Separators.of(tokenizer)), tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_check_2_a_zero_strength_plan_is_plain_generation_bit_by_bit(talker, tokenizer, prompts, kit, temperature):
    model = talker(eos=1.0, seed=1)
    settings = {"temperature": temperature, "max_new_tokens": 60, "seed": 5}
    plain = kit.sample(model, tokenizer, prompts, **settings)
    sites = ["residual:0", "residual:1", "neuron:0[3,9]", "head:1[0,3]", "logits"]
    watched = sample(model, tokenizer, prompts, Plan("none"), record=sites, **settings)
    per_row = rule("given", "add", {"always": True}, "dense", 1.0, per_row=True)
    faded = rule("faded", "add_keep_norm", {"decode": True}, "heads", 1.0, schedule=((0, 0.0), (80, 0.0), (90, 1.0)))
    for plan in (no_op(EVERYTHING), Plan("zeros", (per_row, faded))):
        extra = {} if "given" not in plan.names else {"strengths": {"given": [0.0] * len(prompts)}}
        out = sample(model, tokenizer, prompts, plan, record=sites, **settings, **extra)
        for g, p, w in zip(out, plain, watched, strict=True):
            assert g.response_ids == p.response_ids and not any("strength" in e and e["tokens"] for e in g.events)
            for site in sites:
                np.testing.assert_array_equal(g.series[site], w.series[site])


def test_check_3_forced_tokens_leave_the_logits_they_would_leave_in_the_prompt(talker, tokenizer, prompts):
    """Under vectors that act at every position, a forced text and the same text in the prompt are one thing."""
    model = talker()
    bias = rule("bias", "add", {"always": True}, "dense", 0.5)
    text = "Okay, I was wrong. <INTRA>"
    plan = Plan("t", (bias, Rule("force", Trigger(oracle="fourth"), Action(text))))
    [g] = sample(model, tokenizer, prompts[:1], plan, record=["residual:1"], max_new_tokens=50)
    at = next(e["token"] for e in g.events if e["rule"] == "force") + sum(g.forced)
    assert tokenizer.decode([i for i, f in zip(g.response_ids, g.forced, strict=True) if f]) == text
    prompt = prompts[0] + g.response_ids[:at]
    only = Plan("bias", (bias,))
    [again] = sample(model, tokenizer, [prompt], only, record=["residual:1"], max_new_tokens=50 - at)
    assert again.response_ids == g.response_ids[at:]
    np.testing.assert_allclose(again.series["residual:1"], g.series["residual:1"][at:], atol=2e-5)


def test_check_4_a_batch_is_its_rows_alone(talker, tokenizer, prompts):
    model = talker(eos=1.0, seed=1)
    together = sample(model, tokenizer, prompts)
    assert {e["rule"] for g in together for e in g.events} == set(EVERYTHING.names)
    assert len({len(g.response_ids) for g in together}) > 1 and len({len(p) for p in prompts}) > 1
    for i, g in enumerate(together):
        [alone] = sample(model, tokenizer, [prompts[i]], indices=[i])
        assert alone.response_ids == g.response_ids and alone.events == g.events and alone.forced == g.forced


def test_check_5_steps_found_token_by_token_are_the_offline_ones(make_model, tokenizer):
    """Three ways: the segmenter fed one id at a time, the whole text at once, and the boundary mask on the device."""
    model = make_model()
    plan = Plan("t", (Rule("r", Trigger(boundary=True), Action(add=True), ("residual:0",), "dense"),))
    steering = Steering(model, tokenizer, plan, DIRECTIONS)
    separators = Separators.of(tokenizer)
    rng = np.random.default_rng(0)
    newlines = [i for i in range(separators.size) if "\n" in tokenizer.decode([i])]
    others = sorted(set(range(separators.size)) - {tokenizer.convert_tokens_to_ids("</think>"), separators.eos})
    draws = [rng.choice([*newlines * 4, *others], size=200).tolist() for _ in range(6)]
    for ids in draws[:3]:
        ids[150] = tokenizer.convert_tokens_to_ids("</think>")
    rows = [row(tokenizer, i) for i in range(len(draws))]
    run, found = SteeringRun(steering, rows), [[0] for _ in draws]
    run.prefill = False
    for t in range(200):
        run.read_ids(torch.tensor([[ids[t]] for ids in draws]))
        edited = run.edit("residual:0", torch.zeros(len(draws), 1, D))
        for i, state in enumerate(rows):
            state.segmenter.push(draws[i][t])
            if bool(edited[i].any()):
                found[i].append(t + 1)
    for i, ids in enumerate(draws):
        offline = [0, *(s.token_end for s in segment(ids, tokenizer)[0] if s.closed)]
        assert rows[i].bounds == offline == found[i]
        assert len(offline) > 10


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_check_6_baked_is_hooked(make_model, tokenizer, prompts, arch):
    hooked = make_model(arch)
    plan = Plan("bias", (rule("bias", "add", {"always": True}, "dense", 0.4),))
    ids = torch.tensor([prompts[1]])
    run = SteeringRun(Steering(hooked, tokenizer, plan, DIRECTIONS), [row(tokenizer, 0)])
    with torch.no_grad(), run.hooks():
        want = hooked(ids).logits
    baked = bake_into(make_model(arch), tokenizer, plan, DIRECTIONS, as_llama=arch == "qwen2")
    with torch.no_grad():
        torch.testing.assert_close(baked(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert (want - make_model(arch)(ids).logits).abs().max() > 0.1


def test_check_7_nothing_is_left_between_two_generations(talker, tokenizer, prompts):
    model = talker(seed=1)
    controller = Controller(model, tokenizer, EVERYTHING, directions=DIRECTIONS, oracles=ORACLES)
    settings: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.7, "seed": 3}
    first = generate_batch(model, tokenizer, prompts, controller=controller, **settings)
    generate_batch(model, tokenizer, prompts[:3], controller=controller, **(settings | {"seed": 4}))
    with pytest.raises(RuntimeError, match="lost"), controller.watch(prompts):
        raise RuntimeError("lost")
    again = generate_batch(model, tokenizer, prompts, controller=controller, **settings)
    for a, b in zip(first, again, strict=True):
        assert (a.response_ids, a.events, a.scores, a.forced) == (b.response_ids, b.events, b.scores, b.forced)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_check_8_heads_of_a_model_with_its_own_head_size(make_model, tokenizer, prompts):
    """Qwen3 with 4 heads of 12 on a hidden size of 32: head 3 is inputs 36 to 47 of o_proj, which D / H would miss."""
    model = make_model("qwen3")
    assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size
    plan = Plan("t", (rule("r", "add", {"decode": True}, "heads", 5.0),))
    slices = DIRECTIONS["heads"].values["head:1[0,3]"]

    def edit(z: torch.Tensor, ids: torch.Tensor, prefill: bool) -> torch.Tensor:
        z[:, -1, 0:12] += 5.0 * slices[0]
        z[:, -1, 36:48] += 5.0 * slices[1]
        return z

    for prompt, g in zip(prompts, sample(model, tokenizer, prompts, plan, max_new_tokens=20), strict=True):
        ids, _ = by_hand.greedy(model, prompt, 20, {("head", 1): edit}, tokenizer.eos_token_id)
        assert g.response_ids == ids
