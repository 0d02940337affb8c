"""Recording: cached decoding = teacher forcing (promise 2), padded batches = single runs, rows = tokens (promise 4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neureasoner.errors import UserError
from neureasoner.probes.recording.record import load_series, record, record_to
from neureasoner.sites import read_sites
from neureasoner.traces import Problem, Trace

SITES = ["neuron:1[3,0,7]", "head:1[2,0]", "residual:0", "logits"]


def make_traces(tokenizer, sizes=((5, 17), (9, 30), (3, 1), (7, 11))):
    rng = np.random.default_rng(0)
    out = []
    for i, (p, r) in enumerate(sizes):
        ids = rng.integers(5, len(tokenizer), p + r).tolist()
        problem = Problem(f"p{i}", "f", 1, "q", "a")
        out.append(Trace(f"t{i}", problem, ids[:p], ids[p:], "", [], True, meta={"thinking_tokens": max(1, r - 2)}))
    return out


def stepwise(model, trace, sites):
    """What a monitor sees while decoding with a cache, one token a pass."""
    got = {s: [] for s in sites if s != "logits"}
    rows = []
    with torch.inference_mode(), read_sites(model, got, lambda n, v: got[n].append(v[0, -1].float().numpy())):
        out = model(torch.tensor([trace.prompt_ids]), use_cache=True)
        for values in got.values():
            values.clear()
        for token in trace.response_ids:
            logp = torch.log_softmax(out.logits[0, -1].double(), -1)
            rows.append([float(-(logp.exp() * logp).sum()), float(-logp[token])])
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return {**{k: np.stack(v) for k, v in got.items()}, "logits": np.array(rows)}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_promise_2_recording_equals_cached_decoding(make_model, tiny_tokenizer, arch, padding):
    model, traces = make_model(arch), make_traces(tiny_tokenizer)
    for trace, series in zip(traces, record(model, tiny_tokenizer, traces, SITES, 3, padding=padding), strict=True):
        want = stepwise(model, trace, SITES)
        assert list(series) == SITES
        for site in SITES:
            assert series[site].dtype == np.float32 and len(series[site]) == len(trace.response_ids)
            np.testing.assert_allclose(series[site], want[site], atol=2e-4, rtol=1e-4)


def test_batch_equals_single_and_thinking_only(make_model, tiny_tokenizer):
    model, traces = make_model(), make_traces(tiny_tokenizer)
    together = list(record(model, tiny_tokenizer, traces, SITES, 4))
    alone = [next(record(model, tiny_tokenizer, [t], SITES, 1)) for t in traces]
    thinking = list(record(model, tiny_tokenizer, traces, SITES, 4, thinking_only=True))
    for trace, a, b, c in zip(traces, together, alone, thinking, strict=True):
        for site in SITES:
            np.testing.assert_allclose(a[site], b[site], atol=1e-4)
            np.testing.assert_allclose(a[site][: trace.thinking_end], c[site], atol=1e-4)


def test_chunked_logits_are_the_same(make_model, tiny_tokenizer, monkeypatch):
    model, traces = make_model(), make_traces(tiny_tokenizer)
    want = list(record(model, tiny_tokenizer, traces, ["logits"]))
    monkeypatch.setattr("neureasoner.probes.recording.record.CHUNK", 1)
    for a, b in zip(want, record(model, tiny_tokenizer, traces, ["logits"]), strict=True):
        np.testing.assert_allclose(a["logits"], b["logits"], atol=1e-5)


def test_promise_4_a_hook_that_does_not_fire_is_an_error(make_model, tiny_tokenizer, monkeypatch):
    model = make_model()
    layer = model.model.layers[1]
    mlp = layer.mlp
    monkeypatch.setattr(mlp, "forward", lambda x: torch.zeros_like(x))  # down_proj is never called
    with pytest.raises(UserError, match="cannot be monitored"):
        list(record(model, tiny_tokenizer, make_traces(tiny_tokenizer), ["neuron:1[0]"]))


def test_shards_survive_and_are_not_redone(make_model, tiny_tokenizer, tmp_path):
    model, traces = make_model(), make_traces(tiny_tokenizer)
    paths = record_to(tmp_path, model, tiny_tokenizer, traces, SITES, shard=3)
    assert [len(load_series(p)) for p in paths] == [3, 1]
    stamp = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    record_to(tmp_path, model, tiny_tokenizer, traces, SITES, shard=3)
    assert paths[0].stat().st_mtime_ns == stamp and load_series(paths[1])[0][0] == "t3"
    want = next(record(model, tiny_tokenizer, traces, SITES))
    np.testing.assert_allclose(load_series(paths[0])[0][1]["logits"], want["logits"], atol=1e-4)
