"""The end of an evaluation in a terminal: a short table, a few traces with the interventions in colour, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neureasoner.evaluation.arms import FULL, VANILLA
from neureasoner.evaluation.examples import interest, interventions, is_right, paired
from neureasoner.evaluation.run_folder import load_results, load_traces
from neureasoner.evaluation.verdict import caution, comparison, headline, sentences
from neureasoner.printable import safe
from neureasoner.traces import Trace

FORCED, BLOCK, WRONG, LOOP = "bold black on green", "green", "bold red", "yellow"
WIDE = 104  # columns in which a value and its interval stand on one line


def table(results: Mapping[str, Any], wide: bool = True) -> Table:
    """Accuracy and tokens of every arm, with intervals and paired differences against vanilla.

    Fits into 80 columns unless ``wide``.
    """
    gap = " " if wide else "\n"
    out = Table(
        box=box.HEAVY_HEAD if wide else box.SIMPLE_HEAD,
        title=Text(safe(f"{results['problems']['n']} problems, split {results['problems']['split']}")),
        title_justify="left",
    )
    out.add_column("arm", no_wrap=True)
    for name in ("accuracy", "tokens", "Δ accuracy", "Δ tokens", "triggers"):
        out.add_column(name, justify="right", no_wrap=True)
    for a in results["arms"]:
        c, (low, high) = comparison(results, a["name"], VANILLA), a["accuracy_ci"]
        tokens = a["tokens_ci"]
        out.add_row(
            Text(safe(a["name"])),
            f"{100 * a['accuracy']:.1f}%{gap}[{100 * low:.0f}, {100 * high:.0f}]",
            f"{a['tokens_mean']:.0f}{gap}[{tokens[0]:.0f}, {tokens[1]:.0f}]",
            _delta(c, "accuracy_delta", "accuracy_shown", 1, " pt" + gap),
            _delta(c, "tokens_relative", "tokens_shown", -1, "%" + gap),
            f"{a['triggers_per_trace']:.2f}",
            style="bold" if a["name"] in (VANILLA, FULL) else "",
        )
    return out


def _delta(c: Mapping[str, Any] | None, key: str, certain: str, good: int, unit: str) -> Text:
    if c is None:
        return Text("–")
    low, high = c[f"{key}_ci"]
    style = ("green" if c[key] * good > 0 else "red") if c[certain] else ""
    return Text(f"{100 * c[key]:+.1f}{unit}[{100 * low:+.0f}, {100 * high:+.0f}]", style=style)


def coloured(trace: Trace) -> Text:
    """The response: wrong step red, circle amber, intervention green, forced text inverted."""
    text, labels = Text(safe(trace.response).rstrip("\n")), trace.labels
    blocks = {e["step"] + 1 for e in interventions(trace)}
    for i, step in enumerate(trace.steps):
        if labels and labels.inter.steps and labels.inter.steps[0] <= i < labels.inter.steps[1]:
            text.stylize(LOOP, step.char_start, step.char_end)
        if labels and labels.intra.has_error and labels.intra.step == i:
            text.stylize(WRONG, step.char_start, step.char_end)
        if i in blocks:
            text.stylize(BLOCK, step.char_start, step.char_end)
    for start, end in trace.meta.get("forced_chars", []):
        text.stylize(FORCED, start, end)
    return text


def choose_examples(traces: Mapping[str, Sequence[Trace]], n: int) -> tuple[str, list[tuple[Trace, Trace]]]:
    """A title that is true of what follows, and (vanilla, full) pairs."""
    pairs = sorted(paired(traces), key=lambda pair: interest(*pair))
    repaired = [p for p in pairs if interest(*p)[0] <= 1]
    if len(repaired) >= n:
        return f"{n} of {len(repaired)} answers that vanilla got wrong and full got right after stepping in", repaired[
            :n
        ]
    acted = [p for p in pairs if interventions(p[1])]
    if acted:
        title = f"{len(repaired)} answer(s) that vanilla got wrong and full got right after stepping in"
        return title + ("; more interventions follow" if len(acted) > len(repaired) else ""), acted[:n]
    return "full never stepped in", []


def show(out: str | Path, examples: int = 3, console: Console | None = None) -> None:
    """Print the end of an evaluation from its folder."""
    console = console or Console(highlight=False)
    results = load_results(out)
    if examples:
        title, pairs = choose_examples(load_traces(out, [VANILLA, FULL]), examples)
        console.rule(f"[bold]{title}[/bold]", align="left")
        for vanilla, full in pairs:
            p = full.problem
            console.print(
                Text(safe(p.question), style="bold cyan"), Text(safe(f"right answer {p.answer}"), style="dim")
            )
            for name, trace in ((VANILLA, vanilla), (FULL, full)):
                grade = Text("right", style="green") if is_right(trace) else Text("wrong", style="red")
                given = trace.labels.answer if trace.labels else None
                head = Text(f"── {name}: answers {safe(given or 'nothing')}, ", style="bold")
                console.print(head + grade + Text(f", {len(trace.response_ids)} tokens", style="dim"))
                console.print(coloured(trace))
            console.print()
    verdict(results, console)
    console.print(f"report: {Path(out) / 'report.html'}", soft_wrap=True)


def verdict(results: Mapping[str, Any], console: Console) -> None:
    """The table of arms, and what may be said of it."""
    console.print(table(results, console.width >= WIDE))
    console.print(Text(safe(headline(results)), style="bold"))
    for sentence in [*sentences(results), caution(results)]:
        if sentence:
            console.print(Text(safe("• " + sentence)))
