"""Statistics of activity over time, effect sizes of paired differences, verdicts: pure functions.

Legend: ``T`` tokens of a window, ``C`` channels, ``S`` statistics of a level, ``n`` pairs, ``P`` clusters of pairs
(problems), ``G`` points of a curve, ``R`` bootstrap draws, the first of which is the data itself. ``x`` is ``|a|``,
``z`` the same in units of a channel's reference mean and deviation. A channel that does not move has z 0, kurtosis 0,
crest factor 1, spectral shares and autocorrelations 0; nothing becomes nan but what is said to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neureasoner.probes.detectors.metrics import bootstrap_draws, interval, weighted_auroc
from neureasoner.probes.fluctuation.config import FluctuationConfig
from neureasoner.probes.spectrum import LONGEST, spectrum

SETS = ("chosen", "random")
SIDES = {"intra": ("failing", "clean"), "inter": ("failing", "clean"), "instance": ("easy", "hard")}
PICTURE = {"intra": "spikes", "inter": "cycles", "instance": "collapse"}
EXPECTED = {  # the sign of failing - clean in the paper's picture; the level's verdict quotes the first
    "intra": {"peak_z": 1, "crest": 1, "kurtosis": 1, "r_hf": 1},
    "inter": {"r_dom": 1, "acf_peak": 1, "acf_paragraph": 1},
    "instance": {"late_over_early": -1, "slope": -1, "initial": 1},
}
LABELS = {
    "peak_z": "peak z",
    "crest": "crest factor",
    "kurtosis": "excess kurtosis",
    "r_hf": "r_HF",
    "r_dom": "r_dom / white",
    "acf_peak": "acf peak",
    "acf_paragraph": "acf paragraph",
    "late_over_early": "late / early",
    "slope": "slope",
    "initial": "first step",
}
MEANING = {
    "peak_z": "largest z of the window",
    "crest": "largest |a| over its root mean square",
    "kurtosis": "fourth moment of |a| over its squared variance, minus 3",
    "r_hf": "share of power in the upper half of the frequencies",
    "r_dom": "share of the strongest frequency, over what white noise of the same length gives",
    "acf_peak": "highest local maximum of the autocorrelation at lags of 8 tokens to half the window",
    "acf_paragraph": "autocorrelation at the mean length of the window's paragraphs",
    "late_over_early": "log of mean |a| in the last third over that in the first third",
    "slope": "change of z per 100 tokens",
    "initial": "mean z of the first step",
}
LAG = 8  # tokens: a peak of the autocorrelation below it is texture, not a cycle
SMALL = 0.2  # Cohen's small effect: a picture whose effects all lie below it does not hold
ALPHA = 0.05  # of Holm's correction
FLAT = 1e-6  # deviation over rms below which a channel counts as constant (float32, padded batches)
BANDS = np.geomspace(1 / LONGEST, 0.5, 37)  # edges, cycles per token: four bands an octave


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation by channel ``[C]``; deviation 0 for a channel that is constant up to rounding."""
    mean, sd = x.mean(axis=0), x.std(axis=0)
    return mean, np.where(sd > FLAT * np.sqrt(np.square(x).mean(axis=0)), sd, 0.0)


def over(a: np.ndarray, b: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """``a / b``, and ``empty`` where ``b`` is 0."""
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), empty), where=b > 0)


def autocorrelation(x: np.ndarray) -> np.ndarray:
    """``x [T, C]`` -> ``[T, C]`` at lags 0 … T - 1, divided by the sum of all squares; zeros for constant channels."""
    t = len(x)
    mean, sd = moments(x)
    power = np.abs(np.fft.rfft(np.where(sd > 0, x - mean, 0.0), 2 * t, axis=0)) ** 2
    sums = np.fft.irfft(power, 2 * t, axis=0)[:t]
    return over(sums, sums[:1].copy())


def spikes(x: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of intra: activity ``x [T, C]`` and its ``z [T, C]`` -> ``[C]`` each."""
    mean, sd = moments(x)
    fourth = ((x - mean) ** 4).mean(axis=0)
    return {
        "peak_z": z.max(axis=0),
        "crest": over(x.max(axis=0), np.sqrt(np.square(x).mean(axis=0)), 1.0),
        "kurtosis": over(fourth, sd**4, 3.0) - 3.0,
        "r_hf": spectrum(x.T)["r_hf"],
    }


def cycles(x: np.ndarray, ends: Sequence[int]) -> dict[str, np.ndarray]:
    """Statistics of inter: ``x [T, C]``, ends of the window's steps (uncut) -> ``[C]`` each.

    ``r_dom`` is divided by what white noise of T tokens gives, ``(ln m + 0.58) / m`` with ``m = floor(T / 2)`` bins
    (core.md §1.5). ``acf_peak``: the highest local maximum at lags 8 … T / 2, 0 where none is positive.
    ``acf_paragraph``: at the mean length of the window's steps; nan if two of them do not fit into T.
    """
    t = len(x)
    bins = t // 2
    acf = autocorrelation(x)
    inside = acf[LAG : bins + 1]
    peak = (inside > acf[LAG - 1 : bins]) & (inside >= acf[LAG + 1 : bins + 2])
    lag = round(ends[-1] / len(ends))
    return {
        "r_dom": spectrum(x.T)["r_dom"] * bins / (np.log(bins) + 0.58),
        "acf_peak": np.where(peak, inside, 0.0).max(axis=0, initial=0.0),
        "acf_paragraph": acf[lag] if lag <= bins else np.full(x.shape[1], np.nan),
    }


def decay(x: np.ndarray, z: np.ndarray, mean: np.ndarray, ends: Sequence[int]) -> dict[str, np.ndarray]:
    """Statistics of instance: ``x``, ``z [T, C]``, reference ``mean [C]``, ends of the steps -> ``[C]`` each.

    Both thirds get a floor of a thousandth of the channel's mean (the larger of reference and window), so that a silent
    channel has ratio 1 and one that wakes up no infinite one.
    """
    third, floor = len(x) // 3, 1e-3 * np.maximum(mean, x.mean(axis=0)) + np.finfo(np.float64).tiny
    time = np.arange(len(x)) - (len(x) - 1) / 2
    return {
        "late_over_early": np.log((x[-third:].mean(axis=0) + floor) / (x[:third].mean(axis=0) + floor)),
        "slope": 100 * (time @ z) / (time @ time),
        "initial": z[: ends[0]].mean(axis=0),
    }


def level_statistics(level: str, x: np.ndarray, mean: np.ndarray, sd: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """The level's statistics of a window ``x [T, C]``, averaged over channels: ``[S]``, in the order of ``EXPECTED``.

    ``mean``, ``sd`` ``[C]``: reference of z. ``ends``: the steps' ends, before the window was cut to T.
    """
    z = over(x - mean, sd)
    values = {
        "intra": lambda: spikes(x, z),
        "inter": lambda: cycles(x, ends),
        "instance": lambda: decay(x, z, mean, ends),
    }[level]()
    return np.array([values[name].mean() for name in EXPECTED[level]])


def bands(x: np.ndarray) -> np.ndarray:
    """Power of ``x [T, C]`` in every band of ``BANDS``, relative to a flat spectrum, mean over channels that move.

    nan in a band that holds no bin of the FFT. A channel's average over all its bins is 1.
    """
    mean, sd = moments(x)
    power = (np.abs(np.fft.rfft((x - mean)[:, sd > 0], axis=0)) ** 2)[1:]
    share = (power / power.mean(axis=0)).mean(axis=1) if power.shape[1] else np.full(len(power), np.nan)
    at = np.searchsorted(BANDS, np.fft.rfftfreq(len(x))[1:], side="right") - 1
    at = np.clip(at, 0, len(BANDS) - 2)  # the Nyquist bin, and periods above LONGEST
    n = np.bincount(at, minlength=len(BANDS) - 1).astype(np.float64)
    return over(np.bincount(at, share, len(BANDS) - 1), n, np.nan)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p, in the order given."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    out = np.empty(len(values))
    out[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values)))))
    return out


def effect_sizes(
    failing: np.ndarray, clean: np.ndarray, cluster: np.ndarray, draws: np.ndarray
) -> dict[str, np.ndarray]:
    """One statistic's ``failing [n]``, ``clean [n]`` -> ``[R]`` each, for problems drawn ``draws [R, P]`` times.

    ``difference``: mean of failing - clean. ``d_z``: that over the differences' deviation. ``cliffs_delta``: chance
    that a failing value exceeds a clean one, minus the converse, over all of them, paired or not. nan where undefined.
    """
    d, w = failing - clean, draws[:, cluster]
    with np.errstate(invalid="ignore", divide="ignore"):
        total = w.sum(axis=1)
        mean = (w @ d) / total
        spread = (w @ np.square(d) / total - mean**2) * total / (total - 1)
        d_z = np.where(
            spread > 1e-12 * np.square(d).sum() / max(1, len(d)), mean / np.sqrt(np.maximum(spread, 0)), np.nan
        )
    y = np.repeat([1, 0], len(d))
    area = weighted_auroc(y, np.concatenate([failing, clean]), np.concatenate([w, w], axis=1))
    return {"difference": mean, "d_z": d_z, "cliffs_delta": 2 * area - 1}


def sign_flip_p(d: np.ndarray, cluster: np.ndarray, n: int, seed: int) -> float:
    """Two-sided p of ``sum d [n]`` when the sign of each cluster's differences is arbitrary."""
    sums = np.bincount(cluster, d)
    signs = np.random.default_rng([seed, 3]).choice(np.array([-1, 1], dtype=np.int8), (n, len(sums)))
    hits = (np.abs(signs @ sums) >= np.abs(d.sum()) * (1 - 1e-9)).sum()
    return float((1 + hits) / (1 + n))


def compare(level: str, values: np.ndarray, cluster: np.ndarray, config: FluctuationConfig) -> dict[str, Any]:
    """``values [2 sets, 2 sides, n, S]``, ``cluster [n]`` -> by statistic: both sets' effects, and their difference.

    Pairs in which a statistic is undefined on either side or set do not count for it.
    """
    draws = bootstrap_draws(int(cluster.max()) + 1, config.bootstrap, config.seed)
    out: dict[str, Any] = {}
    for i, (name, sign) in enumerate(EXPECTED[level].items()):
        rows = np.isfinite(values[..., i]).all(axis=(0, 1))
        entry: dict[str, Any] = {"label": LABELS[name], "expected": sign, "n": int(rows.sum())}
        d_z = []
        for key, (failing, clean) in zip(SETS, values[:, :, rows, i], strict=True):
            effects = effect_sizes(failing, clean, cluster[rows], draws)
            d_z.append(effects["d_z"])
            means = [round(float(x.mean()), 4) if len(x) else None for x in (failing, clean)]
            direction = int(np.sign((failing - clean).sum()))
            p = sign_flip_p(failing - clean, cluster[rows], config.permutations, config.seed) if rows.any() else None
            entry[key] = {
                "mean": dict(zip(SIDES[level], means, strict=True)),
                **{k: interval(v) for k, v in effects.items()},
                "direction": direction,
                "p": p,
            }
        entry["chosen_minus_random"] = interval(d_z[0] - d_z[1])
        out[name] = entry
    return out


def correct(levels: dict[str, Any]) -> None:
    """Holm over all statistics of all levels, for each set of channels; adds ``p_holm`` and ``verdict`` in place."""
    for key in SETS:
        entries = [(s, s[key]) for level in levels.values() for s in level["statistics"].values()]
        tested = [(s, e) for s, e in entries if e["p"] is not None]
        for _, e in entries:
            e["p_holm"], e["verdict"] = None, "undecided"
        for (s, e), p in zip(tested, holm([e["p"] for _, e in tested]), strict=True):
            e["p_holm"] = float(p)
            if p < ALPHA:
                e["verdict"] = "as drawn" if e["direction"] == s["expected"] else "opposite"


def verdict(level: str, statistics: dict[str, Any]) -> dict[str, Any]:
    """Whether the picture holds on the chosen channels, and whether it is about them.

    Holds: more than half of the statistics differ significantly as drawn, none the other way. Does not hold: none does,
    and one differs significantly the other way, or all effects lie below a small one (0.2) by their intervals.
    """
    entries = list(statistics.values())
    held = [s for s in entries if s["chosen"]["verdict"] == "as drawn"]
    opposite = [s for s in entries if s["chosen"]["verdict"] == "opposite"]
    small = [s for s in entries if _most(s["chosen"]["d_z"], s["expected"]) < SMALL]
    if 2 * len(held) > len(entries) and not opposite:
        status = "holds"
    elif not held and (opposite or len(small) == len(entries)):
        status = "does not hold"
    else:
        status = "not decided"
    own = [s for s in held if _least(s["chosen_minus_random"], s["expected"]) > 0]
    alike, contrary = (sum(s["random"]["verdict"] == v for s in entries) for v in ("as drawn", "opposite"))
    drawn = "above" if entries[0]["expected"] > 0 else "below"
    effects = (cell(entries[0][key]["d_z"]) for key in SETS)
    more = f"; {len(own) or 'none'} of these more so than on random channels" if held else ""
    sentence = (
        f"{PICTURE[level]}: {status}: {entries[0]['label']} effect d = {next(effects)} on chosen, {next(effects)} "
        f"on random channels (drawn {drawn} 0); of {len(entries)} statistics {len(held)} differ significantly as drawn "
        f"and {len(opposite)} the other way on chosen, {alike} and {contrary} on random channels{more}"
    )
    return {"status": status, "sentence": sentence, "stronger_than_random": len(own)}


def _most(d: dict[str, Any], sign: int) -> float:
    """The interval's far end in the drawn direction; infinite where there is no interval."""
    end = d["high" if sign > 0 else "low"]
    return np.inf if end is None else sign * float(end)


def _least(d: dict[str, Any], sign: int) -> float:
    """The interval's near end in the drawn direction; below all where there is no interval."""
    end = d["low" if sign > 0 else "high"]
    return -np.inf if end is None else sign * float(end)


def cell(value: dict[str, Any], digits: int = 2) -> str:
    """``value [low, high]``, or a dash."""
    if value["value"] is None or value["low"] is None:
        return "–"
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def band(curves: np.ndarray, weights: np.ndarray, least: int) -> dict[str, list[float | None]]:
    """Mean of ``curves [n, G]`` (nan: no value), 95 % intervals; ``weights [R, n]``. None below ``least`` curves."""
    there = np.isfinite(curves)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(there, curves, 0.0)) / (weights @ there.astype(np.float64))
    means[:, there.sum(axis=0) < least] = np.nan
    shown = np.isfinite(means[0])
    low, high = np.full((2, curves.shape[1]), np.nan)
    low[shown], high[shown] = np.nanquantile(means[:, shown], [0.025, 0.975], axis=0)
    listed = lambda v: [round(float(x), 5) if np.isfinite(x) else None for x in v]  # noqa: E731
    return {"mean": listed(means[0]), "low": listed(low), "high": listed(high)}


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Curves of different lengths as one ``[n, longest]``, nan behind their ends."""
    out = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out
