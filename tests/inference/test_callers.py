"""One model, several callers (promise 11): threads, and callbacks that ask the model in the middle of a generation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from neureasoner.directions import Direction
from neureasoner.inference.plan import Action, Plan, Rule, Trigger
from neureasoner.inference.steered import SteeredModel
from neureasoner.sites import called_by, edit_site, read_sites

VECTOR = Direction({"residual:0": 6 * torch.randn(32, generator=torch.Generator().manual_seed(1))}, "positive = test")
PLANS = {
    "plain": Plan("none"),
    "steered": Plan("s", (Rule("r", Trigger(decode=True), Action(add=True), direction="d"),)),
    "chosen": Plan("c", (Rule("r", Trigger(decode=True, phase="think"), Action(add=True), direction="d"),)),
    "forced": Plan("f", (Rule("f", Trigger(random=0.4, cooldown=0), Action("<INTRA>")),)),
}


@pytest.fixture
def models(talker: Callable[..., Any], tokenizer: Any) -> dict[str, SteeredModel]:
    model = talker()
    return {name: SteeredModel(model, tokenizer, plan, directions={"d": VECTOR}) for name, plan in PLANS.items()}


def answer(model: SteeredModel, seed: int = 3, **more: Any) -> list[Any]:
    settings = {"max_new_tokens": 25, "temperature": 0.8, "seed": seed, "record": ["residual:1"]} | more
    done = model.generate(["12 + 30?", "Who is it?"], **settings)
    return [(g.response_ids, g.events, g.series["residual:1"].tolist()) for g in done]


def test_threads_do_not_see_each_other(models: dict[str, SteeredModel]) -> None:
    """Each thread's tokens, events and recorded values are those of the same call alone."""
    jobs = [(name, seed) for seed in range(4) for name in models]
    alone = [answer(models[name], seed) for name, seed in jobs]
    assert len({str(a) for a in alone}) > 8
    together = threading.Barrier(4)

    def job(which: tuple[str, int]) -> list[Any]:
        together.wait(30)
        return answer(models[which[0]], which[1])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, jobs)) == alone


def test_the_global_random_state_is_neither_read_nor_moved(models: dict[str, SteeredModel]) -> None:
    wanted = answer(models["forced"])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert answer(models["forced"]) == wanted
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("outer", PLANS)
def test_a_streaming_callback_may_ask_the_same_model(models: dict[str, SteeredModel], outer: str) -> None:
    wanted = {name: answer(m) for name, m in models.items()}
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    alone = models[outer].generate(["12 + 30?"], **how)[0]
    seen = []

    def on_text(text: str, forced: bool) -> None:
        if len(seen) < 4:
            name = list(models)[len(seen)]
            seen.append(answer(models[name]) == wanted[name])

    got = models[outer].generate(["12 + 30?"], on_text=on_text, **how)[0]
    assert seen == [True] * 4
    assert (got.response_ids, got.events) == (alone.response_ids, alone.events)


def test_an_oracle_may_run_the_bare_model(models: dict[str, SteeredModel], tokenizer: Any) -> None:
    """It sees the plain model's logits, whatever the plan is doing around it."""
    model = models["plain"].model
    rules = (*PLANS["steered"].rules, Rule("o", Trigger(oracle="ask"), Action("<INTER>")))
    ids = torch.tensor([tokenizer.encode("12 + 30?")])
    with torch.no_grad():
        wanted = model(ids).logits
    seen = []

    def ask(row: Any) -> bool:
        with torch.no_grad():
            seen.append(torch.equal(model(ids).logits, wanted))
        return False

    steered = SteeredModel(model, tokenizer, Plan("o", rules), directions={"d": VECTOR})
    steered.generate(["12 + 30?"], oracles={"ask": ask}, max_new_tokens=30, temperature=0.0)
    assert len(seen) > 2 and all(seen)


def test_hooks_act_for_their_caller_alone(models: dict[str, SteeredModel]) -> None:
    model, ids = models["plain"].model, torch.tensor([[5, 6, 7]])
    plain, got = model(ids).logits, list[str]()
    edited: dict[str, bool] = {}

    def look(name: str) -> None:
        with torch.no_grad():
            edited[name] = not torch.equal(model(ids).logits, plain)

    reading = read_sites(model, ["residual:1"], lambda site, _: got.append(site))
    with edit_site(model, "residual:0", torch.zeros_like), reading:
        look("same thread")
        thread = threading.Thread(target=look, args=("other thread",))
        thread.start()
        thread.join()
        with called_by(object()):
            look("other owner")
        look("again")
    look("after")
    assert [k for k, v in edited.items() if v] == ["same thread", "again"]
    assert len(got) == 2


def test_a_generation_that_dies_leaves_no_hook(models: dict[str, SteeredModel]) -> None:
    def dies(text: str, forced: bool) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        models["steered"].generate(["12 + 30?"], max_new_tokens=9, temperature=0.0, on_text=dies)
    for module in models["steered"].model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
