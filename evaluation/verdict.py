"""What the numbers say, in words that are no stronger than their intervals. Used by the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neureasoner.evaluation.arms import ARMS, FAMILY_CLOSING, FULL, RANDOM, RANDOM_CLOSING, VANILLA


def arm_of(results: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """One arm's entry."""
    return next((a for a in results["arms"] if a["name"] == name), None)


def comparison(results: Mapping[str, Any], arm: str, against: str) -> dict[str, Any] | None:
    """One paired comparison."""
    return next((c for c in results["comparisons"] if (c["arm"], c["against"]) == (arm, against)), None)


def points(c: Mapping[str, Any]) -> str:
    """``+3.1 points [+1.0, +5.2]``."""
    low, high = c["accuracy_delta_ci"]
    return f"{100 * c['accuracy_delta']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def percent(c: Mapping[str, Any]) -> str:
    """``-27% tokens [-31%, -22%]``."""
    low, high = c["tokens_relative_ci"]
    return f"{100 * c['tokens_relative']:+.0f}% tokens [{100 * low:+.0f}%, {100 * high:+.0f}%]"


def _judged(value: float, certain: bool, more: str, less: str, same: str) -> str:
    return (more if value > 0 else less) if certain else same


def figure(arm: Mapping[str, Any]) -> str:
    """``vanilla: 62.0% right [58.1, 65.9], 812 tokens an answer [790, 834].``"""
    (low, high), (fewest, most) = arm["accuracy_ci"], arm["tokens_ci"]
    return (
        f"{arm['name']}: {100 * arm['accuracy']:.1f}% right [{100 * low:.1f}, {100 * high:.1f}], "
        f"{arm['tokens_mean']:.0f} tokens an answer [{fewest:.0f}, {most:.0f}]."
    )


def headline(results: Mapping[str, Any]) -> str:
    """One sentence: more right answers for fewer tokens? Each half is judged by its own interval against vanilla.

    Where full and vanilla were not both run, the figures of vanilla (or of the first arm).
    """
    c = comparison(results, FULL, VANILLA)
    if c is None:
        return figure(arm_of(results, VANILLA) or results["arms"][0])
    right = _judged(c["accuracy_delta"], c["accuracy_shown"], "more right answers", "fewer right answers", "")
    long = _judged(c["tokens_relative"], c["tokens_shown"], "more tokens", "fewer tokens", "")
    figures = f"{points(c)}, {percent(c)}."
    if right and long:
        how = "for" if (right, long) != ("fewer right answers", "more tokens") else "and"
        return f"Full gives {right} {how} {long} than vanilla: {figures}"
    if right:
        return f"Full gives {right} than vanilla, but no difference in tokens is shown: {figures}"
    if long:
        return f"Full takes {long} than vanilla, but no difference in right answers is shown: {figures}"
    return f"No difference between full and vanilla is shown, neither in right answers nor in tokens: {figures}"


def _gain(c: Mapping[str, Any]) -> str:
    verb = _judged(c["accuracy_delta"], c["accuracy_shown"], "gains", "loses", "shows no difference in accuracy:")
    return f"{verb} {points(c)}, {percent(c)}"


def sentences(results: Mapping[str, Any]) -> list[str]:
    """The comparisons that tell where a gain comes from, one sentence each; without full, each against vanilla."""
    said = []
    names = {
        RANDOM: "Against a coin that intervenes as often, full",
        FAMILY_CLOSING: "Against a coin that closes as many thinkings of each family at the same steps, full",
        RANDOM_CLOSING: "Against a coin that closes as many thinkings at the same steps, whatever the family, full",
        "sft_only": "Against the trained model left alone, full",
        "full_paper": "Against the paper's spectral probes, full",
        "self_consistency": "Against a majority vote of equal cost, full",
        "no_thinking_share": "Against a coin that closes as many thinkings at once, full",
    }
    for rival, start in names.items():
        c = comparison(results, FULL, rival)
        if c:
            said.append(f"{start} {_gain(c)}.")
    alone = arm_of(results, FULL) is None
    for name in (n for n, arm in ARMS.items() if (arm.baseline and not arm.default) or alone):
        c = comparison(results, name, VANILLA)
        if c:
            said.append(f"Against vanilla, {name} {_gain(c)}.")
    c = comparison(results, "oracle_trigger", FULL)
    if c:
        room = _judged(
            c["accuracy_delta"],
            c["accuracy_shown"],
            "Better timing would still help: the exact judge's triggers gain",
            "Even the exact judge's triggers do not reach full:",
            "A gain from better timing is not shown: the exact judge's triggers bring",
        )
        said.append(f"{room} {points(c)}, {percent(c)} over full.")
    full, coin = arm_of(results, FULL), arm_of(results, RANDOM)
    if full and coin and full["triggers_per_trace"]:
        ratio = coin["triggers_per_trace"] / full["triggers_per_trace"]
        if abs(ratio - 1) > 0.15:
            said.append(f"Note: the coin intervened {ratio:.2f} times as often as full, so that control is not even.")
    share = results.get("closings", {}).get("share", {}).get("*")
    for name in (FAMILY_CLOSING, RANDOM_CLOSING):
        closing = arm_of(results, name)
        if closing and share and abs(closing["triggers_per_trace"] / share - 1) > 0.15:
            ratio = closing["triggers_per_trace"] / share
            said.append(
                f"Note: {name} closed {ratio:.2f} times as many thinkings as full, so that control is not even."
            )
    for name in (n for n in ARMS if n.startswith("oracle_") and n != "oracle_trigger"):
        c = comparison(results, name, "sft_only")
        if c:
            said.append(f"Against the trained model left alone, {name} {_gain(c)}.")
    times, between = (full.get("speedup"), full.get("speedup_ci")) if full else (None, None)
    if times is not None and between is not None:
        low, high = (f"{x:.2f}" if x is not None else "∞" for x in between)
        said.append(f"Per solved problem, full is {times:.2f} times as fast as vanilla [{low}, {high}].")
    return said


def caution(results: Mapping[str, Any]) -> str:
    """A warning about size, or nothing."""
    n = results["problems"]["n"]
    if n < 300:
        return (
            f"Only {n} problems: intervals are wide, and this run shows that the pipeline works rather than how well. "
            "The full recipe measures it."
        )
    return ""
