"""The detectors' figures in words: the table of ``probes fit`` and the Markdown of ``probes report``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PAPER_TABLE_4 = {"intra": (0.871, 0.848), "inter": (0.862, 0.936), "instance": (0.944, 0.951)}  # accuracy, recall


def _cell(value: dict[str, Any] | None, digits: int = 2) -> str:
    if not value or value["value"] is None:
        return "–"
    if value["low"] is None:
        return f"{value['value']:.{digits}f}"
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def print_table(results: dict[str, Any]) -> None:
    """One row per probe and control: figures on test problems with 95 % intervals."""
    from rich.console import Console
    from rich.table import Table

    title = f"probes on {results['split']['test']['problems']} test problems (95 % intervals by problem)"
    table = Table(title=title, title_justify="left")
    table.add_column("level")
    table.add_column("probe", overflow="fold")
    for name in ("AUROC", "recall", "precision", "false alarms /1k tok", "clean traces alarmed", "delay, tokens"):
        table.add_column(name, justify="right")
    once = lambda level, prefix, entry: level == "instance" and ("exit" not in entry or prefix == "paper: ")  # noqa: E731
    for level, entry in results["levels"].items():
        rows = {"": entry["chosen"]} | ({"paper: ": entry["paper"]} if "paper" in entry else {})
        rows |= {"random: ": entry["controls"]["random"], "control: ": entry["controls"]["length"]}
        for i, (prefix, probe) in enumerate(rows.items()):
            test = probe["test"]
            table.add_row(
                level if i == 0 else "",
                f"{prefix}{probe['name']} ({'K' if once(level, prefix, entry) else 'k'}={probe['window']})",
                _cell(test["auroc"]),
                _cell(test["recall"]),
                _cell(test["precision"]),
                _cell(test["false_alarms_per_1000_tokens"]),
                _cell(test["clean_traces_alarmed"]),
                _cell(test.get("delay_tokens"), 0),
                style="bold" if i == 0 else "",
                end_section=i == len(rows) - 1,
            )
    console = Console()
    console.print(table)
    for entry in results["levels"].values():
        if "exit" in entry:
            console.print(_exit_table(entry["exit"]))
    for warning in results["warnings"]:
        console.print(f"[yellow]warning[/] {warning}", highlight=False)


def _exit_table(found: dict[str, Any]) -> Any:
    """The exit and its controls: what each knows beyond the family, and what closing by it brings on test problems."""
    from rich.table import Table

    title = (
        f"instance: closing the thinking from step {found['from_step']} on, thresholds by utility on validation "
        f"(1 % of the tokens is worth {found['price']} points)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("closes by")
    heads = ("AUROC", "within family", "closed", "points", "tokens saved %", "of solved", "of hopeless")
    for name in heads:
        table.add_column(name, justify="right")
    names = {"chosen": "the probe", "family": "family alone", "length": "length alone", "random": "random channels"}
    for key, label in {**names, "always": "always, at once"}.items():
        f = found[key]
        cells = [_cell(f["auroc"]), _cell(f["within_family"]), _cell(f["closed"]), _cell(f["points"], 1)]
        cells += [_cell(part["tokens_saved"], 1) for part in (f, f["solved"], f["hopeless"])]
        table.add_row(label, *cells, style="bold" if key == "chosen" else "")
    return table


def _rows(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    return [
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
        *("| " + " | ".join(str(c) for c in row) + " |" for row in rows),
        "",
    ]


def _plain(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table_4(level: str, entry: dict[str, Any]) -> list[str]:
    run = entry["table_4"]
    lines = ["### The paper's own protocol (its Table 4)", ""]
    if "skipped" in run:
        return [*lines, f"Not run: {run['skipped']}.", ""]
    lines += [
        f"{run['drawn']} trajectories, one sample a token ({run['samples']} on average), the paper's features "
        "and MLP, 8:2, threshold 0.5; mean ± sd over draws of trajectories. "
        f"Paper: accuracy {PAPER_TABLE_4[level][0]}, recall {PAPER_TABLE_4[level][1]}.",
        "",
    ]
    names = ("accuracy", "majority", "balanced_accuracy", "recall", "auroc")
    label = {"tokens": "random tokens (as in the paper)", "trajectories": "by trajectory (no two of one problem)"}
    rows = []
    for split, title in label.items():
        found = run[split]
        cells = [f"{found[k]['mean']:.3f} ± {found[k]['sd']:.3f}" if k in found else "–" for k in names]
        rows.append([title, *cells, found["runs"]])
    return lines + _rows(["split", "accuracy", "larger class", "balanced accuracy", "recall", "AUROC", "runs"], rows)


def _sets(level: str, entry: dict[str, Any], budget: float) -> list[str]:
    loops = level != "instance"
    head = [
        "features",
        "d",
        "estimator",
        "AUROC",
        "average precision",
        "Brier",
        "false alarms /1k tok",
        "clean alarmed",
    ]
    head += ["failing found", "delay, tokens"] if loops else ["recall", "precision"]
    rows = []
    for e in sorted(entry["sets"], key=lambda e: e["control"]):
        t = e["test"]
        name = f"**{e['set']}**" if e["set"] == entry["chosen"] else ("control: " if e["control"] else "") + e["set"]
        last = ("failing_traces_detected", "delay_tokens") if loops else ("recall", "precision")
        cells = [_cell(t["auroc"], 3), _cell(t["average_precision"], 3), _cell(t["brier"], 3)]
        cells += [_cell(t["false_alarms_per_1000_tokens"]), _cell(t["clean_traces_alarmed"])]
        cells += [_cell(t[last[0]]), _cell(t[last[1]], 0 if loops else 2)]
        rows.append([name, e["dims"], e["estimator"], *cells])
    first = entry["sets"][0]["test"]
    lines = [
        "### Feature sets, by problem",
        "",
        f"Estimator and settings chosen on validation, threshold there for {budget:.0%} of clean traces alarmed; test "
        f"problems ({first['n']} decisions, base rate {first['base_rate']}). Bold: best on validation.",
        "",
        *_rows(head, rows),
        "Per decision, at the threshold with the best balanced accuracy on validation:",
        "",
    ]
    rows = [
        [e["set"], *(_cell(e["balanced"][k], 3) for k in ("accuracy", "balanced_accuracy", "recall", "precision"))]
        for e in sorted(entry["sets"], key=lambda e: e["control"])
    ]
    return lines + _rows(["features", "accuracy", "balanced accuracy", "recall", "precision"], rows)


def _controls(entry: dict[str, Any]) -> list[str]:
    lines = ["### Shuffled labels, estimators, splits", ""]
    for e in entry["shuffled"]:
        lines.append(
            f"- {e['set']}, training labels permuted: test AUROC {e['mean']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"
        )
    lines += [
        "",
        *_rows(
            ["features", "estimator", "validation AUROC", "test AUROC"],
            (
                [e["set"], e["estimator"], _plain(e["validation_auroc"]), _cell(e["auroc"], 3)]
                for e in entry["estimators"]
            ),
        ),
    ]
    families = list(entry["splits"][0]["by family"])
    head = ["features (logistic)", "random decisions", "by problem", *(f"{f}: seen → held out" for f in families)]
    rows = []
    for e in entry["splits"]:
        pairs = (e["by family"][f] for f in families)
        rows.append(
            [
                e["set"],
                _cell(e["random decisions"], 3),
                _cell(e["by problem"], 3),
                *(f"{_cell(p['seen'], 3)} → {_cell(p['held out'], 3)}" for p in pairs),
            ]
        )
    return [*lines, "Test AUROC by split; the random split's range is over draws:", "", *_rows(head, rows)]


def _curve(entry: dict[str, Any]) -> list[str]:
    sizes = sorted({c["trajectories"] for curve in entry["curve"].values() for c in curve})
    rows = []
    for name, curve in entry["curve"].items():
        at = {c["trajectories"]: c for c in curve}
        rows.append([name, *(f"{at[s]['mean']:.3f}" if s in at else "–" for s in sizes)])
    return ["### Learning curve: test AUROC by labelled trajectories", "", *_rows(["features", *map(str, sizes)], rows)]


def _nested(entry: dict[str, Any]) -> list[str]:
    lines = ["### What a part adds to others (paired by problem)", ""]
    for kind, pairs in entry["nested"].items():
        rows = []
        for e in pairs:
            sure = e.get("confident")
            rows.append(
                [
                    f"{e['smaller']} → {e['larger']}",
                    " → ".join(_plain(a["value"]) for a in e["auroc"]),
                    _cell(e["auroc_difference"], 3),
                    _cell(e["log_loss_difference"], 4),
                    f"{_cell(sure['auroc_difference'], 3)} ({sure['failing']})" if sure else "–",
                    "; ".join(f"{f} {_cell(v, 3)}" for f, v in e["by_family"].items()),
                ]
            )
        head = [
            "smaller → larger",
            "AUROC",
            "difference",
            "log loss, difference",
            "where the smaller is sure",
            "by family",
        ]
        lines += [f"Estimator {kind}:", "", *_rows(head, rows)]
    told = "; ".join(
        f"{k}: mean R² {v['mean_r2']:.2f}, largest {v['max_r2']:.2f}" for k, v in entry["redundancy"].items()
    )
    return [
        *lines,
        "*Where the smaller is sure*: difference in AUROC within the half of the decisions to which the smaller model "
        "gives the lowest scores (number of failing ones there).",
        "",
        f"How far one part tells the other (ridge regression, test decisions): {told}.",
        "",
    ]


def _rules(entry: dict[str, Any]) -> list[str]:
    if not entry["rules"]:
        return []
    rows = []
    for e in entry["rules"]:
        name = " ".join(str(v) for v in e["rule"].values())
        t = e["test"]
        cells = (
            _cell(t[k]) for k in ("clean_traces_alarmed", "failing_traces_detected", "false_alarms_per_1000_tokens")
        )
        rows.append([name, _plain(e["validation"], 2), *cells, _cell(t["delay_tokens"], 0)])
    head = ["rule", "found on validation", "clean alarmed", "failing found", "false alarms /1k tok", "delay, tokens"]
    title = f"### Decision rules over the scores of {entry['chosen']}, at an equal budget"
    return [title, "", *_rows(head, rows)]


def _errors(entry: dict[str, Any]) -> list[str]:
    lines = ["### Where it errs, at the budget's threshold", ""]
    groups = list(entry["errors"][0]["by"])
    rows = []
    for group in groups:
        cells = []
        for e in entry["errors"]:
            g = e["by"][group]
            shares = (f"{_plain(g[share], 2)} of {g[n]}" for share, n in (("found", "failing"), ("alarmed", "clean")))
            cells.append(" / ".join([*shares, _plain(g["auroc"], 2)]))
        rows.append([group, *cells])
    return [
        *lines,
        "Failing decisions found / clean ones alarmed / AUROC within the group:",
        "",
        *_rows(["group", *(e["set"] for e in entry["errors"])], rows),
    ]


def markdown(summary: dict[str, Any], figures: Sequence[str]) -> str:
    """The report of ``probes report``; every figure in it is in report.json."""
    split = summary["split"]
    lines = [
        "# Probes, examined",
        "",
        f"`{summary['command']}`, version {summary['version']}, seed {summary['seed']}; model `{summary['model']}` "
        f"({summary['fingerprint']}), block {summary['layer']}.",
        "",
        f"Problems: {split['train']['problems']} for training, {split['validation']['problems']} for validation, "
        f"{split['test']['problems']} for the test ({split['test']['traces']} traces). Intervals: 95 %, "
        f"{summary['bootstrap']} draws of test problems. Everything is chosen on validation.",
        "",
    ]
    for level, entry in summary["levels"].items():
        lines += [
            f"## {level}",
            "",
            f"Window {entry['window']}; channels `{entry['channels']}`.",
            "",
            *_table_4(level, entry),
            *_sets(level, entry, summary["false_alarm_rate"]),
            *_controls(entry),
            *_curve(entry),
            *_nested(entry),
            *_rules(entry),
            *_errors(entry),
            *(f"![{f}]({f})" for f in figures if f.startswith(level)),
            "",
        ]
    return "\n".join(lines)
