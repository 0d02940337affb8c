"""DePass against a frozen forward pass written here: by autograd, and part by part; and its two exact sums."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import linear, silu

from neureasoner.errors import UserError
from neureasoner.probes.attribution import frozen, locate
from neureasoner.probes.attribution.depass import decompose, depass_scores
from neureasoner.probes.attribution.depass_forward import propagate
from neureasoner.probes.attribution.direct import direct_scores
from neureasoner.probes.config import ATTRIBUTIONS, LocateConfig
from neureasoner.sites import Layout

ARCHS = {
    "llama": {},
    "llama, all biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen2, sliding": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "qwen3, biases": {"attention_bias": True},
}
TARGETS = [9, 3, 13, 12]


@pytest.fixture
def build(make_model):
    """Three blocks; biases and norm gains, which start as zeros and ones, get random values."""

    def make(name, dtype=torch.float64):
        model = make_model(name.split(",")[0], num_hidden_layers=3, **ARCHS[name])
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("bias"):
                    p.normal_()
                elif "norm" in key:
                    p.uniform_(0.5, 1.5)
        return model.to(dtype)

    return make


@pytest.fixture
def ids():
    return torch.randint(5, 100, (16,)).tolist()


def scale(norm, x):
    return (norm.weight / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()).detach()


def reference(model, ids, layer, neuron_mask, head_mask):
    """Logits ``[N, V]`` of a forward pass in which only what DePass freezes is detached, and the frozen values.

    Whole ``[H, N, N]`` attention, repeated key/value heads, Transformers' own rotation: nothing is shared with the code
    under test. The masks multiply the neurons and heads of one block, so their gradients are the scores.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    layout, n = Layout.of(model), len(ids)
    x = model.model.embed_tokens(torch.tensor(ids))
    cos, sin = model.model.rotary_emb(x[None], torch.arange(n)[None])
    split = lambda t: t.view(n, -1, layout.head_dim)  # noqa: E731
    kept = []
    for i, block in enumerate(layout.layers):
        attn, mlp = block.self_attn, block.mlp
        s1 = scale(block.input_layernorm, x)
        q, k, v = (split(p(s1 * x)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        if hasattr(attn, "q_norm"):
            q, k = scale(attn.q_norm, q) * q, scale(attn.k_norm, k) * k
        q, k = (t[0] for t in apply_rotary_pos_emb(*(t.transpose(0, 1)[None] for t in (q, k)), cos, sin))
        g = layout.n_heads // layout.n_kv_heads
        seen = torch.ones(n, n).tril().bool()
        if getattr(attn, "sliding_window", None):
            seen &= ~torch.ones(n, n).tril(-attn.sliding_window).bool()
        scores = q @ k.repeat_interleave(g, 0).transpose(1, 2) / layout.head_dim**0.5
        a = scores.masked_fill(~seen, float("-inf")).softmax(-1).detach()
        z = torch.einsum("hij,jhd->ihd", a, v.repeat_interleave(g, 1))
        z = z * head_mask[:, None] if i == layer else z
        y = x + attn.o_proj(z.flatten(1))
        s2 = scale(block.post_attention_layernorm, y)
        gate = mlp.gate_proj(s2 * y)
        c = (torch.sigmoid(gate) * mlp.up_proj(s2 * y)).detach()
        neurons = c * gate
        torch.testing.assert_close(neurons, silu(gate) * mlp.up_proj(s2 * y))
        neurons = neurons * neuron_mask if i == layer else neurons
        kept.append({"s1": s1, "a": a, "z": z, "y": y, "s2": s2, "c": c, "neurons": neurons})
        x = y + mlp.down_proj(neurons)
        kept[-1]["x"] = x
    logits = model.lm_head(scale(model.model.norm, x) * x)
    return logits, kept


def ones(model):
    layout, dtype = Layout.of(model), model.lm_head.weight.dtype
    return [torch.ones(k, dtype=dtype, requires_grad=True) for k in (layout.intermediate_size, layout.n_heads)]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ARCHS)
def test_scores_are_gradients_of_the_frozen_forward_pass(build, ids, name, layer):
    model = build(name)
    masks = ones(model)
    logits, _ = reference(model, ids, layer, *masks)
    neurons, heads = depass_scores(model, ids, TARGETS, layer)
    for row, t in enumerate(TARGETS):
        wanted = torch.autograd.grad(logits[t - 1, ids[t]], masks, retain_graph=True)
        torch.testing.assert_close(neurons[row], wanted[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(heads[row], wanted[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ARCHS)
def test_promise_8_both_partitions_add_up_to_the_logit(build, ids, name, layer):
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = build(name, dtype)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, [t - 1 for t in TARGETS], [ids[t] for t in TARGETS]]
        d = decompose(model, ids, TARGETS, layer)
        assert d.neurons.dtype == dtype and not d.neurons.requires_grad
        torch.testing.assert_close(d.logits, logits, rtol=1e-5, atol=1e-5)  # HF's norms and softmax are float32
        atol = rtol * float(d.logits.abs().mean())
        torch.testing.assert_close(d.neurons.sum(-1) + d.neuron_rest, d.logits, rtol=rtol, atol=atol)
        torch.testing.assert_close(d.heads.sum(-1) + d.head_rest, d.logits, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ARCHS)
def test_scores_equal_propagating_every_part(build, ids, name):
    model = build(name)
    for layer in range(3):
        d = decompose(model, ids, TARGETS, layer)
        for site, scores, rest in (("neuron", d.neurons, d.neuron_rest), ("head", d.heads, d.head_rest)):
            parts, remaining = propagate(model, ids, TARGETS, f"{site}:{layer}", chunk=7)
            torch.testing.assert_close(parts, scores, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(remaining, rest, rtol=1e-9, atol=1e-10)


def naive(model, ids, t, kind, layer, indices, mode):
    """Contributions of parts and rest to one logit, the rule of core.md §2.3 spelled out part by part."""
    _, kept = reference(model, ids, layer, *ones(model))
    layout, block, here = Layout.of(model), model.model.layers[layer], kept[layer]
    if kind == "neuron":
        parts = [here["neurons"][:, [n]] * block.mlp.down_proj.weight[:, n] for n in indices]
        parts.append(here["x"] - sum(parts))
    else:
        cut = lambda h: slice(h * layout.head_dim, (h + 1) * layout.head_dim)  # noqa: E731
        parts = [here["z"][:, h] @ block.self_attn.o_proj.weight[:, cut(h)].T for h in indices]
        parts.append(here["y"] - sum(parts))

    def through_mlp(parts, mlp, k):
        gates = [linear(k["s2"] * p, mlp.gate_proj.weight) for p in parts]
        if mlp.gate_proj.bias is not None:
            gates[-1] = gates[-1] + mlp.gate_proj.bias
        if mode == "linear":
            shares = [k["c"] * g for g in gates]
        else:
            weights = [torch.where(g == 0, 0.0, (10 * (g - max(g.max() for g in gates))).exp()) for g in gates]
            shares = [k["neurons"] * w / sum(weights) for w in weights]
        out = [p + linear(s, mlp.down_proj.weight) for p, s in zip(parts, shares, strict=True)]
        if mlp.down_proj.bias is not None:
            out[-1] = out[-1] + mlp.down_proj.bias
        return out

    if kind == "head":
        parts = through_mlp(parts, block.mlp, here)
    for i in range(layer + 1, layout.n_layers):
        attn, k = model.model.layers[i].self_attn, kept[i]
        new = []
        for m, p in enumerate(parts):
            rest = m == len(parts) - 1  # carries the biases
            v = linear(k["s1"] * p, attn.v_proj.weight, attn.v_proj.bias if rest else None)
            v = v.view(len(ids), -1, layout.head_dim).repeat_interleave(layout.n_heads // layout.n_kv_heads, 1)
            z = torch.einsum("hij,jhd->ihd", k["a"], v).flatten(1)
            new.append(p + linear(z, attn.o_proj.weight, attn.o_proj.bias if rest else None))
        parts = through_mlp(new, model.model.layers[i].mlp, k)
    reader = scale(model.model.norm, kept[-1]["x"])[t - 1] * model.lm_head.weight[ids[t]]
    return torch.stack([p[t - 1] @ reader for p in parts])


@pytest.mark.parametrize("mode", ["linear", "softmax"])
@pytest.mark.parametrize("name", ARCHS)
def test_propagation_follows_its_rule_and_conserves_the_logit(build, ids, name, mode):
    model = build(name)
    for site in ("neuron:0[40,3,11]", "head:0[2,1]", "neuron:1[7]", "head:1[0]"):
        kind, layer, indices = site[:-1].replace("[", ":").split(":")
        parts, rest = propagate(model, ids, TARGETS, site, mode=mode)
        logits = decompose(model, ids, TARGETS, int(layer)).logits
        torch.testing.assert_close(parts.sum(-1) + rest, logits, rtol=1e-9, atol=1e-10)
        for row, t in enumerate(TARGETS):
            wanted = naive(model, ids, t, kind, int(layer), [int(i) for i in indices.split(",")], mode)
            torch.testing.assert_close(torch.cat([parts[row], rest[row, None]]), wanted, rtol=1e-8, atol=1e-9)
    model = build(name, torch.float32)
    parts, rest = propagate(model, ids, TARGETS, "neuron:0", mode=mode)
    logits = decompose(model, ids, TARGETS, 0).logits
    torch.testing.assert_close(parts.sum(-1) + rest, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().mean()))


@pytest.mark.parametrize("name", ARCHS)
def test_a_part_that_writes_nothing_scores_nothing(build, ids, name):
    model = build(name)
    block, hd = model.model.layers[1], Layout.of(model).head_dim
    with torch.no_grad():
        block.mlp.down_proj.weight[:, 5] = 0
        block.self_attn.o_proj.weight[:, 2 * hd : 3 * hd] = 0
    neurons, heads = depass_scores(model, ids, TARGETS, 1)
    assert (neurons[:, 5] == 0).all() and (heads[:, 2] == 0).all()
    assert (neurons != 0).sum() == neurons.numel() - len(TARGETS) and (heads != 0).sum() == 3 * len(TARGETS)
    with torch.no_grad():
        for p in model.model.layers[2].mlp.gate_proj.parameters():
            p[3] = 0  # a neuron above with nothing to share
    logits = decompose(model, ids, TARGETS, 1).logits
    for mode in ("linear", "softmax"):
        parts, rest = propagate(model, ids, TARGETS, "neuron:1[5,6]", mode)
        assert (parts[:, 0] == 0).all()
        torch.testing.assert_close(parts[:, 1] + rest, logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ARCHS)
def test_direct_attribution_is_exact_at_the_last_block(build, ids, name):
    model = build(name, torch.float32)
    got, direct = depass_scores(model, ids, TARGETS, 2), direct_scores(model, ids, TARGETS, 2)
    torch.testing.assert_close(got[0], direct[0], rtol=1e-4, atol=1e-5)
    # a head also works through the MLP of its block, which direct attribution leaves out
    assert not torch.allclose(got[1], direct[1], rtol=1e-2)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    got, direct = depass_scores(model, ids, TARGETS, 2), direct_scores(model, ids, TARGETS, 2)
    torch.testing.assert_close(got[1], direct[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 100, 2000])
def test_chunks_and_tiles_do_not_change_the_results(build, ids, cells, monkeypatch):
    model, targets = build("llama, all biases"), [9, 3, 9, 15, 1, 12]
    whole = vars(decompose(model, ids, targets, 0))
    explicit = propagate(model, ids, targets, "neuron:0[1,2]", "softmax")
    monkeypatch.setattr(frozen, "CELLS", cells)
    torch.testing.assert_close(propagate(model, ids, targets, "neuron:0[1,2]", "softmax"), explicit)
    for chunk in (1, 4, 99, None):
        for key, value in vars(decompose(model, ids, targets, 0, chunk)).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-9, atol=1e-10)
    alone = decompose(model, ids[:10], [9], 0)
    torch.testing.assert_close(alone.neurons[0], whole["neurons"][0], rtol=1e-9, atol=1e-10)


def test_half_precision_weights_are_computed_with_in_float32(build, ids):
    half = build("qwen2", torch.bfloat16)
    full = decompose(copy.deepcopy(half).float(), ids, TARGETS, 1)
    got = decompose(half, ids, TARGETS, 1)
    assert got.neurons.dtype == torch.float32 and half.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(vars(got), vars(full))


def test_bad_arguments_are_named(build, make_model, ids):
    model = build("llama")
    for targets in ([], [0], [16]):
        with pytest.raises(UserError, match="targets from 1 to 15"):
            depass_scores(model, ids, targets, 0)
        with pytest.raises(UserError, match="targets from 1 to 15"):
            propagate(model, ids, targets, "neuron:0")
    for layer in (3, -1):
        with pytest.raises(UserError, match=f"layer {layer} is out of range.*layers 0 to 2"):
            depass_scores(model, ids, [3], layer)
    with pytest.raises(UserError, match="chunk must be at least 1"):
        depass_scores(model, ids, [3], 0, chunk=0)
    for site, more, message in (
        ("neuron:3[1]", {}, "layers 0 to 2"),
        ("neuron:0[48]", {}, "neuron 48 is out of range"),
        ("residual:0", {}, "neither neurons nor heads"),
        ("head:0", {"mode": "relu"}, "mode 'relu' is unknown"),
        ("head:0", {"mode": "softmax", "chunk": 2}, "linear mode only"),
    ):
        with pytest.raises(UserError, match=message):
            propagate(model, ids, [3], site, **more)
    with pytest.raises(UserError, match="activation 'silu'; this model has 'gelu'"):
        depass_scores(make_model("llama", hidden_act="gelu"), ids, [3], 0)
    with pytest.raises(UserError, match="not supported"):
        depass_scores(torch.nn.Linear(1, 1), ids, [3], 0)


def test_locate_knows_the_modes():
    assert set(locate.SCORES) == set(ATTRIBUTIONS)
    with pytest.raises(UserError, match="key 'mode' must be one of depass, direct, got 'gradient'"):
        LocateConfig(model="tiny", traces="t", out="o", mode="gradient")
