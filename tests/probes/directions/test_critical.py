"""Reasoning-critical neurons as directions, and the ablation variants, against explicit loops."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from neureasoner.directions import Direction
from neureasoner.models import load
from neureasoner.probes.attribution.contrast import Contrast, random_neurons, statistics
from neureasoner.probes.attribution.rcn import load_rcn, rcn
from neureasoner.probes.attribution.rcn_config import RcnConfig
from neureasoner.probes.directions.critical import FULL, critical_directions
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows

F, L, Q, K = 16, 3, 10, 6
LAYOUT: Any = SimpleNamespace(intermediate_size=F, n_heads=4, head_dim=2, n_layers=L)
INFO = {"model": "m", "fingerprint": "f", "seed": 5}


def settings(**more: Any) -> RcnConfig:
    return RcnConfig("m", "t", "o", **({"neurons": K, "permutations": 4, "bootstrap": 4} | more))


def made(config: RcnConfig, seed: int = 0) -> tuple[Contrast, np.ndarray, np.ndarray, dict[str, Direction]]:
    rng = np.random.default_rng(seed)
    n = L * F
    offset = rng.normal(size=n) * np.where(rng.random(n) < 0.5, 0.0, 3.0)  # half of them cannot flip
    right, wrong = (offset + rng.normal(size=(Q, n)) * 0.3 + s * rng.normal(size=n) for s in (0.5, -0.5))
    counts = rng.integers(1, 4, size=Q)
    null = rng.normal(size=(2, 4, n))
    c = Contrast(
        right.astype(np.float32), wrong.astype(np.float32), counts, counts[::-1].copy(), rng.random(n) + 0.5, *null
    )
    chosen = statistics(c, config)[0]
    layer, index = np.divmod(chosen, F)
    control = random_neurons(layer, index, F, config.seed)
    return c, chosen, control, critical_directions(c, chosen, control, config, LAYOUT, INFO)


def means(c: Contrast, pooling: str) -> tuple[list[float], list[float]]:
    """``g`` and ``b`` by loops."""
    out: list[list[float]] = []
    for table, counts in ((c.right, c.n_right), (c.wrong, c.n_wrong)):
        weights = [float(k) if pooling == "pooled" else 1.0 for k in counts]
        row = []
        for n in range(L * F):
            row.append(sum(w * float(table[q, n]) for q, w in enumerate(weights)) / sum(weights))
        out.append(row)
    return out[0], out[1]


def flat(direction: Direction) -> dict[tuple[int, int], float]:
    found = {}
    for site, values in direction.values.items():
        layer, _, rest = site.removeprefix("neuron:").partition("[")
        index = [int(i) for i in rest.strip("]").split(",")]
        assert index == sorted(index)
        found |= {(int(layer), i): float(v) for i, v in zip(index, values, strict=True)}
    return found


@pytest.mark.parametrize("pooling", ["question", "pooled"])
@pytest.mark.parametrize("unit", ["raw", "sigma"])
def test_full_is_the_mean_difference_of_the_chosen(pooling: str, unit: str) -> None:
    c, chosen, _, found = made(settings(pooling=pooling, unit=unit))
    g, b = means(c, pooling)
    expected = {(n // F, n % F): g[n] - b[n] for n in chosen.tolist()}
    got = flat(found[FULL])
    assert got.keys() == expected.keys()
    assert all(got[k] == pytest.approx(expected[k], rel=1e-5) for k in got)  # raw, whatever they were ranked by
    for site, std in found[FULL].info["std"].items():
        layer, _, rest = site.removeprefix("neuron:").partition("[")
        assert std == [c.sigma[int(layer) * F + int(i)] for i in rest.strip("]").split(",")]
    assert found[FULL].info["seed"] == 5 and found[FULL].fingerprint == "f"
    assert "right traces" in found[FULL].meaning


def test_random_neurons_have_the_same_shifts_elsewhere() -> None:
    _, chosen, control, found = made(settings())
    full, other = flat(found[FULL]), flat(found["random_neurons"])
    assert not full.keys() & other.keys()
    for block in range(L):
        sizes = [sorted(v for (k, _), v in d.items() if k == block) for d in (full, other)]
        assert sizes[0] == sizes[1]
    assert other.keys() == {(n // F, int(i)) for n, i in zip(chosen.tolist(), control, strict=True)}


def test_no_mean_difference_keeps_places_signs_and_block_norms() -> None:
    _, _, _, found = made(settings())
    full, level = flat(found[FULL]), flat(found["no_mean_difference"])
    assert full.keys() == level.keys() and all(full[k] * level[k] > 0 for k in full)
    for block in range(L):
        a, b = ([abs(v) for (k, _), v in d.items() if k == block] for d in (full, level))
        if a:
            assert sum(x * x for x in b) == pytest.approx(sum(x * x for x in a), rel=1e-5)
            assert max(b) == pytest.approx(min(b)) and (len(a) == 1 or max(a) > min(a))


@pytest.mark.parametrize("ranking", ["filter", "released"])
def test_no_sign_filter_takes_the_largest(ranking: str) -> None:
    c, _, _, found = made(settings(ranking=ranking))
    g, b = means(c, "question")
    order = sorted(range(L * F), key=lambda n: -abs(g[n] - b[n]))[:K]
    assert flat(found["no_sign_filter"]).keys() == {(n // F, n % F) for n in order}
    assert flat(found["no_sign_filter"]).keys() != flat(found[FULL]).keys()
    assert any(g[n] * b[n] > 0 for n in order) and all(g[k * F + i] * b[k * F + i] < 0 for k, i in flat(found[FULL]))
    assert "no_sign_filter" not in made(settings(filter_sign=False))[3]


def test_stage_writes_them(make_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    rng, traces = np.random.default_rng(0), []
    for p in range(20):
        for s in range(4):
            word = " apples" if s % 2 else " check"
            text = f"Try {rng.integers(10, 99)}{word}.\n\n" + tiny_tokenizer.eos_token
            ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = tiny_tokenizer(f"<think>\nQuestion {p}", add_special_tokens=False)["input_ids"]
            labels = Labels(bool(s % 2), "1", IntraLabel(), InterLabel())
            problem = Problem(f"p{p:02d}", "f", 1, f"Question {p}", "a")
            traces.append(Trace(f"p{p}#{s}", problem, prompt, ids, text, [], True, labels))
    make_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "traces.jsonl", traces)
    rcn(RcnConfig(str(tmp_path / "model"), str(tmp_path / "traces.jsonl"), str(tmp_path / "out"), neurons=7))
    neurons = load_rcn(tmp_path / "out")
    model, _ = load(str(tmp_path / "model"))
    folder = tmp_path / "out" / "directions"
    assert {p.name for p in folder.iterdir()} == {FULL, "random_neurons", "no_mean_difference", "no_sign_filter"}
    for path in folder.iterdir():
        Direction.load(path).check(model)
        Direction.load(path).random_like(0).check(model)
    expected = {(int(k), int(i)): float(s) for k, i, s in zip(neurons.layer, neurons.index, neurons.shift, strict=True)}
    got = flat(Direction.load(folder / FULL))
    assert got.keys() == expected.keys() and all(got[k] == pytest.approx(expected[k], rel=1e-5) for k in got)
