"""The sampler: the tokens and log-probabilities are those of the plain model, alone, in a batch, with vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner import caches
from neureasoner.errors import UserError
from neureasoner.sampler import Drawn, sample, sample_all
from neureasoner.sampling import Sampling
from neureasoner.training.vectors import bias_vectors

PROMPTS = [[5, 9, 2, 7], [4, 8], [11, 3, 6, 1, 2, 9, 30], [7]]
HOW: dict[str, Any] = {"pad": 0, "ends": [31]}
WHOLE = Sampling(1, 1.0, 1.0)


def recomputed(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Oracle: one full forward pass without cache, in float32."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_full_pass(
    make_model: Callable[..., Any], arch: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows that end at different times and a cache that grows several times."""
    monkeypatch.setattr(caches, "ROOM", 5)
    model = make_model(arch)
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    eos = list(range(0, 60))
    with bias_vectors(model, values):
        how = {"pad": 0, "ends": eos, "seed": 4, "logprobs": True}
        done = sample(model, PROMPTS * 2, Sampling(24, temperature, 1.0), **how).rows
        lengths = {len(row.ids) for row in done}
        assert len(lengths) > 2, "rows leave the batch one after the other"
        for prompt, row in zip(PROMPTS * 2, done, strict=True):
            ids, logprobs, finished = row.ids, row.logprobs, row.finished
            wanted = recomputed(model, prompt, ids, temperature)
            assert (wanted - torch.tensor(logprobs)).abs().mean() < 1e-4
            assert finished == (ids[-1] in eos) and not any(i in eos for i in ids[:-1])
            assert finished or len(ids) == 24


def test_greedy_equals_generate(make_model: Callable[..., Any]) -> None:
    model = make_model()
    done = sample(model, PROMPTS, Sampling(15, 0), **HOW).rows
    for prompt, ids in zip(PROMPTS, [row.ids for row in done], strict=True):
        how = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": 31, "pad_token_id": 0}
        wanted = model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
        assert ids == wanted


def test_draws_follow_the_distribution(make_model: Callable[..., Any]) -> None:
    """First tokens of many rows against the softmax, by chi-square."""
    from scipy.stats import chisquare

    model, n = make_model(), 4000
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([PROMPTS[0]])).logits[0, -1].double(), -1)
    drawn = [row.ids for row in sample(model, [PROMPTS[0]] * n, WHOLE, **HOW, seed=9).rows]
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(p)).double()
    common = p > 5 / n
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    expected = [*(n * p[common]).tolist(), n * float(p[~common].sum())]
    assert len(observed) > 10 and chisquare(observed, expected).pvalue > 1e-3


def test_seed_decides_and_nothing_else_is_touched(make_model: Callable[..., Any]) -> None:
    model = make_model().train()
    state = torch.get_rng_state()
    draw = lambda seed: sample(model, PROMPTS, Sampling(8, 1.0, 1.0), seed=seed, **HOW).rows  # noqa: E731
    one = draw(1)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert one == draw(1)
    assert one != draw(2)


def test_batches_come_back_in_order(make_model: Callable[..., Any]) -> None:
    model, seen = make_model(), list[int]()
    settings = Sampling(6, 0.0)
    done: list[Drawn] = sample_all(model, PROMPTS, settings, batch_size=3, seed=0, advance=seen.append, **HOW)
    assert seen == [3, 1]
    for i, prompt in enumerate(PROMPTS):
        assert done[i].ids == sample(model, [prompt], settings, **HOW).rows[0].ids


@pytest.mark.parametrize("pad", [10**6, -1])
def test_padding_that_the_model_does_not_know(make_model: Callable[..., Any], pad: int) -> None:
    """End tokens beyond the vocabulary are common, and may be all there is to pad with."""
    how: Any = {"sampling": Sampling(max_new_tokens=6, temperature=0), "ends": []}
    model, prompts = make_model(), [[5, 6, 7], [8]]
    assert sample(model, prompts, pad=pad, **how).rows == sample(model, prompts, pad=3, **how).rows


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(make_model: Callable[..., Any], temperature: float, value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[4] = value
    with pytest.raises(UserError, match="NaN"):
        sample(model, [[5, 6]], Sampling(max_new_tokens=3, temperature=temperature), ends=[], pad=0)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 1, np.int64(7)])
def test_any_whole_number_is_a_seed(make_model: Callable[..., Any], seed: int) -> None:
    model, how = make_model(), Sampling(max_new_tokens=6, temperature=1.0)
    draws = [sample(model, [[5, 6]], how, ends=[], pad=0, seed=s).rows[0].ids for s in (seed, seed, 8)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_new_tokens", 2.5), ("max_new_tokens", None), ("max_new_tokens", "5"), ("max_new_tokens", True),
     ("temperature", None), ("temperature", "hot"), ("top_p", None), ("top_k", 5.0), ("top_k", True), ("min_p", "0")],
)  # fmt: skip
def test_settings_of_another_type_are_named(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} .*{value!r}"):
        Sampling(**{key: value})


def test_numpy_numbers_are_numbers(make_model: Callable[..., Any]) -> None:
    how = {"max_new_tokens": np.int64(4), "top_k": np.int32(3), "temperature": np.float32(0.5), "top_p": np.float64(1)}
    plain = Sampling(max_new_tokens=4, top_k=3, temperature=0.5, top_p=1.0)
    one, other = (sample(make_model(), [[5, 6]], s, ends=[], pad=0).rows for s in (Sampling(**how), plain))  # type: ignore[arg-type]
    assert one == other


def test_an_empty_prompt_is_refused(make_model: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="a prompt is empty"):
        sample(make_model(), [[1], []], WHOLE, **HOW)


def test_room_is_made_as_it_is_needed(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap that no memory could hold, and pieces smaller than a response; rows leave in between."""
    from neureasoner import sampler

    model, eos = make_model(), list(range(0, 60))
    how: dict[str, Any] = {"pad": 0, "ends": eos, "seed": 4}
    wanted = sample(model, PROMPTS * 2, Sampling(40, 1.0, 1.0), **how).rows
    monkeypatch.setattr(sampler, "COLUMNS", 3)
    assert sample(model, PROMPTS * 2, Sampling(40, 1.0, 1.0), **how).rows == wanted
    assert sample(model, PROMPTS * 2, Sampling(10**12, 1.0, 1.0), **how).rows == [
        row if row.finished else longer
        for row, longer in zip(wanted, sample(model, PROMPTS * 2, Sampling(400, 1.0, 1.0), **how).rows, strict=True)
    ]
    assert all(row.finished for row in sample(model, PROMPTS * 2, Sampling(400, 1.0, 1.0), **how).rows)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_equal_prompts_are_read_once(make_model: Callable[..., Any], arch: str) -> None:
    model, read = make_model(arch), []
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[0], [9, 5, 2, 7]]
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    done = sample(model, prompts, Sampling(12, 1.0, 1.0), seed=3, logprobs=True, **HOW).rows
    handle.remove()
    assert read[0] == (3, 7) and all(rows > 3 for rows, _ in read[1:2])
    assert len({tuple(row.ids) for row in done[:5:2]}) == 3, "copies are drawn apart"
    for prompt, row in zip(prompts, done, strict=True):
        assert (recomputed(model, prompt, row.ids) - torch.tensor(row.logprobs)).abs().max() < 1e-4
    alone = sample(model, [PROMPTS[0]], Sampling(12, 0), **HOW).rows[0].ids
    assert [row.ids for row in sample(model, [PROMPTS[0]] * 3, Sampling(12, 0), **HOW).rows] == [alone] * 3
