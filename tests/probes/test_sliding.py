"""Promise 5 (streaming features = direct evaluation, golden values), and what windows refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neureasoner.errors import UserError
from neureasoner.probes.features import FeatureSet
from neureasoner.probes.sliding import FFTWindow, SlidingWindow, StreamingWindow, check_spec, window_for
from neureasoner.probes.spectrum import BACKEND, EPS, FLOOR, SPECTRAL, spectral_features

SERIES = {  # core.md §8.1
    "ramp": list(range(1, 9)),
    "alternating": [0, 1, 0, -1] * 3,
    "pi": [3, 1, -4, 1, -5, 9, 2, -6, 5],
    "short": [1, 0, 2, 5],
    "constant": [2, -2] * 4,
}
EXACT = {  # r_HF, r_LF, r_dom, H, e
    "ramp": (0.379234, 0.620766, 0.620766, 0.766398, 5.170484),
    "alternating": (1.0, 0.0, 1.0, 0.0, 3.583519),
    "pi": (0.694516, 0.305484, 0.444444, 0.876453, 5.493061),
    "short": (1.0, 0.0, 0.866667, 0.566510, 3.401197),
    "constant": (0.0, 0.0, 0.0, 0.0, FLOOR),
}
ALGORITHM_2 = {  # r_HF, r_dom, H, e at K = 8
    "ramp": (0.101503, 0.482599, 0.610562, 3.737670),
    "alternating": (0.985627, 0.857143, 0.280033, 1.098612),
    "pi": (0.608270, 0.291537, 0.876015, 3.988984),
    "short": (0.267154, 0.259292, 0.888372, 2.639057),
    "constant": (0.0, 0.0, 0.0, FLOOR),
}


def filled(window: SlidingWindow, x: np.ndarray) -> SlidingWindow:
    """Push ``x [T, N]`` into every row."""
    for y in x:
        window.push(np.tile(y, (window.rows, 1)))
    return window


def read(window: SlidingWindow, level: str) -> dict[str, np.ndarray]:
    """Features of all rows by name, ``[B, N]``."""
    x, _ = window.features(level)
    return dict(zip(SPECTRAL[level], np.moveaxis(x.reshape(window.rows, window.channels, -1), 2, 0), strict=True))


def omegas(grid: str, k: int) -> list[float]:
    """The frequencies of a grid, by their definition."""
    if grid == "uniform":
        return [np.pi * (j + 1) / k for j in range(k)]
    return [2 * np.pi * round(8 * 256 ** (j / (k - 1))) / 4096 for j in range(k)]


def direct(x, omega, first=0):
    """Core.md §1.6.2 with every sum written out over the window, in extended precision. x [L, N] -> name -> [N].

    "seen": the power on the grid as a share of the most there could be, L times the sum of squared deviations.
    """
    x = np.abs(np.asarray(x, dtype=np.longdouble))
    t = np.arange(first, first + len(x), dtype=np.longdouble)
    y = x - x.mean(axis=0)
    angle = np.array(omega, dtype=np.longdouble)[:, None] * t  # [K, L]
    power = (np.cos(angle) @ y) ** 2 + (np.sin(angle) @ y) ** 2  # [K, N]
    share = power / np.maximum(power.sum(axis=0) + EPS * (x * x).sum(axis=0), np.longdouble(1e-300))
    h = -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(axis=0) / np.log(len(omega))
    return {
        "r_hf": share[len(omega) // 2 :].sum(axis=0),
        "r_dom": share.max(axis=0),
        "entropy": h,
        "energy": np.maximum(np.log((y * y).sum(axis=0) + EPS), FLOOR),
        "seen": power.sum(axis=0) / np.maximum(len(x) * (y * y).sum(axis=0), np.longdouble(1e-300)),
    }


def assert_direct(window, history):
    """Every row of a streaming window equals direct evaluation of ``history[b] [L_b, N]`` to 1e-9.

    To 1e-6 where the series is all but invisible on the grid: there float64 sums cancel, however they are made.
    """
    levels = [level for level in ("intra", "inter") if level in window.levels]
    for level in levels:
        x, valid = window.features(level)
        for b, rows in enumerate(history):
            assert valid[b] == (len(rows) >= 4)
            if valid[b]:
                want = direct(rows, omegas(window.grid.name, len(window.grid.turns)))
                tolerance = np.where(want["seen"] > 1e-10, 1e-9, 1e-6)[:, None]
                want = np.stack([want[name] for name in SPECTRAL[level]], axis=1).astype(float)
                error = np.abs(x[b].reshape(want.shape) - want)
                assert (error <= tolerance).all(), (level, b, error.max())
            else:
                assert not x[b].any()


@pytest.mark.parametrize("name", SERIES)
def test_promise_5_golden_values(name):
    x = np.array(SERIES[name], dtype=float)[:, None]
    window, got = filled(FFTWindow(1, 1), x), {}
    for level in SPECTRAL:
        got.update(read(window, level))
    keys = ("r_hf", "r_lf", "r_dom", "entropy", "energy")
    np.testing.assert_allclose([got[k][0, 0] for k in keys], EXACT[name], atol=1e-6)
    window = filled(StreamingWindow(1, 1, frequencies=8), x)
    got = {**read(window, "intra"), **read(window, "inter")}
    keys = ("r_hf", "r_dom", "entropy", "energy")
    np.testing.assert_allclose([got[k][0, 0] for k in keys], ALGORITHM_2[name], atol=1e-6)


def test_energies_of_the_back_ends_differ_by_parseval():
    x = np.random.default_rng(0).normal(size=(33, 3))  # odd: exact (core.md §1.6.3, fact 2)
    exact, streaming = read(filled(FFTWindow(1, 3), x), "intra"), read(filled(StreamingWindow(1, 3), x), "intra")
    np.testing.assert_allclose(exact["energy"] - streaming["energy"], np.log(33 / 2), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), min_size=1, max_size=8), st.integers(0, 99))
def test_exact_windows_have_the_bits_of_the_offline_features(moves, seed):
    rng = np.random.default_rng(seed)
    b, n = 3, 4
    window, history = FFTWindow(b, n, capacity=4), [np.zeros((0, n), np.float32) for _ in range(b)]
    for pushes, percent in moves:
        for _ in range(pushes):
            y, active = rng.normal(size=(b, n)).astype(np.float32), rng.random(b) < 0.7
            window.push(y, active)
            history = [np.concatenate([h, y[i : i + 1]]) if active[i] else h for i, h in enumerate(history)]
        drop = np.array([int(len(h) * percent * rng.random() / 100) for h in history])
        window.pop(drop)
        history = [h[d:] for h, d in zip(history, drop, strict=True)]
        assert window.lengths.tolist() == [len(h) for h in history]
        for level in SPECTRAL:
            x, valid = window.features(level)
            for i, h in enumerate(history):
                want, enough = spectral_features(h, level)
                np.testing.assert_array_equal(x[i], want)
                assert valid[i] == enough


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("channels", [1, 3, 16, 300])
def test_rows_of_one_length_are_transformed_together_with_the_same_bits(rows, channels):
    x = np.random.default_rng(rows).standard_cauchy(size=(257, rows, channels))
    window = FFTWindow(rows, channels)
    for y in x:
        window.push(y)
    for level in SPECTRAL:
        got, _ = window.features(level)
        for b in range(rows):
            np.testing.assert_array_equal(got[b], spectral_features(x[:, b], level)[0])


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 90), st.sampled_from([1e-3, 1.0, 1e3, 1e6])),
        st.tuples(st.just("constant"), st.integers(1, 90), st.sampled_from([0.0, 0.1, 1e6])),
        st.tuples(st.just("pop"), st.integers(0, 100), st.just(0.0)),
    ),
    min_size=1,
    max_size=12,
)


BLIND = [("constant", 16, 1e6), ("push", 19, 1e-3), ("constant", 88, 0.1), ("constant", 8, 1e6)]


@settings(max_examples=80, deadline=None)
@given(MOVES, st.sampled_from(["uniform", "log"]), st.integers(2, 24), st.integers(0, 99), st.booleans())
@example([("push", 20, 1e6), ("push", 20, 1e-3), ("pop", 52, 0.0)], "uniform", 16, 0, False)  # what left was larger
@example([("push", 9, 1.0), ("pop", 100, 0.0), ("constant", 70, 0.1), ("push", 5, 1e-3)], "log", 16, 1, True)
@example(BLIND, "uniform", 9, 75, False)  # what is not small in one row is invisible on the grid
def test_promise_5_streaming_equals_direct_evaluation(moves, grid, k, seed, often):
    rng = np.random.default_rng(seed)
    b, n = 3, 2
    window, history = StreamingWindow(b, n, capacity=4, grid=grid, frequencies=k), [np.zeros((0, n))] * b
    for kind, count, value in moves:
        if kind == "pop":
            drop = np.array([int(len(h) * count * u / 100) for h, u in zip(history, (1, 0.5, 0), strict=True)])
            window.pop(drop)
            history = [h[d:] for h, d in zip(history, drop, strict=True)]
        else:
            noise = value * rng.normal(size=(count, b, n)) if kind == "push" else np.full((count, b, n), value)
            for y in noise:
                active = rng.random(b) < 0.8
                window.push(y, active)
                history = [np.concatenate([h, y[i : i + 1]]) if active[i] else h for i, h in enumerate(history)]
        if often:
            assert_direct(window, history)
    assert_direct(window, history)


def soak(tokens, window, every):
    """Push ``tokens`` tokens, popping a step now and then; compare ten times on the way. N = 3, steps of 20 to 80."""
    rng = np.random.default_rng(0)
    held, steps, next_check = np.zeros((0, 3)), [], every
    done = 0
    while done < tokens:
        size = int(rng.integers(20, 80))
        block = np.abs(rng.normal([0, 100, 3], [1, 1e-2, 1e3], size=(size, 3)))
        for y in block:
            window.push(y[None])
        held, steps, done = np.concatenate([held, block]), [*steps, size], done + size
        while len(steps) > 3:
            oldest, *steps = steps
            window.pop(oldest)
            held = held[oldest:]
        if done >= next_check:
            assert_direct(window, [held])
            next_check += every
    assert_direct(window, [held])


@pytest.mark.parametrize("grid", ["uniform", "log"])
def test_promise_5_holds_after_100_000_tokens(grid):
    soak(10**5, StreamingWindow(1, 3, grid=grid), 10**4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_promise_5_holds_after_ten_million_tokens():
    soak(10**7, StreamingWindow(1, 3, grid="log"), 10**6)


def test_never_read_for_long_is_read_right():
    """Without the sums being made anew, too: a phase that differed between push and pop would leave a residue."""
    rng = np.random.default_rng(0)
    window, x = StreamingWindow(1, 2), rng.normal(size=(20_000, 2))
    window._refresh = lambda rows: None
    for t, y in enumerate(x):
        window.push(y[None])
        if t >= 100:
            window.pop(1)
    assert_direct(window, [x[-100:]])


def test_a_small_spread_about_a_large_mean():
    x = np.random.default_rng(0).normal(100, 1e-3, size=(300, 4))  # core.md §1.6.3, fact 7
    window = filled(StreamingWindow(1, 4), x)
    assert_direct(window, [x])
    window.pop(150)
    assert_direct(window, [x[150:]])


def test_a_spike_that_left_leaves_nothing():
    x = np.random.default_rng(0).normal(size=(60, 2))
    window = filled(StreamingWindow(1, 2), np.concatenate([[[1e12, 1e30]], x]))
    window.pop(1)
    assert_direct(window, [x])


def test_where_the_window_begins_changes_nothing():
    x = np.random.default_rng(0).normal(size=(50, 3))
    early, late = filled(StreamingWindow(1, 3), x), filled(StreamingWindow(1, 3), np.concatenate([x[:17], x]))
    late.pop(17)
    np.testing.assert_allclose(early.features("intra")[0], late.features("intra")[0], atol=1e-11)


@pytest.mark.parametrize("kind", [FFTWindow, StreamingWindow])
def test_a_batch_is_its_rows(kind):
    """Promise 2, for spectra: rows of different lengths do not see each other."""
    rng = np.random.default_rng(0)
    lengths, x = [5, 90, 3, 64], rng.normal(size=(90, 4, 6))
    batch, singles = kind(4, 6), [kind(1, 6) for _ in lengths]
    for t, y in enumerate(x):
        active = np.array([t < length for length in lengths])
        batch.push(np.where(active[:, None], y, np.nan), active)  # a finished row may hold anything
        for b in np.flatnonzero(active):
            singles[b].push(y[b : b + 1])
    batch.pop(np.array([0, 40, 2, 1]))
    for single, n in zip(singles, [0, 40, 2, 1], strict=True):
        single.pop(n)
    x, valid = batch.features("inter")
    want = np.concatenate([single.features("inter")[0] for single in singles])
    assert valid.tolist() == [True, True, False, True] and batch.lengths.tolist() == [5, 50, 1, 63]
    np.testing.assert_allclose(x, want, rtol=0, atol=0 if kind is FFTWindow else 1e-12)
    some, _ = batch.features("inter", rows=[3, 0])
    np.testing.assert_allclose(some, x[[3, 0]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [FFTWindow, StreamingWindow])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, 1e-8])
def test_constant_channels_have_no_spectrum(kind, value):
    window = filled(kind(2, 1), np.full((33, 1), value))
    got = read(window, "intra")
    assert all((abs(got[k]) < 1e-9).all() for k in ("r_hf", "entropy")) and (got["energy"] >= FLOOR).all()
    assert window.features("intra")[1].all()
    window.pop(30)
    assert not window.features("intra")[0].any() and not window.features("intra")[1].any()


@pytest.mark.parametrize("kind", [FFTWindow, StreamingWindow])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_activations_without_a_spectrum_are_refused_and_leave_no_trace(kind, value):
    x = np.random.default_rng(0).normal(size=(20, 2, 3))
    window = kind(2, 3)
    for y in x:
        window.push(y)
    before = window.features("inter")[0]
    bad = x[0].copy()
    bad[1, 2] = value
    with pytest.raises(UserError, match="channel 2 in row 1"):
        window.push(bad)
    with pytest.raises(UserError, match="channel 2 in row 1"):
        window.push(bad, np.array([False, True]))
    assert window.lengths.tolist() == [20, 20]
    np.testing.assert_array_equal(window.features("inter")[0], before)


@pytest.mark.parametrize("kind", [FFTWindow, StreamingWindow])
def test_wrong_calls_are_refused_and_change_nothing(kind):
    window = filled(kind(2, 3), np.ones((5, 3)))
    for n in (6, -1, np.array([0, 6]), 1.5):
        with pytest.raises(ValueError, match="pop"):
            window.pop(n)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        window.push(np.ones((2, 4)))
    with pytest.raises(UserError, match="level"):
        window.features("outer")
    window.push(np.ones((2, 3)), np.zeros(2, bool))
    window.pop(0)
    assert window.lengths.tolist() == [5, 5]
    with pytest.raises(ValueError, match="positive"):
        kind(0, 3)


def test_streaming_has_only_what_the_paper_gives_it():
    with pytest.raises(UserError, match="instance"):
        StreamingWindow(1, 1).features("instance")
    with pytest.raises(UserError, match="intra"):  # r_hf needs a grid whose upper half means w > pi / 2
        StreamingWindow(1, 1, grid="log").features("intra")
    with pytest.raises(UserError, match="grid"):
        StreamingWindow(1, 1, grid="linear")
    with pytest.raises(UserError, match="too few"):
        StreamingWindow(1, 1, frequencies=1)
    with pytest.raises(UserError, match="log grid"):
        StreamingWindow(1, 1, grid="log", frequencies=200)


@pytest.mark.parametrize(("grid", "k"), [("uniform", 2), ("uniform", 16), ("log", 2), ("log", 16), ("log", 40)])
def test_grids(grid, k):
    omega = StreamingWindow(1, 1, grid=grid, frequencies=k).grid.omega
    np.testing.assert_allclose(omega, omegas(grid, k))
    assert (np.diff(omega) > 0).all() and np.abs(1 - np.exp(-1j * omega)).min() > 1e-6 and omega[-1] == np.pi


def test_a_loop_of_paragraphs_is_seen_on_the_log_grid():
    t = np.arange(600)
    x = (2 + np.cos(2 * np.pi * t / 150))[:, None]  # below the lowest uniform frequency, whose period is 32
    got = {
        grid: read(filled(StreamingWindow(1, 1, grid=grid), x), "inter")["r_dom"][0, 0] for grid in ("uniform", "log")
    }
    omega = StreamingWindow(1, 1).grid.omega
    centred = x[:, 0] - x.mean()
    seen = max(abs(np.exp(-1j * w * t) @ centred) ** 2 for w in omega)
    assert seen < 1e-3 * np.abs(np.fft.rfft(centred)).max() ** 2 and got["log"] > 0.5


def test_specs_are_plain_and_a_probe_refuses_others():
    exact = FFTWindow(1, 1).spec("inter")
    assert exact["backend"] == BACKEND
    uniform, log = StreamingWindow(1, 1).spec("inter"), StreamingWindow(1, 1, grid="log").spec("inter")
    for spec in (exact, uniform, log):
        check_spec(spec, json.loads(json.dumps(spec)))
    for want, got, key in [
        (exact, uniform, "backend"),
        (uniform, exact, "backend"),
        (uniform, log, "grid"),
        (uniform, StreamingWindow(1, 1, frequencies=8).spec("inter"), "frequencies"),
        (uniform, StreamingWindow(1, 1, window=8).spec("inter"), "window"),
        (uniform, StreamingWindow(1, 1).spec("intra"), "level"),
        ({**exact, "model": "a"}, {**exact, "model": "b"}, "model"),
        ({**exact, "model": "a"}, exact, "model is absent"),
        (exact, {**exact, "model": "b"}, "model is 'b', the probe was fitted with absent"),
    ]:
        with pytest.raises(UserError, match=key):
            check_spec(want, got)


def test_promise_5_a_streamed_exit_is_the_offline_one():
    """Tokens pushed one by one, the oldest step dropped at each separator, against the feature set's own window."""
    rng, bounds = np.random.default_rng(4), [0, 9, 21, 40, 44, 61, 90]
    full = rng.normal(size=(90, 2))
    leave = FeatureSet.named("spectral", "instance", 3, "neuron:1[3,5]", exit_from=2)
    window, read_at = window_for(leave, 1), 0
    for n, end in enumerate(bounds[1:], 1):
        for y in full[bounds[n - 1] : end]:
            window.push(y[None])
        window.pop(max(0, leave.start(bounds[: n + 1]) - int(window.start[0])))
        x, valid = window.features("instance")
        offline, _ = leave.compute({"neuron:1[3,5]": full}, bounds[: n + 1])
        np.testing.assert_allclose(x[0], offline, rtol=0, atol=1e-9)
        read_at += bool(valid[0])
    assert read_at == 6
