"""Promise 5 (features have golden values), and what features must not depend on."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.errors import UserError
from neureasoner.probes.features import ENTROPY, LENGTH, TREND, FeatureSet, entropy_features, trend_features
from neureasoner.probes.spectrum import BACKEND, FLOOR, fixed_spectrum, spectral_features, spectrum

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


ALGORITHM_2 = [  # core.md §8.1: series, r_HF, r_dom, H, e with K = 8
    (list(range(1, 9)), 0.101503, 0.482599, 0.610562, 3.737670),
    ([0, 1, 0, -1] * 3, 0.985627, 0.857143, 0.280033, 1.098612),
    ([3, 1, -4, 1, -5, 9, 2, -6, 5], 0.608270, 0.291537, 0.876015, 3.988984),
    ([1, 0, 2, 5], 0.267154, 0.259292, 0.888372, 2.639057),
]


@pytest.mark.parametrize("row", ALGORITHM_2)
def test_algorithm_2_golden_values(row):
    got = fixed_spectrum(np.array([row[0]], dtype=float), "algorithm-2/uniform/8")
    np.testing.assert_allclose([got[k][0] for k in ("r_hf", "r_dom", "entropy", "energy")], row[1:], atol=1e-6)


def test_back_ends_are_different_feature_sets_and_part_of_their_identity():
    site = "neuron:1[0,1]"
    series = {site: np.random.default_rng(0).normal(size=(64, 2))}
    sets = {
        b: FeatureSet.named("spectral", "inter", 4, site, backend=b)
        for b in (BACKEND, "algorithm-2/uniform/16", "algorithm-2/log/16")
    }
    values = [f.compute(series, [0, 20, 64])[0] for f in sets.values()]
    assert all(not np.allclose(a, b) for a, b in zip(values, [*values[1:], values[0]], strict=True))
    for f in sets.values():
        assert FeatureSet.from_dict(f.to_dict()) == f
    old = sets[BACKEND].to_dict()
    del old["backend"]  # written before there was a choice
    assert FeatureSet.from_dict(old) == sets[BACKEND]


@pytest.mark.parametrize(
    ("backend", "level", "message"),
    [
        ("fft", "intra", "unknown"),
        ("algorithm-2/uniform/x", "intra", "unknown"),
        ("algorithm-2/mel/16", "intra", "grid 'mel'"),
        ("algorithm-2/log/16", "intra", "no features of level 'intra'"),
        ("algorithm-2/uniform/16", "instance", "no features of level 'instance'"),
    ],
)
def test_wrong_back_ends_are_refused(backend, level, message):
    with pytest.raises(UserError, match=message):
        FeatureSet.named("spectral", level, 2, "neuron:1[0]", backend=backend)


def test_trend_values_written_out():
    rng = np.random.default_rng(3)
    residual, logits, bounds = rng.normal(size=(30, 5)), rng.random((30, 2)), [0, 4, 9, 17, 30]
    got = trend_features(residual, logits, bounds)
    last = [residual[b - 1] for b in bounds[1:]]
    means = [residual[a:b].mean(0) for a, b in pairwise(bounds)]
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    named = dict(zip(TREND, got[5:], strict=True))
    np.testing.assert_allclose(got[:5], last[-1] - last[-2])
    assert named["state_cosine_previous"] == pytest.approx(cos(last[-1], last[-2]))
    assert named["state_cosine_nearest"] == pytest.approx(max(cos(last[-1], x) for x in last[:-2]))
    assert named["mean_cosine_previous"] == pytest.approx(cos(means[-1], means[-2]))
    assert named["mean_cosine_nearest"] == pytest.approx(max(cos(means[-1], x) for x in means[:-2]))
    assert named["norm_ratio"] == pytest.approx(np.log(np.linalg.norm(last[-1]) / np.linalg.norm(last[-2])))
    steps = [logits[a:b].mean(0) for a, b in pairwise(bounds)]
    slope = np.polyfit(range(4), np.array(steps)[:, 0], 1)[0]
    assert named["entropy_slope"] == pytest.approx(slope)
    assert named["surprisal_slope"] == pytest.approx(np.polyfit(range(4), np.array(steps)[:, 1], 1)[0])


@pytest.mark.parametrize("bounds", [[0, 6], [0, 6, 12], [0, 6, 12, 18]])
def test_trend_is_finite_with_few_steps_and_zero_states(bounds):
    x = trend_features(np.zeros((18, 3)), np.zeros((18, 2)), bounds)
    assert x.shape == (3 + len(TREND),) and np.isfinite(x).all()


def test_magnitude_values():
    site, x = "neuron:1[4,7]", np.random.default_rng(5).normal(size=(40, 2))
    got, valid = FeatureSet.named("magnitude", "intra", 2, site).compute({site: x}, [0, 10, 25, 40])
    window, step = np.abs(x[25:40]), np.abs(x[25:40])  # k = 2 keeps one finished step
    np.testing.assert_allclose(got, np.concatenate([window.mean(0), step.mean(0), window.max(0)]))
    got, _ = FeatureSet.named("magnitude", "intra", 3, site).compute({site: x}, [0, 10, 25, 40])
    np.testing.assert_allclose(got[:4], np.concatenate([np.abs(x[10:40]).mean(0), np.abs(x[25:40]).mean(0)]))
    assert valid


def test_several_sites_of_spectra_and_states_are_put_side_by_side():
    rng = np.random.default_rng(1)
    series = {"neuron:0[1]": rng.normal(size=(40, 1)), "head:2[0,1]": rng.random((40, 2))}
    series |= {"residual:0": rng.normal(size=(40, 4)), "residual:2": rng.normal(size=(40, 4))}
    both = FeatureSet.named("spectral+residual", "intra", 2, "neuron:0[1] head:2[0,1]", "residual:0 residual:2")
    assert both.sites() == list(series) and both.dim(4) == 3 * 3 + 2 * 8
    x, _ = both.compute(series, [0, 20, 40])
    apart = [
        FeatureSet.named("spectral", "intra", 2, "neuron:0[1]"),
        FeatureSet.named("spectral", "intra", 2, "head:2[0,1]"),
        FeatureSet.named("residual", "intra", 2, "", "residual:0"),
        FeatureSet.named("residual", "intra", 2, "", "residual:2"),
    ]
    np.testing.assert_array_equal(x, np.concatenate([f.compute(series, [0, 20, 40])[0] for f in apart]))


def test_an_exit_reads_a_trailing_window_at_every_separator():
    full = make()
    for name in NAMES:
        leave = FeatureSet.named(name, "instance", 3, "neuron:1[3,5]", "residual:1", exit_from=2)
        assert FeatureSet.from_dict(leave.to_dict()) == leave and not leave.once
        for n in (2, 3, 4):
            x, valid = leave.compute(full, BOUNDS[: n + 1])
            assert valid and x.shape == (leave.dim(6),)
            if "spectral" not in name:  # what is read does not depend on the level
                intra = FeatureSet.named(name, "intra", 3, "neuron:1[3,5]", "residual:1")
                np.testing.assert_array_equal(x, intra.compute(full, BOUNDS[: n + 1])[0])
    want, _ = spectral_features(full["neuron:1[3,5]"][31:64], "instance")
    spectral = FeatureSet.named("spectral", "instance", 3, "neuron:1[3,5]", exit_from=2)
    np.testing.assert_array_equal(spectral.compute(full, BOUNDS)[0], want)
    for level, window, first in (("intra", 3, 2), ("instance", 1, 2), ("instance", 3, -1)):
        with pytest.raises(UserError, match=r"exit_from|window 1"):
            FeatureSet.named("entropy", level, window, exit_from=first)
    old = {k: v for k, v in FeatureSet.named("entropy", "instance", 2).to_dict().items() if k != "exit_from"}
    assert FeatureSet.from_dict(old).once, "a probe of before is the paper's kind"
