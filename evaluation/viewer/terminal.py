"""``evaluation show``: the report for people over ssh. Traces of two arms side by side, with marks, colours and scores.

Works in 80 columns and when piped: what colour says, the margin says too. Text of traces reaches the terminal through
``printable.safe``, so that no control character in it acts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from rich.console import Console
from rich.text import Text

from neureasoner.config import closest
from neureasoner.errors import UserError
from neureasoner.evaluation.examples import (
    KINDS,
    OF_STEPS,
    UNJUDGED,
    false_alarms,
    fits,
    interest,
    interventions,
    is_right,
    main_pair,
    misses,
    steps_judged,
    thresholds,
)
from neureasoner.evaluation.run_folder import load_results, load_traces
from neureasoner.evaluation.show import BLOCK, LOOP, WRONG, coloured, verdict
from neureasoner.evaluation.viewer.config import ShowConfig
from neureasoner.evaluation.viewer.details import FILE, Details
from neureasoner.printable import safe
from neureasoner.traces import Trace

LEAST = 72  # columns in which two traces stand side by side
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
MARKS = {"wrong": ("✗", "x", WRONG), "loop": ("↻", "o", LOOP), "block": ("▶", ">", BLOCK)}
COLOURS = {"intra": "yellow", "inter": "blue", "instance": "magenta"}


def sparkline(scores: Sequence[float], width: int, low: float = 0.0, high: float = 1.0, bars: str = BARS) -> str:
    """At most ``width`` characters; where several scores share one, the highest is shown."""
    n = min(width, len(scores))
    if n <= 0:
        return ""
    groups = [scores[i * len(scores) // n : (i + 1) * len(scores) // n] for i in range(n)]
    tops = [(max(group) - low) / ((high - low) or 1.0) for group in groups]
    return "".join(bars[min(len(bars) - 1, max(0, int(top * len(bars))))] for top in tops)


def score_lines(trace: Trace, limits: Mapping[str, float], width: int, bars: str = BARS) -> list[Text]:
    """Each rule's scores from step to step, the highest, and the threshold; on two lines where one is too narrow."""
    lines, rules = [], dict[str, list[tuple[int, float]]]()
    for s in trace.meta.get("scores", []):
        rules.setdefault(s["rule"], []).append((s["step"], float(s["score"])))
    for rule, scores in rules.items():
        step, top = max(scores, key=lambda pair: pair[1])
        values, limit = [v for _, v in scores], limits.get(rule)
        bounds = values if limit is None else [*values, limit]
        note = f"{top:.2f} at step {step + 1}" + ("" if limit is None else f", limit {limit:.2f}")
        line = Text(f"{safe(rule):<9}", style=COLOURS.get(rule, "cyan"))
        room = width - line.cell_len - len(note) - 1
        two = room < min(24, len(scores))
        if two:
            room = width - line.cell_len
        line.append(sparkline(values, room, min(0.0, *bounds), max(1.0, *bounds), bars))
        if not two:
            line.append(" ").append(note, style="dim")
        lines += [line, Text(" " * 9 + note, style="dim")] if two else [line]
    return lines


def marks(trace: Trace) -> dict[int, str]:
    """What stands in the margin of a step: ``wrong``, ``loop`` or ``block``."""
    labels, out = trace.labels, dict[int, str]()
    if labels and labels.inter.steps:
        out |= dict.fromkeys(range(*labels.inter.steps), "loop")
    if labels and labels.intra.has_error and labels.intra.step is not None:
        out[labels.intra.step] = "wrong"
    return out | {e["step"] + 1: "block" for e in interventions(trace)}


def side(trace: Trace, limits: Mapping[str, float], width: int, console: Console, plain: bool) -> list[Text]:
    """One trace as lines of at most ``width`` columns: verdict, scores, numbered steps, answer."""
    given = trace.labels.answer if trace.labels else None
    grade = "right" if is_right(trace) else "wrong" if trace.finished else "cut off"
    head = Text(safe(str(trace.meta.get("arm", ""))), style="bold")
    head.append(f" {grade}", style="green" if is_right(trace) else "red").append(f", answer {safe(given or 'none')}, ")
    head.append(f"{len(trace.response_ids):,} tokens", style="dim")
    lines = list(head.wrap(console, width))
    for e in interventions(trace):
        what = f"{e['rule']} after step {e['step'] + 1}"
        what += f": {e['score']:.2f} against {e['threshold']:.2f}" if "threshold" in e else ""
        lines += Text(safe(what), style=COLOURS.get(e["rule"], "cyan")).wrap(console, width)
    for word, rules in (("false alarm", false_alarms(trace)), ("missed", misses(trace))):
        if rules:
            lines.append(Text(f"{word}: {', '.join(rules)}", style="bold red"))
    lines += score_lines(trace, limits, width, PLAIN_BARS if plain else BARS)
    lines.append(Text(("-" if plain else "─") * width, style="dim"))
    text, found = coloured(trace), marks(trace)
    end = trace.steps[-1].char_end if trace.steps else 0
    size = len(text.plain)
    starts = [min(s.char_start, size) for s in trace.steps] + [min(end, size)]
    cuts = sorted({*starts, *(min(s.char_end, size) for s in trace.steps)})
    part_at = dict(zip([0, *cuts], text.divide(cuts), strict=True))  # text[a:b] copies all of it
    for i, start in enumerate(starts):
        piece = part_at[start]
        piece.rstrip()
        if not piece.plain.strip():
            continue
        rich, ascii, style = MARKS.get(found.get(i, ""), (" ", " ", ""))
        number = f"{i + 1:>3}" if i < len(trace.steps) else "  ="
        for k, line in enumerate(piece.wrap(console, max(8, width - 5))):
            margin = Text(number if k == 0 else "   ", style="dim").append(ascii if plain else rich, style=style)
            lines.append(margin.append(" ").append_text(line))
    return lines


def beside(left: list[Text], right: list[Text], width: int, plain: bool) -> list[Text]:
    """Two columns of ``width`` as one."""
    out = []
    for a, b in zip_longest(left, right, fillvalue=Text()):
        line = a.copy()
        line.pad_right(max(0, width - line.cell_len))
        out.append(line.append(" | " if plain else " │ ", style="dim").append_text(b))
    return out


def _arm(name: str, default: str, known: Sequence[str]) -> str:
    if name and name not in known:
        raise UserError(f"arm '{name}' has no traces here{closest(name, known)}; there are {', '.join(known)}")
    return name or default


def _with_scores(trace: Trace, details: Details | None, arm: str) -> Trace:
    found = details.of(arm, trace) if details and not trace.meta.get("scores") else None
    if found:
        keys = ("rule", "step", "token", "score")
        trace.meta["scores"] = [dict(zip(keys, row, strict=True)) for row in found["scores"]]
    return trace


def terminal(config: ShowConfig, console: Console | None = None) -> None:
    """Stage ``evaluation show``: print the arms, then the traces that fit, the most telling first.

    Raises UserError for a folder that is no finished evaluation's, and an arm that has no traces in it.
    """
    results = load_results(config.run)
    names = [a["name"] for a in results["arms"] if (Path(config.run) / "traces" / f"{a['name']}.jsonl").is_file()]
    first, main = main_pair(names)
    arm = _arm(config.arm, main, names)
    rival = "" if config.beside == "none" else _arm(config.beside, first, names)
    rival = "" if rival == arm else rival
    if console is None:
        if not sys.stdout.isatty() and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        console = Console(highlight=False, width=config.width or None)
    plain = "utf" not in (console.encoding or "").lower()
    verdict(results, console)
    if config.traces and arm:
        _traces(config, arm, rival, console, plain)


def _traces(config: ShowConfig, arm: str, rival: str, console: Console, plain: bool) -> None:
    traces = load_traces(config.run, [arm, *([rival] if rival else [])])
    details = Details.beside(config.run) if (Path(config.run) / FILE).is_file() else None
    rows = [t for t in traces[arm] if t.meta.get("sample", 0) == config.sample]
    others = {t.problem.id: t for t in traces.get(rival, []) if t.meta.get("sample", 0) == config.sample}
    words = config.search.lower()
    found = [
        (others.get(t.problem.id), t)
        for t in rows
        if (not config.only or fits(config.only, t, others.get(t.problem.id)))
        and config.family in ("", t.problem.family)
        and words in "\n".join([t.problem.id, t.problem.question, t.response]).lower()
    ]
    found.sort(key=lambda pair: interest(*pair) if pair[0] else (6, 0))  # type: ignore[arg-type]
    what = KINDS.get(config.only, "in all") + (f" against {rival}" if config.only in ("to_right", "to_wrong") else "")
    console.print()
    console.print(Text(f"{len(found)} of {len(rows)} traces of {arm}, {what}; {min(config.traces, len(found))} shown"))
    blind = sum(not steps_judged(t) for t in rows) if config.only in OF_STEPS else 0
    if blind:
        console.print(Text(f"{blind} of them were {UNJUDGED}"))
    limits = thresholds(traces)
    fallback = details.meta["thresholds"] if details else {}
    for other, trace in found[: config.traces]:
        p = trace.problem
        console.print()
        console.print(Text(safe(f"{p.id}  {p.family}, difficulty {p.difficulty}"), style="dim"))
        console.print(Text(safe(p.question), style="bold cyan"))
        console.print(Text(safe(f"right answer {p.answer}"), style="dim"))
        pair = [(rival, other)] if other is not None else []
        pair += [(arm, trace)]
        stacked = len(pair) == 1 or console.width < LEAST
        width = console.width - 1 if stacked else (console.width - 3) // 2
        sides = [
            side(_with_scores(t, details, name), fallback | limits.get(name, {}), width, console, plain)
            for name, t in pair
        ]
        lines = [line for s in sides for line in [*s, Text()]] if stacked else beside(sides[0], sides[1], width, plain)
        for line in lines:
            line.rstrip()
            console.print(line, soft_wrap=True)
