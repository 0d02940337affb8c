"""``probes report``: the probes' figures as a table, ROC curves and score histograms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json, read_tensors
from neureasoner.errors import UserError
from neureasoner.probes.config import ReportConfig
from neureasoner.stages import StageFolder


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
    for level, entry in results["levels"].items():
        rows = {"": entry["chosen"], "paper: ": entry["paper"]}
        rows |= {"random: ": entry["controls"]["random"], "control: ": entry["controls"]["length"]}
        for i, (prefix, probe) in enumerate(rows.items()):
            test = probe["test"]
            table.add_row(
                level if i == 0 else "",
                f"{prefix}{probe['name']} ({'K' if level == 'instance' else 'k'}={probe['window']})",
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
    for warning in results["warnings"]:
        console.print(f"[yellow]warning[/] {warning}", highlight=False)


def report(config: ReportConfig) -> dict[str, Any]:
    """Stage ``probes report``. Prints the table and writes a PNG per level."""
    from neureasoner.probes.figures import draw_scores

    fit = Path(config.fit)
    if not (fit / "results.json").is_file():
        raise UserError(f"{fit}: holds no results.json; run probes fit first, or name its folder")
    results = read_json(fit / "results.json")
    folder = StageFolder(config.out, "probes report", config, inputs=[fit / "results.json"])
    print_table(results)
    if folder.done:
        return folder.summary
    figures: list[str] = []
    for level, entry in results["levels"].items():
        tensors, _ = read_tensors(fit / level / "scores.safetensors")
        figures += draw_scores(folder.path, level, {k: v.numpy() for k, v in tensors.items()}, entry)
    return folder.finish({"figures": figures})
