"""Where experts lie: figures against scipy and scikit-learn, verdicts on planted experts and on noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom, mannwhitneyu
from sklearn.metrics import roc_auc_score

from neureasoner.probes.attribution import experts
from neureasoner.probes.attribution.experts import Pools
from neureasoner.probes.attribution.selection import Pool, effects, places, pooled
from neureasoner.probes.detectors.metrics import bootstrap_draws, interval

N, H, P = 40, 20, 30  # neurons and heads of a block, problems
WANTED = {"neuron": 12, "head": 8}
SIZE = 20


def side(rng, spans, problems, lifts, blocks=(0,), tokens=5):
    """Pools of random spans; ``lifts[block]``: added to the scores of neurons and heads, ``[N]`` and ``[H]``."""
    found = {}
    for _ in range(spans):
        scores = {
            b: tuple(torch.tensor(rng.normal(size=(tokens, c)) + lifts.get(b, (0, 0))[i]) for i, c in enumerate((N, H)))
            for b in blocks
        }
        here = scores[blocks[0]]
        values = {"raw": pooled(here, False), "z": pooled(here, True)}
        values |= {f"{k}:{b}": scores[b][i] for b in blocks for i, k in enumerate(("neuron", "head"))}
        values["depth"] = pooled([s for b in blocks for s in scores[b]], True)
        for name, v in values.items():
            found.setdefault(name, []).append([t.numpy() for t in places(v)])
    problem = rng.integers(problems, size=spans)
    return {k: Pool(*(np.stack([r[i] for r in v]) for i in range(3)), problem) for k, v in found.items()}


def pools(seed, neurons=0.0, heads=0.0, block=0, blocks=(0,), clean=True, problems=P):
    """Failing spans that lift half of the neurons or most heads of one block, clean ones that lift nothing."""
    rng = np.random.default_rng(seed)
    lifts = {block: (neurons * (np.arange(N) < 20), heads * (np.arange(H) < 14))}
    return Pools(side(rng, 40, problems, lifts, blocks), side(rng, 40, problems, {}, blocks) if clean else {})


DRAWS = bootstrap_draws(P, 100, 0)


@pytest.mark.parametrize(("f", "h", "size"), [(512, 8, 40), (40, 12, 10), (18944, 28, 40), (30, 30, 20)])
def test_chance_is_the_hypergeometric_range(f, h, size):
    got = experts.chance(f, h, size)
    law = hypergeom(f + h, h, size)
    assert got["value"] == pytest.approx(law.mean() / size)
    assert (got["low"] * size, got["high"] * size) == pytest.approx((law.ppf(0.025), law.ppf(0.975)))


def test_the_range_of_places_by_chance_holds_95_of_100_random_orders():
    got = experts.ahead_by_chance(N, H)
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(N + H) for _ in range(4000)])
    _, ahead = experts.heads_of(iter([(np.arange(4000), order)]), N, SIZE, 4000)
    assert np.mean((ahead >= got["low"]) & (ahead <= got["high"])) == pytest.approx(0.95, abs=0.015)
    assert ahead.mean() == pytest.approx(0.5, abs=0.01)


def test_figures_of_an_order_equal_counting_and_mann_whitney():
    rng = np.random.default_rng(1)
    order = np.stack([rng.permutation(N + H) for _ in range(5)])
    rows = np.array([0, 2, 3, 4, 6])
    share, ahead = experts.heads_of(iter([(rows, order)]), N, SIZE, 7)
    assert np.isnan(share[[1, 5]]).all() and np.isnan(ahead[[1, 5]]).all()
    for row, one in zip(rows, order, strict=True):
        assert share[row] == sum(c >= N for c in one[:SIZE]) / SIZE
        place = np.argsort(one)
        u = mannwhitneyu(place[:N], place[N:]).statistic  # pairs in which the neuron stands behind the head
        assert ahead[row] == pytest.approx(u / (N * H))


def between(value, low, high):
    return {"value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("share", "ahead", "by_chance", "expected"),
    [
        ((0.5, 0.4, 0.6), (0.5, 0.4, 0.6), (0.2, 0.05, 0.35), "heads"),
        ((0.5, 0.3, 0.6), (0.9, 0.8, 0.99), (0.2, 0.05, 0.35), "undecided"),
        ((0.0, 0.0, 0.04), (0.5, 0.4, 0.6), (0.2, 0.05, 0.35), "neurons"),
        ((0.1, 0.0, 0.06), (0.1, 0.0, 0.2), (0.2, 0.05, 0.35), "undecided"),
        # a share of 0 is no news where few heads are: the whole order decides
        ((0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (0.015, 0.0, 0.05), "undecided"),
        ((0.0, 0.0, 0.0), (0.1, 0.0, 0.2), (0.015, 0.0, 0.05), "neurons"),
        ((0.04, 0.0, 0.05), (0.1, 0.0, 0.2), (0.015, 0.0, 0.05), "undecided"),
        ((None, None, None), (None, None, None), (0.2, 0.05, 0.35), "undecided"),
    ],
)
def test_verdicts_come_from_intervals(share, ahead, by_chance, expected):
    assert experts.verdict(between(*share), between(*ahead), between(*by_chance), between(0.5, 0.3, 0.7)) == expected


def planted(**level_pools):
    return experts.types_of(level_pools, N, H, SIZE, DRAWS)


def test_observation_1_is_reproduced_contradicted_or_open():
    mlp, heads, noise = pools(0, neurons=3), pools(1, heads=3), pools(2)
    as_paper = planted(intra=mlp, inter=heads, instance=pools(3, neurons=3))
    assert as_paper["observation_1"] == "reproduced"
    assert experts.conclusion(as_paper).startswith("Observation 1 is reproduced (intra: neurons, the paper has neurons")
    entry = as_paper["levels"]["inter"]
    assert entry["measure"] == "effect" and entry["verdict"] == "heads" and entry["status"] == "as in the paper"
    assert entry["measures"]["effect"]["heads"]["value"] >= 0.7  # the fourteen planted ones lead
    assert entry["measures"]["effect"]["enrichment"]["value"] == pytest.approx(
        entry["measures"]["effect"]["heads"]["value"] * (N + H) / H, abs=1e-3
    )
    against = planted(intra=heads, inter=heads, instance=heads)
    assert against["observation_1"] == "contradicted" and against["levels"]["intra"]["status"] == "against the paper"
    assert "contradicted (intra: heads, the paper has neurons" in experts.conclusion(against)
    open_ = planted(intra=noise, inter=heads)
    assert open_["levels"]["intra"]["verdict"] == "undecided" and open_["observation_1"] == "undecided"
    text = experts.conclusion(open_)
    assert "neither reproduced nor contradicted" in text and "no failing spans for instance" in text
    only = planted(inter=heads)
    assert only["levels"]["inter"]["status"] == "as in the paper" and only["observation_1"] == "undecided"


def test_differences_between_levels_are_paired_by_draw():
    one = pools(4, heads=2)
    got = planted(inter=one, intra=one, instance=pools(5))
    assert got["differences"]["inter - intra"] == between(0.0, 0.0, 0.0)
    assert got["differences"]["inter - instance"]["value"] == pytest.approx(
        got["levels"]["inter"]["measures"]["effect"]["heads"]["value"]
        - got["levels"]["instance"]["measures"]["effect"]["heads"]["value"]
    )


def test_without_clean_spans_the_verdict_is_of_the_z_scored_frequency():
    got = planted(inter=pools(6, heads=4, clean=False))["levels"]["inter"]
    assert list(got["measures"]) == ["raw", "z"] and got["measure"] == "z" and got["verdict"] == "heads"


def test_few_problems_decide_nothing():
    got = experts.types_of({"inter": pools(1, heads=3, problems=4)}, N, H, SIZE, DRAWS)["levels"]["inter"]
    assert got["n_problems"] == 4 and got["verdict"] == "undecided"
    assert got["measures"]["effect"]["heads"]["low"] > experts.chance(N, H, SIZE)["high"]


def test_separation_is_the_auroc_on_folds_left_out():
    for seed, lift in ((0, 1.0), (1, 0.0)):
        both = pools(seed, heads=lift)
        got = experts.separation(both, 0, WANTED, DRAWS, 7)
        folds = np.random.default_rng([7, 11]).permutation(np.arange(P) % experts.FOLDS)
        for kind, n in WANTED.items():
            failing, clean = both.pair(f"{kind}:0")
            y, score = [], []
            for fold in range(experts.FOLDS):
                others = (folds != fold).astype(float)[None]
                _, effect = next(effects(failing, clean, others))
                best = sorted(range(effect.shape[1]), key=lambda c: -effect[0, c])[:n]
                for label, pool in ((1, failing), (0, clean)):
                    for r in np.flatnonzero(folds[pool.problem] == fold):
                        y.append(label)
                        score.append(round(-float(pool.mean[r, best].mean()), 4))
            assert got[kind]["value"] == pytest.approx(roc_auc_score(y, score), abs=1e-4)
    assert got["head"]["low"] < 0.6  # noise: choosing and testing on the same spans would show it as told apart
    planted_heads = experts.separation(pools(0, heads=3), 0, WANTED, DRAWS, 0)
    assert planted_heads["head"]["low"] > 0.95 and planted_heads["neuron - head"]["high"] < 0
    assert experts.separation(pools(0, clean=False), 0, WANTED, DRAWS, 0) == {}


def test_all_of_a_few_heads_are_not_their_own_mean():
    got = experts.separation(pools(0, heads=3), 0, {"neuron": N, "head": H}, DRAWS, 0)
    assert got["head"]["value"] > 0.9


def test_problems_too_few_for_folds_leave_separation_open():
    rng = np.random.default_rng(0)
    both = Pools(side(rng, 5, 1, {}), side(rng, 5, 1, {}))
    assert experts.separation(both, 0, WANTED, bootstrap_draws(1, 20, 0), 0)["head"]["value"] is None


@pytest.mark.parametrize(("kind", "lift"), [("head", {"heads": 3.0}), ("neuron", {"neurons": 3.0})])
def test_depth_names_the_planted_block_and_type(kind, lift):
    blocks = [2, 3, 5]
    both = pools(8, block=3, blocks=tuple(blocks), **lift)
    got = experts.depth_of(both, blocks, N, H, WANTED, DRAWS, 0)
    assert got["best"] == {"block": 3, "type": kind}
    shares = {k: [v["value"] for v in got["share"][k]] for k in got["share"]}
    assert sum(map(sum, shares.values())) == pytest.approx(1, abs=1e-3) and got["size"] == SIZE
    assert shares[kind][1] >= 0.4 and got["share"][kind][1]["low"] > got["chance"][kind]
    assert 3 * (got["chance"]["neuron"] + got["chance"]["head"]) == pytest.approx(1)
    _, effect = next(effects(*both.pair("depth"), DRAWS[:1]))
    first = np.argsort(-effect[0], kind="stable")[:SIZE]
    for i in range(3):
        inside = [c - i * (N + H) for c in first if i * (N + H) <= c < (i + 1) * (N + H)]
        assert shares["neuron"][i] == pytest.approx(sum(c < N for c in inside) / SIZE)
        assert shares["head"][i] == pytest.approx(sum(c >= N for c in inside) / SIZE)
    assert got["separation"]["head"][1] == experts.separation(both, 3, WANTED, DRAWS, 0)["head"]


def test_depth_without_clean_spans_has_shares_only():
    got = experts.depth_of(pools(8, blocks=(0, 1), clean=False, neurons=4, block=1), [0, 1], N, H, WANTED, DRAWS, 0)
    assert "separation" not in got and got["share"]["neuron"][1]["value"] > got["share"]["neuron"][0]["value"]


def test_undefined_intervals_are_dashes():
    assert experts.percent(interval(np.full(3, np.nan))) == experts.number(interval(np.full(3, np.nan))) == "–"
    assert experts.percent(between(0.051, 0.0, 0.104), 1) == "5.1 % [0.0, 10.4]"
    assert experts.number(between(1.5, 1.0, 2.0), 1) == "1.5 [1.0, 2.0]"
