"""Think or Not: golden values, candidates against full forwards, and a whole trace against an own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from neureasoner.forward import cache_argument
from neureasoner.inference.baselines import baseline
from neureasoner.inference.baselines.branch import Beam, Branch, boxed_answers
from neureasoner.inference.baselines.think_or_not import (
    BOXED_STUB,
    CLOSE,
    MAX_ENTROPY,
    OPTION_STUB,
    answer_entropy,
    plainly_same,
)
from neureasoner.sampling import left_padded
from neureasoner.steps import Separators, segment

DIGITS = {"}": 9.0, "4": 6.0, "2": 6.0, "7": 5.0, "{": 3.0}


@pytest.mark.parametrize(
    ("p", "entropy", "stop"),
    [
        ((0.97, 0.01, 0.01, 0.01), 0.060485, False),
        ((0.99, 0.004, 0.003, 0.003), 0.024126, True),
        ((0.25, 0.25, 0.25, 0.25), 0.5, False),
        ((0.485, 0.005, 0.005, 0.005), 0.060485, False),  # normalised first
        ((1.0,), 0.0, True),
        ((0.5, 0.5, 0.0, 0.0), 0.25, False),
    ],
)
def test_golden_entropies(p, entropy, stop) -> None:
    assert answer_entropy(p) == pytest.approx(entropy, abs=1e-6)
    assert (answer_entropy(p) < 0.1 * MAX_ENTROPY) is stop


def test_the_threshold_is_the_largest_possible_entropy() -> None:
    n = np.linspace(1, 20, 100_001)
    assert pytest.approx((np.log2(n) / n).max(), abs=1e-8) == MAX_ENTROPY == pytest.approx(0.53074, abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "answer"),
    [
        (["4", "2", "}"], "42"),
        (["4", "5}."], "45"),  # the token that closes may hold a part of the answer
        (["\\frac{", "1}{", "2", "}", "}"], "\\frac{1}{2}"),  # an inner brace does not close it
        (["\\frac{1}{2}}$"], "\\frac{1}{2}"),
        (["\\{", "1", "\\", "}", "}"], "\\{1\\}"),  # escaped braces are text
        (["\\\\", "}"], "\\\\"),  # an escaped backslash escapes nothing
        (["4", "{"], None),
    ],
)
def test_an_answer_ends_at_the_brace_that_closes_it(tokens, answer) -> None:
    beam, said = Beam(0), None
    for n, token in enumerate(tokens):
        beam, said = beam.extended(token.encode(), -0.5)
        assert (said is None) == (n < len(tokens) - 1 or answer is None)
    assert said == answer


def read_prompts(model: Any, prompts: list[list[int]], pad: int) -> tuple[Any, torch.Tensor]:
    """Cache and mask as generate has them after its first forward over a padded batch."""
    ids, mask = left_padded(prompts, pad, "cpu")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=places, **{cache_argument(model): cache})
    return cache, mask


def log_probabilities(loop: Any, model: Any, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(loop.next_logits(model, ids), -1)


def candidates_by_hand(
    loop: Any, model: Any, tokenizer: Any, ids: list[int], barred: set[int]
) -> tuple[dict[str, float], int]:
    """Beam search by full forwards over decoded text: probabilities of strings, and tokens fed beyond the stub."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    found: dict[str, float] = {}
    fed = 0
    for step in range(10):
        fed += len(beams) if step else 0
        grown = []
        for tokens, logp in beams:
            values, best = log_probabilities(loop, model, ids + tokens).topk(5)
            for value, token in zip(values.tolist(), best.tolist(), strict=True):
                if token in barred or token >= len(tokenizer):
                    continue
                text = "{" + tokenizer.decode([*tokens, token])
                ends = [n for n in range(len(text)) if text[: n + 1].count("{") == text[: n + 1].count("}")]
                if not ends:
                    grown.append(([*tokens, token], logp + value))
                elif answer := "".join(text[1 : ends[0]].split()):
                    found[answer] = found.get(answer, 0.0) + float(np.exp(logp + value))
        beams = sorted(grown, key=lambda b: -b[1])[:5]
    return dict(sorted(found.items(), key=lambda f: -f[1])[:5]), fed


def barred_of(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("</think>")}


def test_boxed_answers_are_those_of_full_forwards(leaning, tokenizer, prompts, loop) -> None:
    """A batch padded on the left, one row branched twice; the generation's own cache stays bit for bit."""
    model, barred = leaning(DIGITS), barred_of(tokenizer)
    cache, mask = read_prompts(model, prompts, tokenizer.pad_token_id)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    stub = tokenizer.encode(CLOSE + BOXED_STUB, add_special_tokens=False)
    rows = [2, 0, 2]
    said, read = boxed_answers(
        Branch(model, cache, mask, rows), stub, Separators.of(tokenizer).texts, barred, plainly_same
    )
    for row, answers, tokens in zip(rows, said, read, strict=True):
        want, fed = candidates_by_hand(loop, model, tokenizer, prompts[row] + stub, barred)
        assert len(want) > 1 and tokens == len(stub) + fed
        assert {"".join(a.split()): p for a, p in answers} == pytest.approx(want, rel=1e-3)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


@pytest.mark.parametrize(
    ("arch", "more"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ],
)
def test_a_branch_reads_as_full_forwards_do(arch, more, make_model, tokenizer, prompts, loop) -> None:
    """Chosen rows, then two copies of one of them that go different ways."""
    model = make_model(arch, **more)
    branch = Branch(model, *read_prompts(model, prompts, tokenizer.pad_token_id), rows=[3, 1])
    first = branch.read([[7, 8, 9], [7, 8, 9]])
    branch.select([1, 1, 0])
    second = branch.read([[20], [21], [22]])
    want = [prompts[3] + [7, 8, 9], prompts[1] + [7, 8, 9]]
    for got, ids in zip(first, want, strict=True):
        torch.testing.assert_close(got, log_probabilities(loop, model, ids), atol=1e-4, rtol=1e-4)
    for got, ids in zip(second, [[*want[1], 20], [*want[1], 21], [*want[0], 22]], strict=True):
        torch.testing.assert_close(got, log_probabilities(loop, model, ids), atol=1e-4, rtol=1e-4)


def test_equal_answers_are_one_candidate(leaning, tokenizer, prompts) -> None:
    model = leaning(DIGITS)
    cache, mask = read_prompts(model, prompts[:1], tokenizer.pad_token_id)
    stub = tokenizer.encode(CLOSE + BOXED_STUB, add_special_tokens=False)

    def ask(same: Callable[[str, str], bool]) -> list[tuple[str, float]]:
        branch = Branch(model, cache, mask, [0])
        return boxed_answers(branch, stub, Separators.of(tokenizer).texts, set(), same, width=5, steps=3)[0][0]

    apart, together = ask(lambda a, b: False), ask(lambda a, b: True)
    assert len(apart) > 1 and len(together) == 1
    assert together[0][0] == apart[0][0] and together[0][1] >= sum(p for _, p in apart) - 1e-9


def think_by_hand(
    loop: Any, model: Any, tokenizer: Any, prompt: list[int], ask: Any, min_chars: int, limit: float, tokens: int
) -> tuple[list[int], list[int], list[float]]:
    """The method as a loop: probe before the first token and after each chunk, stop at an entropy below ``limit``."""
    state: dict[str, Any] = {"since": 0, "stopped": False, "entropies": []}
    close = tokenizer.encode(CLOSE, add_special_tokens=False)

    def before(out: list[int]) -> list[int] | None:
        steps, thinking = segment(out, tokenizer)
        inside = thinking == len(out) and not state["stopped"]
        chunk = tokenizer.decode(out[state["since"] :]).strip()
        closes = not out or any(s.closed and s.token_end == len(out) for s in steps)
        if not inside or not closes or (out and len(chunk) < min_chars):
            return None
        state["since"] = len(out)
        p = ask(prompt + out)
        if not p or (len(p) == 1 and p[0] < 0.5):
            return None
        q = np.array(p) / sum(p)
        state["entropies"].append(float(-(q * np.log2(q)).sum() / len(q)))
        state["stopped"] = state["entropies"][-1] < limit
        return close if state["stopped"] else None

    ids, forced = loop.by_hand(model, prompt, tokens, tokenizer.eos_token_id, before)
    return ids, forced, state["entropies"]


@pytest.mark.parametrize("options", ["", "ABCD"])
def test_a_whole_trace_by_hand(options, leaning, tokenizer, prompts, loop) -> None:
    model, barred = leaning({} if options else DIGITS | {".\n\n": 7.0}), barred_of(tokenizer)
    tokens, min_chars = (50, 12) if options else (26, 6)
    stub = tokenizer.encode(CLOSE + (OPTION_STUB if options else BOXED_STUB), add_special_tokens=False)
    letters = [[i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() == x] for x in options]

    def ask(ids: list[int]) -> list[float]:
        if not options:
            return list(candidates_by_hand(loop, model, tokenizer, ids + stub, barred)[0].values())
        p = log_probabilities(loop, model, ids + stub).exp()
        return [float(p[i].sum()) for i in letters]

    def run(ratio: float, **how: Any) -> Any:
        steered = baseline("think_or_not", model, tokenizer, options=options, ratio=ratio, min_chars=min_chars)
        return steered.generate(prompts, temperature=0.0, max_new_tokens=tokens, **how), steered

    # A first look says where a limit divides the chunks: some rows stop at their first chunk, some later, some not.
    seen = sorted(MAX_ENTROPY * (1 - s["score"]) for g in run(1e-6)[0] for s in g.scores)
    assert len(seen) >= 6 and len(set(seen)) == len(seen)
    cut = len(seen) // 4
    limit = (seen[cut] + seen[cut + 1]) / 2
    out, steered = run(limit / MAX_ENTROPY)
    for prompt, g in zip(prompts, out, strict=True):
        ids, forced, entropies = think_by_hand(loop, model, tokenizer, prompt, ask, min_chars, limit, tokens)
        assert g.response_ids == ids and loop.forced_places(g) == forced
        assert [MAX_ENTROPY * (1 - s["score"]) for s in g.scores] == pytest.approx(entropies, rel=1e-3)
        assert [e["rule"] for e in g.events] == ["sure"] * bool(forced)
        if options:
            assert g.probe_tokens == len(stub) * len(g.scores)
        assert g.to_trace("t", None).meta["probe_tokens"] == g.probe_tokens > 0  # type: ignore[arg-type]
    assert any(g.events for g in out) and any(len(g.scores) > 1 for g in out)
    loop.single_runs(steered, prompts[:3], temperature=0.0, max_new_tokens=tokens)


def test_probing_does_not_touch_the_generation(leaning, tokenizer, prompts, kit) -> None:
    """Never sure: sampled tokens and recorded series are those of vanilla; only probe tokens were spent."""
    model = leaning(DIGITS)
    settings = {"max_new_tokens": 24, "temperature": 0.7, "seed": 2, "record": kit.SITES}
    plain = baseline("vanilla", model, tokenizer).generate(prompts, **settings)
    steered = baseline("think_or_not", model, tokenizer, ratio=1e-9, min_chars=5)
    ours = steered.generate(prompts, **settings)
    for g, p in zip(ours, plain, strict=True):
        assert g.response_ids == p.response_ids and g.probe_tokens > 0 == p.probe_tokens and not any(g.forced)
        for site in kit.SITES:
            np.testing.assert_array_equal(g.series[site], p.series[site])
    assert not model._forward_pre_hooks, "its hook is gone"


def test_a_single_candidate_must_be_likely(leaning, tokenizer, prompts) -> None:
    """All candidates made one: an entropy of 0 stops at once, unless the answer's probability is below a half."""
    unsure, sure = leaning(DIGITS), leaning({"4": 60.0})

    def stops(model: Any) -> list[bool]:
        steered = baseline("think_or_not", model, tokenizer, same=lambda a, b: True)
        out = steered.generate(prompts, temperature=0.0, max_new_tokens=12)
        return [bool(g.events) for g in out]

    cache, mask = read_prompts(unsure, prompts, tokenizer.pad_token_id)
    steered = baseline("think_or_not", unsure, tokenizer, same=lambda a, b: True)
    said, _ = steered.ask(Branch(unsure, cache, mask, range(len(prompts))), {tokenizer.eos_token_id})
    assert stops(unsure) == [p[0] >= 0.5 for p in said] and not all(p[0] >= 0.5 for p in said)
    assert stops(sure) == [False] * len(prompts), "4444444444 is no closed answer"


def test_a_closed_thinking_is_not_probed(leaning, tokenizer, prompts) -> None:
    steered = baseline("think_or_not", leaning(DIGITS), tokenizer, min_chars=5)
    out = steered.generate(prompts, nothinking=True, temperature=0.0, max_new_tokens=20)
    assert all(g.probe_tokens == 0 and not g.events for g in out)
