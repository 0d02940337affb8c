"""Which states are compared, on which side; and their values against single forward passes with hand-set hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.probes.directions import states as module
from neureasoner.probes.directions.config import DirectionsConfig
from neureasoner.probes.directions.estimators import Example
from neureasoner.probes.directions.states import States, projections, read_states, sites_of, states_of, thought
from neureasoner.sites import Layout
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace

TEXTS = [
    "Try 12.\n\nWait, that is 3.\n\nSo 4.\n\nAnother way: 5.\n\nDone",
    "Add 1 and 2.\n\nThat's correct so far.\n\nNow 3.",
    "One step only",
]


def settings(**more: Any) -> DirectionsConfig:
    return DirectionsConfig(**({"model": "m", "traces": "t", "out": "o"} | more))


def make_traces(tokenizer: Any, texts: list[str], right: list[bool], problems: list[str]) -> list[Trace]:
    out = []
    for i, (text, correct, p) in enumerate(zip(texts, right, problems, strict=True)):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        prompt = tokenizer(f"<think>\nQuestion {p}" + "?" * i, add_special_tokens=False)["input_ids"]
        labels = Labels(correct, "1", IntraLabel(), InterLabel())
        text += tokenizer.eos_token
        out.append(Trace(f"t{i}", Problem(p, "f", 1, f"Question {p}", "a"), prompt, ids, text, [], True, labels))
    return out


def single(model: Any, ids: list[int], site: str) -> np.ndarray:
    """``[T, C]`` of one unpadded row, float64, with a hook of our own."""
    kind, _, rest = site.partition(":")
    layer = model.model.layers[int(rest.partition("[")[0])]
    index = [int(i) for i in rest.partition("[")[2].strip("]").split(",") if i]
    got: list[torch.Tensor] = []
    places = {
        "residual": lambda: layer.register_forward_hook(
            lambda m, a, o: got.append(o[0] if isinstance(o, tuple) else o)
        ),
        "attn_out": lambda: layer.self_attn.register_forward_hook(lambda m, a, o: got.append(o[0])),
        "mlp_out": lambda: layer.mlp.register_forward_hook(lambda m, a, o: got.append(o)),
        "neuron": lambda: layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: got.append(a[0])),
        "head": lambda: layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: got.append(a[0])),
    }
    handle = places[kind]()
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    value = got[0][0].double()
    if kind == "head":
        size = model.config.head_dim
        value = torch.cat([value[:, h * size : (h + 1) * size] for h in index], dim=1)
    elif index:
        value = value[:, index]
    return value.numpy()


SITES = ["residual:1", "attn_out:0", "mlp_out:1", "neuron:1[5,0]", "neuron:0", "head:1[3,1]"]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("pooled", [True, False])
def test_states_equal_single_rows(make_model: Any, monkeypatch: Any, arch: str, pooled: bool) -> None:
    monkeypatch.setattr(module, "CHUNK", 300)  # several pieces of tokens
    model, rng = make_model(arch), np.random.default_rng(0)
    given = []
    for i in range(11):
        ids = rng.integers(5, 300, size=int(rng.integers(6, 20))).tolist()
        positions = (2, 3, len(ids) - 1) if i % 2 else (4,)
        given.append(
            States(f"p{i // 2}", ids, positions, pooled, (True,) if pooled else (bool(i % 2),) * len(positions))
        )
    steps: list[int] = []
    got = list(read_states(model, given, SITES, 3, steps.append))
    assert sum(steps) == len(given)
    expected = [(s, [list(s.positions)] if pooled else [[p] for p in s.positions]) for s in given]
    flat = [(s, at) for s, groups in expected for at in groups]
    assert [(e.problem, e.positive) for e in got] == [(s.problem, s.sides[0]) for s, _ in flat]
    for example, (state, at) in zip(got, flat, strict=True):
        for site in SITES:
            value = example.values[site]
            assert value.dtype == np.float64
            np.testing.assert_allclose(value, single(model, state.ids, site)[at].mean(axis=0), rtol=1e-4, atol=2e-5)


def test_states_of_weights_that_lie_elsewhere(make_model: Any) -> None:
    from accelerate import cpu_offload

    given = [States("p", [1, 2, 3], (2,), False, (True,))]
    sites = ["residual:1", "head:0[1]", "neuron:1[3]"]
    model = cpu_offload(make_model(), execution_device=torch.device("cpu"))
    [got], [want] = (list(read_states(m, given, sites, 1)) for m in (model, make_model()))
    for site in sites:
        np.testing.assert_array_equal(got.values[site], want.values[site])


def test_no_hook_stays(make_model: Any) -> None:
    model = make_model()
    list(read_states(model, [States("p", [1, 2, 3], (2,), False, (True,))], SITES, 1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_site_that_does_not_fire(make_model: Any, monkeypatch: Any) -> None:
    model = make_model()
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: torch.zeros_like(x))
    with pytest.raises(UserError, match="site 'neuron:1' did not fire"):
        list(read_states(model, [States("p", [1, 2, 3], (2,), False, (True,))], ["neuron:1"], 1))


def test_correct_means_over_the_response_without_its_end(tiny_tokenizer: Any) -> None:
    traces = make_traces(tiny_tokenizer, TEXTS, [True, False, True], ["b", "a", "b"])
    found = states_of(traces, tiny_tokenizer, settings())
    assert [(s.problem, s.sides) for s in found] == [("a", (False,)), ("b", (True,)), ("b", (True,))]
    for state, trace in zip(found, [traces[1], traces[0], traces[2]], strict=True):
        begin = len(trace.prompt_ids)
        assert state.pooled and state.positions == tuple(range(begin, begin + len(trace.response_ids) - 1))
        assert state.ids == trace.prompt_ids + trace.response_ids
    last = states_of(traces, tiny_tokenizer, settings(pool="last"))
    assert [s.positions for s in last] == [(s.positions[-1],) for s in found] and not last[0].pooled


def test_short_takes_the_extremes_of_right_finished_answers(tiny_tokenizer: Any) -> None:
    texts = ["a b c", "a", "a b", "a b c a b c", "a", "b", "a", "a b"]
    right = [True, True, True, False, True, True, True, False]
    problems = ["p", "p", "p", "p", "same", "same", "alone", "alone"]
    traces = make_traces(tiny_tokenizer, texts, right, problems)
    for t in traces:
        t.prompt_ids = traces[0].prompt_ids
    found = states_of(traces, tiny_tokenizer, settings(contrast="short"))
    assert [(s.problem, s.sides) for s in found] == [("p", (True,)), ("p", (False,))]
    assert found[0].ids == traces[1].prompt_ids + traces[1].response_ids
    assert found[1].ids == traces[0].prompt_ids + traces[0].response_ids
    assert found[0].positions == (len(found[0].ids) - 2,)  # the token before the end token
    traces[0].finished = False
    found = states_of(traces, tiny_tokenizer, settings(contrast="short"))
    assert found[1].ids == traces[2].prompt_ids + traces[2].response_ids


def test_thoughts_are_labelled_by_what_follows_the_boundary(tiny_tokenizer: Any) -> None:
    traces = make_traces(tiny_tokenizer, TEXTS, [True, False, True], ["a", "b", "c"])
    found = states_of(traces, tiny_tokenizer, settings(contrast="thoughts"))
    assert [(s.problem, s.sides) for s in found] == [("a", (False, True, False, True)), ("b", (False, True))]
    for state, text in zip(found, TEXTS, strict=False):
        before = [tiny_tokenizer.decode(state.ids[: p + 1]) for p in state.positions]
        parts = text.split("\n\n")
        prompt = before[0].removesuffix(parts[0] + "\n\n")
        assert before == [prompt + "".join(x + "\n\n" for x in parts[: i + 1]) for i in range(len(parts) - 1)]
        assert not state.pooled


def test_an_answer_behind_a_closed_thinking_has_no_thoughts(tiny_tokenizer: Any) -> None:
    traces = make_traces(tiny_tokenizer, TEXTS[:2], [True, False], ["a", "b"])
    traces[0].prompt_ids = tiny_tokenizer("What is </think>?<think>\nOkay.\n</think>\n\n")["input_ids"]
    traces[1].prompt_ids = tiny_tokenizer("What is </think>?\nAnswer:")["input_ids"]
    found = states_of(traces, tiny_tokenizer, settings(contrast="thoughts"))
    assert [(s.problem, s.sides) for s in found] == [("b", (False, True))]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Wait, alternatively no", "reflection"),
        ("wait", "reflection"),
        ("I waited.", "execution"),
        (" Let me check that", "reflection"),
        ("It's correct", "reflection"),
        ("Alternatively, 3", "transition"),
        ("But alternatively", "execution"),
        ("Use Another Method", "transition"),
        ("Another way to verify", "reflection"),  # reflection is tried first
        ("3 + 4 = 7", "execution"),
    ],
)
def test_keywords(text: str, kind: str) -> None:
    assert thought(text, settings(contrast="thoughts")) == kind


def test_own_keywords(tiny_tokenizer: Any) -> None:
    own = settings(contrast="thoughts", reflection=["^Going back"], transition=[])
    assert thought("going back to 3", own) == "reflection" and thought("Wait", own) == "execution"


def test_retokenised_traces_keep_their_boundaries(tiny_tokenizer: Any) -> None:
    traces = make_traces(tiny_tokenizer, TEXTS, [True] * 3, ["a", "b", "c"])
    own = states_of(traces, tiny_tokenizer, settings(contrast="thoughts"))
    for t in traces:
        t.response_ids, t.prompt_ids = [1], [1]  # another model's
    found = states_of(traces, tiny_tokenizer, settings(contrast="thoughts", retokenise=True))
    assert [s.sides for s in found] == [s.sides for s in own]


def test_sites_are_resolved_against_the_model(make_model: Any) -> None:
    layout = Layout.of(make_model())
    assert sites_of(layout, ["residual:*", "residual: 1", "neuron:0[3,1]", "head:1"]) == [
        "residual:0",
        "residual:1",
        "neuron:0[3,1]",
        "head:1[0,1,2,3]",
    ]
    assert sites_of(layout, ["neuron:*"], ranked=True) == ["neuron:0", "neuron:1"]
    for texts, ranked, message in (
        (["residual:2"], False, "layer 2 is out of range"),
        (["neuron:0"], False, "takes whole blocks of neurons"),
        (["residual:0"], True, "takes whole blocks of neurons"),
        (["neuron:0[1]"], True, "takes whole blocks of neurons"),
        (["logits"], False, "holds no vector"),
        (["nothing:*"], False, "malformed"),
    ):
        with pytest.raises(UserError, match=message):
            sites_of(layout, texts, ranked)


def test_projections_are_centred_within_problems_where_paired() -> None:
    rng = np.random.default_rng(0)
    examples = [Example({"residual:0": rng.normal(size=3)}, i % 2 == 0, f"p{i // 4}") for i in range(12)]
    d = {"residual:0": np.array([1.0, -2.0, 0.5])}
    side, raw = projections(examples, d, paired=False)
    _, centred = projections(examples, d, paired=True)
    expected = [e.values["residual:0"] @ d["residual:0"] for e in examples]
    np.testing.assert_allclose(raw["residual:0"], expected)
    for i in range(3):
        part = np.array(expected[4 * i : 4 * i + 4])
        np.testing.assert_allclose(centred["residual:0"][4 * i : 4 * i + 4], part - part.mean())
    assert side.tolist() == [e.positive for e in examples]
