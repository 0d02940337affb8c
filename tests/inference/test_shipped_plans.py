"""Each shipped plan does what its paper's own code does, written by hand: on Llama, Qwen2 and Qwen3 (own head size).

Directions and gates are made here, in the folders the plans name.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.inference.plan import Plan
from neureasoner.inference.steered import SteeredModel, encode_prompt
from neureasoner.models import fingerprint
from neureasoner.probes.detectors.gate import FailureGate
from neureasoner.steps import segment

_spec = importlib.util.spec_from_file_location("steering_by_hand", Path(__file__).parent / "by_hand.py")
assert _spec and _spec.loader
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

SHIPPED = Path(__file__).parents[2] / "configs" / "plans"
ARCHES = ["llama", "qwen2", "qwen3"]
D, F, TOKENS = 32, 48, 14
QUESTIONS = ["12 + 30?", "Try 3 * 8 - 5 and tell me.", "Done?"]


@pytest.fixture(params=ARCHES)
def steered(request: Any, make_model: Any, tokenizer: Any, tmp_path: Path) -> Any:
    """``steered(name, direction values)``: the shipped plan on a random model, its direction beside it."""
    model = make_model(request.param, num_hidden_layers=3)

    def make(name: str, values: dict[str, torch.Tensor] | None, gate: Any = None) -> SteeredModel:
        shutil.copy(SHIPPED / f"{name}.yaml", tmp_path / "plan.yaml")
        plan = Plan.load(tmp_path)
        for path in plan.direction_paths:
            Direction(values or {}, "positive = test", "m", fingerprint(model)).save(tmp_path / path)
        for path in plan.gate_paths:
            gate.model_fingerprint = fingerprint(model)
            gate.save(tmp_path / path)
        return SteeredModel(model, tokenizer, plan)

    return make


def same(steered: SteeredModel, edits_of: Any) -> list[Any]:
    """A batch under the plan equals, row by row, an own greedy loop with the hooks by hand; the generations."""
    out = steered.generate(QUESTIONS, max_new_tokens=TOKENS, temperature=0.0)
    for question, g in zip(QUESTIONS, out, strict=True):
        prompt = encode_prompt(steered.tokenizer, question)
        ids, _ = by_hand.greedy(steered.model, prompt, TOKENS, edits_of(prompt), steered.tokenizer.eos_token_id)
        assert g.response_ids == ids
    plain = steered.with_plan(Plan("none")).generate(QUESTIONS, max_new_tokens=TOKENS, temperature=0.0)
    assert any(g.response_ids != p.response_ids for g, p in zip(out, plain, strict=True)), "steering shows"
    return out


def vectors(n: int, size: float = 3.0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3)) * size


def test_bias_only_adds_a_vector_to_every_block_at_every_position(steered):
    v = vectors(3)

    def edits(_: list[int]) -> dict[Any, Any]:
        return {("residual", b): lambda h, ids, prefill, b=b: h + v[b] for b in range(3)}

    for g in same(steered("bias_only", {f"residual:{b}": v[b] for b in range(3)}), edits):
        assert [(e["rule"], e["token"], e["strength"]) for e in g.events] == [("bias", 0, 1.0)]


def test_asc_adds_to_the_last_position_of_every_forward(steered):
    v = vectors(1, 9.0)[0]
    edit = by_hand.at_last(lambda h: h + 0.27 * v)
    same(steered("asc", {"residual:1": v}), lambda _: {("residual", 1): edit})


def test_a_control_vector_is_added_to_all_positions(steered):
    v = vectors(1)[0]
    edit = by_hand.everywhere(lambda h: h + v)
    same(steered("control_vector", {"residual:1": v}), lambda _: {("residual", 1): edit})


def test_seal_acts_on_boundary_tokens_of_the_thinking(steered):
    """The random model hardly ends a step by itself: its output is pushed to, in both runs, by the LM head."""
    v = vectors(1, 6.0)[0]
    model = steered("seal", {"residual:1": v})
    separators = [i for i in range(model.tokenizer.vocab_size) if "\n\n" in model.tokenizer.decode([i])]
    head = torch.nn.Linear(D, model.model.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(model.model.lm_head.weight)
        head.bias.zero_()
        head.bias[separators] = 3.0
    model.model.lm_head = head

    def edits(prompt: list[int]) -> dict[Any, Any]:
        seen: list[int] = []

        def edit(h: torch.Tensor, ids: torch.Tensor, prefill: bool) -> torch.Tensor:
            if not prefill:
                seen.append(int(ids[0, -1]))
                steps, thinking = segment(seen, model.tokenizer)
                if thinking == len(seen) and any(s.closed and s.token_end == thinking for s in steps):
                    h[:, -1] += v
            return h

        return {("residual", 1): edit}

    plan = model.plan
    reference = SteeredModel(model.model, model.tokenizer, plan, accept=model.accept)
    assert sum(e["tokens"] for g in same(reference, edits) for e in g.events) > 3


def test_adaras_nudges_neurons_in_questions_the_gate_expects_to_fail(steered):
    """Neuron by neuron and row by row, as the release; the gate is a real one, its scores computed again here."""
    neurons, delta = {1: [4, 11, 30], 2: [7]}, {1: [30.0, -40.0, 25.0], 2: [60.0]}
    rng = np.random.default_rng(0)
    gate = FailureGate(np.array([[0, 3], [2, 9], [1, 40]]), hidden=8, epochs=2)
    values = [rng.normal(size=(5, 3)) for _ in range(8)]
    gate.fit(values, np.arange(8) % 2)
    model = steered(
        "adaras",
        {f"neuron:{b}[{','.join(map(str, n))}]": torch.tensor(delta[b]) for b, n in neurons.items()},
        gate,
    )
    score = {}
    for question in QUESTIONS:
        prompt = encode_prompt(model.tokenizer, question)
        read: dict[Any, Any] = {}
        handles = by_hand.install(
            model.model,
            {("neuron", b): lambda a, ids, prefill, b=b, read=read: read.setdefault(b, a) for b in range(3)},
        )
        with torch.no_grad():
            model.model(torch.tensor([prompt]))
        for handle in handles:
            handle.remove()
        x = torch.stack([read[b][0, 1:, n] for b, n in gate.channels.tolist()], 1)
        score[tuple(prompt)] = float(gate.predict_proba([x.numpy()])[0])
    ranked = sorted(score.values())
    loaded = model.gates["gates/adaras"]
    loaded.threshold = (ranked[0] + ranked[1]) / 2  # one question of the three is let alone

    def edits(prompt: list[int]) -> dict[Any, Any]:
        if score[tuple(prompt)] <= loaded.threshold:
            return {}

        def edit(block: int) -> Any:
            def nudge(a: torch.Tensor) -> torch.Tensor:
                for n, d in zip(neurons[block], delta[block], strict=True):
                    a[n] += 0.3 * d
                return a

            return by_hand.at_last(nudge)

        return {("neuron", b): edit(b) for b in neurons}

    out = same(model, edits)
    assert sorted(len(g.events) for g in out) == [0, 1, 1]
    for g in out:
        assert g.scores[0]["score"] == pytest.approx(score[tuple(g.prompt_ids)], abs=1e-6)


def test_no_thinking_is_the_prompt_with_the_thinking_closed(steered):
    model = steered("no_thinking", None)
    forced = model.generate(QUESTIONS, max_new_tokens=40, temperature=0.0)
    given = model.with_plan(Plan("none")).generate(QUESTIONS, max_new_tokens=40, temperature=0.0, nothinking=True)
    for f, g in zip(forced, given, strict=True):
        n = sum(f.forced)
        assert f.prompt_ids + f.response_ids[:n] == g.prompt_ids
        assert f.response_ids[n:] == g.response_ids[: 40 - n] and len(f.response_ids) > n


@pytest.mark.parametrize("at", [{"inter": 2, "intra": 5}, {"inter": 2}, {"instance": 4}, {"instance": 4, "intra": 6}])
def test_neureasoner_forces_what_the_paper_forces(talker, tokenizer, kit, prompts, at):
    """Oracles in place of the probes: the text stands where the oracle spoke, and the rest is plain generation."""
    plan = Plan.load(SHIPPED / "neureasoner.yaml")
    plan = plan.replace_triggers({name: {"oracle": name} for name in plan.names})
    oracles = {name: (lambda row, name=name: row.steps == at.get(name)) for name in plan.names}
    model = talker()
    [g] = kit.sample(model, tokenizer, prompts[:1], plan, oracles=oracles, max_new_tokens=60)
    # the instance rule closes the thinking, after which nothing is watched
    expected = [("instance", 4)] if "instance" in at else list(at.items())
    assert [(e["rule"], e["step"] + 1) for e in g.events] == expected
    assert ("</think>" in g.text) == ("instance" in at)
    position, ids = 0, list(prompts[0])
    for event in [*g.events, None]:
        end = 60 if event is None else event["token"]
        [rest] = kit.sample(model, tokenizer, [ids], max_new_tokens=end - position)
        ids += rest.response_ids + (
            [] if event is None else tokenizer.encode(event["action"], add_special_tokens=False)
        )
        position = len(ids) - len(prompts[0])
    assert ids[len(prompts[0]) :] == g.response_ids
