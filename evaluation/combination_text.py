"""``results.md`` of ``combine``: the arms, the effect of each part alone and beside the others, and pairs of parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neureasoner.evaluation.cells import figures, header, interval, p_of, row
from neureasoner.evaluation.combination_config import ALL, NONE
from neureasoner.evaluation.markdown import programs
from neureasoner.evaluation.verdict import comparison, percent, points

FEW = 8  # seeds below which a page says so


def _points(c: Mapping[str, Any]) -> str:
    return interval(c["accuracy"], c["accuracy_ci"], sign="+")


def _tokens(c: Mapping[str, Any]) -> str:
    return interval(c["tokens"], c["tokens_ci"], 1.0, 0, sign="+")


def _seeds(n: int) -> str:
    return f"{n} seed{'s' if n > 1 else ''}"


def arms_table(results: Mapping[str, Any]) -> list[str]:
    """Every arm with its intervals, against nothing, and everything against it."""
    lines = header(
        "arm", "accuracy, %", "mean tokens", "rules acting", "truncated, %", "against none", "all against it"
    )
    for a in results["arms"]:
        c, d = comparison(results, a["name"], NONE), comparison(results, ALL, a["name"])
        lines.append(
            row(
                a["name"],
                *figures(a),
                f"{points(c)}; {percent(c)}" if c else "–",
                points(d) if d and a["name"] != NONE else "–",
            )
        )
    return lines


def effects_table(results: Mapping[str, Any]) -> list[str]:
    """What each part brings, in points of accuracy and in tokens."""
    mean = any("mean" in e for e in results["effects"])
    cells = ["part", "alone", "beside all others", "difference of the two", *(["over all subsets"] if mean else [])]
    lines = header(*cells, "tokens alone", "tokens beside all others", "difference of the two")
    for e in results["effects"]:
        right = [_points(e["alone"]), _points(e["beside"]), f"{_points(e['change'])}, {p_of(e['change'])}"]
        right += [_points(e["mean"]) if "mean" in e else "–"] if mean else []
        lines.append(row(e["part"], *right, *(_tokens(e[k]) for k in ("alone", "beside", "change"))))
    return lines


def pairs_table(results: Mapping[str, Any]) -> list[str]:
    """Each pair with nothing else on: do the two effects add up?"""
    lines = header("A", "B", "A alone", "A beside B", "B alone", "B beside A", "difference of differences")
    for e in results["pairs"]:
        cells = [_points(e[k]) for k in ("first", "first_beside", "second", "second_beside")]
        lines.append(row(*e["parts"], *cells, f"{_points(e['change'])}, {p_of(e['change'])}"))
    return lines


def sentence(effect: Mapping[str, Any]) -> str:
    """What the effects of one part alone and beside the others say, no stronger than their intervals."""
    alone, beside, change = effect["alone"], effect["beside"], effect["change"]
    seen = "its effect"
    values = f"alone {_points(alone)} points, beside all others {_points(beside)}, difference {_points(change)}"
    if change["accuracy_shown"]:
        if alone["accuracy"] * change["accuracy"] >= 0:
            said = f"{seen} is larger beside the others"
        elif alone["accuracy_shown"] and not beside["accuracy_shown"]:
            said = f"{seen} alone is not to be seen beside the others: they explain it"
        else:
            said = f"{seen} changes beside the others"
    elif alone["accuracy_shown"] or beside["accuracy_shown"]:
        said = "it has an effect, and no change of it by the others is shown"
    else:
        said = "no effect is shown, alone or beside the others"
    return f"{effect['part']}: {said} ({values})."


def tuning_table(results: Mapping[str, Any]) -> list[str]:
    """Accuracy on validation problems at every strength that was tried."""
    lines = header("part", "strength", "accuracy, %", "")
    for t in results["tuning"]:
        accuracy = interval(t["accuracy"], t["accuracy_ci"])
        lines.append(row(t["part"], f"{t['strength']:g}", accuracy, "chosen" if t["chosen"] else ""))
    return lines


def markdown(results: Mapping[str, Any]) -> str:
    """The whole page, its heading left to whoever includes it."""
    n, s, seeds = results["problems"], results["sampling"], results["seeds"]
    parts = [f"- {sentence(e)}" for e in results["effects"]]
    parts += [
        *([""] if parts else []),
        f"{n['test']} problems, {_seeds(seeds['samples'])} each, the same in every arm; temperature "
        f"{s['temperature']}, top-p {s['top_p']}, at most {s['max_new_tokens']} tokens. 95 % intervals (bootstrap) "
        f"and p-values (sign flips) by problem, {results['intervals']['resamples']} draws; no correction for the "
        "number of comparisons.",
        "",
        *arms_table(results),
        "",
    ]
    parts += [f"- {name}: {', '.join(rules)}" for name, rules in results["parts"].items()]
    if results["effects"]:
        parts += ["", "What each part brings (accuracy in points):", "", *effects_table(results)]
    if results["pairs"]:
        parts += ["", "Pairs, nothing else on (accuracy in points):", "", *pairs_table(results)]
    if results["tuning"]:
        parts += ["", f"Strengths on {n['validation']} validation problems, that part alone on:", ""]
        parts += tuning_table(results)
    if seeds["samples"] < FEW:
        parts += ["", f"Only {_seeds(seeds['samples'])} a problem: intervals by problem hold, but they are wide."]
    parts += [line for said in programs(results) for line in ("", said)]
    return "\n".join(parts) + "\n"
