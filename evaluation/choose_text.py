"""What ``choose`` shows: ``choice.md``, and ``frontier.png`` (drawn without a display)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neureasoner.evaluation.cells import header, interval, row
from neureasoner.evaluation.verdict import percent, points
from neureasoner.probes.figures import panels, save

NONE, ONE, MANY, CHOSEN = "#555555", "#1b6ca8", "#e08e0b", "#c0392b"


def _rules(entry: Mapping[str, Any]) -> str:
    """``intra > 0.43 (25%) + instance > 0.6, from step 4``, or that there is none."""
    said = []
    for name, rule in entry["rules"].items():
        asked = f" ({rule['asked']})" if rule["asked"].endswith("%") or rule["asked"] == "own" else ""
        threshold = f" > {rule['threshold']:.4g}{asked}" if "threshold" in rule else ""
        said.append(name + threshold + (f", from step {rule['min_steps']}" if "min_steps" in rule else ""))
    return " + ".join(said) or "no rule"


def candidates_table(found: Mapping[str, Any]) -> list[str]:
    """Every plan, the best first."""
    heads = ("plan", "acts in, %", "accuracy, %", "tokens, % of no plan", "utility", "utility against no plan")
    lines = header(*heads, "against no plan", "on the frontier")
    for c in sorted(found["candidates"], key=lambda c: -c["utility"]):
        against, mark = c.get("against_plan_less"), "**" if c["chosen"] else ""
        cells = [f"{mark}{_rules(c)}{mark}", f"{100 * c['acts_in']:.0f}", interval(c["accuracy"], c["accuracy_ci"])]
        cells += [f"{c['tokens_percent']:.1f}", f"{c['utility']:.2f}"]
        cells += [interval(c["utility_gain"], c["utility_gain_ci"], 1.0, 2, sign="+")] if against else ["–"]
        cells += [f"{points(against)}, {percent(against)}" if against else "–", "yes" if c["frontier"] else ""]
        lines.append(row(*cells))
    return lines


def fate(rule: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Why a rule was kept or dropped, in a sentence."""
    if "gain" not in rule:
        return f"{rule['rule']} is dropped: its probe gave no score, so it was not tried."
    plans = {c["name"]: _rules(c) for c in found["candidates"]}
    gain = interval(rule["gain"], rule["gain_ci"], 1.0, 2, sign="+")
    if rule["kept"]:
        return (
            f"{rule['rule']} is kept: with it the plan is worth {gain} more than without it ({plans[rule['without']]})."
        )
    alone = interval(rule["gain_alone"], rule["gain_alone_ci"], 1.0, 2, sign="+")
    return (
        f"{rule['rule']} is dropped: the best plan with it ({plans[rule['with']]}) is worth {gain} against the chosen "
        f"one; alone, at its best, {alone} against no plan."
    )


def markdown(found: Mapping[str, Any]) -> str:
    """The whole page, its heading left to whoever includes it."""
    chosen = next(c for c in found["candidates"] if c["chosen"])
    n, drawn = len(found["candidates"]), sum(c["drawn"] for c in found["candidates"])
    if chosen["rules"]:
        c, gain = (
            chosen["against_plan_less"],
            interval(chosen["utility_gain"], chosen["utility_gain_ci"], 1, 2, sign="+"),
        )
        first = f"**Chosen: {_rules(chosen)}. Against no plan {points(c)}, {percent(c)}; utility {gain}.**"
    else:
        first = (
            f"**Chosen: no rule. At a price of {found['price']:g} points for one per cent of the tokens no plan is "
            "worth more than none; the plan that is written has no rules.**"
        )
    how = (
        f"Utility: {found['utility']}; price {found['price']:g}. {n} plans on {found['problems']['n']} problems × "
        f"{found['seeds']['samples']} samples with paired seeds ({drawn:,} responses drawn); 95 % intervals by "
        "problem. The best of several looks better than it is: what it brings has to be measured on other problems."
    )
    out = found["out"]
    model, base = found["model"], found["base"]
    after = f"neureasoner assemble --model {model}{f' --base {base}' if base else ''} --plan {out} --out CHECKPOINT"
    parts = [first, "", *(f"- {fate(r, found)}" for r in found["rules"]), "", how, "", *candidates_table(found), ""]
    return "\n".join([*parts, f"Written: {out}/plan.yaml, choice.json, frontier.png. Next: {after}"]) + "\n"


def draw(folder: Path, found: Mapping[str, Any]) -> None:
    """``frontier.png``: tokens against accuracy of every plan, the frontier, and the line of equal utility."""
    figure, (ax,) = panels(1, 4.6)
    figure.set_size_inches(7.2, 4.6)
    best = next(c for c in found["candidates"] if c["chosen"])
    middle = sum(c["tokens_percent"] for c in found["candidates"]) / len(found["candidates"])
    labelled: set[tuple[float, float]] = set()
    for c in sorted(found["candidates"], key=lambda c: len(c["rules"])):
        x, y = c["tokens_percent"], 100 * c["accuracy"]
        colour = (NONE, ONE, MANY)[min(len(c["rules"]), 2)]
        ax.plot(x, y, "o", color=colour, ms=5, zorder=5 - min(len(c["rules"]), 2))
        if (c["frontier"] or c["chosen"]) and (x, y) not in labelled:  # of plans that come to the same, the shortest
            labelled.add((x, y))
            side = {"xytext": (6, 4), "ha": "left"} if x <= middle else {"xytext": (-6, 4), "ha": "right"}
            words = _rules(c).replace(" + ", "\n")
            ax.annotate(words, (x, y), textcoords="offset points", fontsize=6.5, color=colour, **side)
    frontier = sorted((c["tokens_percent"], 100 * c["accuracy"]) for c in found["candidates"] if c["frontier"])
    ax.plot(*zip(*frontier, strict=True), color="#999999", lw=1, zorder=1, label="frontier")
    x, y = best["tokens_percent"], 100 * best["accuracy"]
    low, high = (100 * e for e in best["accuracy_ci"])
    ax.plot([x, x], [low, high], color=CHOSEN, lw=1.2, zorder=2)
    ax.plot(x, y, "*", color=CHOSEN, ms=14, zorder=6, label="chosen, with its 95 % interval")
    ends = ax.get_xlim()
    ax.plot(
        ends, [y + found["price"] * (e - x) for e in ends], ":", color=CHOSEN, lw=1, zorder=1, label="equal utility"
    )
    ax.set_xlim(ends)
    for name, colour in (("no plan", NONE), ("one rule", ONE), ("several rules", MANY)):
        ax.plot([], [], "o", color=colour, ms=5, label=name)
    ax.set_xlabel("tokens, % of no plan")
    ax.set_ylabel("right answers, %")
    ax.set_title(f"{found['problems']['n']} validation problems × {found['seeds']['samples']}", fontsize=9)
    ax.legend(frameon=False, fontsize=7, loc="best")
    save(figure, folder / "frontier.png")
