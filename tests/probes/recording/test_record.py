"""Recording: only what was asked for leaves a layer; batch = single and cached decoding = teacher forcing (promise 2);
rows = tokens (promise 4); bad input is named; a killed record_to goes on (promise 9).

The oracle decodes token by token with a cache in float64 and reads the model's modules with hooks of its own.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.forward import cache_argument
from neureasoner.inference.controller import Controller
from neureasoner.inference.decode import generate_batch
from neureasoner.inference.plan import Plan
from neureasoner.probes.recording import record as module
from neureasoner.probes.recording.record import record, record_to
from neureasoner.probes.recording.store import SeriesStore
from neureasoner.responses import read_response
from neureasoner.sites import read_sites
from neureasoner.traces import Problem

SITES = ["neuron:1[3,0,7]", "head:1[2,0]", "residual:0", "logits"]
WIDTHS = {"neuron:1[3,0,7]": 3, "head:1[2,0]": 2, "residual:0": 32, "logits": 2}
PROBLEM = Problem("p", "f", 1, "q", "a")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ARCHS = ["llama", "qwen2", "qwen3"]


def trace_of(tokenizer, name, prompt, response):
    trace = read_response(tokenizer, prompt, response, [tokenizer.eos_token_id]).to_trace(name, PROBLEM)
    trace.meta["thinking_tokens"] = max(1, len(response) - 2)
    return trace


def make_traces(tokenizer, sizes=((5, 17), (9, 30), (3, 1), (7, 11))):
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(5, len(tokenizer), p).tolist(), rng.integers(5, len(tokenizer), r).tolist()) for p, r in sizes
    ]
    return [trace_of(tokenizer, f"t{i}", p, r) for i, (p, r) in enumerate(rows)]


def stepwise(model, trace):
    """``{site: [T, C]}`` of SITES while decoding with a cache, one token a pass, in float64."""
    model = copy.deepcopy(model).double()
    block, seen, rows = model.model.layers[1], {}, []
    block.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(a=args[0][0, -1]))
    block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(z=args[0][0, -1].view(4, 12)))
    model.model.layers[0].register_forward_hook(lambda _, __, out: seen.update(h=out[0, -1]))
    with torch.no_grad():
        name, out = cache_argument(model), model(torch.tensor([trace.prompt_ids]), use_cache=True)
        for token in trace.response_ids:
            p = torch.softmax(out.logits[0, -1], -1)
            logits = [-sum(float(x) * np.log(float(x)) for x in p), -np.log(float(p[token]))]
            out = model(torch.tensor([[token]]), use_cache=True, **{name: getattr(out, name)})
            neurons = [float(seen["a"][n]) for n in (3, 0, 7)]
            heads = [np.sqrt(sum(float(x) ** 2 for x in seen["z"][h])) for h in (2, 0)]
            rows.append((neurons, heads, seen["h"].tolist(), logits))
    return {site: np.array([row[i] for row in rows]) for i, site in enumerate(SITES)}


def storage(array):
    """Bytes that live as long as ``array`` does."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.nbytes if array.base is None else array.base.untyped_storage().nbytes()


@pytest.mark.parametrize("arch", ARCHS)
def test_promise_2_recording_equals_cached_decoding(make_model, tiny_tokenizer, arch):
    model, traces = make_model(arch), make_traces(tiny_tokenizer)
    left, right, alone = (
        list(record(model, tiny_tokenizer, traces, SITES, b, padding=p))
        for b, p in ((3, "left"), (4, "right"), (1, "right"))
    )
    for i, trace in enumerate(traces):
        want = stepwise(model, trace)
        for got in (left[i], right[i], alone[i]):
            assert list(got) == SITES
            for site in SITES:
                assert got[site].dtype == np.float32 and got[site].shape == (len(trace.response_ids), WIDTHS[site])
                np.testing.assert_allclose(got[site], want[site], **CLOSE)


@pytest.mark.parametrize("arch", ARCHS)
def test_promise_2_the_controller_records_what_recording_does(make_model, tiny_tokenizer, arch):
    model = make_model(arch)
    prompts = [t.prompt_ids for t in make_traces(tiny_tokenizer)]
    controller = Controller(model, tiny_tokenizer, Plan("none", ()), record=SITES)
    done = generate_batch(
        model, tiny_tokenizer, prompts, max_new_tokens=25, temperature=0.8, seed=3, controller=controller
    )
    traces = [g.to_trace(f"g{i}", PROBLEM) for i, g in enumerate(done)]
    assert sum(len(t.response_ids) for t in traces) > 30
    for g, series in zip(done, record(model, tiny_tokenizer, traces, SITES), strict=True):
        for site in SITES:
            n = len(g.series[site])
            assert n >= len(g.response_ids) - 1  # generate never reads the last token of the longest row
            np.testing.assert_allclose(g.series[site], series[site][:n], **CLOSE)


def test_thinking_only_are_the_first_rows(make_model, tiny_tokenizer):
    model, traces = make_model(), make_traces(tiny_tokenizer)
    thinking = record(model, tiny_tokenizer, traces, SITES, 4, thinking_only=True)
    for trace, a, b in zip(traces, record(model, tiny_tokenizer, traces, SITES, 4), thinking, strict=True):
        for site in SITES:
            assert len(b[site]) == trace.thinking_end < max(2, len(trace.response_ids))
            np.testing.assert_allclose(a[site][: trace.thinking_end], b[site], **CLOSE)


def test_chunked_logits_are_the_same(make_model, tiny_tokenizer, monkeypatch):
    model, traces = make_model(), make_traces(tiny_tokenizer)
    want = list(record(model, tiny_tokenizer, traces, ["logits"]))
    monkeypatch.setattr(module, "CHUNK", 1)
    for a, b in zip(want, record(model, tiny_tokenizer, traces, ["logits"]), strict=True):
        np.testing.assert_allclose(a["logits"], b["logits"], **CLOSE)


@pytest.mark.parametrize("arch", ARCHS)
def test_only_the_wanted_channels_leave_the_layer(make_model, tiny_tokenizer, arch):
    """48 neurons and 4 heads of 12 are there; what the hook hands out keeps nothing of the others in memory."""
    model, left = make_model(arch), {}
    with torch.inference_mode(), read_sites(model, SITES[:3], left.__setitem__):
        model(torch.randint(5, 300, (2, 9)))
    for site, value in left.items():
        assert value.shape == (2, 9, WIDTHS[site])
        assert value.untyped_storage().nbytes() == 2 * 9 * WIDTHS[site] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_series_does_not_keep_its_padded_batch(make_model, tiny_tokenizer, dtype):
    model, traces = make_model().to(dtype), make_traces(tiny_tokenizer)
    for trace, series in zip(traces, record(model, tiny_tokenizer, traces, SITES), strict=True):
        for site, values in series.items():
            assert storage(values) == len(trace.response_ids) * WIDTHS[site] * 4


def test_promise_4_a_hook_that_does_not_fire_is_an_error(make_model, tiny_tokenizer, monkeypatch):
    model = make_model()
    layer = model.model.layers[1]
    mlp = layer.mlp
    monkeypatch.setattr(mlp, "forward", lambda x: torch.zeros_like(x))  # down_proj is never called
    with pytest.raises(UserError, match="cannot be monitored"):
        list(record(model, tiny_tokenizer, make_traces(tiny_tokenizer), ["neuron:1[0]"]))


@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("neuron:1[3,0]", "response token 6, channel 1"),
        ("residual:1", "response token 6, channel 0"),
        ("logits", "response token 7, channel 1"),
    ],
)
def test_a_value_that_is_not_finite_is_named(make_model, tiny_tokenizer, site, place):
    """Neuron 0 of the last block breaks where t3 reads row 6; that shapes the distribution of token 7."""
    model, traces = make_model(), make_traces(tiny_tokenizer)

    def damage(_, __, out):
        if out.shape[1] == 7 + 11:
            out[0, 7 + 6, 0] = torch.nan

    model.model.layers[1].mlp.up_proj.register_forward_hook(damage)
    with pytest.raises(UserError) as error:
        list(record(model, tiny_tokenizer, traces, [site], 1))
    assert str(error.value) == (
        f"site '{site}', trace 't3', {place}: the model gave nan in float32; load it in bfloat16 or float32, and if it "
        "is, its weights are damaged"
    )
    assert len(list(record(model, tiny_tokenizer, traces[:3], [site], 1))) == 3


def test_half_precision_that_overflows_is_told_to_load_wider(make_model, tiny_tokenizer):
    model, traces = make_model(), make_traces(tiny_tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] *= 1e5
    half, wide = copy.deepcopy(model).half(), model.bfloat16()
    with pytest.raises(UserError, match=r"channel 2: the model gave -?inf in float16; load it in bfloat16 or float32"):
        list(record(half, tiny_tokenizer, traces, ["neuron:1[3,0,7]"]))
    assert len(list(record(wide, tiny_tokenizer, traces, ["neuron:1[3,0,7]"]))) == 4


def test_token_ids_the_model_does_not_know_are_named(make_model, tiny_tokenizer):
    model, [trace, *_] = make_model(), make_traces(tiny_tokenizer)
    rows = len(tiny_tokenizer) + 5
    for bad in (rows, -1):
        for ids in ("prompt_ids", "response_ids"):
            other = copy.deepcopy(trace)
            getattr(other, ids)[2] = bad
            with pytest.raises(UserError, match=rf"'t0' holds token {bad}, the model knows 0 to {rows - 1}; name the"):
                list(record(model, tiny_tokenizer, [other], SITES))
    last = trace_of(tiny_tokenizer, "t", [5], [6, rows - 1])  # a padded row of the LM head: no text, but a token
    assert len(list(record(model, tiny_tokenizer, [last], ["logits"]))) == 1
    with pytest.raises(UserError, match="'t' has no prompt tokens; sample it again"):
        list(record(model, tiny_tokenizer, [trace_of(tiny_tokenizer, "t", [], [6])], SITES))


def test_another_tokenizer_is_named(make_model, tiny_tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(len(tiny_tokenizer))}, unk_token="w0"))
    other = PreTrainedTokenizerFast(tokenizer_object=words)
    ids = tiny_tokenizer("Okay, that is 12.\n\n").input_ids
    trace = trace_of(tiny_tokenizer, "t", [5], ids)
    with pytest.raises(
        UserError, match=r"trace 't': .* spell 'w\d+ .*' at character 0, its text has 'Okay, that is 12"
    ):
        list(record(make_model(), other, [trace], ["logits"]))
    trace.response += " More."
    with pytest.raises(UserError, match=r"spell '' at character 19, its text has ' More.'; name the model"):
        list(record(make_model(), tiny_tokenizer, [trace], ["logits"]))


def test_text_is_compared_as_it_was_decoded(make_model, tiny_tokenizer):
    """Special tokens stay, spaces are not cleaned up, half a character is a replacement mark; nothing is refused."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.clean_up_tokenization_spaces = True
    ids = [*tokenizer("<think>\nIt is n't , is it ?").input_ids, tokenizer.eos_token_id, *tokenizer("é").input_ids[:1]]
    trace = trace_of(tokenizer, "t", [5], ids)
    assert "n't , is it ?<|im_end|>\ufffd" in trace.response
    assert len(next(record(make_model(), tokenizer, [trace], ["logits"]))["logits"]) == len(ids)
    empty = trace_of(tokenizer, "e", [5, 6], [])
    [series] = record(make_model(), tokenizer, [empty], SITES)
    assert {s: v.shape for s, v in series.items()} == {s: (0, c) for s, c in WIDTHS.items()}


def test_promise_9_record_to_goes_on_where_it_stopped(make_model, tiny_tokenizer, tmp_path, monkeypatch):
    model, traces = make_model(), make_traces(tiny_tokenizer, [(3, 4 + i) for i in range(10)])
    forward, read = module._forward, []

    def dying(model, batch, *args):
        if len(read) == 7:
            raise KeyboardInterrupt
        read.extend(tuple(response) for _, response in batch)
        return forward(model, batch, *args)

    monkeypatch.setattr(module, "_forward", dying)
    with pytest.raises(KeyboardInterrupt):
        record_to(tmp_path / "s", model, tiny_tokenizer, traces, SITES, batch_size=1, shard=3)
    assert list(SeriesStore(tmp_path / "s")) == [t.id for t in traces[:6]]
    monkeypatch.setattr(module, "_forward", lambda *a: read.extend(tuple(r) for _, r in a[1]) or forward(*a))
    store = record_to(tmp_path / "s", model, tiny_tokenizer, traces, SITES, batch_size=2, shard=3)
    assert len(read) == 11 and len(set(read)) == 10, "the one trace of the unfinished shard is read again, no other"
    assert list(store) == [t.id for t in traces] and store.n_tokens == sum(len(t.response_ids) for t in traces)
    record_to(tmp_path / "s", model, tiny_tokenizer, traces[::-1], SITES)
    assert len(read) == 11
    for trace, want in zip(traces, record(model, tiny_tokenizer, traces, SITES), strict=True):
        assert list(store[trace.id]) == SITES
        for site in SITES:
            np.testing.assert_allclose(store[trace.id][site], want[site], **CLOSE)


def test_record_to_does_not_mix(make_model, tiny_tokenizer, tmp_path):
    model, traces, out = make_model(), make_traces(tiny_tokenizer), tmp_path / "s"
    store = record_to(out, model, tiny_tokenizer, traces[:2], ["neuron:1[3, 0]"], dtype="float16")
    assert store.sites == {"neuron:1[3,0]": 2} and store.dtype == "float16"

    def again(message, model=model, tokenizer=tiny_tokenizer, traces=traces, sites=("neuron:1[3,0]",), dtype="float16"):
        with pytest.raises(UserError, match=message):
            record_to(out, model, tokenizer, traces, list(sites), dtype=dtype)

    more = copy.deepcopy(tiny_tokenizer)
    more.add_tokens(["<more>"])
    again("recorded with model fingerprint .*, not .*; choose another folder", model=make_model(seed=1))
    again("recorded with tokenizer fingerprint", tokenizer=more)
    again(r"recorded with sites \{'neuron:1\[3,0\]': 2\}, not \{'logits': 2\}", sites=["logits"])
    again("recorded with dtype float16, not float32", dtype="float32")
    again("layer 9 is out of range", sites=["residual:9"])
    again("trace id 't2' occurs twice", traces=[*traces, traces[2]])
    resampled = copy.deepcopy(traces)
    resampled[1].prompt_ids[0] += 1
    again("trace 't1' was recorded from other tokens", traces=resampled)
    assert list(SeriesStore(out)) == ["t0", "t1"]
    assert list(record_to(out, model, tiny_tokenizer, traces, ["neuron:1[3,0]"], dtype="float16")) == [
        t.id for t in traces
    ]
