"""The strength that a KL budget allows, against divergences worked out over whole sequences in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.calibrate import calibrate
from neureasoner.inference.calibrate_config import CalibrateConfig
from neureasoner.inference.steered import encode_prompt
from neureasoner.models import load
from neureasoner.traces import Problem, write_rows

_spec = importlib.util.spec_from_file_location("calibrate_by_hand", Path(__file__).parent / "by_hand.py")
assert _spec and _spec.loader
by_hand: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(by_hand)

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(7))
QUESTIONS = ["12 + 30?", "Who is it?", "Count to three."]
STRENGTHS = [0.02, 0.05, 0.2, 1.0]


@pytest.fixture
def root(talker: Any, tokenizer: Any, tmp_path: Path) -> Path:
    model = talker(eos=1.0)
    model.lm_head.register_parameter("bias", None)  # the architecture has none: it would not be loaded
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Direction({"residual:0": VECTOR}, "positive = test").save(tmp_path / "plans" / "d")
    write_rows(tmp_path / "p.jsonl", [Problem(str(i), "f", 1, q, "1") for i, q in enumerate(QUESTIONS)])
    return tmp_path


def settings(root: Path, trigger: str, more: str = "", **changes: Any) -> CalibrateConfig:
    rule = f"{{name: r, trigger: {{{trigger}}}, direction: d, action: {{add: true}}, strength: 9}}"
    (root / "plans" / "plan.yaml").write_text(f"name: t\nrules: [{rule}{more}]")
    given = {"plan": str(root / "plans" / "plan.yaml"), "strengths": STRENGTHS, "max_new_tokens": 20, "batch_size": 2}
    given |= {
        "model": str(root / "model"),
        "problems": str(root / "p.jsonl"),
        "out": str(root / "out"),
        "device": "cpu",
    }
    return CalibrateConfig(**(given | changes))


def divergence(root: Path, strength: float, everywhere: bool) -> tuple[float, int]:
    """Mean KL a token, and tokens: greedy responses one by one, then whole sequences with the vector added by hand."""
    model, tokenizer = load(str(root / "model"), device="cpu")
    total, count = 0.0, 0
    for question in QUESTIONS:
        prompt = encode_prompt(tokenizer, question)
        ids, _ = by_hand.greedy(model, prompt, 20, {}, tokenizer.eos_token_id)
        whole = torch.tensor([[*prompt, *ids]])

        def edit(h: torch.Tensor, *_: Any, start: int = 0 if everywhere else len(prompt) - 1) -> torch.Tensor:
            h[:, start:] += strength * VECTOR
            return h

        def log_p(edits: Any, whole: torch.Tensor = whole, n: int = len(ids)) -> torch.Tensor:
            handles = by_hand.install(model, edits)
            with torch.no_grad():
                found = model(whole).logits[0, -n - 1 : -1].double().log_softmax(-1)
            for handle in handles:
                handle.remove()
            return found

        p, q = log_p({}), log_p({("residual", 0): edit})
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(ids)
    return total / count, count


@pytest.mark.parametrize(("trigger", "everywhere"), [("always: true", True), ("decode: true", False)])
def test_the_largest_strength_within_the_budget(root: Path, trigger: str, everywhere: bool, capsys: Any) -> None:
    expected = {f"{s:g}": divergence(root, s, everywhere) for s in STRENGTHS}
    values = [kl for kl, _ in expected.values()]
    assert values == sorted(values) and values[1] > 0
    budget = (values[1] + values[2]) / 2
    found = calibrate(settings(root, trigger, budget=budget, strengths=STRENGTHS[::-1]))
    assert found["strength"] == 0.05 and found["tokens"] == expected["1"][1]
    assert {k: pytest.approx(v, rel=1e-4, abs=1e-7) for k, v in found["kl"].items()} == {
        k: v for k, (v, _) in expected.items()
    }
    said = capsys.readouterr().out
    assert "write `strength: 0.05`" in said and said.count("over the budget") == 2


def test_what_cannot_be_calibrated_is_named(root: Path) -> None:
    with pytest.raises(UserError, match=r"the smallest strength, 0.02, has a KL of .* over the budget 1e-12"):
        calibrate(settings(root, "always: true", budget=1e-12))
    forced = ", {name: f, trigger: {start: true}, action: {force: x}}"
    with pytest.raises(UserError, match="rule f forces a text, which has no strength; name one of"):
        calibrate(settings(root, "always: true", forced, rule="f"))
    with pytest.raises(UserError, match="has no rule 'g'"):
        calibrate(settings(root, "always: true", rule="g"))
    biased = ", {name: b, trigger: {always: true}, action: {add_logits: {a: 1}}}"
    with pytest.raises(UserError, match="2 of its rules have a strength; name one with rule"):
        calibrate(settings(root, "always: true", biased))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": []}, "'strengths' needs finite numbers"),
        ({"strengths": [0.0, 1.0]}, "'strengths' needs finite numbers other than 0"),
        ({"strengths": [-1.0, 1.0]}, "holds both signs"),
        ({"budget": 0.0}, "'budget' must be above 0"),
        ({"batch_size": 0}, "'batch_size' must be at least 1"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrateConfig(**({"model": "m", "problems": "p", "out": "o", "strengths": [1.0]} | changes))
