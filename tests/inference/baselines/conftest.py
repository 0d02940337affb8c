"""An own decoding loop without a cache: the oracle that the baselines are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def next_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Logits [V] after ``ids``, one full forward."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()


def by_hand(
    model: Any,
    prompt: Sequence[int],
    tokens: int,
    eos: int,
    before: Callable[[list[int]], Sequence[int] | None] = lambda out: None,
    instead: Callable[[list[int], int], Sequence[int] | None] = lambda out, token: None,
    bias: torch.Tensor | None = None,
) -> tuple[list[int], list[int]]:
    """Greedy decoding of one prompt: response ids and the places of the forced ones.

    ``before(out)`` may give tokens to force now; ``instead(out, token)`` some to force in place of the argmax.
    """
    out: list[int] = []
    forced: list[int] = []
    queue: list[int] = []
    while len(out) < tokens and (not out or out[-1] != eos):
        if not queue:
            queue = list(before(out) or [])
        if not queue:
            logits = next_logits(model, [*prompt, *out])
            token = int((logits if bias is None else logits + bias).argmax())
            queue = list(instead(out, token) or [])
            if not queue:
                out.append(token)
                continue
        forced.append(len(out))
        out.append(queue.pop(0))
    return out, forced


def forced_places(g: Any) -> list[int]:
    """Places of a generation's forced tokens."""
    return [t for t, f in enumerate(g.forced) if f]


def single_runs(steered: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> None:
    """A batch of prompts of unlike length equals its rows, each by itself (greedy)."""
    batch = steered.generate(prompts, **settings)
    assert len({len(p) for p in prompts}) > 1, "the batch has to be padded"
    for i, g in enumerate(batch):
        # the rows before it keep the row's place, which its coins hang on
        alone = steered.generate(prompts[: i + 1], batch_size=1, **settings)[-1]
        assert alone.response_ids == g.response_ids and alone.forced == g.forced
        assert alone.probe_tokens == g.probe_tokens and len(alone.events) == len(g.events)
        for one, other in zip(alone.events, g.events, strict=True):
            assert one | {"score": 0} == other | {"score": 0}
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)


@pytest.fixture(scope="session")
def loop() -> SimpleNamespace:
    """The helpers of this file, for tests (which cannot import a conftest)."""
    return SimpleNamespace(
        next_logits=next_logits, by_hand=by_hand, forced_places=forced_places, single_runs=single_runs
    )


@pytest.fixture(scope="session")
def leaning(talker: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """``leaning({text: bias}, **of_talker)``: the talker with more or less of some tokens (texts of one token)."""

    def make(biases: dict[str, float], **settings: Any) -> Any:
        model = talker(**settings)
        with torch.no_grad():
            for text, bias in biases.items():
                [i] = tokenizer.encode(text, add_special_tokens=False)
                model.lm_head.bias[i] += bias
        return model

    return make
