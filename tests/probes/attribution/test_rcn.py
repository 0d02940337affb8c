"""Reasoning-critical neurons against explicit loops in float64, a planted neuron, and labels that mean nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from neureasoner import cli
from neureasoner.artifacts import file_fingerprint, read_json, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.probes.attribution import contrast as module
from neureasoner.probes.attribution.contrast import (
    Contrast,
    columns,
    contrast,
    encode,
    random_neurons,
    resampled,
    shuffled_labels,
    span_means,
    statistics,
    top,
)
from neureasoner.probes.attribution.rcn import contrast_rows, load_rcn, rcn
from neureasoner.probes.attribution.rcn_config import RcnConfig
from neureasoner.probes.labels import split_problems
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows

PLANTED = (1, 17)  # block, neuron
RIGHT, WRONG = " apples", " check"


def settings(**more):
    base = {"neurons": 4, "permutations": 20, "bootstrap": 40, "least_problems": 3, "batch_size": 3}
    return RcnConfig("m", "t", "o", **(base | more))


def plant(model, tokenizer):
    """Make one neuron write +, for one word and -, for another; nothing else comes near its size."""
    block, neuron = PLANTED
    words = [tokenizer(w, add_special_tokens=False)["input_ids"][-1] for w in (RIGHT, WRONG)]
    assert words[0] != words[1]
    with torch.no_grad():
        mlp = model.model.layers[block].mlp
        for weight, axis in ((mlp.gate_proj.weight, 0), (mlp.up_proj.weight, 1)):
            weight[neuron] = 0
            weight[neuron, axis] = 5
        for word, sign in zip(words, (1, -1), strict=True):
            model.model.embed_tokens.weight[word] = 0
            model.model.embed_tokens.weight[word, :2] = torch.tensor([20.0, 20.0 * sign])
    return model


def make_traces(tokenizer, n=20, samples=4, seed=0, signal=True):
    """Half of the samples of a problem are right; right ones say one word, wrong ones another (with ``signal``)."""
    rng = np.random.default_rng(seed)
    out = []
    for p in range(n):
        for s in range(samples):
            right = s < samples // 2
            word = (RIGHT if right else WRONG) if signal else ""
            text = (
                f"Try {rng.integers(10, 99)}{word} is {rng.integers(10, 99)}.\n\n" * int(rng.integers(1, 4)) + "Done."
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            finished = bool(s % 2)
            ids, text = ([*ids, tokenizer.eos_token_id], text + tokenizer.eos_token) if finished else (ids, text)
            prompt = tokenizer(f"<think>\nQuestion {p}" + "?" * (p % 4), add_special_tokens=False)["input_ids"]
            labels = Labels(right, "1", IntraLabel(), InterLabel())
            problem = Problem(f"p{p:02d}", "f", 1, f"Question {p}", "a")
            out.append(Trace(f"p{p}#{s}", problem, prompt, ids, text, [], finished, labels))
    return out


def read(model, row):
    """Activations ``[T, L, F]`` of one unpadded row, float64."""
    got = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: got.append(a[0][0].double().numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([row[0]]))
    for h in hooks:
        h.remove()
    return np.stack(got, axis=1)


def table(traces, tokenizer, config):
    """Rows, labels and question numbers of traces in their order."""
    rows = [encode(t, tokenizer, config) for t in traces]
    _, question = np.unique([t.problem.id for t in traces], return_inverse=True)
    return rows, np.array([t.labels.correct for t in traces]), question


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_means_equal_single_rows(make_model, tiny_tokenizer, monkeypatch, arch, batch_size):
    monkeypatch.setattr(module, "CHUNK", 48 * 7)  # several pieces of tokens
    model = make_model(arch)
    rows, _, _ = table(make_traces(tiny_tokenizer, 3), tiny_tokenizer, settings())
    seen = []
    for members, mean, square in span_means(model, rows, batch_size):
        assert mean.dtype == np.float64 and len(members) <= batch_size
        for i, m, q in zip(members, mean, square, strict=True):
            a = read(model, rows[i])[rows[i][1] : rows[i][2]]
            np.testing.assert_allclose(m, a.mean(axis=0).reshape(-1), rtol=1e-4, atol=2e-6)
            np.testing.assert_allclose(q, (a**2).mean(axis=0).reshape(-1), rtol=1e-4, atol=2e-6)
        seen += members
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("pooling", ["question", "pooled"])
@pytest.mark.parametrize("span", ["response", "all"])
def test_streaming_equals_one_pass_in_float64(make_model, tiny_tokenizer, monkeypatch, pooling, span):
    monkeypatch.setattr(module, "QUESTIONS", 3)
    model, config = make_model(), settings(pooling=pooling, span=span)
    traces = [t for i, t in enumerate(make_traces(tiny_tokenizer, 7)) if i not in (0, 9, 10, 14)]  # uneven counts
    rows, right, question = table(traces, tiny_tokenizer, config)
    steps = []
    got = contrast(model, rows, right, question, config, steps.append)
    assert sum(steps) == len(rows)
    a = [read(model, r)[r[1] : r[2]].reshape(r[2] - r[1], -1) for r in rows]
    m = np.stack([x.mean(axis=0) for x in a])

    def side_mean(labels):
        if pooling == "pooled":
            return m[labels].mean(axis=0)
        return np.mean([m[labels & (question == q)].mean(axis=0) for q in range(7)], axis=0)

    close = {"rtol": 1e-4, "atol": 3e-6}
    ones = np.ones((1, 7))
    blocks = list(resampled(got, ones, pooling))
    np.testing.assert_allclose(np.concatenate([g for _, g, _ in blocks], axis=1)[0], side_mean(right), **close)
    np.testing.assert_allclose(np.concatenate([b for _, _, b in blocks], axis=1)[0], side_mean(~right), **close)
    np.testing.assert_allclose(got.sigma, np.concatenate(a).std(axis=0), rtol=1e-4, atol=1e-5)
    for q in range(7):
        np.testing.assert_allclose(got.right[q], m[right & (question == q)].mean(axis=0), **close)
        assert (got.n_right[q], got.n_wrong[q]) == ((right & (question == q)).sum(), (~right & (question == q)).sum())
    shuffled = shuffled_labels(right, question, config.permutations, config.seed)
    for p in (0, 7, 19):
        np.testing.assert_allclose(got.null_right[p], side_mean(shuffled[p]), **close)
        np.testing.assert_allclose(got.null_wrong[p], side_mean(~shuffled[p]), **close)


def test_labels_are_shuffled_within_questions():
    right, question = np.array([1, 0, 0, 1, 1, 0, 0], bool), np.array([0, 0, 0, 1, 1, 1, 2])
    got = shuffled_labels(right, question, 600, 3)
    for q in range(3):
        assert (got[:, question == q].sum(axis=1) == right[question == q].sum()).all()
    np.testing.assert_allclose(got[:, :6].mean(axis=0), [1 / 3] * 3 + [2 / 3] * 3, atol=0.07)
    assert len(np.unique(got, axis=0)) == 9
    np.testing.assert_array_equal(got, shuffled_labels(right, question, 600, 3))


def test_spans_leave_out_position_0_and_the_end(tiny_tokenizer):
    trace = make_traces(tiny_tokenizer, 1)[1]
    n_prompt, n = len(trace.prompt_ids), len(trace.prompt_ids) + len(trace.response_ids)
    assert trace.finished and encode(trace, tiny_tokenizer, settings())[1:] == (n_prompt, n - 1)
    assert encode(trace, tiny_tokenizer, settings(span="all"))[1:] == (1, n - 1)
    cut = make_traces(tiny_tokenizer, 1)[0]
    assert not cut.finished and encode(cut, tiny_tokenizer, settings())[2] == len(cut.prompt_ids + cut.response_ids)


def test_another_models_traces(tiny_tokenizer):
    trace = make_traces(tiny_tokenizer, 1)[1]
    foreign = replace(trace, response_ids=[i + 1 for i in trace.response_ids])
    with pytest.raises(UserError, match=r"trace 'p0#1': .* set retokenise"):
        encode(foreign, tiny_tokenizer, settings())
    with pytest.raises(UserError, match="set retokenise"):
        encode(replace(trace, prompt_ids=[10**6]), tiny_tokenizer, settings())
    with pytest.raises(UserError, match="'p0#1' has no prompt tokens"):
        encode(replace(trace, prompt_ids=[]), tiny_tokenizer, settings())
    text = trace.response.removesuffix(tiny_tokenizer.eos_token)
    for end in (tiny_tokenizer.eos_token, "</s>", "<｜end▁of▁sentence｜>", ""):
        foreign.response = text + end
        ids, begin, stop = encode(foreign, tiny_tokenizer, settings(retokenise=True))
        assert tiny_tokenizer.decode(ids[begin:stop]) == text and stop == len(ids)
        assert tiny_tokenizer.decode(ids[:begin]).endswith("Question 0<|im_end|>\n<|im_start|>assistant\n<think>\n")
    ids, begin, _ = encode(foreign, tiny_tokenizer, settings(retokenise=True, template=False))
    assert tiny_tokenizer.decode(ids[:begin]) == "Question: Question 0\nThinking process:\n"
    bare = SimpleNamespace(chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        encode(foreign, bare, settings(retokenise=True))


def by_hand(g, b, k, ranking="filter", filter_sign=True, sigma=None):
    """The ranking, one neuron at a time."""
    entries = []
    for n, (x, y) in enumerate(zip(g, b, strict=True)):
        size = abs(x - y) / (1 if sigma is None else sigma[n])
        if ranking == "released":
            entries.append((-abs(x - y) / (abs(x) + abs(y) + 1e-8), -size, n))
        elif x * y < 0 or not filter_sign:
            entries.append((-size, n))
    return [e[-1] for e in sorted(entries)][:200][:k]


@pytest.mark.parametrize("more", [{}, {"filter_sign": False}, {"ranking": "released"}, {"unit": "sigma"}])
def test_rankings_equal_a_loop(monkeypatch, more):
    monkeypatch.setattr(module, "COLUMNS", 33)
    rng = np.random.default_rng(0)
    g, b, sigma = rng.normal(size=(3, 250)), rng.normal(size=(3, 250)), rng.random(250) + 0.1
    config = settings(neurons=20, **more)
    got, size = top(columns(g, b), sigma, config)
    for row in range(3):
        by = {k: v for k, v in more.items() if k != "unit"} | ({"sigma": sigma} if "unit" in more else {})
        assert got[row].tolist() == by_hand(g[row], b[row], 20, **by)
        raw = np.abs(g[row] - b[row])[got[row]]
        np.testing.assert_allclose(size[row], raw / sigma[got[row]] if "unit" in more else raw)


def test_released_ranking_is_the_filter_up_to_its_small_term():
    rng = np.random.default_rng(1)
    g, b = rng.normal(size=(1, 400)), rng.normal(size=(1, 400))
    ones = np.ones(400)
    explicit, released = (top(columns(g, b), ones, settings(neurons=50, ranking=r))[0] for r in ("filter", "released"))
    np.testing.assert_array_equal(explicit, released)
    mixed = np.array([[1e-10, 5.0]]), np.array([[-1e-10, 0.1]])  # a flip near zero and a neuron that keeps its sign
    first = [top(columns(*mixed), ones, settings(neurons=1, ranking=r))[0].tolist() for r in ("filter", "released")]
    assert first == [[[0]], [[1]]]


def test_too_few_sign_changes_and_dead_neurons():
    g, b = np.array([[1.0, 2, -3, 0, 5]]), np.array([[-1.0, 1, 1, 0, 4]])
    got, size = top(columns(g, b), np.ones(5), settings(neurons=4))
    assert got.tolist() == [[2, 0, -1, -1]] and size.tolist() == [[4, 2, 0, 0]]
    assert module.difference(g, b, np.array([2.0, 1, 1, 0, 0]), "sigma").tolist() == [[1, 1, -4, 0, 0]]


def synthetic(seed=0, n_questions=12, n_neurons=90, planted=()):
    rng = np.random.default_rng(seed)
    right, wrong = (rng.normal(0.4, 0.3, (n_questions, n_neurons)).astype(np.float32) for _ in range(2))
    for n in planted:
        right[:, n], wrong[:, n] = right[:, n] + 2, wrong[:, n] - 2
    counts, null = rng.integers(1, 4, (2, n_questions)), rng.normal(0.4, 0.1, (2, 20, n_neurons))
    return Contrast(right, wrong, counts[0], counts[1], rng.random(n_neurons) + 0.5, null[0], null[1])


@pytest.mark.parametrize("pooling", ["question", "pooled"])
def test_statistics_equal_a_loop(monkeypatch, pooling):
    from scipy.stats import ttest_rel

    monkeypatch.setattr(module, "COLUMNS", 40)
    c, config = synthetic(planted=(5, 60)), settings(pooling=pooling, neurons=2)
    chosen, arrays, summary, null = statistics(c, config)
    assert set(chosen) == {5, 60} and null.shape == (20, 2)
    np.testing.assert_allclose(
        arrays["t"], ttest_rel(c.right[:, chosen].astype(float), c.wrong[:, chosen].astype(float)).statistic, rtol=1e-6
    )
    weights = [c.n_right, c.n_wrong] if pooling == "pooled" else [np.ones(12)] * 2
    draws = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=40)
    sets = []
    for draw in draws:
        g = np.average(c.right.astype(float), axis=0, weights=weights[0] * draw)
        b = np.average(c.wrong.astype(float), axis=0, weights=weights[1] * draw)
        sets.append(set(by_hand(g, b, 2)))
    np.testing.assert_allclose(arrays["bootstrap"], [np.mean([n in s for s in sets]) for n in chosen])
    overlap = [len(s & set(chosen.tolist())) / len(s | set(chosen.tolist())) for s in sets]
    assert summary["stability"]["mean_jaccard"] == pytest.approx(np.mean(overlap), rel=1e-5)
    flips = [(x * y < 0).sum() for x, y in zip(c.null_right, c.null_wrong, strict=True)]
    assert summary["chance"]["flips"]["mean"] == pytest.approx(np.mean(flips), rel=1e-5)
    least = np.abs(arrays["delta"]).min()
    large = [((x * y < 0) & (abs(x - y) >= least)).sum() for x, y in zip(c.null_right, c.null_wrong, strict=True)]
    assert summary["chance"]["as_large_as_the_last"]["mean"] == pytest.approx(np.mean(large))
    assert summary["chance"]["p_kth_size"] == pytest.approx(1 / 21, rel=1e-5)


def test_unit_sigma_changes_the_unit_and_not_the_shift():
    c = synthetic(planted=(5, 60))
    raw, sigma = (statistics(c, settings(neurons=2, unit=u)) for u in ("raw", "sigma"))
    order = np.argsort(raw[0]), np.argsort(sigma[0])
    np.testing.assert_allclose(raw[1]["delta"][order[0]], (sigma[1]["delta"] * sigma[1]["sigma"])[order[1]], rtol=1e-12)
    np.testing.assert_array_equal(sigma[1]["sigma"], c.sigma[sigma[0]])


def test_no_sign_change_is_refused():
    c = synthetic()
    c.right[:], c.wrong[:] = np.abs(c.right) + 0.1, np.abs(c.wrong) + 0.1
    with pytest.raises(UserError, match="set filter_sign to false"):
        statistics(c, settings())
    assert len(statistics(c, settings(filter_sign=False))[0]) == 4


def test_random_neurons_are_others_of_the_same_block():
    layer, index = np.array([0, 2, 0, 2, 2]), np.array([1, 3, 0, 1, 2])
    got = random_neurons(layer, index, 6, 0)
    np.testing.assert_array_equal(got, random_neurons(layer, index, 6, 0))
    for block in (0, 2):
        mine = got[layer == block].tolist()
        assert len(set(mine)) == len(mine) and not set(mine) & set(index[layer == block].tolist())


def test_a_block_that_does_not_fire_is_an_error(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: torch.zeros_like(x))
    with pytest.raises(UserError, match="site 'neuron:1' did not fire"):
        list(span_means(model, [([1, 2, 3], 1, 3)], 1))


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_model, tiny_tokenizer):
    root = tmp_path_factory.mktemp("rcn")
    plant(make_model(), tiny_tokenizer).save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    write_rows(root / "traces.jsonl", make_traces(tiny_tokenizer))
    rcn(stage(root))
    return root


def stage(root, **more):
    base = {"model": str(root / "model"), "traces": str(root / "traces.jsonl"), "out": str(root / "out")}
    return RcnConfig(**(base | {"neurons": 6, "permutations": 30, "bootstrap": 40} | more))


def test_planted_neuron_is_found_first_and_beats_chance(work, tiny_tokenizer):
    found = load_rcn(work / "out")
    assert (int(found.layer[0]), int(found.index[0])) == PLANTED
    assert found.delta[0] > 0 > found.wrong_mean[0] and found.right_mean[0] > 0
    np.testing.assert_allclose(found.delta, found.right_mean - found.wrong_mean, rtol=1e-5)
    assert found.delta.dtype == np.float32 and (np.diff(np.abs(found.delta)) <= 0).all() and (found.sigma > 0).all()
    assert len(found.layer) == 6 and found.layer.dtype == np.int64
    assert not {*zip(found.layer, found.index, strict=True)} & {*zip(found.layer, found.random_index, strict=True)}
    info = read_json(work / "out" / "neurons.json")
    stats = info["statistics"]
    assert stats["chance"]["p_kth_size"] < 0.05 and stats["chance"]["flips"]["mean"] < stats["flips"]
    assert load_file(work / "out" / "neurons.safetensors")["bootstrap"][0] == 1
    assert stats["blocks"] == {str(k): int((found.layer == k).sum()) for k in np.unique(found.layer)}
    split = split_problems(make_traces(tiny_tokenizer), 0.2, 0.2, 0)
    assert sorted(p for p, s in split.items() if s == "train") == info["problems"]
    assert {"model", "fingerprint", "unit", "meaning", "shift", "options", "seed", "version"} <= set(info)
    assert (work / "out" / "neurons.png").stat().st_size > 1000


def test_stage_is_done_once_and_options_reach_it(work, capsys):
    stamp = (work / "out" / "neurons.json").stat().st_mtime_ns
    assert rcn(stage(work))["neurons"] == 6 and (work / "out" / "neurons.json").stat().st_mtime_ns == stamp
    capsys.readouterr()
    names = [f"--{k}={v}" for k, v in (("model", work / "model"), ("traces", work / "traces.jsonl"))]
    more = ["--out", str(work / "cli"), "--neurons", "3", "--unit", "sigma", "--retokenise", "--problems", "9"]
    assert cli.main(["probes", "rcn", *names, *more]) == 0
    assert "3 neurons" in capsys.readouterr().out
    sigma = load_rcn(work / "cli")
    assert (int(sigma.layer[0]), int(sigma.index[0])) == PLANTED and sigma.unit == "sigma"
    np.testing.assert_allclose(sigma.shift, sigma.right_mean - sigma.wrong_mean, rtol=1e-5)
    assert len(read_json(work / "cli" / "neurons.json")["problems"]) == 9


def test_labels_without_meaning_are_called_chance(make_model, tiny_tokenizer, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "traces.jsonl", make_traces(tiny_tokenizer, signal=False, seed=2))
    summary = rcn(stage(tmp_path))
    assert summary["chance"]["p_kth_size"] > 0.05 and any("chance" in w for w in summary["warnings"])
    assert "may be chance" in capsys.readouterr().out


def test_too_few_contrast_problems(work, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("neureasoner.models.load", lambda *_, **__: pytest.fail("the model was loaded before"))
    traces = make_traces(tiny_tokenizer)
    for t in traces[8:]:
        t.labels.correct = True
    write_rows(tmp_path / "traces.jsonl", traces)
    with pytest.raises(UserError, match=r"\d of 12 training problems have right and wrong traces, 8 are needed"):
        rcn(stage(tmp_path, model=str(work / "model")))


def test_a_trace_of_nothing_does_not_count(tiny_tokenizer):
    traces = make_traces(tiny_tokenizer, 4, 2)
    eos = tiny_tokenizer.eos_token
    traces[1] = replace(traces[1], response_ids=[tiny_tokenizer.eos_token_id], response=eos)
    found, rows = contrast_rows(traces, tiny_tokenizer, settings())
    assert {t.problem.id for t in found} == {"p01", "p02", "p03"} and len(rows) == 6


def test_another_model_is_refused(work, make_model, tiny_tokenizer):
    found = load_rcn(work / "out")
    found.check(plant(make_model(), tiny_tokenizer))
    with pytest.raises(UserError, match="run probes rcn on this model"):
        found.check(make_model(seed=1))


def test_damaged_folders_are_refused(work, tmp_path):
    with pytest.raises(UserError, match=r"no neurons\.json"):
        load_rcn(tmp_path)
    info = json.loads((work / "out" / "neurons.json").read_text())
    data = (work / "out" / "neurons.safetensors").read_bytes()
    (tmp_path / "neurons.safetensors").write_bytes(data)
    for change, message in (
        ({"kind": "neurons"}, "not one of probes rcn"),
        ({"schema": 9}, "schema 1"),
        ({"tensors": "x"}, "different runs"),
    ):
        write_json(tmp_path / "neurons.json", info | change)
        with pytest.raises(UserError, match=message):
            load_rcn(tmp_path)
    write_tensors(tmp_path / "neurons.safetensors", {"layer": torch.zeros(3)})
    write_json(tmp_path / "neurons.json", info | {"tensors": file_fingerprint([tmp_path / "neurons.safetensors"])})
    with pytest.raises(UserError, match="'index' is missing"):
        load_rcn(tmp_path)
    (tmp_path / "neurons.safetensors").write_bytes(data[:50])
    with pytest.raises(UserError, match="not a safetensors"):
        load_rcn(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"neurons": 0}, "'neurons' must be at least 1"),
        ({"problems": -1}, "'problems' must be at least 0"),
        ({"least_problems": 1}, "'least_problems' must be at least 2"),
        ({"span": "prompt"}, "'span' must be one of response, all"),
        ({"pooling": "x"}, "'pooling' must be one of"),
        ({"ranking": "x"}, "'ranking' must be one of filter, released"),
        ({"unit": "x"}, "'unit' must be one of raw, sigma"),
        ({"ranking": "released", "filter_sign": False}, "'filter_sign' has no effect"),
        ({"ranking": "released", "neurons": 201}, "at most 200"),
        ({"template": False}, "only with retokenise"),
        ({"validation": 0.6, "test": 0.5}, "below 1 in sum"),
    ],
)
def test_bad_settings_are_named(more, message):
    with pytest.raises(UserError, match=message):
        settings(**more)
