"""``probes fluctuation``: do failures fluctuate as the paper draws them? (its Observation 2, core.md §1.4)

The picture: a wrong step shows sharp spikes (intra), circling is periodic (inter), a hard problem keeps its neurons
busy while an easy one excites them at first and then lets go (instance). Here it becomes numbers: statistics of the
activity while each of two continuations was written, compared in pairs, on the selected channels and on random ones.

Legend: ``n`` pairs, ``T`` tokens of a window, ``C`` channels, ``S`` statistics, ``G`` points of a curve. Activity is
``|a|``, for heads the norm. ``failing`` is the side with the failure: of an instance pair the **easy** problem
(overthinking is what can go wrong there), against the hard one. A window begins where the continuation does (instance:
with the thinking) and holds the steps compared.

- Statistics are taken channel by channel, then averaged over channels. Most depend on T, so both windows of a pair are
  cut to the length of the shorter one (but not in the curves over time).
- z: a channel's mean and deviation over all clean (instance: hard) tokens of the level, one pair of numbers for both
  sides. A window's own clean twin would not do: its side would have deviation 1 by construction, the other more.
- Intervals draw whole problems, p flips the sign of whole problems' differences. Instance pairs join two problems, and
  neighbours in their list share one; each problem keeps its first partner, and pairs with another are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner import __version__
from neureasoner.artifacts import read_json, write_json, write_text
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.pairs import read_pairs
from neureasoner.probes.detectors.metrics import bootstrap_draws
from neureasoner.probes.features import LEVELS
from neureasoner.probes.fluctuation.config import FluctuationConfig
from neureasoner.probes.fluctuation.statistics import (
    BANDS,
    EXPECTED,
    PICTURE,
    SETS,
    SIDES,
    band,
    bands,
    compare,
    correct,
    level_statistics,
    moments,
    over,
    padded,
    verdict,
)
from neureasoner.probes.labels import failure, instance_pairs, is_clean, labels_of
from neureasoner.probes.recording.record import record
from neureasoner.sites import Site
from neureasoner.stages import StageFolder
from neureasoner.traces import Step, Trace, read_traces

POINTS = 50  # of relative time
FEWEST = 10  # pairs behind a point of a curve, and a quarter of all; fewer only where there are fewer
FEW = 20  # problems below which a warning is due: intervals from fewer are too narrow


@dataclass(frozen=True)
class Side:
    """One continuation. ``trace`` is cut where the window ends; ``ends``: its steps' ends, counted from ``begin``."""

    trace: Trace
    begin: int
    ends: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length of the window."""
        return self.ends[-1] if self.ends else 0

    @classmethod
    def of(cls, trace: Trace, begin: int, steps: int) -> Side:
        """The first ``steps`` steps from response token ``begin`` on; fewer where the thinking ends before."""
        held: list[Step] = [s for s in trace.steps if s.token_start >= begin][:steps]
        if held:
            end = held[-1]
            trace = replace(
                trace, response_ids=trace.response_ids[: end.token_end], response=trace.response[: end.char_end]
            )
        return cls(trace, begin, tuple(s.token_end - begin for s in held))


@dataclass(frozen=True)
class Match:
    """Two continuations to compare."""

    id: str
    level: str
    failing: Side
    clean: Side

    @property
    def problems(self) -> tuple[str, str]:
        """Problem ids of both sides."""
        return self.failing.trace.problem.id, self.clean.trace.problem.id

    @property
    def tokens(self) -> int:
        """Length of the shorter window."""
        return min(self.failing.tokens, self.clean.tokens)


def matches_of_pairs(path: str | Path) -> list[Match]:
    """The pairs that ``data pairs`` wrote. It calls the hard problem of an instance pair ``failing``."""
    out = []
    for pair in read_pairs(path):
        sides = [Side.of(t, pair.prefix, pair.steps) for t in (pair.failing, pair.clean)]
        out.append(Match(pair.id, pair.level, *(sides[::-1] if pair.level == "instance" else sides)))
    return out


def matches_of_traces(
    traces: Sequence[Trace], nothinking: Sequence[Trace], first_steps: int
) -> tuple[list[Match], dict[str, int]]:
    """Every judged failure with the same steps of a clean trace of its problem, and how many failures have none.

    The prefixes differ, unlike those of ``data pairs``. A problem's clean traces that reach far enough take turns.
    """
    problems: dict[str, list[Trace]] = {}
    for trace in traces:
        labels_of(trace)
        problems.setdefault(trace.problem.id, []).append(trace)
    out, without = [], Counter[str]()
    for group in problems.values():
        clean = [t for t in group if is_clean(t, "intra") and is_clean(t, "inter")]
        for level in ("intra", "inter"):
            for i, (trace, found) in enumerate((t, failure(t, level)) for t in group):
                if found is None:
                    continue
                first, end = found
                able = [t for t in clean if len(t.steps) >= end and t.steps[end - 1].closed]
                if not able:
                    without[level] += 1
                    continue
                both = [(t, t.steps[first].token_start) for t in (trace, able[i % len(able)])]
                out.append(Match(f"{trace.id}/{level}", level, *(Side.of(t, begin, end - first) for t, begin in both)))
    for pair in instance_pairs(traces, nothinking, first_steps):
        hard, easy = (Side.of(t, 0, first_steps) for t in (pair.failing, pair.clean))
        out.append(Match(pair.id, "instance", easy, hard))
    return out, dict(without)


def one_partner(matches: Iterable[Match]) -> list[Match]:
    """Matches whose problems have no other partner, first come first kept, so that clusters share no problem."""
    partner: dict[str, str] = {}
    kept = []
    for match in matches:
        a, b = match.problems
        if partner.get(a, b) == b and partner.get(b, a) == a:
            partner[a], partner[b] = b, a
            kept.append(match)
    return kept


Windows = dict[str, tuple[list[np.ndarray], list[np.ndarray]]]  # set -> failing and clean side -> |a| [T, C] by pair


def record_windows(
    model: Any,
    tokenizer: Any,
    matches: Sequence[Match],
    sites: dict[str, str],
    batch_size: int,
    advance: Callable[[], None],
) -> Windows:
    """Activity of both sides' windows on both sets of channels, float32."""
    traces = [side.trace for m in matches for side in (m.failing, m.clean)]
    begins = [side.begin for m in matches for side in (m.failing, m.clean)]
    out: Windows = {key: ([], []) for key in SETS}
    recorded = record(model, tokenizer, traces, list(sites.values()), batch_size)
    for i, (series, begin) in enumerate(zip(recorded, begins, strict=True)):
        for key in SETS:
            out[key][i % 2].append(np.abs(series[sites[key]][begin:]))
        advance()
    return out


def analyse(
    level: str, matches: Sequence[Match], windows: Windows, lead: int, config: FluctuationConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the level shows: its entry of fluctuation.json, and single pairs for the figure.

    ``lead``: the chosen channel that the single pairs show (of the random ones the first).
    """
    names = sorted({m.problems for m in matches})
    cluster = np.array([names.index(m.problems) for m in matches])
    weights = bootstrap_draws(len(names), config.bootstrap, config.seed)[:, cluster]
    least = min(len(matches), max(FEWEST, len(matches) // 4))
    shown = np.sort(np.random.default_rng([config.seed, 5]).permutation(len(matches))[: config.examples])
    grid = np.linspace(0, 1, POINTS)
    values = np.empty((2, 2, len(matches), len(EXPECTED[level])))
    curves: dict[str, Any] = {}
    single: dict[str, Any] = {}
    for s, key in enumerate(SETS):
        mean, sd = moments(np.concatenate(windows[key][1]).astype(np.float64))
        curves[key] = {"relative": {}, "absolute": {}, "frequency": {}}
        single[key] = {}
        for side, name in enumerate(SIDES[level]):
            absolute, frequency = [], []
            for i, (match, window) in enumerate(zip(matches, windows[key][side], strict=True)):
                x = window.astype(np.float64)
                absolute.append(over(x - mean, sd).mean(axis=1))
                cut, ends = x[: match.tokens], (match.failing, match.clean)[side].ends
                values[s, side, i] = level_statistics(level, cut, mean, sd, ends)
                frequency.append(bands(cut))
            relative = np.stack([np.interp(grid * (len(z) - 1), np.arange(len(z)), z) for z in absolute])
            for kind, rows in (("relative", relative), ("absolute", padded(absolute)), ("frequency", frequency)):
                curves[key][kind][name] = band(np.asarray(rows), weights, least)
            column = lead if key == "chosen" else 0
            single[key][name] = [over(windows[key][side][i] - mean, sd)[:, column] for i in shown]
    lengths = [[m.failing.tokens for m in matches], [m.clean.tokens for m in matches], [m.tokens for m in matches]]
    entry = {
        "picture": PICTURE[level],
        "pairs": len(matches),
        "problems": len(names),
        "tokens": dict(zip((*SIDES[level], "compared"), (float(np.median(n)) for n in lengths), strict=True)),
        "statistics": compare(level, values, cluster, config),
        "examples": [matches[i].id for i in shown],
        "curves": curves,
    }
    return entry, single


def usable(matches: Sequence[Match], seen: set[str], config: FluctuationConfig) -> tuple[list[Match], dict[str, int]]:
    """Matches that can be compared, and how many were left out for which reason."""
    fresh = [m for m in matches if not (config.unseen and seen & set(m.problems))]
    long = [m for m in fresh if m.tokens >= config.min_tokens]
    kept = one_partner(long)
    counts = {
        "found": len(matches),
        "on problems the channels were selected on": len(matches) - len(fresh),
        f"shorter than {config.min_tokens} tokens on a side": len(fresh) - len(long),
        "problem already paired with another": len(long) - len(kept),
    }
    return kept, counts


def _neurons(config: FluctuationConfig, model: Any) -> dict[str, Any]:
    from neureasoner.models import fingerprint, known_as

    neurons = read_json(config.neurons)
    if neurons.get("kind") != "neurons" or not neurons.get("levels"):
        raise UserError(f"{config.neurons}: not a neurons.json of probes locate; run probes locate first")
    found = fingerprint(model)
    if neurons["fingerprint"] not in known_as(found):
        raise UserError(
            f"{config.neurons}: selected on model '{neurons['model']}' ({neurons['fingerprint']}), not on "
            f"'{config.model}' ({found}); run probes locate on this model"
        )
    return dict(neurons)


def _found(config: FluctuationConfig) -> tuple[list[Match], dict[str, int]]:
    if config.pairs:
        return matches_of_pairs(config.pairs), {}
    nothinking = read_traces(config.nothinking) if config.nothinking else []
    return matches_of_traces(read_traces(config.traces), nothinking, config.first_steps)


def fluctuation(config: FluctuationConfig) -> dict[str, Any]:
    """Stage ``probes fluctuation``. Writes fluctuation.json, fluctuation.md and a folder of figures per level.

    A level without pairs or without neurons is left out with a warning; UserError if none is left, or for neurons of
    another model.
    """
    from neureasoner.models import load
    from neureasoner.probes.detectors.fit import command_line
    from neureasoner.probes.fluctuation.figures import draw_level, markdown, print_table
    from neureasoner.progress import Progress

    given = [config.neurons, *filter(None, (config.pairs, config.traces, config.nothinking))]
    folder = StageFolder(config.out, "probes fluctuation", config, inputs=[*model_files(config.model), *given])
    if folder.done:
        print_table(read_json(folder.path / "fluctuation.json"))
        return folder.summary
    found, unpaired = _found(config)
    model, tokenizer = load(config.model)
    neurons = _neurons(config, model)
    seen = set(neurons["problems"])
    levels: dict[str, Any] = {}
    singles: dict[str, Any] = {}
    warnings: list[str] = []
    work: dict[str, tuple[list[Match], dict[str, int]]] = {}
    for level in LEVELS:
        kept, counts = usable([m for m in found if m.level == level], seen, config)
        counts |= {"failures without a clean trace": unpaired[level]} if level in unpaired else {}
        if level not in neurons["levels"]:
            warnings.append(f"{level}: {config.neurons} names no channels for it; left out")
        elif not kept:
            warnings.append(f"{level}: no pair to compare ({_listed(counts)}); left out")
        else:
            work[level] = kept, counts
    if not work:
        raise UserError("nothing to compare: " + "; ".join(warnings))
    with Progress() as bar:
        task = bar.add_task("recording", total=sum(2 * len(kept) for kept, _ in work.values()))
        for level, (kept, counts) in work.items():
            bar.update(task, description=f"recording ({level})")
            chosen = neurons["levels"][level]
            sites = {
                k: str(Site.parse(s)) for k, s in zip(SETS, (chosen["site"], neurons["random"][level]), strict=True)
            }
            windows = record_windows(
                model, tokenizer, kept, sites, config.batch_size, lambda: bar.update(task, advance=1)
            )
            lead = (Site.parse(sites["chosen"]).indices or ()).index(chosen["indices"][0])
            entry, singles[level] = analyse(level, kept, windows, lead, config)
            again = sum(bool(seen & set(m.problems)) for m in kept)
            levels[level] = {"sites": sites, "lead": chosen["indices"][0], "left_out": counts, "seen": again, **entry}
            if entry["problems"] < FEW:
                warnings.append(
                    f"{level}: {entry['problems']} problems are few; its intervals say little, make more pairs"
                )
    correct(levels)
    for level, entry in levels.items():
        entry["verdict"] = verdict(level, entry["statistics"])
    results = {
        "kind": "fluctuation",
        "schema": 1,
        "model": config.model,
        "fingerprint": neurons["fingerprint"],
        "layer": neurons["layer"],
        "source": "pairs of one prefix" if config.pairs else "traces of one problem",
        "bands": [float(f"{f:.6g}") for f in BANDS],
        "bootstrap": config.bootstrap,
        "permutations": config.permutations,
        "intervals": "95 %, resampling problems",
        "seed": config.seed,
        "version": __version__,
        "command": command_line(),
        "levels": levels,
        "warnings": warnings,
    }
    for level, entry in levels.items():
        draw_level(folder.path / level, level, entry, singles[level])
    write_text(folder.path / "fluctuation.md", markdown(results))
    write_json(folder.path / "fluctuation.json", results)
    print_table(results)
    kept_keys = ("pairs", "problems", "left_out", "verdict")
    return folder.finish({"levels": {k: {n: e[n] for n in kept_keys} for k, e in levels.items()}, "warnings": warnings})


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "none found"
