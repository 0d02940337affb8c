"""``results.md`` of ``ablate``: the arms, the strengths that were tried, and the gate, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neureasoner.evaluation.cells import header, interval, p_of, row
from neureasoner.evaluation.markdown import programs
from neureasoner.evaluation.verdict import comparison, percent, points

FEW = 8  # seeds below which a table says so


def arms_table(results: Mapping[str, Any]) -> list[str]:
    """Every arm with its intervals, against vanilla and against full."""
    lines = header(
        "arm",
        "strength",
        "steered, %",
        "accuracy, %",
        "mean tokens",
        "truncated, %",
        "against vanilla",
        "full against it",
    )
    for a in results["arms"]:
        c, d = comparison(results, a["name"], "vanilla"), comparison(results, "full", a["name"])
        d = None if a["name"] == "vanilla" else d
        lines.append(
            row(
                a["name"],
                f"{a['strength']:g}" if a["strength"] else "–",
                f"{100 * a['steered']:.0f}",
                interval(a["accuracy"], a["accuracy_ci"]),
                interval(a["tokens_mean"], a["tokens_ci"], 1, 0),
                f"{100 * a['truncated']:.1f}",
                f"{points(c)}, {p_of(c)}; {percent(c)}" if c else "–",
                f"{points(d)}, {p_of(d)}" if d else "–",
            )
        )
    return lines


def tuning_table(results: Mapping[str, Any]) -> list[str]:
    """Accuracy on validation problems at every strength that was tried."""
    lines = header("arm", "strength", "accuracy, %", "against vanilla", "")
    plain = results["tuning"]["vanilla"]
    lines.append(row("vanilla", "–", interval(plain["accuracy"], plain["accuracy_ci"]), "–", ""))
    for t in results["tuning"]["tried"]:
        c = t["against_vanilla"]
        accuracy = interval(t["accuracy"], t["accuracy_ci"])
        lines.append(row(t["arm"], f"{t['strength']:g}", accuracy, points(c), "chosen" if t["chosen"] else ""))
    return lines


def gate_text(gate: Mapping[str, Any]) -> str:
    """What the gate is worth, in two sentences."""

    def area(entry: Mapping[str, Any] | None) -> str:
        if not entry or entry.get("value") is None:
            return "unknown"
        return f"{entry['value']:.2f}" + ("" if entry["low"] is None else f" [{entry['low']:.2f}, {entry['high']:.2f}]")

    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    return (
        f"AUROC of the gate on these test problems {area(gate['auroc'])}, on the test problems it was fitted beside "
        f"{area(gate['fitted'])}. It steers {share(gate['picked'])} of the questions: {share(gate['recall'])} of the "
        f"{gate['failing']} that vanilla solves in less than {share(gate['fails_below'])} of its attempts, and "
        f"{share(gate['picked_of_solved'])} of the others."
    )


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence: does full beat vanilla?"""
    c = comparison(results, "full", "vanilla")
    assert c is not None
    if not c["accuracy_shown"]:
        return f"No difference in accuracy between full and vanilla is shown: {points(c)}, {p_of(c)}; {percent(c)}."
    more = "more" if c["accuracy_delta"] > 0 else "less"
    return f"Full is {more} often right than vanilla: {points(c)}, {p_of(c)}; {percent(c)}."


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page, its heading left to whoever includes it."""
    n, s, seeds = results["problems"], results["sampling"], results["seeds"]
    how = (
        f"{n['test']} test problems, {seeds['samples']} seeds each, temperature {s['temperature']}, "
        f"top-p {s['top_p']}, at most {s['max_new_tokens']} tokens. Strengths were chosen on {n['validation']} other "
        f"problems ({seeds['validation_samples']} seeds each). 95 % intervals (bootstrap) and p-values (sign flips) by "
        f"problem, {results['intervals']['resamples']} draws; no correction for the number of arms."
    )
    parts = [f"**{verdict(results)}**", "", how, "", *arms_table(results), ""]
    parts += [f"- {a['name']}: {a['about']}" for a in results["arms"]]
    if seeds["samples"] < FEW:
        parts += ["", f"Only {seeds['samples']} seeds a problem: this shows that it runs rather than how well."]
    if results["gate"]:
        parts += ["", gate_text(results["gate"])]
    parts += ["", "Strengths on validation problems:", "", *tuning_table(results)]
    parts += [line for said in programs(results) for line in ("", said)]
    return "\n".join(parts) + "\n"
