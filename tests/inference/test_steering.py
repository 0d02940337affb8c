"""Tensor actions equal hooks written by hand, on Llama, Qwen2 and Qwen3; positions, doses, rows, and the event log."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.forward import cache_argument
from neureasoner.inference.controller import Controller
from neureasoner.inference.decode import generate_batch
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger

_spec = importlib.util.spec_from_file_location("steering_by_hand", Path(__file__).parent / "by_hand.py")
assert _spec and _spec.loader
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)
rule, steer, logits_of, at_last, everywhere = (
    by_hand.rule,
    by_hand.steer,
    by_hand.logits_of,
    by_hand.at_last,
    by_hand.everywhere,
)

ARCHES = ["llama", "qwen2", "qwen3"]
D, HD = 32, 12
RNG = torch.Generator().manual_seed(7)
VECTOR = torch.randn(D, generator=RNG)
NEURONS, DELTA = [3, 17, 40], torch.tensor([4.0, -3.0, 5.0])
HEADS, SLICES = [1, 3], torch.randn(2, HD, generator=RNG) * 3
DENSE = Direction({"residual:0": VECTOR, "residual:1": -2 * VECTOR}, "positive = test")
SPARSE = Direction(
    {"neuron:1[3,17,40]": DELTA}, "positive = test", info={"std": {"neuron:1[3,17,40]": [0.5, 2.0, 1.0]}}
)
HEADED = Direction({"head:1[1,3]": SLICES}, "positive = test")
MLP = Direction({"mlp_out:0": VECTOR}, "positive = test")
ATTN = Direction({"attn_out:1": VECTOR}, "positive = test")


def bump(index: list[int], delta: torch.Tensor, s: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Neuron by neuron, as the released code."""

    def fn(a: torch.Tensor) -> torch.Tensor:
        for i, d in zip(index, delta.tolist(), strict=True):
            a[i] = a[i] + s * d
        return a

    return fn


def headwise(fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Head by head on the input of o_proj."""

    def edit(z: torch.Tensor) -> torch.Tensor:
        for h, v in zip(HEADS, SLICES, strict=True):
            z[h * HD : (h + 1) * HD] = fn(z[h * HD : (h + 1) * HD], v)
        return z

    return edit


def without(x: torch.Tensor, v: torch.Tensor, s: float) -> torch.Tensor:
    return x - s * (x @ v) / (v @ v) * v


UNIT = VECTOR / VECTOR.norm()
LAST, ALL = {"decode": True}, {"always": True}
CASES: dict[str, tuple[Rule, Direction | None, dict[tuple[str, int], Any]]] = {
    "add residual, everywhere": (
        rule({"add": True}, ALL, strength=Strength(0.4)),
        DENSE,
        {
            ("residual", 0): everywhere(lambda h: h + 0.4 * VECTOR),
            ("residual", 1): everywhere(lambda h: h - 0.8 * VECTOR),
        },
    ),
    "add residual, one site of two": (
        rule({"add": True}, LAST, site=("residual:1",)),
        DENSE,
        {("residual", 1): at_last(lambda h: h - 2 * VECTOR)},
    ),
    "add neurons, last": (
        rule({"add": True}, LAST, strength=Strength(0.3)),
        SPARSE,
        {("neuron", 1): at_last(bump(NEURONS, DELTA, 0.3))},
    ),
    "add neurons in sigma": (
        rule({"add": True}, ALL, strength=Strength(0.3, unit="sigma")),
        SPARSE,
        # 4, -3, 5 are 8, -1.5 and 5 deviations
        {("neuron", 1): everywhere(bump(NEURONS, DELTA, 0.3 / ((8**2 + 1.5**2 + 5**2) / 3) ** 0.5))},
    ),
    "add heads": (
        rule({"add": True}, LAST),
        HEADED,
        {("head", 1): at_last(headwise(lambda z, v: z + v))},
    ),
    "add relative": (
        rule({"add": True}, ALL, strength=Strength(0.1, relative=True)),
        MLP,
        {("mlp_out", 0): everywhere(lambda h: h + 0.1 * h.norm() * VECTOR)},
    ),
    "add keeping the norm": (
        rule({"add_keep_norm": True}, LAST, strength=Strength(0.5)),
        ATTN,
        {("attn_out", 1): at_last(lambda h: (h + 0.5 * VECTOR) * h.norm() / (h + 0.5 * VECTOR).norm())},
    ),
    "residual vectors at mlp_out of their blocks": (
        rule({"add_keep_norm": True}, LAST, site=("mlp_out:*",), strength=Strength(0.3, relative=True)),
        Direction({"residual:0": UNIT, "residual:1": -UNIT}, "fractional"),
        {
            ("mlp_out", b): at_last(
                lambda h, u=u: h.norm() * (h / h.norm() + 0.3 * u) / (h / h.norm() + 0.3 * u).norm()
            )
            for b, u in enumerate((UNIT, -UNIT))
        },
    ),
    "scale residual": (
        rule({"scale": True}, ALL, site=("residual:0",), strength=Strength(1.5)),
        DENSE,
        {("residual", 0): everywhere(lambda h: without(h, VECTOR, 1.5))},
    ),
    "scale heads in their own space": (
        rule({"scale": True}, ALL),
        HEADED,
        {("head", 1): everywhere(headwise(lambda z, v: without(z, v, 1.0)))},
    ),
    "set neurons": (
        rule({"set": -1.25}, LAST, direction=None, site=("neuron:0[5,2]",)),
        None,
        {("neuron", 0): at_last(lambda a: a.index_fill(0, torch.tensor([2, 5]), -1.25))},
    ),
    "set half way": (
        rule({"set": 2.0}, ALL, direction=None, site=("head:0[2]",), strength=Strength(0.5)),
        None,
        {("head", 0): everywhere(lambda z: torch.cat([z[:24], z[24:36] + 0.5 * (2 - z[24:36]), z[36:]]))},
    ),
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_action_equals_a_hook_written_by_hand(make_model, tokenizer, prompts, arch, case):
    plan, direction, edits = CASES[case]
    model = make_model(arch)
    want_ids, want = by_hand.greedy(model, prompts[0], 10, edits, tokenizer.eos_token_id)
    ids, got = logits_of(model, tokenizer, prompts[0], plan, direction or {}, 10)
    assert ids == want_ids
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    _, plain = by_hand.greedy(model, prompts[0], 1, {}, tokenizer.eos_token_id)
    assert (want[0] - plain[0]).abs().max() > 1e-3, "the edit does something"


@pytest.mark.parametrize("arch", ARCHES)
def test_a_direction_of_hidden_size_at_heads_projects_what_they_write(make_model, tokenizer, prompts, arch):
    """ThinkEdit: W_o^h z_h loses its component along u; the oracle edits a copy of the weights."""
    model, edited = make_model(arch), make_model(arch)
    with torch.no_grad():
        w = edited.model.layers[1].self_attn.o_proj.weight
        for h in (0, 2):
            part = w[:, h * HD : (h + 1) * HD]
            part -= 0.7 * torch.outer(UNIT, UNIT @ part)
    want_ids, want = by_hand.greedy(edited, prompts[0], 10, {}, tokenizer.eos_token_id)
    plan = rule({"scale": True}, ALL, site=("head:1[0,2]",), strength=Strength(0.7))
    ids, got = logits_of(
        model, tokenizer, prompts[0], plan, Direction({"attn_out:1": 3 * VECTOR}, "positive = short"), 10
    )
    assert ids == want_ids
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


HEADS_BY_BLOCK = rule({"scale": True}, ALL, site=("head:1[0,2]",)), Direction({"attn_out:1": VECTOR}, "positive = x")


@pytest.mark.parametrize("case", [*CASES, "heads against a direction of hidden size"])
def test_weights_that_lie_elsewhere_are_steered_alike(make_model, tokenizer, prompts, case):
    from accelerate import cpu_offload

    plan, direction = CASES[case][:2] if case in CASES else HEADS_BY_BLOCK
    want = logits_of(make_model(), tokenizer, prompts[0], plan, direction or {}, 5)
    offloaded = cpu_offload(make_model(), execution_device=torch.device("cpu"))
    got = logits_of(offloaded, tokenizer, prompts[0], plan, direction or {}, 5)
    assert got[0] == want[0]
    torch.testing.assert_close(got[1], want[1], atol=2e-4, rtol=1e-4)


def test_boundary_acts_only_on_tokens_that_close_a_thinking_step(talker, tokenizer, prompts, kit):
    model = talker(eos=0.0, close=-3.0, seed=2)
    close = tokenizer.convert_tokens_to_ids("</think>")

    def sample(prompt: list[int]) -> tuple[list[int], list[int]]:
        """Own loop: steps found with the offline segmenter over the ids so far."""
        from neureasoner.steps import segment

        acted: list[int] = []
        ids: list[int] = []

        def edit(h: torch.Tensor, given: torch.Tensor, prefill: bool) -> torch.Tensor:
            if not prefill:
                done = [*ids]
                steps, _ = segment(done, tokenizer)
                if any(s.closed and s.token_end == len(done) for s in steps) and close not in done:
                    acted.append(len(done) - 1)
                    h[:, -1] += 1.5 * VECTOR
            return h

        handles = by_hand.install(model, {("residual", 0): edit})
        with torch.no_grad():
            cache, given = None, torch.tensor([prompt])
            for _ in range(50):
                out = model(given, use_cache=True, **{cache_argument(model): cache})
                cache = getattr(out, cache_argument(model))
                ids.append(int(out.logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
                given = torch.tensor([[ids[-1]]])
        for handle in handles:
            handle.remove()
        return ids, acted

    plan = rule({"add": True}, {"boundary": True}, site=("residual:0",), strength=Strength(1.5))
    got = steer(model, tokenizer, prompts, plan, DENSE, max_new_tokens=50)
    plain = kit.sample(model, tokenizer, prompts, max_new_tokens=50)
    assert any(g.response_ids != p.response_ids for g, p in zip(got, plain, strict=True))
    for g in got:
        ids, acted = sample(g.prompt_ids)
        assert g.response_ids == ids
        assert sum(e["tokens"] for e in g.events) == len(acted)
        assert [e["token"] for e in g.events] == [t + 1 for t in acted[:1]]
    assert sum(len(g.events) for g in got) >= 3


def test_newlines_in_two_tokens_are_a_boundary_too(make_model, tokenizer, prompts):
    r"""``\n`` + ``\n`` closes a step at the second; the online state equals the segmenter's on forced text."""
    model = make_model()
    text = "Well\n\nThen. So\n\n\n\nEnd.\n\n</think>\n\nYes.\n\n"
    close = tokenizer.convert_tokens_to_ids("</think>")
    before, after = text.split("</think>")
    pieces = [i for c in before for i in tokenizer.encode(c, add_special_tokens=False)] + [close]
    pieces += tokenizer.encode(after, add_special_tokens=False)
    force = Rule("talk", Trigger(start=True), Action(text))
    acts = rule({"add": True}, {"boundary": True}, site=("residual:0",))
    for forced in (tokenizer.encode(text, add_special_tokens=False), pieces):
        plan = Plan("t", (force, acts))
        controller = Controller(model, tokenizer, plan, directions={"d": DENSE})
        controller.forced_ids["talk"] = forced
        [g] = generate_batch(
            model, tokenizer, prompts[:1], max_new_tokens=len(forced) + 3, temperature=0.0, controller=controller
        )
        effects = [e for e in g.events if e["rule"] == "r"]
        assert len([s for s in g.steps if s.closed]) == 3 and not g.events[0]["suppressed"]
        assert sum(e["tokens"] for e in effects) == 3


@pytest.mark.parametrize("source", ["oracle", "random"])
def test_a_fired_rule_acts_for_its_duration_from_the_next_token_on(talker, tokenizer, prompts, source):
    model = talker()
    trigger = {"oracle": "go"} if source == "oracle" else {"random": 1.0}
    wanted = 3 if source == "oracle" else None
    plan = rule(
        {"add": True}, {**trigger, "immediate": True, "duration": 4, "max": 2, "cooldown": 2}, site=("residual:0",)
    )
    oracles = {"go": lambda row: len(row.tokens) >= 3}
    [g] = steer(model, tokenizer, prompts[:1], plan, DENSE, oracles=oracles, max_new_tokens=60)
    first = g.events[0]["token"]
    assert wanted in (None, first) and [e["tokens"] for e in g.events] == [4, 4]
    bounds = [s.token_end for s in g.steps if s.closed]
    resumed = first + 4  # tokens read when the effect ended; two more steps have to close
    assert g.events[1]["token"] == [b for b in bounds if b > resumed][1]
    spans = [range(e["token"], e["token"] + 4) for e in g.events]

    def edit(h: torch.Tensor, ids: torch.Tensor, prefill: bool) -> torch.Tensor:
        if not prefill:
            if any(count[0] in span for span in spans):
                h[:, -1] += VECTOR
            count[0] += 1
        return h

    count = [0]
    ids, _ = by_hand.greedy(model, prompts[0], 60, {("residual", 0): edit}, tokenizer.eos_token_id)
    assert ids == g.response_ids
    assert g.events[0] | {"score": 0, "threshold": 0} == {
        "step": g.events[0]["step"],
        "token": first,
        "rule": "r",
        "score": 0,
        "threshold": 0,
        "action": "add",
        "suppressed": False,
        "row": 0,
        "strength": 1.0,
        "tokens": 4,
    }


def test_a_probe_without_duration_steers_to_the_end(talker, tokenizer, prompts, kit):
    model = talker()
    probe = kit.FakeProbe(lambda n, s: s == 2)
    plan = rule({"add": True}, {"probe": "p", "max": 3}, site=("residual:0",))
    [g] = steer(model, tokenizer, prompts[:1], plan, DENSE, probes={"p": probe}, max_new_tokens=40)
    [event] = g.events
    assert event["tokens"] == 40 - 1 - event["token"], "the last token is never read"
    assert event["score"] == 0.9 and event["threshold"] == 0.5


def test_schedules_and_strengths_per_row(make_model, tokenizer, prompts):
    model = make_model()
    plan = rule(
        {"add": True}, LAST, site=("residual:0",), strength=Strength(2.0, schedule=((2, 1.0), (6, 0.0)), per_row=True)
    )
    factors = [1.0, -0.5, 0.0, 3.0]
    batch = steer(model, tokenizer, prompts, plan, DENSE, strengths={"r": factors})
    for g, f in zip(batch, factors, strict=True):
        steps = [0]

        def edit(h: torch.Tensor, ids: torch.Tensor, prefill: bool, f: float = f, steps: list[int] = steps) -> Any:
            s = 2.0 * f * min(1.0, max(0.0, (6 - steps[0]) / 4))
            steps[0] += 1
            h[:, -1] += s * VECTOR
            return h

        ids, _ = by_hand.greedy(model, g.prompt_ids, 24, {("residual", 0): edit}, tokenizer.eos_token_id)
        assert g.response_ids == ids
        assert [(e["strength"], e["tokens"]) for e in g.events] == ([(2.0 * f, min(6, len(ids)))] if f else [])
    with pytest.raises(UserError, match="rule r takes its strength row by row"):
        steer(model, tokenizer, prompts, plan, DENSE)
    with pytest.raises(UserError, match="4 finite strengths are needed, one a row, got"):
        steer(model, tokenizer, prompts, plan, DENSE, strengths={"r": [1.0]})
    with pytest.raises(UserError, match="strengths name rule 'x', which takes none"):
        steer(model, tokenizer, prompts, plan, DENSE, strengths={"r": factors, "x": factors})


def test_logit_rules_bias_the_scores_and_nothing_else(talker, tokenizer, prompts, kit):
    model = talker()
    plain = kit.sample(model, tokenizer, prompts, record=["logits"], plan=kit.plan_of(a=("<INTRA>", {"random": 0.0})))
    token = plain[0].response_ids[3]
    text = tokenizer.convert_ids_to_tokens(token)
    plan = rule({"add_logits": {text: -40.0}}, LAST, direction=None, strength=Strength(2.0))
    out = steer(model, tokenizer, prompts, plan, {}, record=["logits"], max_new_tokens=60)
    assert not any(token in g.response_ids for g in out)
    np.testing.assert_array_equal(out[0].series["logits"][:1], plain[0].series["logits"][:1])  # raw logits
    [event] = out[0].events
    assert event["action"] == "add_logits" and event["tokens"] == len(out[0].response_ids) and event["strength"] == 2.0
    boundary = rule({"add_logits": {text: 1000.0}}, {"boundary": True}, direction=None)
    for g in steer(model, tokenizer, prompts, boundary, {}, max_new_tokens=40):
        ends = [s.token_end for s in g.steps if s.closed and s.token_end < len(g.response_ids)]
        assert ends and all(g.response_ids[t] == token for t in ends)
        assert g.events[0]["tokens"] == len(ends)


def test_two_rules_at_one_site_act_in_the_plans_order(make_model, tokenizer, prompts):
    model = make_model()
    add = rule({"add": True}, ALL, name="add", site=("residual:0",))
    cut = rule({"scale": True}, ALL, name="cut", site=("residual:0",), strength=Strength(0.5))
    want = {
        ("add", "cut"): everywhere(lambda h: without(h + VECTOR, VECTOR, 0.5)),
        ("cut", "add"): everywhere(lambda h: without(h, VECTOR, 0.5) + VECTOR),
    }
    for names, edit in want.items():
        rules = tuple({"add": add, "cut": cut}[n] for n in names)
        _, expected = by_hand.greedy(model, prompts[0], 6, {("residual", 0): edit}, tokenizer.eos_token_id)
        _, got = logits_of(model, tokenizer, prompts[0], Plan("t", rules, conflicts="order"), {"d": DENSE}, 6)
        torch.testing.assert_close(got[: len(expected)], expected, atol=1e-4, rtol=1e-4)
        for policy, text in ((None, "has no policy"), ("refuse", "says `conflicts: refuse`")):
            with pytest.raises(UserError, match=f"rules {names[0]} and {names[1]} both write residual:0.*{text}"):
                Controller(model, tokenizer, Plan("t", rules, conflicts=policy), directions={"d": DENSE})
    apart = (rule({"set": 0.0}, name="a", direction=None, site=("neuron:0[1]",)),)
    apart += (rule({"set": 0.0}, name="b", direction=None, site=("neuron:0[2]",)),)
    Controller(model, tokenizer, Plan("t", apart))


def test_probes_read_what_the_model_goes_on_with(make_model, tokenizer, prompts):
    site = "neuron:1[3,17,40]"
    plan = rule({"set": 9.0}, LAST, direction=None, site=(site,))
    [g] = steer(make_model(), tokenizer, prompts[:1], plan, {}, record=[site], max_new_tokens=4)
    assert g.series[site].shape == (3, 3) and (g.series[site] == 9.0).all()


def test_half_precision_keeps_its_dtype(make_model, tokenizer, prompts):
    model = make_model().to(torch.bfloat16)
    for name, (plan, direction, _) in CASES.items():
        out = steer(model, tokenizer, prompts[:2], plan, direction or {}, max_new_tokens=4)
        assert all(len(g.response_ids) for g in out), name


def test_a_hook_that_is_gone_is_an_error(make_model, tokenizer, prompts):
    model = make_model()
    controller = Controller(
        model, tokenizer, Plan("t", (rule({"add": True}, {"boundary": True}),)), directions={"d": DENSE}
    )
    with controller.watch(prompts[:1]) as watch:
        ids = torch.tensor(prompts[:1])
        watch(ids, model(ids).logits[:, -1])
        model.model.layers[1]._forward_hooks.clear()
        with pytest.raises(RuntimeError, match=r"site residual:1: its writing hook fired 0 times"):
            watch(torch.cat([ids, ids[:, :1]], 1), model(ids[:, :1]).logits[:, -1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Gate:
    """A stand-in gate: predicts failure for prompts of an even number of counted tokens."""

    threshold, model_fingerprint = 0.5, "any"
    channels = np.array([[0, 1], [1, 2]])

    def __init__(self, seen: list[int] | None = None):
        self.seen = [] if seen is None else seen

    def predict_proba(self, values: Any) -> np.ndarray:
        self.seen += [len(v) for v in values]
        return np.array([0.9 if len(v) % 2 == 0 else 0.1 for v in values])

    def check(self, model: Any) -> None:
        pass


def test_a_gate_is_asked_once_and_bars_rows_bit_by_bit(make_model, tokenizer, prompts, kit):
    model, gate = make_model(), Gate()
    uneven = [p[: len(p) - (i % 2)] if len(p) % 2 else p[: len(p) - 1 + i % 2] for i, p in enumerate(prompts)]
    want = [(len(p) - 1) % 2 == 0 for p in uneven]
    assert any(want) and not all(want)
    plan = rule({"add": True}, {"gate": "g", "decode": True}, strength=Strength(0.8))
    got = steer(model, tokenizer, uneven, plan, SPARSE, gates={"g": gate}, record=["residual:1"])
    assert gate.seen == [len(p) - 1 for p in uneven], "asked once, for the whole batch, position 0 left out"
    plain = steer(model, tokenizer, uneven, Plan("none"), {}, record=["residual:1"])
    for g, p, on in zip(got, plain, want, strict=True):
        assert [s["score"] for s in g.scores] == [0.9 if on else 0.1]
        assert len(g.events) == int(on)
        if on:
            # the prompt's forward, and every token but the last, which is never read
            assert g.events[0]["score"] == 0.9 and g.events[0]["tokens"] == len(g.response_ids)
        else:
            assert g.response_ids == p.response_ids
            np.testing.assert_array_equal(g.series["residual:1"], p.series["residual:1"])
    alone = rule({"add": True}, {"gate": "g"}, strength=Strength(0.8))
    again = steer(model, tokenizer, uneven, alone, SPARSE, gates={"g": Gate()})
    assert [g.response_ids for g in again] == [g.response_ids for g in got], "a gate alone means decode"
    with pytest.raises(UserError, match="gate g was not loaded"):
        steer(model, tokenizer, uneven, plan, SPARSE)
    with pytest.raises(UserError, match="prompts of at least 2 tokens"):
        steer(model, tokenizer, [[5]], plan, SPARSE, gates={"g": Gate()})


def test_a_gated_text_is_forced_before_the_first_token(talker, tokenizer, prompts):
    plan = Plan("t", (Rule("close", Trigger(gate=1.0), Action("Okay.\n</think>\n\n")),))
    for g in steer(talker(), tokenizer, prompts, plan, {}):
        forced = tokenizer.encode("Okay.\n</think>\n\n", add_special_tokens=False)
        assert g.response_ids[: len(forced)] == forced and g.forced == [True] * len(forced) + [False] * (
            24 - len(forced)
        )
        assert [(e["token"], e["rule"]) for e in g.events] == [(0, "close")] and g.thinking_tokens < len(forced)


def test_bad_input_is_named_before_anything_runs(make_model, tokenizer, prompts):
    model = make_model()

    def refused(text: str, plan: Any, directions: Any) -> None:
        plan = Plan("t", (plan,)) if isinstance(plan, Rule) else plan
        with pytest.raises(UserError, match=text):
            Controller(model, tokenizer, plan, directions=directions)

    add = rule({"add": True}, ALL)
    refused("rule r: direction d was not loaded", add, {})
    refused("layer 7 is out of range", add, {"d": Direction({"residual:7": VECTOR}, "m")})
    refused("hidden size of this model is 32", add, {"d": Direction({"residual:1": torch.ones(8)}, "m")})
    refused("was made on model 'other'", add, {"d": Direction({"residual:1": VECTOR}, "m", "other", "abc")})
    missing = rule({"add": True}, ALL, site=("residual:0",))
    refused("site 'residual:0': the direction has no values for it, only for neuron", missing, {"d": SPARSE})
    refused("'head:\\*' fits nothing of the direction", rule({"add": True}, ALL, site=("head:*",)), {"d": DENSE})
    refused(
        "scale needs a direction of some length",
        rule({"scale": True}),
        {"d": Direction({"residual:1": 0 * VECTOR}, "m")},
    )
    # what heads write is the attention's output, whatever site the rule names
    thinkedit = rule({"scale": True}, ALL, name="t", site=("head:1[0,2]",))
    both = {"d": Direction({"attn_out:1": VECTOR}, "m")}
    refused("rules t and r both write attn_out:1", Plan("t", (thinkedit, rule({"add": True}, ALL))), both)
    assert Controller(
        model, tokenizer, Plan("t", (thinkedit, rule({"add": True}, ALL)), conflicts="order"), directions=both
    )
    sigma = rule({"add": True}, strength=Strength(unit="sigma"))
    dead = Direction({"neuron:1[3]": DELTA[:1]}, "m", info={"std": {"neuron:1[3]": [0.0]}})
    refused("unit sigma needs each neuron's standard deviation", sigma, {"d": dead})
    refused("unit sigma needs each neuron's standard deviation", sigma, {"d": DENSE})
    refused("add_logits: 'Wait, no way' is . tokens", rule({"add_logits": {"Wait, no way": 1.0}}, direction=None), {})
    small = make_model(vocab_size=tokenizer.convert_tokens_to_ids("<INTRA>"))
    with pytest.raises(UserError, match="model and tokenizer do not belong together"):
        Controller(small, tokenizer, Plan("t", (Rule("x", Trigger(always=True), Action("<INTRA>")),)))
