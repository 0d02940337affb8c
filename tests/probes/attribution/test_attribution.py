"""Attribution against contributions built one by one in float64; selection against its literal definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.errors import UserError
from neureasoner.probes.attribution.direct import direct_scores
from neureasoner.probes.attribution.selection import joint_worst_rank, ranks, select, worst_rank
from neureasoner.sites import Layout


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_direct_scores_equal_explicit_contributions(make_model, arch):
    model = make_model(arch).double()
    layout, layer = Layout.of(model), 1
    ids = torch.randint(5, 100, (14,)).tolist()
    targets = [3, 9, 13]
    got: dict[str, torch.Tensor] = {}
    block = model.model.layers[layer]
    hooks = [
        m.register_forward_pre_hook(lambda _, a, k=k: got.__setitem__(k, a[0][0]))
        for k, m in (("a", block.mlp.down_proj), ("z", block.self_attn.o_proj), ("h", model.model.norm))
    ]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    for h in hooks:
        h.remove()
    neurons, heads = direct_scores(model, ids, targets, layer)
    model.requires_grad_(False)
    assert neurons.shape == (3, layout.intermediate_size) and heads.shape == (3, layout.n_heads)
    w_down, w_out, norm = block.mlp.down_proj.weight, block.self_attn.o_proj.weight, model.model.norm
    for i, t in enumerate(targets):
        scale = norm.weight / torch.sqrt((got["h"][t - 1] ** 2).mean() + norm.variance_epsilon)
        w = model.lm_head.weight[ids[t]]
        torch.testing.assert_close(w @ (scale * got["h"][t - 1]), logits[t - 1, ids[t]])  # the frozen norm is the norm
        for n in range(0, layout.intermediate_size, 5):
            contribution = scale * (got["a"][t - 1, n] * w_down[:, n])
            assert float(neurons[i, n]) == pytest.approx(float(w @ contribution), abs=1e-10)
        for h in range(layout.n_heads):
            cut = slice(h * layout.head_dim, (h + 1) * layout.head_dim)
            contribution = scale * (w_out[:, cut] @ got["z"][t - 1, cut])
            assert float(heads[i, h]) == pytest.approx(float(w @ contribution), abs=1e-10)


def test_bad_targets_and_layers_are_refused(make_model):
    model = make_model()
    with pytest.raises(UserError, match="layers 0 to 1"):
        direct_scores(model, [5, 6], [1], 2)
    for targets in ([], [0], [2]):
        with pytest.raises(UserError, match="targets"):
            direct_scores(model, [5, 6], targets, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10**6))
def test_worst_rank_is_the_intersection_of_topk(n, c, seed):
    scores = np.random.default_rng(seed).normal(size=(n, c))
    rho = worst_rank(scores)
    for k in range(1, c + 1):
        literal = set(range(c))
        for row in scores:
            literal &= set(np.argsort(-row)[:k].tolist())
        assert literal == set(np.flatnonzero(rho <= k).tolist())
    assert (worst_rank(scores, 0.5) <= rho).all()
    assert sorted(ranks(scores)[0]) == list(range(1, c + 1))


def test_selection_prefers_what_clean_spans_do_not_select():
    failing = np.full((4, 6), 5.0) + np.arange(6) / 10
    failing[:, 0], failing[:, 3], failing[:2, 4] = 1, 2, 1.5  # 0 always on, 3 failing only, 4 on half of them
    clean = np.full((3, 6), 5.0) + np.arange(6) / 10
    clean[:, 0] = 1
    assert select(failing, None, 2).indices == [0, 3]
    chosen = select(failing, clean, 2)
    assert chosen.indices == [3, 4] or (chosen.indices[0] == 3 and 0 not in chosen.indices)
    assert chosen.clean_frequency[0] < chosen.frequency[0]
    assert chosen.n_spans == 4 and chosen.n_clean == 3 and len(select(failing, clean, 99).indices) == 6


def test_ties_go_by_mean_rank():
    failing = np.array([[1.0, 9, 2, 8], [1, 7, 2, 9]])
    assert select(failing, None, 3).indices[:2] == [0, 2]
    assert select(failing, None, 3).implied_k == 8


def test_joint_ranking_is_free_of_scale():
    rng = np.random.default_rng(0)
    neurons, heads = rng.normal(size=(5, 9)), rng.normal(size=(5, 3))
    np.testing.assert_array_equal(joint_worst_rank(neurons, heads), joint_worst_rank(neurons, heads * 100))
