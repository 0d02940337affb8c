"""Promise 5 (features have golden values), and what features must not depend on."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.errors import UserError
from neureasoner.probes.features import (
    ENTROPY,
    FLOOR,
    LENGTH,
    FeatureSet,
    entropy_features,
    spectral_features,
    spectrum,
)

GOLDEN = [  # core.md §8.1: series, r_HF, r_LF, r_dom, H, e
    (list(range(1, 9)), 0.379234, 0.620766, 0.620766, 0.766398, 5.170484),
    ([0, 1, 0, -1] * 3, 1.0, 0.0, 1.0, 0.0, 3.583519),
    ([3, 1, -4, 1, -5, 9, 2, -6, 5], 0.694516, 0.305484, 0.444444, 0.876453, 5.493061),
    ([1, 0, 2, 5], 1.0, 0.0, 0.866667, 0.566510, 3.401197),
    ([2, -2] * 4, 0.0, 0.0, 0.0, 0.0, FLOOR),
]
KEYS = ("r_hf", "r_lf", "r_dom", "entropy", "energy")


@pytest.mark.parametrize("row", GOLDEN)
def test_promise_5_golden_values(row):
    got = spectrum(np.array([row[0]], dtype=float))
    np.testing.assert_allclose([got[k][0] for k in KEYS], row[1:], atol=1e-6)


def direct(x):
    """Core.md §1.5, written out term by term."""
    x = np.abs(np.asarray(x, dtype=np.float64))
    t = len(x)
    y = x - x.mean()
    bins = t // 2 + 1
    power = [abs(sum(y[i] * np.exp(-2j * np.pi * f * i / t) for i in range(t))) ** 2 for f in range(bins)]
    total = sum(power[1:])
    share = [p / total for p in power]
    h = -sum(s * np.log(s) for s in share[1:] if s > 0) / np.log(bins - 1)
    return sum(share[bins // 2 :]), sum(share[1 : bins // 2]), max(share[1:]), h, np.log(total)


series = st.lists(st.floats(-100, 100, allow_nan=False, width=32), min_size=4, max_size=40).filter(
    lambda v: np.std(np.abs(v)) > 1e-3
)


@settings(max_examples=60, deadline=None)
@given(series, st.floats(1e-3, 1e3))
def test_equals_the_definition_and_ratios_ignore_scale(values, scale):
    x = np.array([values])
    got, scaled = spectrum(x), spectrum(x * scale)
    np.testing.assert_allclose([got[k][0] for k in KEYS], direct(values), rtol=1e-5, atol=1e-6)
    for key in KEYS[:4]:
        np.testing.assert_allclose(got[key], scaled[key], atol=1e-6)
    np.testing.assert_allclose(got["r_hf"] + got["r_lf"], 1.0, atol=1e-6)
    np.testing.assert_allclose(spectrum(-x)["entropy"], got["entropy"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 4))
def test_too_short_is_zero_and_not_valid(t, c):
    x, valid = spectral_features(np.ones((t, c)) * np.arange(t)[:, None], "intra")
    assert not valid and x.shape == (3 * c,) and not x.any()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e-8])
def test_constant_series_has_no_spectrum(value):
    got = spectrum(np.full((1, 33), value))
    assert all(abs(got[k][0]) < 1e-9 for k in KEYS[:4]) and got["energy"][0] >= FLOOR


def test_channels_keep_their_order():
    x = np.random.default_rng(0).normal(size=(20, 3))
    both, _ = spectral_features(x, "inter")
    one = np.concatenate([spectral_features(x[:, [i]], "inter")[0] for i in range(3)])
    np.testing.assert_array_equal(both, one)


def make(t=90, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "neuron:1[3,5]": rng.normal(size=(t, 2)).astype(np.float32),
        "logits": rng.random((t, 2)).astype(np.float32),
        "residual:1": rng.normal(size=(t, 6)).astype(np.float32),
    }


BOUNDS = [0, 20, 31, 50, 64]
NAMES = ["spectral", "entropy", "residual", "length", "entropy+residual", "entropy+residual+spectral"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", ["intra", "inter", "instance"])
def test_pure_online_equals_offline_and_dim(name, level):
    features = FeatureSet.named(name, level, 4, "neuron:1[3,5]", "residual:1")
    full = make()
    before = {k: v.copy() for k, v in full.items()}
    offline, valid = features.compute(full, BOUNDS)
    online, _ = features.compute({k: v[:64] for k, v in full.items()}, BOUNDS)
    np.testing.assert_array_equal(offline, online)
    assert valid and offline.dtype == np.float64 and offline.shape == (features.dim(6),)
    assert all((before[k] == full[k]).all() for k in full)
    parts = [
        FeatureSet.named(p, level, 4, "neuron:1[3,5]", "residual:1").compute(full, BOUNDS)[0] for p in name.split("+")
    ]
    np.testing.assert_array_equal(np.concatenate(parts), offline)
    assert FeatureSet.from_dict(features.to_dict()) == features


def test_window_is_the_last_finished_steps():
    full = make()
    for k, start in ((2, 50), (3, 31), (4, 20), (5, 0), (9, 0)):
        features = FeatureSet.named("spectral", "intra", k, "neuron:1[3,5]")
        want, _ = spectral_features(full["neuron:1[3,5]"][start:64], "intra")
        np.testing.assert_array_equal(features.compute(full, BOUNDS)[0], want)
    instance = FeatureSet.named("spectral", "instance", 4, "neuron:1[3,5]")
    want, _ = spectral_features(full["neuron:1[3,5]"][:64], "instance")
    np.testing.assert_array_equal(instance.compute(full, BOUNDS)[0], want)


def test_validity():
    entropy = FeatureSet.named("entropy", "intra", 2)
    assert not entropy.compute(make(), [0, 15])[1] and entropy.compute(make(), [0, 16])[1]
    spectral = FeatureSet.named("spectral", "intra", 2, "neuron:1[3,5]")
    assert not spectral.compute(make(), [0, 20, 23])[1] and spectral.compute(make(), [0, 20, 24])[1]
    instance = FeatureSet.named("length", "instance", 2)
    assert [instance.compute(make(), BOUNDS[: n + 1])[1] for n in (1, 2, 3)] == [False, True, False]


def test_after_a_trigger_only_what_follows_counts():
    full = make()
    shifted = {k: v[20:] for k, v in full.items()}
    for name in NAMES:
        features = FeatureSet.named(name, "intra", 4, "neuron:1[3,5]", "residual:1")
        a, b = features.compute(full, [20, 31, 50, 64]), features.compute(shifted, [0, 11, 30, 44])
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1] == b[1]


def test_entropy_values():
    logits = np.array([[1.0, 2], [3, 0], [0, 1], [2, 4], [0.01, 0.5]])
    got = dict(zip(ENTROPY, entropy_features(logits, [0, 2, 5], 0), strict=True))
    assert got["step_entropy_mean"] == pytest.approx(2.01 / 3) and got["window_entropy_max"] == 3
    assert got["step_surprisal_max"] == 4 and got["step_surprisal_second"] == 1
    assert got["step_surprisal_sum"] == pytest.approx(np.log1p(5.5)) and got["step_certain"] == pytest.approx(2 / 3)
    assert got["window_step_min"] == pytest.approx(2.01 / 3)
    assert got["entropy_over_earlier"] == pytest.approx(2.01 / 3 - 2)
    assert len(LENGTH) == FeatureSet.named("length", "intra", 2).dim(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spectre", "intra", 2), "different parts"),
        (("entropy+entropy", "intra", 2), "different parts"),
        (("entropy", "outer", 2), "level"),
        (("entropy", "intra", 1), "window"),
        (("spectral", "intra", 2, "neuron:1"), "must list"),
        (("residual", "intra", 2, "", "mlp_out:1"), "residual site"),
    ],
)
def test_wrong_feature_sets_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        FeatureSet.named(*arguments)


def test_short_series_is_an_error():
    with pytest.raises(ValueError, match="64"):
        FeatureSet.named("entropy", "intra", 2).compute(make(63), BOUNDS)


def test_fast_enough_to_run_while_decoding():
    rng = np.random.default_rng(0)
    site = f"neuron:1[{','.join(map(str, range(32)))}]"
    full = {site: rng.normal(size=(400, 32)), "logits": rng.random((400, 2)), "residual:1": rng.normal(size=(400, 192))}
    features = FeatureSet.named("entropy+residual+spectral", "intra", 4, site, "residual:1")
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        features.compute(full, [0, 280, 320, 360, 400])
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3
