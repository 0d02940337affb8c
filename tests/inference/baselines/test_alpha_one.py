"""AlphaOne against an own loop without a cache, with its coins thrown again."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.inference.baselines import baseline
from neureasoner.inference.baselines.alpha_one import mean_thinking
from neureasoner.sampler import Run, sample
from neureasoner.sampling import Sampling
from neureasoner.traces import THINK_CLOSE

WORD = "Wait"


def ends_blank(tokenizer: Any, out: list[int]) -> bool:
    return str(tokenizer.decode(out)).endswith("\n\n")


def test_slow_then_fast_by_hand(leaning, tokenizer, prompts, loop) -> None:
    """Moment 1.4 * 20 = 28: coins with p = 1 - t/28 after blank lines before it, ``</think>`` for the word after it."""
    model, seed, moment = leaning({WORD: 5.0, "\n": 4.0}, seed=2), 7, 28.0
    steered = baseline("alpha_one", model, tokenizer, n_think=20.0)
    settings = {"temperature": 0.0, "max_new_tokens": 45, "seed": seed}
    [word], [close] = (tokenizer.encode(t, add_special_tokens=False) for t in (WORD, THINK_CLOSE))
    out = steered.generate(prompts, **settings)
    [newline] = tokenizer.encode("\n", add_special_tokens=False)
    waited = closed = spelled = 0
    for index, (prompt, g) in enumerate(zip(prompts, out, strict=True)):
        rng = np.random.default_rng([seed, index, zlib.crc32(b"slow")])

        def before(ids: list[int], rng: Any = rng) -> list[int] | None:
            if not ids or len(ids) >= moment or close in ids or not ends_blank(tokenizer, ids):
                return None
            return [word] if rng.random() < 1 - len(ids) / moment else None

        def instead(ids: list[int], token: int) -> list[int] | None:
            alone = token == word and not tokenizer.decode(ids)[-1:].isalpha()
            return [close] if len(ids) >= moment and close not in ids and alone else None

        ids, forced = loop.by_hand(model, prompt, 45, tokenizer.eos_token_id, before, instead)
        assert g.response_ids == ids and loop.forced_places(g) == forced
        assert [e["token"] for e in g.events] == forced, "each forced text is one token here"
        waited += sum(ids[t] == word for t in forced)
        closed += sum(ids[t] == close for t in forced)
        spelled += sum(ids[t - 1] == newline for t in forced if ids[t] == word)
        for event in g.events:
            assert event["rule"] == ("slow" if event["token"] < moment else "fast")
    assert waited > spelled > 0 and closed > 0, "both phases act, after blank lines of one token and of two"
    loop.single_runs(steered, prompts, **settings)


def test_the_fast_phase_begins_at_the_moment(leaning, tokenizer, prompts) -> None:
    """No word of the model's own is left from token M on while the thinking lasts, not at M itself either."""
    model = leaning({WORD: 5.0})
    [word], [close] = (tokenizer.encode(t, add_special_tokens=False) for t in (WORD, THINK_CLOSE))
    at_once = 0
    for moment in range(3, 9):
        steered = baseline("alpha_one", model, tokenizer, n_think=float(moment), alpha=1.0)
        for g in steered.generate(prompts, temperature=0.0, max_new_tokens=20):
            end = g.response_ids.index(close) if close in g.response_ids else len(g.response_ids)
            for t in range(moment, end):
                own = g.response_ids[t] == word and not g.forced[t]
                assert not own or tokenizer.decode(g.response_ids[:t])[-1].isalpha()
            at_once += any(e["token"] == moment and e["rule"] == "fast" for e in g.events)
    assert at_once > 0


def test_nothing_is_forced_after_the_thinking(leaning, tokenizer, prompts) -> None:
    """A model that closes its thinking at once and then writes blank lines and the word all the time."""
    model = leaning({WORD: 4.0})
    steered = baseline("alpha_one", model, tokenizer, n_think=8.0)
    plain = baseline("vanilla", model, tokenizer)
    settings = {"temperature": 0.0, "max_new_tokens": 40, "nothinking": True}
    out = steered.generate(prompts, **settings)
    assert [g.response_ids for g in out] == [g.response_ids for g in plain.generate(prompts, **settings)]
    assert any(WORD in g.text for g in out) and any("\n\n" in g.text for g in out)


def test_sampling_is_that_of_vanilla_up_to_the_word(leaning, tokenizer, prompts, loop) -> None:
    """With the moment near 0 there is no slow phase: same draws as vanilla, the first Wait becomes ``</think>``."""
    model = leaning({WORD: 6.0})
    [word], [close] = (tokenizer.encode(t, add_special_tokens=False) for t in (WORD, THINK_CLOSE))
    settings = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 40, "seed": 3}
    steered = baseline("alpha_one", model, tokenizer, n_think=1e-3)
    plain = baseline("vanilla", model, tokenizer).generate(prompts, **settings)
    out = steered.generate(prompts, **settings)
    replaced = 0
    for g, p in zip(out, plain, strict=True):
        # token 0 comes before any moment; the word's token within another word is not the word
        places = [
            t
            for t, token in enumerate(p.response_ids)
            if t and token == word and not tokenizer.decode(p.response_ids[:t])[-1].isalpha()
        ]
        at = places[0] if places else len(p.response_ids)
        assert g.response_ids[:at] == p.response_ids[:at]
        assert loop.forced_places(g) == places[:1] and all(g.response_ids[t] == close for t in places[:1])
        replaced += len(places[:1])
    assert replaced > 1
    assert [g.response_ids for g in steered.generate(prompts, **settings)] == [g.response_ids for g in out]
    other = steered.generate(prompts, **(settings | {"seed": 4}))
    assert [g.response_ids for g in other] != [g.response_ids for g in out]


def test_the_rate_of_waits_falls_to_zero_at_the_moment(leaning, tokenizer, prompts) -> None:
    """Blank lines all the way: the share of them followed by a forced word is 1 - t/M, here in two halves."""
    model = leaning({})
    settings = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 80, "seed": 0, "batch_size": 64}
    out = baseline("alpha_one", model, tokenizer, n_think=80 / 1.4).generate(prompts[:2] * 32, **settings)
    asked = np.array([(s["token"], s["score"]) for g in out for s in g.scores])
    heads = np.array([(e["token"]) for g in out for e in g.events if e["rule"] == "slow"])
    assert len(asked) > 300
    for low, high in ((0, 40), (40, 80)):
        inside = asked[(asked[:, 0] >= low) & (asked[:, 0] < high), 0]
        p = 1 - inside / 80
        got = ((heads >= low) & (heads < high)).sum()
        assert abs(got - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.6, 0.95), (1.3, 0.5)])
def test_what_is_about_to_be_drawn_is_drawn(temperature, top_p, make_model) -> None:
    """The peek says each next token, and draws nothing."""
    peeked: list[torch.Tensor] = []

    class Look:
        narrows = True
        run: Run

        def begin(self, run: Run) -> None:
            self.run = run

        def narrow(self, *_: Any) -> None: ...

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            state = self.run.generator.get_state()
            peeked.append(self.run.peek(scores))
            assert torch.equal(state, self.run.generator.get_state())
            return scores

    how = {"ends": [], "pad": 0, "watch": Look()}
    done = sample(make_model(), [[5, 6, 7], [8, 9, 10]], Sampling(20, temperature, top_p), **how)
    assert [row.ids for row in done.rows] == torch.stack(peeked, 1).tolist()


@pytest.mark.parametrize(
    ("tokens", "last", "found"),
    [
        (["So", "\n\n"], "Wait", True),
        (["So", "."], " Wait", True),
        (["W", "a", "i"], "t", True),
        (["x", "W", "a", "i"], "t", False),  # xWait
        (["Wait"], ",", False),  # it stands there already
        ([], "wait", False),  # case matters
        ([], "Waiting", False),
    ],
)
def test_the_word_is_recognised_at_its_last_piece(tokens, last, found, talker, tokenizer) -> None:
    decoder = baseline("alpha_one", talker(), tokenizer, n_think=9.0)
    watch = decoder.kind(decoder.controller(), [], set(), None)
    texts = [*tokens, last]
    watch.controller.separators = SimpleNamespace(texts=[t.encode() for t in texts])
    row = SimpleNamespace(tokens=list(range(len(tokens))))
    assert watch._completes(row, len(tokens)) is found


def test_n_think_is_the_mean_thinking_of_vanilla_runs(leaning, tokenizer, prompts) -> None:
    out = baseline("vanilla", leaning({THINK_CLOSE: 24.0}), tokenizer).generate(
        prompts, temperature=0.0, max_new_tokens=30
    )
    close = tokenizer.convert_tokens_to_ids("</think>")
    lengths = [g.response_ids.index(close) if close in g.response_ids else len(g.response_ids) for g in out]
    assert mean_thinking(out) == pytest.approx(sum(lengths) / len(lengths))
    with pytest.raises(UserError, match="at least one vanilla run"):
        mean_thinking([])
