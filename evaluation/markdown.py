"""``results.md``: the evaluation's tables as Markdown, to paste where people talk about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neureasoner.evaluation.arms import VANILLA
from neureasoner.evaluation.cells import figures, header, interval, p_of, row, value_of
from neureasoner.evaluation.verdict import caution, comparison, headline, percent, points, sentences

FAILURES = {"intra": "wrong step", "inter": "circles", "instance": "easy question"}

UNKNOWN = "–"


def arms_table(results: Mapping[str, Any]) -> list[str]:
    """Every arm with its intervals, and its paired difference against vanilla."""
    lines = header("arm", "accuracy, %", "mean tokens", "triggers per answer", "truncated, %", "against vanilla")
    for a in results["arms"]:
        c = comparison(results, a["name"], VANILLA)
        lines.append(
            row(
                a["name"],
                *figures(a),
                f"{points(c)}, {p_of(c)}; {percent(c)}" if c else "–",
            )
        )
    return lines


def _seconds(arm: Mapping[str, Any], key: str) -> str:
    value, ends = arm.get(key), arm.get(f"{key}_ci")
    if value is None or ends is None:
        return "–"
    low, high = (f"{x:.2f}" if x is not None else "∞" for x in ends)
    return f"{value:.2f} [{low}, {high}]"


def costs_table(results: Mapping[str, Any]) -> list[str]:
    """What answers cost: forced tokens (counted above), probe tokens (not counted), wall time by problem and solved."""
    heads = ("seconds per response", "seconds per solved problem", "times faster than vanilla per solved problem")
    lines = header("arm", "forced tokens", "probe tokens", *heads)
    for a in results["arms"]:
        times = (_seconds(a, k) for k in ("seconds_per_problem", "seconds_per_solved", "speedup"))
        lines.append(row(a["name"], f"{a['forced_mean']:.1f}", f"{a['probe_tokens_mean']:.1f}", *times))
    return lines


def curves_table(results: Mapping[str, Any], key: str, name: str) -> list[str]:
    """Accuracy by k of ``pass_at`` or ``cons``; nothing where no arm has any."""
    arms = [a for a in results["arms"] if a[key]]
    if not arms:
        return []
    sizes = list(arms[0][key])
    lines = header("arm", *(f"{name}@{k}" for k in sizes))
    for a in arms:
        lines.append(row(a["name"], *(interval(a[key][k]["accuracy"], a[key][k]["accuracy_ci"]) for k in sizes)))
    return lines


def source(results: Mapping[str, Any]) -> list[str]:
    """Which benchmark it is, how it was decoded otherwise than in the paper, and what held its programs; sentences."""
    said, of = list[str](), results["problems"].get("source")
    if of:
        release = f", {of['release']}" if of.get("release") else ""
        whole = f" of {of['whole_set']}" if of.get("whole_set") else ""
        said.append(f"Benchmark {of['benchmark']}{release}: {results['problems']['n']}{whole} problems.")
        said += [f"Private: {of['private']}."] if of.get("private") else []
    differs = results["sampling"].get("differs_from_paper")
    if differs:
        listed = ", ".join(f"{k} {ours} (paper: {theirs})" for k, (ours, theirs) in differs.items())
        said.append(f"Not the paper's protocol: {listed}.")
    return said + programs(results)


def programs(results: Mapping[str, Any]) -> list[str]:
    """What held the programs, where there were any; sentences."""
    held = results.get("sandbox")
    return [f"Programs ran in the sandbox at the level '{held['level']}', {held['user']}."] if held else []


def _area(entry: Any) -> str:
    test = entry.get("test") if isinstance(entry, Mapping) else None
    found = value_of(test.get("auroc")) if isinstance(test, Mapping) else None
    if not found or not found[1]:
        return UNKNOWN
    low, high = found[1]
    return f".{round(100 * found[0]):02d} [{low:.2f}, {high:.2f}]".replace(".100", "1.00")


def probes_table(results: Mapping[str, Any]) -> list[str]:
    """AUROC on unseen problems: the chosen probe, the paper's spectra, and the controls; empty where none is known."""
    lines = header("level", "shows", "chosen probe", "AUROC", "the paper's spectra", "random channels", "length only")
    known = False
    for level, entry in results["probes"].items():
        controls = entry.get("controls", {})
        areas = [_area(entry.get("chosen") or entry), _area(entry.get("paper"))]
        areas += [_area(controls.get(key)) for key in ("random", "length")]
        known = known or any(area != UNKNOWN for area in areas)
        lines.append(
            row(
                level,
                FAILURES.get(level, level),
                f"{entry.get('features', '–')}, window {entry.get('window', '–')}",
                *areas,
            )
        )
    return lines if known else []


def families_table(results: Mapping[str, Any]) -> list[str]:
    """Accuracy by family, per cent."""
    families = results["problems"]["families"]
    lines = header("arm", *families)
    for a in results["arms"]:
        cells = [a["by_family"].get(f, {}) for f in families]
        lines.append(row(a["name"], *(f"{100 * c['accuracy']:.1f}" if c else "–" for c in cells)))
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page, its heading left to whoever includes it."""
    n, sampling = results["problems"]["n"], results["sampling"]
    how = (
        f"{n} problems of the split {results['problems']['split']}, temperature {sampling['temperature']}, top-p "
        f"{sampling['top_p']}, at most {sampling['max_new_tokens']} tokens; 95 % intervals and paired differences by "
        f"problem (bootstrap, {results['intervals']['resamples']} draws); p by sign flips of problems."
    )
    said = [f"- {s}" for s in [*sentences(results), caution(results)] if s]
    parts = [f"**{headline(results)}**", "", *said, "", how]
    if about := source(results):
        parts += ["", " ".join(about)]
    parts += ["", *arms_table(results)]
    for key, name in (("pass_at", "Pass"), ("cons", "Cons")):
        if table := curves_table(results, key, name):
            parts += ["", f"{name}@k from one draw of {results['seeds']['samples']} samples, per cent:", "", *table]
    parts += ["", "Cost of an answer (forced tokens are among the tokens above, probe tokens are not):", ""]
    parts += costs_table(results)
    if how := results["intervals"].get("seconds"):
        parts += ["", f"Seconds: {how}."]
    if results["skipped"]:
        parts += ["", *(f"Not run: {name} ({why})." for name, why in results["skipped"].items())]
    parts += ["", "Accuracy by family, per cent:", "", *families_table(results)]
    if table := probes_table(results):
        parts += ["", "Probes, on problems that neither fitting nor choosing has seen:", "", *table]
    return "\n".join(parts) + "\n"
