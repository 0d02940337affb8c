"""A model whose ``forward`` lost an argument is refused by name; both names of the cache are found by looking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from neureasoner import forward
from neureasoner.caches import RoomLayer, new_cache, prefix
from neureasoner.errors import UserError
from neureasoner.forward import cache_argument, next_logits, read
from neureasoner.sampler import sample
from neureasoner.sampling import Sampling

ARCHS = ["llama", "qwen2", "qwen3"]
IDS = torch.tensor([[5, 9, 2, 7]])


def renamed(model: Any, old: str, new: str, inner: bool = False) -> Any:
    """The model with one argument of its ``forward`` under another name; what it does not know, it swallows."""
    target = model.model if inner else model
    kind = type(target)
    names = [new if n == old else n for n in forward._parameters(kind) if n not in ("self", "kwargs")]
    code = f"""def renamed_forward(self, {", ".join(f"{n}=None" for n in names)}, **kwargs):
    given = {{k: v for k, v in locals().items() if v is not None and k not in ("self", "kwargs", {new!r})}}
    if {new} is not None: given[{old!r}] = {new}
    return base(self, **given)
"""
    scope: dict[str, Any] = {"base": kind.forward}
    exec(code, scope)
    target.__class__ = type(kind.__name__, (kind,), {"forward": scope["renamed_forward"]})
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_stock_models_take_what_we_give(make_model: Callable[..., Any], arch: str) -> None:
    """With the installed transformers: logits of a cached reading in two parts are those of one full pass."""
    model = make_model(arch)
    cache, mask = new_cache(model), torch.ones_like(IDS)
    positions = torch.arange(4)[None]
    with torch.no_grad():
        next_logits(model, IDS[:, :3], mask[:, :3], positions[:, :3], cache)
        got = next_logits(model, IDS[:, 3:], mask, positions[:, 3:], cache)
        torch.testing.assert_close(got, model(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read(model, IDS), model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("new", forward.CACHE_NAMES)
def test_the_cache_is_found_under_either_name(make_model: Callable[..., Any], new: str) -> None:
    model = make_model()
    old = cache_argument(model)
    wanted = sample(model, [[5, 6], [7]], Sampling(6, 0.0), ends=[], pad=0).rows
    if new != old:
        renamed(model, old, new)
    assert cache_argument(model) == new
    assert sample(model, [[5, 6], [7]], Sampling(6, 0.0), ends=[], pad=0).rows == wanted


def test_a_cache_under_a_third_name_is_an_error(make_model: Callable[..., Any]) -> None:
    model = make_model()
    renamed(model, cache_argument(model), "memory")
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM.forward of transformers .* takes no 'cache'"):
        sample(model, [[5, 6]], Sampling(2, 0.0), ends=[], pad=0)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "use_cache", "input_ids"])
def test_a_name_that_is_gone_is_an_error(make_model: Callable[..., Any], name: str) -> None:
    model = renamed(make_model(), name, "another")
    with pytest.raises(UserError, match=f"takes no '{name}'"):
        sample(model, [[5, 6]], Sampling(2, 0.0), ends=[], pad=0)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "use_cache"])
def test_a_name_that_is_gone_is_an_error_in_a_plain_reading(make_model: Callable[..., Any], name: str) -> None:
    model = renamed(make_model(), name, "another", inner=True)
    with pytest.raises(UserError, match=f"takes no '{name}'"):
        read(model, IDS, torch.ones_like(IDS), torch.arange(4)[None])


def test_logits_to_keep_may_go(make_model: Callable[..., Any]) -> None:
    model = make_model()
    wanted = sample(model, [[5, 6], [7]], Sampling(6, 0.0), ends=[], pad=0).rows
    renamed(model, "logits_to_keep", "another")
    assert sample(model, [[5, 6], [7]], Sampling(6, 0.0), ends=[], pad=0).rows == wanted


def test_a_cache_that_is_not_filled_is_an_error(make_model: Callable[..., Any]) -> None:
    model = make_model()
    old = cache_argument(model)

    class Forgets(type(model)):  # type: ignore[misc]
        def forward(self, **given: Any) -> Any:
            given.pop(old)
            return super().forward(**given)

    forgets = type(model).forward
    Forgets.forward.__signature__ = __import__("inspect").signature(forgets)  # type: ignore[attr-defined]
    model.__class__ = Forgets
    with pytest.raises(RuntimeError, match="cache holds 0"):
        sample(model, [[5, 6]], Sampling(2, 0.0), ends=[], pad=0)


def test_a_sliding_window_keeps_its_kind_of_layer(make_model: Callable[..., Any]) -> None:
    """The window is shorter than the text: the tokens are those of stock ``generate``, and no prefix can be cut."""
    settings = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = make_model("qwen2", **settings)
    kinds = {type(layer) for layer in new_cache(model).layers}
    assert RoomLayer in kinds and len(kinds) == 2
    prompts = [[5, 9, 2, 7, 11, 3, 6], [4, 8]]
    done = sample(model, prompts, Sampling(9, 0.0), ends=[], pad=0)
    for prompt, row in zip(prompts, done.rows, strict=True):
        how = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert row.ids == model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
    assert prefix(model, done.run.cache, 0, 0, 3, 2) is None
