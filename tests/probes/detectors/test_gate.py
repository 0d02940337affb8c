"""The failure gate: explicit loops and scikit-learn as oracles, a question digit that decides, shuffled labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score, roc_auc_score

from neureasoner import cli
from neureasoner.artifacts import read_json, write_json
from neureasoner.errors import UserError
from neureasoner.models import fingerprint
from neureasoner.probes.detectors import gate as module
from neureasoner.probes.detectors.gate import (
    AttentionPool,
    FailureGate,
    gate_scores,
    pooled_prompts,
    question_values,
    select_channels,
    youden,
)
from neureasoner.probes.detectors.gate_config import GateConfig
from neureasoner.probes.detectors.gate_stage import Data, controls, figures, question_labels
from neureasoner.probes.detectors.gate_stage import gate as stage
from neureasoner.probes.detectors.metrics import auroc, bootstrap_draws
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace, write_rows

CHANNELS = np.array([[1, 40], [0, 3], [1, 2], [0, 47]])


def make_prompts(n=9, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 200, int(rng.integers(2, 14))).tolist() for _ in range(n)]


def make_traces(tokenizer, n=120, samples=4, seed=0, signal=True):
    """Problems that hold one digit fail most of their samples, the others few."""
    rng = np.random.default_rng(seed)
    out = []
    for p in range(n):
        hard = bool(rng.random() < 0.4)
        digit = "9" if hard and signal else "2"
        text = f"<think>\nTom has{' more' * int(rng.integers(1, 6))} {rng.integers(3, 9)}{digit} apples"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        problem = Problem(f"p{p}", "ab"[p % 2], int(rng.integers(1, 4)), text, "1")
        for s in range(samples):
            labels = Labels(s < (1 if hard else 3), "1", IntraLabel(), InterLabel())
            out.append(Trace(f"p{p}#{s}", problem, ids, [5], "x", [], True, labels))
    return out


def config(root, **more):
    base = {"model": str(root / "model"), "traces": str(root / "traces.jsonl"), "out": str(root / "out")}
    return GateConfig(
        **(base | {"channels": 12, "lr": 3e-3, "epochs": 25, "bootstrap": 60, "hidden": 32, "permutations": 2} | more)
    )


def read(model, ids):
    """Activations ``[T, L, F]`` of one prompt, position 0 left out."""
    got = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: got.append(a[0][0].numpy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for h in hooks:
        h.remove()
    return np.stack(got, axis=1)[1:]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_values_of_padded_batches_equal_single_prompts(make_model, arch, batch_size):
    model, prompts = make_model(arch), make_prompts()
    values = question_values(model, CHANNELS, prompts, batch_size)
    pooled = pooled_prompts(model, prompts, batch_size)
    for ids, got, mean in zip(prompts, values, pooled, strict=True):
        want = read(model, ids)
        assert got.shape == (len(ids) - 1, 4) and got.dtype == np.float32
        np.testing.assert_allclose(got, want[:, CHANNELS[:, 0], CHANNELS[:, 1]], atol=2e-4)
        np.testing.assert_allclose(mean, want.mean(axis=0).reshape(-1), atol=2e-4)


def test_channels_are_pairs_in_the_order_of_the_f_statistic(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 12 * 30)).astype(np.float32), rng.integers(0, 2, 60)
    x[:, 11 * 30 + 4] += 3 * y  # block 11: a lexicographic order of blocks would find it elsewhere
    x[:, 7] = 2  # never moves
    want = np.nan_to_num(f_classif(np.delete(x, 7, axis=1).astype(np.float64), y)[0])
    order = np.argsort(-want)[:9]
    order += order >= 7
    for columns in (1 << 14, 50):
        monkeypatch.setattr(module, "COLUMNS", columns)
        got = select_channels(x, y, 9, 30)
        assert got[0].tolist() == [11, 4]
        np.testing.assert_array_equal(got[:, 0] * 30 + got[:, 1], order)
    assert len(select_channels(x, y, 1000, 30)) == 360
    assert len(select_channels(np.ones((6, 30)), np.arange(6) % 2, 5, 30)) == 5


def test_attention_pooling_equals_a_loop():
    net = AttentionPool(3, 8, 0.3).double().eval()
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(t, 3)) for t in (5, 1, 8)]
    x, counts = torch.full((3, 8, 3), 9.0, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.bool)
    for i, (row, left) in enumerate(zip(rows, (2, 0, 0), strict=True)):  # padding on either side
        x[i, left : left + len(row)], counts[i, left : left + len(row)] = torch.tensor(row), True
    w, b = net.score.weight.detach().numpy()[0], net.score.bias.item()
    with torch.no_grad():
        got = net(x, counts)
        for row, logit in zip(rows, got, strict=True):
            weight = np.exp([np.tanh(w @ token + b) for token in row])
            pooled = sum(a * token for a, token in zip(weight / weight.sum(), row, strict=True))
            hidden = np.maximum(net.head[0].weight.numpy() @ pooled + net.head[0].bias.numpy(), 0)
            assert float(logit) == pytest.approx(float(net.head[3](torch.tensor(hidden))), rel=1e-12)


def synthetic(n=160, seed=0, signal=2.0):
    """Questions of unlike length in which one token of a failing one shows it, in channel 1."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.35).astype(int)
    values = [rng.normal(size=(int(rng.integers(2, 12)), 4)).astype(np.float32) * [1, 1, 50, 1] for _ in y]
    for v, label in zip(values, y, strict=True):
        v[int(rng.integers(len(v))), 1] += signal * 4 * label
    return [v.astype(np.float32) for v in values], y


def fitted(seed=0, signal=2.0, shuffle=None, **more):
    (values, y), (held, yv) = synthetic(signal=signal), synthetic(80, seed=1, signal=signal)
    if shuffle is not None:
        rng = np.random.default_rng(shuffle)
        y, yv = rng.permutation(y), rng.permutation(yv)
    more = {"lr": 3e-3, "epochs": 15, "hidden": 32, "seed": seed} | more
    return FailureGate(CHANNELS, **more).fit(values, y, (held, yv))


def test_learns_what_shows_failure_and_high_means_fails():
    gate = fitted()
    values, y = synthetic(200, seed=2)
    score = gate.predict_proba(values)
    assert auroc(y, score) > 0.9 and score[y == 1].mean() > score[y == 0].mean() + 0.2
    np.testing.assert_array_equal(gate.predict(values), score > gate.threshold)
    assert gate.predict(values)[y == 1].mean() > 0.8 > 0.3 > gate.predict(values)[y == 0].mean()
    assert 0 < len(gate.history_) <= 15 and {"epoch", "loss", "auroc"} == set(gate.history_[0])


def test_shuffled_labels_and_noise_are_at_chance():
    values, y = synthetic(200, seed=2)
    areas = [auroc(y, fitted(seed=s, shuffle=s, epochs=4).predict_proba(values)) for s in range(12)]
    assert abs(np.mean(areas) - 0.5) < 0.2  # each lies to one side, since one channel still stands out
    nothing, y0 = synthetic(200, seed=2, signal=0)
    assert abs(auroc(y0, fitted(signal=0, epochs=10).predict_proba(nothing)) - 0.5) < 0.12


def test_same_seed_same_gate_and_no_trace_in_global_randomness():
    state = torch.random.get_rng_state()
    a, b, c = fitted(epochs=3), fitted(epochs=3), fitted(seed=1, epochs=3)
    values, _ = synthetic(30, seed=4)
    np.testing.assert_array_equal(a.predict_proba(values), b.predict_proba(values))
    assert (a.predict_proba(values) != c.predict_proba(values)).any()
    assert torch.equal(state, torch.random.get_rng_state())
    alone = [a.predict_proba([v])[0] for v in values]
    np.testing.assert_allclose(alone, a.predict_proba(values), rtol=1e-10)


def test_stops_early_and_keeps_the_best_epoch():
    gate = fitted(epochs=40, patience=2)
    areas = [h["auroc"] for h in gate.history_]
    assert len(areas) == int(np.argmax(areas)) + 3 < 40
    held, yv = synthetic(80, seed=1)
    assert auroc(yv, gate.predict_proba(held)) == pytest.approx(max(areas), abs=1e-5)


def test_bad_input_is_refused():
    gate = fitted(epochs=1)
    with pytest.raises(ValueError, match=r"expected values \[T, 4\]"):
        gate.predict_proba([np.zeros((3, 5), dtype=np.float32)])
    with pytest.raises(ValueError, match="at least one token"):
        gate.predict_proba([np.zeros((0, 4), dtype=np.float32)])
    values, y = synthetic(20)
    with pytest.raises(UserError, match="training needs both classes, got 0 failing of 20"):
        FailureGate(CHANNELS).fit(values, y * 0)
    with pytest.raises(UserError, match="validation needs both classes, got 20 failing of 20"):
        FailureGate(CHANNELS).fit(values, y, (values, y * 0 + 1))


@pytest.mark.parametrize("seed", range(4))
def test_youden_is_the_best_cut(seed):
    rng = np.random.default_rng(seed)
    y, score = np.r_[0, 1, rng.integers(0, 2, 30)], rng.integers(0, 9, 32) / 9
    gain = lambda cut: (score[y == 1] > cut).mean() - (score[y == 0] > cut).mean()  # noqa: E731
    best = max(gain(cut) for cut in [-1, *score])
    assert gain(youden(y, score)) == pytest.approx(best)
    assert np.abs(score - youden(y, score)).min() > 1e-9  # between scores, not on one


def test_figures_equal_sklearn():
    rng = np.random.default_rng(0)
    y, score = rng.integers(0, 2, 80), rng.random(80)
    alarm, draws = score > 0.4, bootstrap_draws(80, 200, 0)
    got = figures(y, score, alarm, draws)
    for key, want in (
        ("auroc", roc_auc_score(y, score)),
        ("balanced_accuracy", balanced_accuracy_score(y, alarm)),
        ("recall", recall_score(y, alarm)),
        ("precision", precision_score(y, alarm)),
    ):
        assert got[key]["value"] == pytest.approx(want, abs=1e-4) and got[key]["low"] < want < got[key]["high"]
    assert figures(y, score, score > 2, draws)["precision"]["value"] is None


def test_saved_equals_loaded(tmp_path):
    gate = fitted(epochs=3, model="m", model_fingerprint="f" * 16)
    gate.notes = {"why": "test"}
    gate.save(tmp_path / "g")
    again = FailureGate.load(tmp_path / "g")
    values, _ = synthetic(50, seed=5)
    np.testing.assert_array_equal(gate.predict_proba(values), again.predict_proba(values))
    assert (again.threshold, again.notes, again.history_) == (gate.threshold, gate.notes, gate.history_)
    np.testing.assert_array_equal(again.channels, CHANNELS)
    info = read_json(tmp_path / "g" / "gate.json")
    assert info["polarity"].startswith("1 = needs intervention") and info["settings"]["seed"] == 0
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == ["gate.json", "gate.safetensors"]


def test_damaged_gates_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no gate\.json"):
        FailureGate.load(tmp_path)
    fitted(epochs=1).save(tmp_path)
    good = read_json(tmp_path / "gate.json")
    for change, message in (
        ({"schema": 9}, "schema 9"),
        ({"kind": "probe"}, "expected 1"),
        ({"tensors": "x"}, "different fits"),
        ({"settings": good["settings"] | {"hidden": 7}}, "damaged gate"),
        ({"settings": {"width": 1}}, "damaged gate"),
    ):
        write_json(tmp_path / "gate.json", good | change)
        with pytest.raises(UserError, match=message):
            FailureGate.load(tmp_path)
    (tmp_path / "gate.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a safetensors"):
        FailureGate.load(tmp_path)


def test_scores_take_one_prefill_of_the_same_model(make_model):
    model, prompts = make_model(), make_prompts()
    gate = fitted(epochs=2, model="mine", model_fingerprint=fingerprint(model))
    passes = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    together = gate_scores(gate, model, prompts)
    assert len(passes) == 1 and together.shape == (9,)
    hook.remove()
    np.testing.assert_allclose([gate_scores(gate, model, [p])[0] for p in prompts], together, atol=1e-4)
    with pytest.raises(UserError, match="fitted on model 'mine'"):
        gate_scores(gate, make_model(seed=1), prompts)
    with pytest.raises(UserError, match="at least 2 tokens"):
        gate_scores(gate, model, [[5]])


def test_a_block_that_does_not_fire_is_an_error(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: torch.zeros_like(x))
    with pytest.raises(UserError, match=r"site 'neuron:1\[40,2\]' did not fire"):
        question_values(model, CHANNELS, make_prompts(), 4)


def test_labels_come_from_solving_rates(tiny_tokenizer):
    traces = make_traces(tiny_tokenizer, 4)
    for t, right in zip(traces, [0] * 4 + [1, 0, 0, 1] + [1, 1, 0, 1] + [0, 0, 0, 1], strict=True):
        t.labels.correct = bool(right)
    settings = GateConfig("m", "t", "o")
    assert question_labels(traces, settings) == {"p0": 1, "p1": 0, "p2": 0, "p3": 1}
    assert question_labels(traces, GateConfig("m", "t", "o", solved_from=0.7)) == {"p0": 1, "p2": 0, "p3": 1}
    assert question_labels(traces, GateConfig("m", "t", "o", fails_below=0.8))["p2"] == 1


@pytest.fixture(scope="module")
def work(tmp_path_factory, make_model, tiny_tokenizer):
    root = tmp_path_factory.mktemp("gate")
    make_model().save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    write_rows(root / "traces.jsonl", make_traces(tiny_tokenizer))
    stage(config(root))
    return root


def test_stage_learns_a_planted_digit_and_its_controls_do_not(work, make_model, tiny_tokenizer):
    results = read_json(work / "out" / "results.json")
    assert results["test"]["auroc"]["value"] > 0.9 and results["test"]["recall"]["value"] > 0.7
    assert set(results["controls"]) == {"length", "family", "difficulty", "shuffled"}
    for name, row in results["controls"].items():
        assert row["auroc"]["value"] < 0.8, name
        assert row["auroc"]["low"] <= row["auroc"]["value"] <= row["auroc"]["high"]
    assert sum(sum(v.values()) for v in results["questions"].values()) == 120 and not results["warnings"]
    assert {"seed", "command", "version", "polarity", "intervals"} <= set(results)
    report = (work / "out" / "report.md").read_text()
    assert len(results["shuffled_aurocs"]) == 2 and all(0 <= a <= 1 for a in results["shuffled_aurocs"])
    assert results["shuffled_aurocs"][0] == pytest.approx(results["controls"]["shuffled"]["auroc"]["value"], abs=1e-4)
    assert "2 permutations" in report
    assert "| gate |" in report and "| shuffled |" in report and "1 = needs intervention" in report
    assert (work / "out" / "roc.png").stat().st_size > 1000
    gate, model = FailureGate.load(work / "out" / "gate"), make_model()
    ids = [tiny_tokenizer(f"<think>\nTom has more 4{w} apples", add_special_tokens=False)["input_ids"] for w in "92"]
    fails, solved = gate_scores(gate, model, ids)
    assert fails > gate.threshold > solved and gate.threshold == results["test"]["threshold"]
    stamp = (work / "out" / "results.json").stat().st_mtime_ns
    stage(config(work))
    assert (work / "out" / "results.json").stat().st_mtime_ns == stamp


def test_controls_know_their_kind_only(tiny_tokenizer):
    data = Data(make_traces(tiny_tokenizer, 60), GateConfig("m", "t", "o"))
    train = data.of("train")
    out = controls(data)
    for family in "ab":
        of = data.family[train] == family
        rate = (data.y[train][of].sum() + data.y[train].mean()) / (of.sum() + 1)
        np.testing.assert_allclose(out["family"][0][data.family == family], rate)
    length = out["length"][0]
    assert len(np.unique(length.round(9))) == len(np.unique(data.length))
    one = make_traces(tiny_tokenizer, 60)
    for t in one:
        t.problem.family, t.problem.difficulty = "a", 1
    assert set(controls(Data(one, GateConfig("m", "t", "o")))) == {"length"}


def test_gate_that_knows_nothing_says_so(work, tiny_tokenizer, capsys):
    write_rows(work / "blind.jsonl", make_traces(tiny_tokenizer, 60, signal=False, seed=5))
    argv = ["probes", "gate", "--model", str(work / "model"), "--traces", str(work / "blind.jsonl")]
    assert cli.main([*argv, "--out", str(work / "blind"), "--channels", "8", "--epochs", "3"]) == 0
    warnings = read_json(work / "blind" / "results.json")["warnings"]
    assert any("36 training questions are few" in w for w in warnings)
    assert any("not above chance" in w for w in warnings) and "Warning: " in capsys.readouterr().out


def test_one_class_and_short_prompts_are_refused(work, tiny_tokenizer):
    traces = make_traces(tiny_tokenizer, 30)
    for t in traces:
        t.labels.correct = True
    write_rows(work / "easy.jsonl", traces)
    with pytest.raises(UserError, match="train has 0 failing and 18 solved problems"):
        stage(config(work, traces=str(work / "easy.jsonl"), out=str(work / "easy")))
    traces[0].prompt_ids = [5]
    with pytest.raises(UserError, match="'p0#0' has fewer than 2 prompt tokens"):
        Data(traces, GateConfig("m", "t", "o"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"channels": 0}, "'channels' must be at least 1"),
        ({"fails_below": 0.0}, "'fails_below' must lie in"),
        ({"solved_from": 0.3}, "'solved_from' must lie between fails_below"),
        ({"dropout": 1.0}, "'dropout' must lie in"),
        ({"lr": 0.0}, "'lr'"),
        ({"test": 0.0}, "below 1 in sum"),
    ],
)
def test_bad_settings_are_named(more, message):
    with pytest.raises(UserError, match=message):
        GateConfig("m", "t", "o", **more)
