"""Direct attribution against contributions built one by one in float64; several blocks at once against one by one."""

from __future__ import annotations

import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.probes.attribution import frozen
from neureasoner.probes.attribution.depass import depass_scores
from neureasoner.probes.attribution.direct import direct_scores, direct_sweep
from neureasoner.probes.attribution.sweep import depass_sweep
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


@pytest.mark.parametrize("layers", [[1], [2, 0], [0, 1, 2]])
@pytest.mark.parametrize(("sweep", "one"), [(direct_sweep, direct_scores), (depass_sweep, depass_scores)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_sweep_equals_its_blocks_one_by_one(make_model, monkeypatch, name, sweep, one, layers):
    model = make_model(name, num_hidden_layers=3, **({"attention_bias": True} if name == "qwen3" else {})).double()
    ids, targets = torch.randint(5, 100, (16,)).tolist(), [9, 3, 13, 12, 3]
    for cells in (2**25, 800):  # the second makes chunks of one or two targets
        monkeypatch.setattr(frozen, "STATE_CELLS", cells)
        got = sweep(model, ids, targets, layers)
        assert sorted(got) == sorted(layers)
        for layer in layers:
            for part, wanted in zip(got[layer], one(model, ids, targets, layer), strict=True):
                torch.testing.assert_close(part, wanted, rtol=1e-9, atol=1e-11)


def test_one_forward_pass_serves_all_blocks(make_model):
    model, calls = make_model(num_hidden_layers=3), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    direct_sweep(model, [5, 6, 7], [1, 2], [0, 1, 2])
    assert len(calls) == 1
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_half_precision_scores_are_not_rounded_to_ties(make_model):
    model = make_model("qwen2").to(torch.bfloat16)
    ids = torch.randint(5, 100, (12,)).tolist()
    neurons, heads = direct_scores(model, ids, [4, 11], 0)
    assert neurons.dtype == heads.dtype == torch.float32
    exact, _ = direct_scores(model.double(), ids, [4, 11], 0)
    assert float((neurons - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert all(len(row.unique()) == len(row) for row in neurons)


def test_bad_targets_and_layers_are_refused(make_model):
    model = make_model()
    with pytest.raises(UserError, match="layer 2 is out of range; this model has layers 0 to 1"):
        direct_scores(model, [5, 6], [1], 2)
    for sweep in (direct_sweep, depass_sweep):
        for layers in ([0, 2], [-1, 1]):
            with pytest.raises(UserError, match="layers 0 to 1"):
                sweep(model, [5, 6], [1], layers)
        for targets in ([], [0], [2]):
            with pytest.raises(UserError, match="targets from 1 to 1"):
                sweep(model, [5, 6], targets, [0])
