"""Fluctuation's numbers: statistics of a window against loops and scipy, effects against resampling by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from neureasoner.probes.detectors.metrics import bootstrap_draws
from neureasoner.probes.fluctuation import statistics as fs


@pytest.mark.parametrize("t", [16, 33, 80])
def test_statistics_against_loops(t):
    rng = np.random.default_rng(t)
    x = np.abs(rng.standard_normal((t, 5))) * [1, 10, 0.1, 3, 5]
    mean, sd = x.mean(0) * 1.1, x.std(0) * 0.7
    z = (x - mean) / sd
    ends = (t // 4, t // 2, t + 7)
    found = {**fs.spikes(x, z), **fs.cycles(x, ends), **fs.decay(x, z, mean, ends)}
    for c in range(5):
        v = [float(a) for a in x[:, c]]
        assert found["peak_z"][c] == pytest.approx(max((a - mean[c]) / sd[c] for a in v))
        assert found["crest"][c] == pytest.approx(max(v) / math.sqrt(sum(a * a for a in v) / t))
        assert found["kurtosis"][c] == pytest.approx(stats.kurtosis(v))
        power = [
            abs(sum((a - np.mean(v)) * np.exp(-2j * np.pi * k * i / t) for i, a in enumerate(v))) ** 2
            for k in range(t // 2 + 1)
        ]
        bins, total = t // 2 + 1, sum(power[1:])
        assert found["r_hf"][c] == pytest.approx(sum(power[bins // 2 :]) / total)
        m = bins - 1
        assert found["r_dom"][c] == pytest.approx(max(power[1:]) / total / ((math.log(m) + 0.58) / m))
        y = [a - np.mean(v) for a in v]
        acf = [sum(y[i] * y[i + k] for i in range(t - k)) / sum(a * a for a in y) for k in range(t)]
        assert fs.autocorrelation(x)[:, c] == pytest.approx(acf, abs=1e-12)
        tops = [acf[k] for k in range(8, t // 2 + 1) if acf[k - 1] < acf[k] >= acf[k + 1]]
        assert found["acf_peak"][c] == pytest.approx(max([0.0, *tops]), abs=1e-12)
        lag = round((t + 7) / 3)
        assert found["acf_paragraph"][c] == pytest.approx(acf[lag])
        third = t // 3
        floor = 1e-3 * max(mean[c], np.mean(v))
        assert found["late_over_early"][c] == pytest.approx(
            math.log((np.mean(v[-third:]) + floor) / (np.mean(v[:third]) + floor))
        )
        assert found["slope"][c] == pytest.approx(100 * np.polyfit(np.arange(t), z[:, c], 1)[0])
        assert found["initial"][c] == pytest.approx(np.mean(z[: t // 4, c]))
    for level, names in fs.EXPECTED.items():
        got = fs.level_statistics(level, x, mean, sd, ends)
        assert got == pytest.approx([found[n].mean() for n in names])


def test_a_paragraph_longer_than_half_the_window_is_no_lag():
    x = np.abs(np.random.default_rng(0).standard_normal((40, 3)))
    assert np.isnan(fs.cycles(x, (21, 42))["acf_paragraph"]).all()
    assert np.isfinite(fs.cycles(x, (20, 40))["acf_paragraph"]).all()


def test_statistics_see_what_they_are_named_after():
    rng = np.random.default_rng(1)
    noise = np.abs(rng.standard_normal((120, 200)))
    white = fs.cycles(noise, (20, 40, 60))
    assert white["r_dom"].mean() == pytest.approx(1, abs=0.06)  # its expectation in white noise
    loop = noise + 2 * np.sin(2 * np.pi * np.arange(120) / 20)[:, None] + 2
    cyclic = fs.cycles(loop, (20, 40, 60))
    assert cyclic["r_dom"].mean() > 5 and cyclic["acf_paragraph"].mean() > 0.5 > 0.2 > white["acf_paragraph"].mean()
    assert cyclic["acf_peak"].mean() > white["acf_peak"].mean() + 0.3
    spiky = noise.copy()
    spiky[60] += 15
    z = lambda x: (x - noise.mean(0)) / noise.std(0)  # noqa: E731
    for name in ("peak_z", "crest", "kurtosis"):
        assert fs.spikes(spiky, z(spiky))[name].mean() > 2 * fs.spikes(noise, z(noise))[name].mean()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_channels_give_numbers(value):
    x = np.full((40, 2), value, dtype=np.float32).astype(np.float64)
    mean, sd = fs.moments(x)
    assert (sd == 0).all()
    z = fs.over(x - mean, sd)
    found = {**fs.spikes(x, z), **fs.cycles(x, (10, 20)), **fs.decay(x, z, mean, (10, 20))}
    for name, got in found.items():
        assert (got == (1 if name == "crest" else 0)).all() or got == pytest.approx(
            [1 if name == "crest" else 0] * 2
        ), name
    assert np.isnan(fs.bands(x)).all()
    silent = x.copy()
    silent[20:, 0] += 1  # silent in the reference, wakes up late
    assert np.abs(fs.decay(silent, z, np.zeros(2), (10, 20))["late_over_early"]).max() < 8


def test_bands_average_the_bins_in_them():
    rng = np.random.default_rng(2)
    x = np.abs(rng.standard_normal((150, 4)))
    x[:, 3] = 0.5  # does not move: left out
    got = fs.bands(x)
    power = np.array([np.abs(np.fft.fft(x[:, c] - x[:, c].mean())[1:76]) ** 2 for c in range(3)])
    share = (power / power.mean(1, keepdims=True)).mean(0)
    for i, (low, high) in enumerate(itertools.pairwise(fs.BANDS)):
        last = i == len(fs.BANDS) - 2
        inside = [s for k, s in enumerate(share, 1) if low <= k / 150 < high or (last and k / 150 == 0.5)]
        assert np.isnan(got[i]) if not inside else got[i] == pytest.approx(np.mean(inside)), i
    assert np.isfinite(fs.bands(np.abs(rng.standard_normal((2000, 1))))[0])  # longer periods go into the lowest band


def test_holm():
    assert fs.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert fs.holm([0.9, 0.8]) == pytest.approx([1, 1]) and len(fs.holm([])) == 0


def test_effect_sizes_against_resampling_by_hand():
    rng = np.random.default_rng(3)
    cluster = np.array([0, 0, 1, 2, 2, 2, 3, 4])
    failing, clean = rng.integers(0, 6, (2, 8)).astype(float)
    draws = bootstrap_draws(5, 30, 7)
    got = fs.effect_sizes(failing, clean, cluster, draws)
    for r, draw in enumerate(draws):
        rows = [i for i in range(8) for _ in range(int(draw[cluster[i]]))]
        f, c = failing[rows], clean[rows]
        d = f - c
        assert got["difference"][r] == pytest.approx(d.mean())
        spread = d.std(ddof=1) if len(d) > 1 else 0
        assert np.isnan(got["d_z"][r]) if spread < 1e-9 else got["d_z"][r] == pytest.approx(d.mean() / spread)
        assert got["cliffs_delta"][r] == pytest.approx(np.mean([np.sign(a - b) for a in f for b in c]))
    same = fs.effect_sizes(np.ones(4), np.zeros(4), np.arange(4), bootstrap_draws(4, 5, 0))
    assert np.isnan(same["d_z"]).all() and (same["difference"] == 1).all() and (same["cliffs_delta"] == 1).all()


def test_sign_flips_turn_whole_problems():
    rng = np.random.default_rng(4)
    cluster = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5])
    d = rng.standard_normal(9) + 0.5
    sums = [d[cluster == k].sum() for k in range(6)]
    hits = [
        abs(sum(s * v for s, v in zip(signs, sums, strict=True))) >= abs(sum(sums)) - 1e-9
        for signs in itertools.product((-1, 1), repeat=6)
    ]
    assert fs.sign_flip_p(d, cluster, 20_000, 0) == pytest.approx(np.mean(hits), abs=0.015)
    assert fs.sign_flip_p(np.zeros(3), np.arange(3), 99, 0) == 1
    assert fs.sign_flip_p(np.ones(12), np.zeros(12, int), 999, 0) == 1  # one problem proves nothing


def test_band_counts_only_what_is_there():
    rng = np.random.default_rng(5)
    curves = rng.standard_normal((12, 6))
    curves[9:, 3:] = np.nan
    curves[2:, 5] = np.nan
    draws = bootstrap_draws(12, 300, 1)
    got = fs.band(curves, draws, 5)
    assert (
        got["mean"][:5] == pytest.approx(np.nanmean(curves, 0)[:5], abs=1e-5)
        and got["mean"][5] is None is got["low"][5]
    )
    means = [np.nanmean(np.repeat(curves[:, 3], d.astype(int))) for d in draws]
    assert got["low"][3] == pytest.approx(np.quantile(means, 0.025), abs=1e-4)
    assert got["high"][3] == pytest.approx(np.quantile(means, 0.975), abs=1e-4)
    assert fs.padded([np.ones(2), np.ones(3)]).tolist()[1] == [1, 1, 1] and np.isnan(
        fs.padded([np.ones(2), np.ones(3)])[0, 2]
    )
