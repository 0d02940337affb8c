"""A random model that writes paragraphs, and probes whose scores are injected. The rest is the real thing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.inference.controller import Controller
from neureasoner.inference.decode import Generation, generate_batch
from neureasoner.inference.plan import Action, Plan, Rule, Trigger
from neureasoner.steps import Separators

SITES = ["neuron:1[3,5]", "head:1[0,2]", "residual:0", "logits"]


@dataclass
class FakeFeatures:
    """Features (tokens, steps) of the window it is given; remembers what it saw."""

    level: str = "intra"
    window: int = 4
    name: str = "fake"
    read: tuple[str, ...] = ("neuron:1[3,5]",)
    exit_from: int = 0
    seen: list[tuple[dict[str, np.ndarray], list[int]]] = field(default_factory=list)

    @property
    def once(self) -> bool:
        return self.level == "instance" and not self.exit_from

    def sites(self) -> list[str]:
        return list(self.read)

    def compute(self, series: dict[str, np.ndarray], bounds: Sequence[int]) -> tuple[np.ndarray, bool]:
        assert set(series) == set(self.read) and bounds[0] == 0
        for values in series.values():
            assert len(values) == bounds[-1] and np.isfinite(values).all()
        self.seen.append(({k: v.copy() for k, v in series.items()}, list(bounds)))
        return np.array([bounds[-1], len(bounds) - 1], dtype=np.float64), True


@dataclass
class FakeProbe:
    """Scores by a rule on (tokens, steps) of the window: 0.9 where it says so, else 0.1."""

    when: Callable[[int, int], bool] = lambda tokens, steps: False
    features: FakeFeatures = field(default_factory=FakeFeatures)
    threshold: float = 0.5
    model_fingerprint: str = "any"
    rule: Any = None

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return np.array([0.9 if self.when(int(a), int(b)) else 0.1 for a, b in x])

    def check(self, model: Any) -> None:
        pass


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer: Any) -> Any:
    """The tiny tokenizer with trigger tokens, as after SFT."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<INTRA>", "<INTER>"]})
    return tokenizer


@pytest.fixture(scope="session")
def talker(make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """``talker(eos=-4.0, close=-20.0)``: a random model with a bias to separators, and biases on EOS and </think>."""

    def make(eos: float = -4.0, close: float = -20.0, seed: int = 0) -> Any:
        model = make_model(seed=seed)
        old = model.lm_head
        head = torch.nn.Linear(old.in_features, old.out_features, bias=True)
        head.weight = old.weight
        separators = Separators.of(tokenizer)
        with torch.no_grad():
            head.bias.zero_()
            for i in range(separators.size):
                if separators.contains_separator(i):
                    head.bias[i] = 2.0
            head.bias[tokenizer.convert_tokens_to_ids(["<INTRA>", "<INTER>"])] = -20.0
            head.bias[tokenizer.eos_token_id], head.bias[tokenizer.convert_tokens_to_ids("</think>")] = eos, close
            head.bias[len(tokenizer) :] = -50.0
        model.lm_head = head
        return model.eval()

    return make


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Four prompts of different length, each ending in <think>."""
    questions = ["12 + 30?", "Try 3 * 8 - 5 and tell me.", "Tom has 3 apples and buys 14 more. How many?", "Done?"]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    return [tokenizer.encode(t, add_special_tokens=False) for t in texts]


def plan_of(**rules: tuple[str, Mapping[str, Any]]) -> Plan:
    """``plan_of(intra=("<INTRA>", {"probe": "p"}))``; order is priority."""
    return Plan("test", tuple(Rule(n, Trigger(**t), Action(text)) for n, (text, t) in rules.items()))


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    plan: Plan | None = None,
    probes: Mapping[str, Any] | None = None,
    *,
    oracles: Any = None,
    record: Sequence[str] = (),
    **settings: Any,
) -> list[Generation]:
    """generate_batch, greedy and 60 tokens unless said otherwise."""
    controller = Controller(model, tokenizer, plan, probes, oracles=oracles, record=record) if plan else None
    settings = {"max_new_tokens": 60, "temperature": 0.0, "seed": 1} | settings
    return generate_batch(model, tokenizer, prompts, controller=controller, **settings)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers of this file, for tests (which cannot import a conftest)."""
    return SimpleNamespace(FakeFeatures=FakeFeatures, FakeProbe=FakeProbe, plan_of=plan_of, sample=sample, SITES=SITES)
