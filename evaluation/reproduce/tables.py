"""One page a table: ours beside the paper's. Reads what the stages of a recipe wrote; measures nothing.

The paper's differences are computed here from its own rows; they come without intervals, which it does not give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neureasoner.errors import UserError
from neureasoner.evaluation.cells import header, interval, row
from neureasoner.evaluation.combination_config import ALL, NONE, WITHOUT
from neureasoner.evaluation.reproduce.paper import paper
from neureasoner.evaluation.verdict import arm_of, comparison, percent, points

DASH = "–"
LEVELS = ("intra", "inter", "instance")


@dataclass(frozen=True)
class Found:
    """What a page is written from.

    results   by label of the recipe's stage (a benchmark's name where there are several)
    folders   where each of them lies
    run_dir   the recipe's run directory, for figures
    of, same  the paper's model printed beside ours; whether it is ours
    """

    results: Mapping[str, Mapping[str, Any]]
    folders: Mapping[str, Path]
    run_dir: Path
    of: str = ""
    same: bool = False
    files: list[str] = field(default_factory=list)


def pair(cell: Sequence[float] | None, base: Sequence[float] | None = None) -> str:
    """The paper's accuracy and tokens, and how far they are from a base: ``96.3 / 1318 (+3.0, -44 %)``."""
    if cell is None:
        return DASH
    text = f"{cell[0]:.1f} / {cell[1]:.0f}"
    if base is None or base is cell:
        return text
    return f"{text} ({cell[0] - base[0]:+.1f}, {100 * (cell[1] / base[1] - 1):+.0f} %)"


def ours(results: Mapping[str, Any], name: str) -> str:
    """Our accuracy with its interval, and mean tokens; a dash where the arm was not run."""
    arm = arm_of(results, name)
    if arm is None:
        return DASH
    return f"{interval(arm['accuracy'], arm['accuracy_ci'])} / {arm['tokens_mean']:.0f}"


def gain(results: Mapping[str, Any], arm: str, against: str) -> str:
    """Our paired difference in points and tokens with intervals, or a dash."""
    c = comparison(results, arm, against)
    return f"{points(c)}, {percent(c)}" if c else DASH


# The arms without which a table cannot be written, and how a recipe comes by them.
NEEDS: dict[str, tuple[list[str], str]] = {
    "table2": (
        [NONE, *(f"{WITHOUT}{level}" for level in LEVELS), ALL],
        "it needs the parts intra, inter and instance and `arms: minus`",
    ),
    "table7": (
        [*(f"{level}_{w}" for level in LEVELS for w in (2, 8)), ALL],
        "it needs probes of window 4 and these variants",
    ),
    "figure5": (["vanilla", "full"], "name both in its `arms`"),
}


def need(table: str, label: str, arms: Sequence[str]) -> None:
    """Raises UserError naming the arms that ``table`` is written from and a stage lacks."""
    names, how = NEEDS[table]
    missing = [n for n in names if n not in arms]
    if missing:
        raise UserError(f"stage '{label}' has no arm {', '.join(missing)}; {how}")


def _names(results: Mapping[str, Any]) -> list[str]:
    return [a["name"] for a in results["arms"]]


def methods(found: Found, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tables 1 and 5: methods by benchmark. Ours by label of the stage, the paper's where it names the benchmark."""
    arms = paper()["methods"]
    theirs = list(next(iter(rows.values())))
    shared = [b for b in theirs if b in found.results]
    printed = shared or theirs
    heads = [h for label in found.results for h in (f"ours: {label}", "against vanilla")]
    lines = header("method", *heads, *(f"paper: {b}" for b in printed))
    named = {arm: method for method, arm in arms.items()}
    ran = list(dict.fromkeys(a["name"] for r in found.results.values() for a in r["arms"]))
    listed = {m: arms.get(m, "") for m in rows}
    listed |= {
        named.get(a, a): a for a in ran if a not in listed.values()
    }  # of another table of the paper, or ours alone
    for method, arm in listed.items():
        cells = [c for r in found.results.values() for c in (ours(r, arm), gain(r, arm, "vanilla"))]
        cells += [pair(rows.get(method, {}).get(b), rows["Vanilla"].get(b)) for b in printed]
        label = method if method == arm or not arm else f"{method} (`{arm}`)"
        lines.append(row(label, *cells))
    return [
        *lines,
        "",
        "Accuracy in % / mean tokens; the paper's differences to its vanilla row in brackets. A dash: not run here "
        "(the method trains a model of its own, or the arm was left out), or not in the paper.",
    ]


def table1(found: Found) -> list[str]:
    """Methods on five benchmarks."""
    return methods(found, paper()["table1"][found.of])


def table5(found: Found) -> list[str]:
    """Methods on AIME24."""
    return methods(found, paper()["table5"][found.of])


def table2(found: Found) -> list[str]:
    """Ablation: the plan without each of its rules."""
    theirs = paper()["table2"][found.of]
    arms = {"without all MLPs": NONE} | {f"without {p}": f"{WITHOUT}{p}" for p in LEVELS} | {"full": ALL}
    benchmarks = list(theirs["full"])
    heads = [h for label in found.results for h in (f"ours: {label}", "full against it")]
    lines = header("variant", *heads, *(h for b in benchmarks for h in (f"paper: {b}", "full against it")))
    for label, results in found.results.items():
        need("table2", label, _names(results))
    for variant, arm in arms.items():
        cells = [c for r in found.results.values() for c in (ours(r, arm), gain(r, ALL, arm))]
        for b in benchmarks:
            full, it = theirs["full"][b], theirs[variant][b]
            difference = f"{full[0] - it[0]:+.1f} points, {100 * (full[1] / it[1] - 1):+.0f}% tokens"
            cells += [pair(it), DASH if variant == "full" else difference]
        lines.append(row(variant, *cells))
    return [*lines, "", "Accuracy in % / mean tokens; ours with 95 % intervals, differences in pairs of problems."]


def _mean_sd(entry: Mapping[str, Any]) -> str:
    return f"{entry['mean']:.3f} ± {entry['sd']:.3f}"


def _value(entry: Mapping[str, Any]) -> str:
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def table4(found: Found) -> list[str]:
    """Accuracy and recall of the probes: by the paper's split, by trajectory, by problem."""
    by = ("ours, its protocol", "the same tokens, by trajectory", "its features, by problem", "best, by problem")
    lines = header("level", "paper", *by)
    for results in found.results.values():
        for level, entry in results["levels"].items():
            theirs = paper()["table4"][level]
            run = entry["table_4"]
            own = [f"not run: {run['skipped']}"] * 2 if "skipped" in run else []
            own = own or [
                f"{_mean_sd(run[s]['accuracy'])} / {_mean_sd(run[s]['recall'])}" for s in ("tokens", "trajectories")
            ]
            sets = {e["set"]: e["balanced"] for e in entry["sets"] if not e["control"]}
            by_problem = [
                f"{_value(sets[s]['accuracy'])} / {_value(sets[s]['recall'])}" if s in sets else DASH
                for s in ("spectral", entry["chosen"])
            ]
            lines.append(row(level, f"{theirs['accuracy']:.3f} / {theirs['recall']:.3f}", *own, *by_problem))
    return [
        *lines,
        "",
        "Accuracy / recall. The paper splits the tokens of its trajectories at random; by problem, no problem has "
        "traces on both sides, and the threshold is the one with the best balanced accuracy on validation problems.",
    ]


def table6(found: Found) -> list[str]:
    """Wall time, vanilla and with the plan."""
    from neureasoner.evaluation.reproduce.runtime import percent as overhead

    lines = header("", "vanilla, s", "ours, s", "longer by", "tokens")
    for label, r in found.results.items():
        plain, watched, free = (r["arms"][k] for k in ("plain", "watched", "free"))
        same = f"{plain['tokens']} in both"
        cells = [f"{plain['seconds']:.1f}", f"{watched['seconds']:.1f}", overhead(r["watching"]), same]
        lines.append(row(f"ours: {label}, equal tokens (watched, nobody intervenes)", *cells))
        cells = [f"{plain['seconds']:.1f}", f"{free['seconds']:.1f}", overhead(r["free"]), overhead(r["free_tokens"])]
        lines.append(row(f"ours: {label}, running free", *cells))
    for benchmark, (vanilla, theirs) in paper()["table6"][found.of].items():
        more = f"{100 * (theirs / vanilla - 1):+.1f} %"
        lines.append(row(f"paper: {benchmark}", f"{vanilla}", f"{theirs}", more, "not given"))
    machines = ", ".join(sorted({r["device"] for r in found.results.values()}))
    return [
        *lines,
        "",
        f"Ours on {machines}, vanilla being the checkpoint's own model without its plan; the paper's on an A100. It "
        "says that its tokens fall by 20 to 63 %, so its longer times can only be those of equal tokens, or of a "
        "controller that waits.",
    ]


def table7(found: Found) -> list[str]:
    """Window sizes 2, 4 and 8 of each level, the others at 4."""
    theirs = paper()["table7"][found.of]
    heads = [f"{who}: {w}" for who in ("ours", "paper") for w in (2, 4, 8)]
    lines: list[str] = []
    for label, results in found.results.items():
        need("table7", label, _names(results))
        lines += ["", f"{label}:", ""] if len(found.results) > 1 else []
        lines += header("window of", *heads, "ours: 2 against 4", "ours: 8 against 4")
        for level in LEVELS:
            arms = [f"{level}_2", ALL, f"{level}_8"]
            cells = [ours(results, a) for a in arms] + [pair(theirs[level][w]) for w in (2, 4, 8)]
            lines.append(row(level, *cells, *(_turned(comparison(results, ALL, arms[i])) for i in (0, 2))))
    return [*lines, "", "Accuracy in % / mean tokens. One window is changed at a time, the two others are at 4."]


def _turned(c: Mapping[str, Any] | None) -> str:
    """The accuracy difference of a comparison the other way round."""
    assert c is not None
    low, high = c["accuracy_delta_ci"]
    # 0 - 0 is 0, while -0 prints as -0.0
    return points({"accuracy_delta": 0 - c["accuracy_delta"], "accuracy_delta_ci": [0 - high, 0 - low]})


def figure5(found: Found) -> list[str]:
    """Cons@k with and without, and the figure."""
    from neureasoner.evaluation.reproduce.consistency import curves, figure

    lines: list[str] = []
    for label, results in found.results.items():
        need("figure5", label, _names(results))
        drawn = curves(found.folders[label], ["vanilla", "full"], results)
        lines += ["", f"{label}:", ""] if len(found.results) > 1 else []
        lines += header("k", "vanilla, %", "NeuReasoner (`full`), %", "difference, points")
        for k, difference in drawn["difference"].items():
            cells = [interval(drawn["arms"][a][k]["accuracy"], drawn["arms"][a][k]["ci"]) for a in ("vanilla", "full")]
            lines.append(row(str(k), *cells, interval(difference["accuracy"], difference["ci"], sign="+")))
        name = "figure5.png" if len(found.results) == 1 else f"figure5_{label.replace(' ', '_')}.png"
        figure(drawn, {"vanilla": "vanilla", "full": "NeuReasoner"}).savefig(found.run_dir / name, dpi=150)
        found.files.append(name)
        lines += ["", f"![Cons@k]({name})"]
    theirs = paper()["figure5"]
    return [*lines, "", f"The paper, {theirs['model']} on {theirs['benchmark']}: {theirs['says']}."]


WRITERS: dict[str, Callable[[Found], list[str]]] = {
    "table1": table1,
    "table2": table2,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "figure5": figure5,
}
