"""Selection against its literal definition: sets, and one span, one draw of problems at a time."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.probes.attribution import selection
from neureasoner.probes.attribution.selection import (
    Pool,
    chosen_sets,
    effects,
    hypergeometric,
    implied_k,
    orders,
    overlap_by_chance,
    places,
    pooled,
    ranks,
    select,
    usable,
    worst_rank,
)
from neureasoner.probes.detectors.metrics import bootstrap_draws


def topk_sets(scores, k):
    """The TopK set of every token, by sorting; ties go to the lower index."""
    return [set(sorted(range(scores.shape[1]), key=lambda c: (-row[c], c))[:k]) for row in scores]


def z(scores):
    return (scores - scores.mean()) / scores.std()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_worst_rank_is_the_intersection_of_topk(n, c, seed, tied):
    scores = np.random.default_rng(seed).normal(size=(n, c)).round(0 if tied else 9)
    rho = worst_rank(torch.tensor(scores)).numpy()
    for k in range(1, c + 1):
        assert set.intersection(*topk_sets(scores, k)) == set(np.flatnonzero(rho <= k).tolist())
    assert sorted(ranks(torch.tensor(scores))[0].tolist()) == list(range(1, c + 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 8), st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.9, 1.0]))
def test_a_quantile_is_membership_in_that_share_of_topk(n, c, seed, q):
    scores = np.random.default_rng(seed).normal(size=(n, c))
    rho = worst_rank(torch.tensor(scores), q).numpy()
    for k in range(1, c + 1):
        sets = topk_sets(scores, k)
        wanted = {i for i in range(c) if sum(i in s for s in sets) >= q * n - 1e-9}
        assert wanted == set(np.flatnonzero(rho <= k).tolist())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 8), st.integers(2, 4), st.integers(0, 10**6), st.booleans())
def test_joint_ranks_are_the_intersection_over_both_types(n, f, h, seed, z_scored):
    rng = np.random.default_rng(seed)
    neurons, heads = rng.normal(size=(n, f)), 5 * rng.normal(size=(n, h)) + 1
    joint = np.concatenate([z(neurons), z(heads)] if z_scored else [neurons, heads], axis=1)
    rho = worst_rank(pooled([torch.tensor(neurons), torch.tensor(heads)], z_scored)).numpy()
    for k in range(1, f + h + 1):
        assert set.intersection(*topk_sets(joint, k)) == set(np.flatnonzero(rho <= k).tolist())


def test_z_scored_pools_are_free_of_scale_and_of_constants():
    rng = np.random.default_rng(0)
    neurons, heads = (torch.tensor(rng.normal(size=s)) for s in ((5, 9), (5, 3)))
    np.testing.assert_array_equal(*(ranks(pooled([neurons, s * heads + 7], True)) for s in (1, 100)))
    assert torch.isfinite(pooled([neurons, torch.ones(5, 3)], True)).all()
    assert (worst_rank(pooled([neurons, 1000 + heads], False))[9:] <= 3).all()  # raw: scale decides


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([0.5, 1.0]))
def test_places_order_by_worst_then_mean_rank(n, c, seed, q):
    scores = torch.tensor(np.random.default_rng(seed).normal(size=(n, c)))
    rho, place, mean = places(scores, q)
    np.testing.assert_array_equal(rho, worst_rank(scores, q))
    np.testing.assert_allclose(mean, ranks(scores).double().mean(0))
    wanted = sorted(range(c), key=lambda i: (int(rho[i]), float(mean[i]), i))
    assert [wanted.index(i) + 1 for i in range(c)] == place.tolist()


def pool(seed, spans, width, problems, tokens=4, shift=0.0):
    """A pool of random spans over ``problems`` problems; ``shift`` lifts the scores of the first two components."""
    rng = np.random.default_rng(seed)
    lift = np.r_[shift, shift, np.zeros(width - 2)]
    found = [places(torch.tensor(rng.normal(size=(tokens, width)) + lift)) for _ in range(spans)]
    return Pool(*(np.stack([f[i] for f in found]) for i in range(3)), rng.integers(problems, size=spans))


def repeated(side, draw):
    """Rows of the pool as often as the draw holds their problem."""
    return [i for i, p in enumerate(side.problem) for _ in range(int(draw[p]))]


def by_hand(failing, clean, size, draw, k=0):
    """The chosen components of one draw, in order, by counting span after span."""
    width = failing.rho.shape[1]

    def frequency_and_rank(side):
        rows = repeated(side, draw)
        inside = [[side.rho[r, c] <= k if k else side.place[r, c] <= size for c in range(width)] for r in rows]
        return [sum(i[c] for i in inside) / len(rows) for c in range(width)], [
            sum(float(side.rho[r, c]) for r in rows) / len(rows) for c in range(width)
        ]

    often, rank = frequency_and_rank(failing)
    less, minus = frequency_and_rank(clean) if clean else ([0.0] * width, [0.0] * width)
    key = lambda c: (k > 0 and often[c] == 0, -round(often[c] - less[c], 9), round(rank[c] - minus[c], 7), c)  # noqa: E731
    order = sorted(range(width), key=key)
    return order, [c for c in order if not (k and often[c] == 0)][:size]


@pytest.mark.parametrize("cells", [1, 40, 2**23])
@pytest.mark.parametrize(("contrast", "k"), [(False, 0), (True, 0), (True, 4), (False, 2)])
def test_choices_of_every_draw_are_those_made_by_hand(monkeypatch, cells, contrast, k):
    monkeypatch.setattr(selection, "CELLS", cells)
    failing, clean = pool(0, 7, 9, 5, shift=1.0), pool(1, 6, 9, 5) if contrast else None
    draws = bootstrap_draws(5, 12, 3)
    draws = draws[usable(draws, failing, clean)]
    sets = chosen_sets(failing, clean, 3, draws, k)
    seen = 0
    for rows, order, n in orders(failing, clean, 3, draws, k):
        for draw, one, count, chosen in zip(draws[rows], order, n, sets[rows], strict=True):
            wanted, first = by_hand(failing, clean, 3, draw, k)
            assert one.tolist() == wanted and count == len(first) and set(np.flatnonzero(chosen)) == set(first)
            seen += 1
    assert seen == len(draws) == len(sets)


@pytest.mark.parametrize("k", [0, 5])
def test_a_selection_says_how_often_its_components_are_chosen_again(k):
    failing, clean = pool(2, 12, 20, 8, shift=1.0), pool(3, 10, 20, 8)
    draws = bootstrap_draws(8, 200, 0)
    got = select(failing, clean, 4, draws, k)
    first = by_hand(failing, clean, 4, draws[0], k)[1]
    assert got.indices == first and len(first) > 1
    drawn = [set(by_hand(failing, clean, 4, d, k)[1]) for d in draws[1:] if usable(d[None], failing, clean)[0]]
    assert got.again == pytest.approx([np.mean([c in s for s in drawn]) for c in first], abs=1e-4)
    assert got.jaccard == pytest.approx(np.mean([len(s & set(first)) / len(s | set(first)) for s in drawn]), abs=1e-4)
    assert got.by_chance == len(first) / 20 and got.n_spans == 12 and got.n_clean == 10
    inside = failing.rho <= k if k else failing.place <= 4
    assert got.frequency == pytest.approx(inside.mean(axis=0)[first].tolist(), abs=1e-4)
    assert got.n_problems == len(set(failing.problem.tolist()))
    literal = [max(failing.rho[r, c] for c in first) for r in range(12)]  # the K of each span that holds them all
    assert got.implied_k == math.ceil(np.median(literal))


def test_what_always_wins_is_firm_and_noise_is_not():
    draws = bootstrap_draws(40, 200, 0)
    firm = select(pool(0, 40, 60, 40, shift=8.0), None, 2, draws)
    assert firm.indices in ([0, 1], [1, 0]) and firm.again == [1.0, 1.0] and firm.jaccard == 1.0
    noise = select(pool(1, 40, 60, 40), pool(2, 40, 60, 40), 6, draws)
    assert noise.jaccard < 0.6 and min(noise.again) < 0.7
    alone = pool(3, 5, 12, 1)
    assert select(alone, None, 3, bootstrap_draws(1, 50, 0)).again == [1.0] * 3  # one problem: nothing to resample


def test_selection_prefers_what_clean_spans_do_not_select():
    rho = np.full((4, 6), 5.0) + np.arange(6) / 10
    rho[:, 0], rho[:, 3], rho[:2, 4] = 1, 2, 1.5  # 0 always on, 3 failing only, 4 on half of them
    other = np.full((3, 6), 5.0) + np.arange(6) / 10
    other[:, 0] = 1
    place = lambda r: r.argsort(1, kind="stable").argsort(1) + 1  # noqa: E731
    failing, clean = (Pool(r, place(r), r, np.arange(len(r))) for r in (rho, other))
    draws = np.ones((2, 4))
    assert select(failing, None, 2, draws).indices == [0, 3]
    chosen = select(failing, clean, 2, draws)
    assert chosen.indices[0] == 3 and 0 not in chosen.indices and chosen.clean_frequency[0] < chosen.frequency[0]
    assert len(select(failing, clean, 99, draws).indices) == 6


def test_an_empty_literal_intersection_chooses_nothing_and_the_implied_k_would():
    failing = pool(5, 6, 10, 4, tokens=30)
    draws = bootstrap_draws(4, 20, 0)
    empty = select(failing, None, 3, draws, 1)
    assert empty.indices == [] and empty.again == [] and empty.jaccard == 0
    k = implied_k(failing, 3)
    held = [int((row <= k).sum()) for row in failing.rho]
    assert np.median(held) >= 3 > np.median([int((row <= k - 1).sum()) for row in failing.rho])


def test_draws_without_a_span_of_each_side_are_not_usable():
    failing, clean = pool(0, 3, 5, 1), pool(1, 3, 5, 1)
    clean.problem = np.ones(3, dtype=int)
    draws = np.array([[1.0, 1], [2, 0], [0, 2], [0, 0]])
    assert usable(draws, failing, clean).tolist() == [True, False, False, False]
    assert usable(draws, failing, None).tolist() == [True, True, False, False]


@pytest.mark.parametrize("cells", [1, 2**23])
def test_effects_are_differences_of_mean_ranks_in_pooled_deviations(monkeypatch, cells):
    monkeypatch.setattr(selection, "CELLS", cells)
    failing, clean = pool(0, 9, 7, 4, shift=2.0), pool(1, 8, 7, 4)
    failing.mean[:, 6] = clean.mean[:, 6] = 3.0  # a constant has no effect, not an infinite one
    draws = bootstrap_draws(4, 10, 1)
    draws = draws[usable(draws, failing, clean)]
    got = np.concatenate([e for _, e in effects(failing, clean, draws)])
    for draw, row in zip(draws, got, strict=True):
        f, c = failing.mean[repeated(failing, draw)], clean.mean[repeated(clean, draw)]
        for i in range(6):
            spread = math.sqrt((f[:, i].var() + c[:, i].var()) / 2)
            wanted = (c[:, i].mean() - f[:, i].mean()) / spread if spread > 1e-6 else 0
            assert row[i] == pytest.approx(wanted, abs=1e-6)
        assert row[6] == 0
    assert (got[0, :2] > 0.5).all()


@pytest.mark.parametrize(("total", "marked", "drawn"), [(6, 2, 3), (7, 7, 2), (5, 1, 5), (8, 0, 3)])
def test_chances_equal_counting_all_draws(total, marked, drawn):
    counts = [sum(c < marked for c in combo) for combo in itertools.combinations(range(total), drawn)]
    wanted = [counts.count(i) / len(counts) for i in range(drawn + 1)]
    np.testing.assert_allclose(hypergeometric(total, marked, drawn), wanted, atol=1e-12)
    mine = set(range(drawn))
    overlaps = [len(mine & set(c)) / len(mine | set(c)) for c in itertools.combinations(range(total), drawn)]
    assert overlap_by_chance(total, drawn) == pytest.approx(np.mean(overlaps))
