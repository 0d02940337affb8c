"""Estimators against explicit loops and NumPy's own SVD; signs, weights, subspaces, and every refusal."""

from __future__ import annotations

import numpy as np
import pytest

from neureasoner.errors import UserError
from neureasoner.probes.directions.estimators import (
    Example,
    mean_difference,
    pca_difference,
    relative_difference,
)

C = 6


def made(n: int = 12, seed: int = 0, shift: float = 1.0, weights: bool = False) -> list[Example]:
    """Examples at two sites, problem by problem, sides of uneven number; some problems have one side only."""
    rng = np.random.default_rng(seed)
    out = []
    for p in range(n):
        base = rng.normal(size=C)
        for _ in range(int(rng.integers(2, 6))):
            side = bool(rng.integers(2)) if p else True
            x = base + rng.normal(size=C) + shift * side * np.arange(C)
            weight = float(rng.integers(0, 4)) if weights else 1.0
            out.append(Example({"residual:0": x.astype(np.float32), "mlp_out:1": -2 * x}, side, f"p{p:02d}", weight))
    return out


def differences(examples: list[Example], site: str) -> np.ndarray:
    """``[Q, C]`` by explicit loops, float64."""
    rows = []
    for p in dict.fromkeys(e.problem for e in examples):
        means = []
        for side in (True, False):
            total, weight = np.zeros(C), 0.0
            for e in examples:
                if e.problem == p and e.positive is side:
                    total, weight = total + e.weight * np.asarray(e.values[site], dtype=np.float64), weight + e.weight
            means.append(total / weight if weight else None)
        if means[0] is not None and means[1] is not None:
            rows.append(means[0] - means[1])
    return np.stack(rows)


@pytest.mark.parametrize("weights", [False, True])
def test_mean_difference_equals_loops(weights: bool) -> None:
    examples = made(weights=weights)
    grouped, paired = mean_difference(iter(examples)), mean_difference(iter(examples), paired=True)
    for site in ("residual:0", "mlp_out:1"):
        side = np.array([e.positive for e in examples])
        w = np.array([e.weight for e in examples])
        x = np.stack([e.values[site] for e in examples]).astype(np.float64)
        expected = np.average(x[side], axis=0, weights=w[side]) - np.average(x[~side], axis=0, weights=w[~side])
        np.testing.assert_allclose(grouped.values[site], expected, rtol=1e-12)
        rows = differences(examples, site)
        np.testing.assert_allclose(paired.values[site], rows.mean(axis=0), rtol=1e-10)
    used = sum(e.weight > 0 and e.positive for e in examples)
    assert grouped.info["examples"]["positive"] == used
    assert paired.info["problems"] == len(differences(examples, "residual:0"))
    assert grouped.values["residual:0"] @ np.arange(C) > 0 > grouped.values["mlp_out:1"] @ np.arange(C)


def test_paired_is_blind_to_what_problems_differ_in_and_grouped_is_not() -> None:
    rng, out = np.random.default_rng(1), []
    for p in range(40):  # easy problems, mostly right, lie elsewhere; sides do not differ
        easy = p % 2
        for s in range(6):
            x = np.array([10.0 * easy, 0.0]) + 0.1 * rng.normal(size=2)
            out.append(Example({"residual:0": x}, s < (5 if easy else 1), str(p)))
    assert abs(mean_difference(out, paired=True).values["residual:0"]).max() < 0.1
    assert mean_difference(out).values["residual:0"][0] > 5


def test_natural_norms_and_deviations() -> None:
    examples = made(weights=True)
    examples = [
        Example({"neuron:2[3,1,0,5,4,2]": e.values["residual:0"]}, e.positive, e.problem, e.weight) for e in examples
    ]
    info = mean_difference(examples).info
    x = np.stack([e.values["neuron:2[3,1,0,5,4,2]"] for e in examples]).astype(np.float64)
    w = np.array([e.weight for e in examples])
    mean = np.average(x, axis=0, weights=w)
    std = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w))
    np.testing.assert_allclose(info["std"]["neuron:2[3,1,0,5,4,2]"], std, rtol=1e-9)
    natural = info["natural"]["neuron:2[3,1,0,5,4,2]"]
    assert natural["norm"] == pytest.approx(np.average(np.linalg.norm(x, axis=1), weights=w))
    assert natural["std"] == pytest.approx(np.sqrt((std**2).mean()))


@pytest.mark.parametrize("flip", [False, True])
def test_pca_is_the_first_axis_with_the_label_s_sign(flip: bool) -> None:
    examples = [Example(e.values, e.positive != flip, e.problem) for e in made(20)]
    found = pca_difference(examples)
    for site in ("residual:0", "mlp_out:1"):
        rows = differences(examples, site)
        axis = np.linalg.svd(rows)[2][0]
        cosine = found.values[site] @ axis / np.linalg.norm(found.values[site])
        assert abs(cosine) == pytest.approx(1, abs=1e-9)
        assert np.linalg.norm(found.values[site]) == pytest.approx(np.sqrt(((rows @ axis) ** 2).mean()))
        # the sign: states of the positive side lie further along, and as much as the correlation says
        centred = np.concatenate([rows, -rows]) / 2 @ found.values[site]
        labels = np.repeat([1, -1], len(rows))
        assert found.info["pca"][site]["label_correlation"] == pytest.approx(np.corrcoef(centred, labels)[0, 1])
        assert np.corrcoef(centred, labels)[0, 1] > 0
        s = np.linalg.svd(rows)[1]
        assert found.info["pca"][site]["explained"] == pytest.approx(s[0] ** 2 / (s**2).sum())


def test_pca_without_a_sign_is_refused() -> None:
    examples = []
    for p, d in enumerate([3.0, -3.0]):
        examples += [Example({"residual:0": np.array([s * d, 0.1])}, s > 0, str(p)) for s in (1, -1)]
    with pytest.raises(UserError, match="does not correlate with the label"):
        pca_difference(examples)


@pytest.mark.parametrize("paired", [False, True])
def test_removed_subspace_is_gone_and_nothing_else(paired: bool) -> None:
    examples = made()
    basis = np.random.default_rng(3).normal(size=(2, C))
    basis = np.concatenate([basis, basis[:1] * 2])  # rows that depend on each other
    plain = mean_difference(examples, paired)
    found = mean_difference(examples, paired, remove={"residual:0": basis})
    projector = basis.T @ np.linalg.pinv(basis.T)
    expected = plain.values["residual:0"] - projector @ plain.values["residual:0"]
    np.testing.assert_allclose(found.values["residual:0"], expected, atol=1e-12)
    np.testing.assert_array_equal(found.values["mlp_out:1"], plain.values["mlp_out:1"])
    assert abs(basis @ pca_difference(examples, {"residual:0": basis}).values["residual:0"]).max() < 1e-9
    with pytest.raises(UserError, match="nothing is left"):
        mean_difference(examples, paired, remove={"residual:0": np.eye(C)})
    with pytest.raises(UserError, match="has 3 values a row, not 6"):
        mean_difference(examples, paired, remove={"residual:0": np.ones((1, 3))})


def test_relative_difference_equals_a_sort_in_loops() -> None:
    rng = np.random.default_rng(5)
    centre = {0: rng.normal(size=20), 3: rng.normal(size=20) * 3}
    examples = []
    for i in range(30):
        values = {f"neuron:{k}": (c + rng.normal(size=20)).astype(np.float32) for k, c in centre.items()}
        examples.append(Example(values, i % 3 == 0, str(i)))
    found = relative_difference(reversed(examples), 7)
    ranked = []
    for layer in (0, 3):
        for n in range(20):
            sides = [
                [float(e.values[f"neuron:{layer}"][n]) for e in examples if e.positive is s] for s in (True, False)
            ]
            g, b = (sum(x) / len(x) for x in sides)
            ranked.append((abs(g - b) / (abs(g) + abs(b) + 1e-8), abs(g - b), layer, n, g - b))
    ranked.sort(key=lambda r: (-r[0], -r[1], r[2], r[3]))
    expected: dict[str, list[float]] = {}
    for layer in (0, 3):
        best = sorted((r[3], r[4]) for r in ranked[:7] if r[2] == layer)
        if best:
            expected[f"neuron:{layer}[{','.join(str(n) for n, _ in best)}]"] = [d for _, d in best]
    assert list(found.values) == list(expected)
    for site, values in expected.items():
        np.testing.assert_allclose(found.values[site], values, rtol=1e-6)
        index = [int(i) for i in site[9:-1].split(",")]
        x = np.stack([e.values[site[:8]] for e in examples]).astype(np.float64)
        np.testing.assert_allclose(found.info["std"][site], x.std(axis=0)[index], rtol=1e-6)
    assert sum(len(v) for v in found.values.values()) == 7


def test_relative_difference_prefers_flips_to_larger_differences() -> None:
    """Neuron 1 flips its sign by a little, neuron 0 differs by much more without one."""
    examples = [Example({"neuron:0": np.array([9.0 if p else 4.0, 0.1 if p else -0.1])}, p, "x") for p in (0, 1, 0, 1)]
    examples = [Example(e.values, bool(e.positive), e.problem) for e in examples]
    assert list(relative_difference(examples, 1).values) == ["neuron:0[1]"]


@pytest.mark.parametrize("estimator", [mean_difference, pca_difference, lambda e: relative_difference(e, 3)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_named(estimator, bad) -> None:
    examples = [Example({"neuron:0": np.array([1.0, 2.0])}, i % 2 == 0, f"p{i // 2}") for i in range(8)]
    examples[5] = Example({"neuron:0": np.array([1.0, bad])}, False, "p2")
    with pytest.raises(UserError, match="site 'neuron:0', problem 'p2': states hold NaN or infinity"):
        estimator(examples)


def test_too_few_and_other_refusals() -> None:
    examples = made()
    one_side = [e for e in examples if e.positive]
    with pytest.raises(UserError, match="0 negative states, 2 are needed"):
        mean_difference(one_side)
    with pytest.raises(UserError, match="0 problems with both sides, 2 are needed"):
        mean_difference(one_side, paired=True)
    with pytest.raises(UserError, match="0 problems with both sides, 2 are needed"):
        pca_difference(one_side)
    with pytest.raises(UserError, match="0 positive states, 2 are needed"):
        mean_difference([])
    with pytest.raises(UserError, match="problems with both sides, 99 are needed"):
        mean_difference(examples, paired=True, least=99)
    with pytest.raises(UserError, match="do not follow each other"):
        mean_difference([*examples, examples[0]], paired=True)
    with pytest.raises(UserError, match="lacks sites of the others"):
        mean_difference([*examples, Example({"residual:0": np.ones(C)}, True, "z")])
    with pytest.raises(UserError, match="weight -1"):
        mean_difference([Example({"residual:0": np.ones(C)}, True, "z", -1.0)])
    with pytest.raises(UserError, match="use 'neuron:LAYER'"):
        relative_difference(examples, 3)
    for k in (0, 201):
        with pytest.raises(UserError, match="between 1 and 200"):
            relative_difference(examples, k)
    same = [Example({"neuron:0": np.ones(3)}, i % 2 == 0, "x") for i in range(6)]
    with pytest.raises(UserError, match="no neuron's mean differs"):
        relative_difference(same, 2)
