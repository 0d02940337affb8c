"""The detector: learns, repeats by seed, survives saving bit for bit, refuses what it was not made for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neureasoner.artifacts import read_json, write_json
from neureasoner.errors import UserError
from neureasoner.models import fingerprint
from neureasoner.probes.detectors.metrics import (
    auroc,
    bootstrap_draws,
    interval,
    ratio,
    roc,
    threshold_for,
    weighted_auroc,
)
from neureasoner.probes.detectors.probe import Probe
from neureasoner.probes.features import FeatureSet


def data(n=400, d=16, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.arange(1, d + 1)
    y = (x[:, 3] / 4 + rng.normal(size=n) / 3 > 0.8).astype(int)
    return x, y


def fitted(seed=0, **more):
    x, y = data()
    return Probe(FeatureSet.named("entropy", "intra", 4), hidden=64, epochs=30, batch_size=64, seed=seed, **more).fit(
        x, y, data(200, seed=1)
    )


def test_learns_and_is_calibrated():
    probe = fitted()
    x, y = data(1000, seed=2)
    p = probe.predict_proba(x)
    assert auroc(y, p) > 0.93 and abs(p.mean() - y.mean()) < 0.06 and ((p > 0) & (p < 1)).all()
    np.testing.assert_array_equal(probe.predict(x), p > probe.threshold)
    assert probe.history_ and {"epoch", "loss", "auroc"} == set(probe.history_[0])


def test_same_seed_same_probe_and_no_trace_in_global_randomness():
    state = torch.random.get_rng_state()
    x, _ = data(20, seed=3)
    a, b, c = fitted(), fitted(), fitted(seed=1)
    np.testing.assert_array_equal(a.predict_proba(x), b.predict_proba(x))
    assert (a.predict_proba(x) != c.predict_proba(x)).any()
    assert torch.equal(state, torch.random.get_rng_state())


def test_single_rows_equal_a_batch():
    probe = fitted()
    x, _ = data(30, seed=4)
    np.testing.assert_allclose([probe.predict_proba(r[None])[0] for r in x], probe.predict_proba(x), rtol=1e-12)


def test_promise_11_saved_equals_loaded_with_everything_in_the_artifact(tmp_path):
    probe = fitted(model="m", model_fingerprint="f" * 16, layer=3)
    probe.threshold, probe.notes = 0.375, {"why": "test"}
    probe.save(tmp_path / "p")
    again = Probe.load(tmp_path / "p")
    x, _ = data(50, seed=5)
    np.testing.assert_array_equal(probe.predict_proba(x), again.predict_proba(x))
    assert (again.threshold, again.features, again.model_fingerprint) == (0.375, probe.features, "f" * 16)
    info = read_json(tmp_path / "p" / "probe.json")
    assert info["feature_backend"] == "exact-rfft" and info["epsilon"] == 1e-12 and info["settings"]["seed"] == 0
    assert {"threshold", "platt", "version", "git", "model", "layer"} <= set(info)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["probe.json", "probe.safetensors"]


def test_promise_10_bad_probe_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"probe\.json"):
        Probe.load(tmp_path)
    fitted().save(tmp_path / "p")
    path = tmp_path / "p" / "probe.json"
    good = read_json(path)
    for change, message in (
        ({"feature_backend": "stft"}, "features 'stft'"),
        ({"schema": 99}, "schema 99"),
        ({"tensors": "x"}, "different fits"),
        ({"settings": {"hidden": 7}}, "damaged"),
        ({"features": {"name": "entropy"}}, "malformed"),
    ):
        write_json(path, good | change)
        with pytest.raises(UserError, match=message):
            Probe.load(tmp_path / "p")
    write_json(path, good)
    (tmp_path / "p" / "probe.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a safetensors"):
        Probe.load(tmp_path / "p")


def test_probe_of_another_model_is_refused(make_model):
    model = make_model()
    probe = fitted(model="mine", model_fingerprint=fingerprint(model))
    probe.check(model)
    with pytest.raises(UserError, match="fitted on model 'mine'"):
        probe.check(make_model(seed=1))
    probe.features = FeatureSet.named("length", "intra", 4)
    with pytest.raises(UserError, match="16 features"):
        probe.check(model)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="both classes"):
        Probe(FeatureSet.named("entropy", "intra", 4)).fit(np.zeros((4, 16)), np.zeros(4))


def test_auroc_equals_sklearn_with_ties_and_weights():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 200), rng.integers(0, 20, 200) / 20
    w = rng.integers(0, 4, (5, 200)).astype(float)
    want = [roc_auc_score(y, s, sample_weight=row) for row in w]
    np.testing.assert_allclose(weighted_auroc(y, s, w), want)
    assert auroc(y, s) == pytest.approx(roc_auc_score(y, s))
    assert auroc(y, s) == pytest.approx(np.trapezoid(*roc(y, s)[::-1]))
    assert np.isnan(auroc(np.ones(3), np.arange(3)))


def test_intervals_resample_problems():
    draws = bootstrap_draws(30, 500, 0)
    assert (draws[0] == 1).all() and (draws.sum(1) == 30).all()
    num = np.random.default_rng(0).random(30)
    got = ratio(num, np.ones(30), draws)
    assert got["low"] < got["value"] < got["high"] and got["value"] == pytest.approx(num.mean(), abs=1e-4)
    assert interval(np.full(4, np.nan)) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.9])
def test_threshold_keeps_the_budget(rate):
    maxima = np.random.default_rng(1).random(37)
    maxima[3] = -np.inf
    assert (maxima > threshold_for(maxima, rate)).mean() <= rate
    assert threshold_for(np.full(3, -np.inf), rate) == 0.5
