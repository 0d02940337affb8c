"""The detector: learns, repeats by seed, survives saving bit for bit, refuses what it was not made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf, expit

import neureasoner
from neureasoner.artifacts import file_fingerprint, read_json, write_json, write_tensors
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
from neureasoner.probes.detectors.sequential import Sequential
from neureasoner.probes.features import FeatureSet
from neureasoner.probes.sliding import window_for
from neureasoner.probes.spectrum import BACKEND

SHIPPED = Path(neureasoner.__file__).parent / "assets" / "tiny-steered" / "probes"
GOLDEN = {  # logits and probabilities of two seeded rows, by the version that wrote the files (schema 1)
    "intra": ([-3.968453155922975, -3.2971969375028936], [0.005908858382772613, 0.010018971477618516]),
    "inter": ([-2.6593629077768277, -36.02219943818152], [0.002278380814125838, 1.1113456750814985e-12]),
    "instance": ([-3.9354428028618407, -2.4446003949123796], [0.12669852780205973, 0.22215782683198357]),
    "paper/intra": ([0.10894245208312237, -12.66175043123642], [0.11606436694083738, 5.939655631593675e-05]),
    "paper/inter": ([-0.5811981821310787, -17.277909409256353], [0.032165634403740866, 1.5709555108190902e-07]),
    "paper/instance": ([-2.7684529969479574, 9.610062464129143], [0.1924828723448247, 0.9843058777138558]),
}


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
        ({"settings": {"hidden": 7}}, "damaged tensors of kind 'mlp'"),
        ({"settings": {"depth": 7}}, "estimator 'mlp' has no setting 'depth'"),
        ({"estimator": "logistic", "settings": {}}, "damaged tensors of kind 'logistic'"),
        ({"estimator": "boosting", "settings": {}}, "'boosting' is for comparison and cannot be saved"),
        ({"estimator": "svm"}, "estimator 'svm' is unknown"),
        ({"rule": {"name": "consecutive"}}, "rule 'consecutive' needs setting 'm'"),
        ({"epsilon": 1e-3}, "with epsilon 0.001"),
        ({"features": {"name": "entropy"}}, "malformed"),
        ({"platt": [1.0]}, "damaged probe"),
        ({"threshold": "high"}, "damaged probe"),
    ):
        write_json(path, good | change)
        with pytest.raises(UserError, match=message) as error:
            Probe.load(tmp_path / "p")
        assert str(error.value).startswith(str(tmp_path / "p"))
    write_json(path, {k: v for k, v in good.items() if k != "threshold"})
    with pytest.raises(UserError, match=r"damaged probe \('threshold'\)"):
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


def test_bad_training_data_is_refused_by_level():
    with pytest.raises(UserError, match="probe 'intra': training needs both classes"):
        Probe(FeatureSet.named("entropy", "intra", 4)).fit(np.zeros((4, 16)), np.zeros(4))
    x = np.zeros((4, 16))
    x[1, 9] = np.nan
    with pytest.raises(UserError, match="probe 'intra': features hold NaN or infinity in column 9"):
        Probe(FeatureSet.named("entropy", "intra", 4)).fit(x, np.arange(4) % 2)


@pytest.mark.parametrize("name", GOLDEN)
def test_shipped_probes_score_as_when_they_were_written(name):
    """Written by schema 1: no kind of estimator, no rule, no back end in the feature set."""
    probe = Probe.load(SHIPPED / name)
    mean, scale = probe.estimator.mean_, probe.estimator.scale_
    x = np.random.default_rng(7).normal(size=(4, len(mean)))[:2] * 3 * scale + mean
    logits, p = GOLDEN[name]
    np.testing.assert_allclose(probe.decision_function(x), logits, rtol=1e-12)
    np.testing.assert_allclose(probe.predict_proba(x), p, rtol=1e-12)
    assert read_json(SHIPPED / name / "probe.json")["schema"] == 1
    assert probe.rule is None and probe.estimator.kind == "mlp"
    np.testing.assert_array_equal(probe.predict(x), np.array(p) > probe.threshold)


def write_schema_1(folder, tensors):
    settings = {"hidden": 5, "dropout": 0.1, "lr": 0.001, "weight_decay": 3.0}
    settings |= {"batch_size": 256, "epochs": 40, "patience": 6, "seed": 19}
    features = {"name": "length", "level": "inter", "parts": ["length"], "window": 4, "channels": "", "residual": ""}
    write_tensors(folder / "probe.safetensors", tensors)
    write_json(
        folder / "probe.json",
        {
            "schema": 1,
            "kind": "probe",
            "features": features,
            "feature_backend": "exact-rfft",
            "epsilon": 1e-12,
            "model": "m",
            "model_fingerprint": "f",
            "layer": None,
            "threshold": 0.25,
            "platt": [0.5, -0.25],
            "settings": settings,
            "history": [{"epoch": 0, "loss": 0.3, "auroc": 0.9}],
            "notes": {"validation_auroc": 0.9},
            "tensors": file_fingerprint([folder / "probe.safetensors"]),
        },
    )


def test_schema_1_still_loads_and_means_the_same(tmp_path):
    rng = np.random.default_rng(0)
    w = {f"mlp.{i}.weight": rng.normal(size=s) for i, s in ((0, (5, 6)), (3, (5, 5)), (6, (1, 5)))}
    w |= {f"mlp.{i}.bias": rng.normal(size=s) for i, s in ((0, 5), (3, 5), (6, 1))}
    w |= {"scaler.mean": rng.normal(size=6), "scaler.scale": rng.random(6) + 0.5}
    write_schema_1(tmp_path, {k: torch.from_numpy(v) for k, v in w.items()})
    probe = Probe.load(tmp_path)
    x = rng.normal(size=(30, 6)) * 8
    h = np.clip((x.astype(np.float32).astype(np.float64) - w["scaler.mean"]) / w["scaler.scale"], -8, 8)
    for i in (0, 3):
        h = h @ w[f"mlp.{i}.weight"].T + w[f"mlp.{i}.bias"]
        h = h * (1 + erf(h / np.sqrt(2))) / 2
    logits = h @ w["mlp.6.weight"][0] + w["mlp.6.bias"]
    np.testing.assert_allclose(probe.decision_function(x), logits, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(probe.predict_proba(x), expit(0.5 * logits - 0.25), rtol=1e-12, atol=1e-15)
    assert (probe.threshold, probe.rule, probe.history_[0]["auroc"]) == (0.25, None, 0.9)
    assert probe.estimator.get_params()["weight_decay"] == 3.0
    probe.save(tmp_path / "again")
    again, info = Probe.load(tmp_path / "again"), read_json(tmp_path / "again" / "probe.json")
    np.testing.assert_array_equal(again.predict_proba(x), probe.predict_proba(x))
    assert (info["schema"], info["estimator"], info["rule"]) == (2, "mlp", None)


def test_logistic_probe_is_calibrated_saved_and_loaded(tmp_path):
    (x, y), held = data(), data(200, seed=1)
    features = FeatureSet.named("entropy", "intra", 4)
    probe = Probe(features, kind="logistic", C=0.1).fit(x, y, held)
    xt, yt = data(1000, seed=2)
    p = probe.predict_proba(xt)
    assert auroc(yt, p) > 0.93 and abs(p.mean() - yt.mean()) < 0.06 and probe.history_ == []
    probe.save(tmp_path / "p")
    again = Probe.load(tmp_path / "p")
    np.testing.assert_array_equal(again.predict_proba(xt), p)
    info = read_json(tmp_path / "p" / "probe.json")
    assert info["estimator"] == "logistic" and info["settings"]["C"] == 0.1 == again.estimator.get_params()["C"]


def test_a_rule_decides_over_the_rows_of_each_trace_and_is_saved(tmp_path):
    probe = fitted(rule=Sequential("consecutive", m=2))
    probe.threshold = 0.4
    x, _ = data(300, seed=6)
    above = probe.predict_proba(x) > 0.4
    np.testing.assert_array_equal(probe.predict(x), above & np.r_[False, above[:-1]])
    trace = np.arange(300) // 7
    first = np.r_[True, trace[1:] != trace[:-1]]
    want = above & np.r_[False, above[:-1]] & ~first
    assert 0 < want.sum() < probe.predict(x).sum()
    np.testing.assert_array_equal(probe.predict(x, trace), want)
    probe.save(tmp_path / "p")
    assert read_json(tmp_path / "p" / "probe.json")["rule"] == {"name": "consecutive", "m": 2}
    again = Probe.load(tmp_path / "p")
    assert again.rule == probe.rule
    np.testing.assert_array_equal(again.predict(x, trace), want)


def test_boosting_can_be_compared_but_not_saved(tmp_path):
    probe = Probe(FeatureSet.named("entropy", "intra", 4), kind="boosting", max_iter=30).fit(*data(), data(200, seed=1))
    x, y = data(500, seed=2)
    assert auroc(y, probe.predict_proba(x)) > 0.9
    with pytest.raises(UserError, match="estimator 'boosting' is for comparison and cannot be saved"):
        probe.save(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_unknown_estimators_and_settings_are_refused():
    features = FeatureSet.named("entropy", "intra", 4)
    with pytest.raises(UserError, match="estimator 'svm' is unknown; use one of mlp, logistic, boosting"):
        Probe(features, kind="svm")
    with pytest.raises(UserError, match="estimator 'mlp' has no setting 'C'"):
        Probe(features, C=1.0)


def test_spectral_back_end_and_scalars_are_in_the_artifact(tmp_path):
    (x, y), sites = data(80, d=9), "neuron:1[3] neuron:2[0,4]"
    features = FeatureSet.named("spectral", "intra", 4, sites, backend="algorithm-2/uniform/16")
    Probe(features, epochs=1).fit(x, y).save(tmp_path)
    info = read_json(tmp_path / "probe.json")
    assert (info["feature_backend"], info["scalar"]) == ("algorithm-2/uniform/16", "abs")
    assert Probe.load(tmp_path).features == features
    write_json(tmp_path / "probe.json", info | {"feature_backend": "exact-rfft"})
    with pytest.raises(UserError, match=r"fitted on features 'exact-rfft' .* computes 'algorithm-2/uniform/16'"):
        Probe.load(tmp_path)


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


BACKENDS = [BACKEND, "algorithm-2/uniform/16", "algorithm-2/log/16"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sliding_window_gives_the_score_of_the_features_it_was_fitted_on(backend):
    """Both back ends, streamed with pushes and pops, against the window computed at once; others are refused."""
    rng = np.random.default_rng(4)
    site = "neuron:1[0,2,5]"
    features = FeatureSet.named("spectral", "inter", 4, site, backend=backend)
    x, y = rng.normal(size=(60, features.dim(8))), np.arange(60) % 2
    probe = Probe(features, epochs=2, hidden=8).fit(x, y)
    window, series = window_for(features, 2), rng.normal(size=(90, 2, 3))
    for t, token in enumerate(series):
        window.push(token)
        if t % 30 == 29:
            window.pop(7)
    p, valid = probe.score_window(window)
    want = np.stack([features.compute({site: series[21:, row]}, [0, 20, 69])[0] for row in (0, 1)])
    assert valid.all()
    np.testing.assert_allclose(p, probe.predict_proba(want), atol=1e-6)
    for other in BACKENDS:
        if other != backend:
            wrong = FeatureSet.named("spectral", "inter", 4, site, backend=other)
            with pytest.raises(UserError, match=r"spectral features: (backend|grid) is"):
                probe.score_window(window_for(wrong, 2))
    with pytest.raises(UserError, match="window is 8"):
        probe.score_window(window_for(FeatureSet.named("spectral", "inter", 8, site, backend=backend), 2))


def test_a_probe_of_more_than_spectra_wants_no_window():
    with pytest.raises(UserError, match="no spectral part"):
        window_for(FeatureSet.named("entropy", "inter", 4), 1)
    features = FeatureSet.named("entropy+spectral", "inter", 4, "neuron:1[0]")
    with pytest.raises(UserError, match="more than a window"):
        Probe(features).score_window(window_for(features, 1))
