"""Sites: their strings, the layouts they resolve in, and that hooks read and edit exactly what they name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.sites import Layout, Site, edit_site, read_sites

ARCHS = ["llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("text", ["residual:3", "neuron:3[1,5,9]", "head:0[0,2]", "attn_out:3", "mlp_out:3", "logits"])
def test_string_round_trip(text: str) -> None:
    assert str(Site.parse(text)) == text
    assert Site.parse(Site.parse(text)) == Site.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "residual",
        "neurons:3",
        "residual:-1",
        "residual:3[1]",
        "neuron:3[]",
        "neuron:3[1,1]",
        "logits:3",
        "head:x[1]",
    ],
)
def test_malformed_strings_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        Site.parse(text)


def hidden(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("arch", ARCHS)
def test_read_sites_equal_the_model_s_own_values(make_model: Any, arch: str) -> None:
    model = make_model(arch)
    layout = Layout.of(model)
    ids = torch.randint(0, 300, (3, 7))
    captured: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    own: dict[str, torch.Tensor] = {}
    handles = [
        layer.mlp.register_forward_hook(lambda m, a, o: own.update(x=a[0], mlp=o)),
        layer.self_attn.o_proj.register_forward_hook(lambda m, a, o: own.update(z=a[0], attn=o)),
    ]
    sites = [
        "neuron:1[5,0]",
        "neuron:1",
        "head:1[3,1]",
        "head:1",
        "attn_out:1",
        "mlp_out:1",
        "residual:0",
        "residual:1",
    ]
    with torch.no_grad(), read_sites(model, sites, captured.__setitem__):
        model(ids)
        # a twin, because Transformers leaves its own hooks behind when it collects hidden states
        out = make_model(arch)(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    mlp = layer.mlp
    neurons = torch.nn.functional.silu(mlp.gate_proj(own["x"])) * mlp.up_proj(own["x"])
    norms = own["z"].view(3, 7, layout.n_heads, layout.head_dim).norm(dim=-1)
    close = torch.testing.assert_close
    close(captured["neuron:1"], neurons)
    close(captured["neuron:1[5,0]"], neurons[..., [5, 0]])
    close(captured["head:1"], norms)
    close(captured["head:1[3,1]"], norms[..., [3, 1]])
    close(captured["attn_out:1"], own["attn"])
    close(captured["mlp_out:1"], own["mlp"])
    close(captured["residual:0"], out.hidden_states[1])
    close(layout.lm_head(layout.final_norm(captured["residual:1"])), out.logits)
    for site in sites:
        assert captured[site].shape == (3, 7, layout.width(site))
    assert layout.n_heads * layout.head_dim != layout.hidden_size
    assert hidden(model) == 0


def test_hooks_fire_once_per_decoded_token(make_model: Any) -> None:
    """Promise 4 rests on this: cached decoding reads every token but the last exactly once."""
    model = make_model()
    seen: list[int] = []
    with read_sites(model, ["head:1[0]"], lambda _, v: seen.append(v.shape[1])):
        model.generate(torch.ones(2, 5, dtype=torch.long), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert seen == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("residual:2", "layers 0 to 1"),
        ("neuron:0[48]", "neurons 0 to 47"),
        ("head:1[0,4]", "heads 0 to 3"),
        ("logits", "has no hook"),
        ("tokens", "has no hook"),
    ],
)
def test_out_of_range_is_refused_before_any_hook_is_set(make_model: Any, site: str, words: str) -> None:
    model = make_model()
    with pytest.raises(UserError, match=words), read_sites(model, ["residual:0", site], lambda *_: None):
        pass
    with pytest.raises(UserError, match=words), edit_site(model, site, lambda x: x):
        pass
    assert hidden(model) == 0


def test_hooks_are_removed_after_an_error(make_model: Any) -> None:
    model = make_model()

    def broken(*_: Any) -> None:
        raise RuntimeError("in the callback")

    with pytest.raises(RuntimeError, match="callback"), read_sites(model, ["residual:0", "neuron:0"], broken):
        model(torch.ones(1, 2, dtype=torch.long))
    assert hidden(model) == 0


def test_unknown_architecture_is_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        Layout.of(model)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["residual", "attn_out", "mlp_out", "neuron", "head"])
def test_edit_replaces_the_value_and_identity_changes_nothing(make_model: Any, arch: str, kind: str) -> None:
    model = make_model(arch)
    ids = torch.randint(0, 300, (2, 5))
    with torch.no_grad():
        plain = model(ids).logits
        with edit_site(model, f"{kind}:0", lambda x: x):
            assert torch.equal(model(ids).logits, plain)
        captured: dict[str, torch.Tensor] = {}
        downstream = {"neuron": "mlp_out:0", "head": "attn_out:0"}.get(kind, "residual:0")
        with (
            edit_site(model, f"{kind}:0", torch.zeros_like),
            read_sites(model, [downstream], captured.__setitem__),
        ):
            assert not torch.equal(model(ids).logits, plain)
        if kind in ("neuron", "head"):  # their write matrices have no bias
            assert not captured[downstream].any()
        with pytest.raises(ValueError, match="shape"), edit_site(model, f"{kind}:0", lambda x: x[..., :1]):
            model(ids)
        assert torch.equal(model(ids).logits, plain)
    assert hidden(model) == 0


def test_reading_keeps_the_graph(make_model: Any) -> None:
    model = make_model()
    captured: dict[str, torch.Tensor] = {}
    with read_sites(model, ["neuron:0[1]"], captured.__setitem__):
        model(torch.ones(1, 3, dtype=torch.long))
    captured["neuron:0[1]"].sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


class _Packed(torch.nn.Linear):
    """Stands for a module of a quantisation library: its weight is a tensor of the library's own kind."""

    def __init__(self, weight: Any, name: str = "weight"):
        torch.nn.Module.__init__(self)
        setattr(self, name, weight)


class _Tensor(torch.Tensor):
    pass


def _packings() -> dict[str, Any]:
    matrix = torch.ones(32, 48)
    return {
        "subclass": _Packed(torch.nn.Parameter(matrix.as_subclass(_Tensor))),
        "int8": _Packed(torch.nn.Parameter(matrix.to(torch.int8), requires_grad=False)),
        "fp8": _Packed(torch.nn.Parameter(matrix.to(torch.float8_e4m3fn), requires_grad=False)),
        "packed": _Packed(torch.nn.Parameter(matrix.to(torch.uint8).reshape(-1, 1), requires_grad=False)),
        "no weight": _Packed(torch.nn.Parameter(matrix.to(torch.int32), requires_grad=False), "qweight"),
        "a method": _Packed(lambda: matrix),
    }


@pytest.mark.parametrize("kind", list(_packings()))
@pytest.mark.parametrize("name", ["down_proj", "o_proj", "q_proj"])
def test_quantised_modules_are_refused_by_name(make_model: Any, kind: str, name: str) -> None:
    model = make_model()
    part = "mlp" if name == "down_proj" else "self_attn"
    setattr(getattr(model.model.layers[1], part), name, _packings()[kind])
    with pytest.raises(UserError, match=rf"quantised .*layers\.1\.{part}\.{name}"):
        Layout.of(model)


@pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
def test_quantised_embeddings_are_refused_too(make_model: Any, where: str) -> None:
    model = make_model()
    packed = _Packed(torch.nn.Parameter(torch.ones(390, 32).to(torch.int8), requires_grad=False))
    setattr(model if where == "lm_head" else model.model, where, packed)
    with pytest.raises(UserError, match=where):
        Layout.of(model)


def test_a_config_that_says_quantised_is_believed(make_model: Any) -> None:
    model = make_model()
    for about in ({"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}):
        model.config.quantization_config = about
        with pytest.raises(UserError, match=about.get("quant_method", "quantization_config")):
            Layout.of(model)
    del model.config.quantization_config
    model.is_quantized = True
    with pytest.raises(UserError, match="is_quantized"):
        Layout.of(model)
    model.is_quantized = False  # as after model.dequantize()
    Layout.of(model)


def test_plain_matrices_in_other_wrappings_pass(make_model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        Layout.of(make_model("qwen2").to(dtype))
    Layout.of(make_model().to("meta"))
    base = make_model("llama")
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[3]))
    Layout.of(base)


def test_a_matrix_of_another_size_is_named(make_model: Any) -> None:
    model = make_model()
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(40, 32, bias=False)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj holds \[32, 40\].*\[32, 48\]"):
        Layout.of(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_norms_of_heads_are_float32(make_model: Any, dtype: torch.dtype) -> None:
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), read_sites(model := make_model().to(dtype), ["head:0"], seen.__setitem__):
        model(torch.tensor([[5, 6, 7]]))
    assert seen["head:0"].dtype == torch.float32 and seen["head:0"].shape == (1, 3, 4)


def test_sites_are_read_where_their_modules_run(make_model: Any) -> None:
    from accelerate import cpu_offload

    ids, seen = torch.tensor([[5, 6, 7]]), {}
    sites = ["neuron:1[3,1]", "head:0[2]", "residual:1"]
    expected = {}
    with torch.no_grad():
        model = make_model()
        with read_sites(model, sites, expected.__setitem__):
            model(ids)
        offloaded = cpu_offload(make_model(), execution_device=torch.device("cpu"))
        with read_sites(offloaded, sites, seen.__setitem__):
            offloaded(ids)
    assert seen.keys() == expected.keys()
    for site in sites:
        torch.testing.assert_close(seen[site], expected[site])
