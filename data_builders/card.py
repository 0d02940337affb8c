"""The card of a trigger-training data set: what ``datasets.load_dataset`` needs to know, and what a reader does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neureasoner.data_builders.encoding import IGNORE, encode_row, trigger_ids
from neureasoner.data_builders.layouts import Reconstruction

# The columns are written down so that no row's empty fields can decide their types.
HEADER = """\
---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
dataset_info:
  features:
  - {name: id, dtype: string}
  - name: problem
    struct:
    - {name: id, dtype: string}
    - {name: family, dtype: string}
    - {name: difficulty, dtype: int64}
    - {name: question, dtype: string}
    - {name: answer, dtype: string}
  - {name: level, dtype: string}
  - {name: prompt, dtype: string}
  - {name: response, dtype: string}
  - {name: failure_span, list: int64}
  - {name: trigger_span, list: int64}
  - {name: block_span, list: int64}
  - name: control
    struct:
    - {name: error_length, dtype: string}
    - {name: error_type, dtype: string}
    - {name: loop_length_paragraphs, dtype: int64}
    - {name: loop_theme, dtype: string}
    - {name: style, dtype: string}
  - {name: reference_id, dtype: string}
  - {name: source, dtype: string}
---
"""


class TokenCount:
    """Lengths of rows as training will see them: tokens of prompt, response and what of it trains, by level."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.triggers = tokenizer, trigger_ids(tokenizer)
        self.rows: dict[str, list[tuple[int, int]]] = {}

    def add(self, row: Reconstruction) -> None:
        """Count a row. Raises UserError for one that cannot be encoded."""
        encoded = encode_row(row, self.tokenizer, self.triggers)
        trained = sum(label != IGNORE for label in encoded.labels)
        self.rows.setdefault(row.level, []).append((len(encoded.input_ids), trained))

    def summary(self) -> dict[str, dict[str, int]]:
        """By level and for all: rows, tokens, tokens that train, and the mean, median, 95th percentile and longest."""
        every = [pair for rows in self.rows.values() for pair in rows]
        return {name: _statistics(rows) for name, rows in (*sorted(self.rows.items()), ("all", every)) if rows}


def _statistics(rows: Sequence[tuple[int, int]]) -> dict[str, int]:
    lengths = sorted(n for n, _ in rows)
    at = lambda share: lengths[min(len(lengths) - 1, int(share * len(lengths)))]  # noqa: E731
    return {
        "rows": len(rows), "tokens": sum(lengths), "trained": sum(t for _, t in rows),
        "mean": round(sum(lengths) / len(rows)), "median": at(0.5), "p95": at(0.95), "longest": lengths[-1],
    }  # fmt: skip


def card(summary: dict[str, Any]) -> str:
    """README.md of the folder (Markdown with the header that the Hub and ``datasets`` read)."""
    lines = [
        "# Trigger-training data",
        "",
        f"{summary['rows']} rows in `train.jsonl`, made by `{summary['rewriter']}` (seed {summary['seed']}); "
        '`datasets.load_dataset("this folder")` loads them.',
    ]
    for key, title in (("levels", "Levels"), ("kinds", "Kinds"), ("sources", "Sources")):
        lines += ["", f"## {title}", "", "| | rows |", "|---|---|"]
        lines += [f"| {name} | {n} |" for name, n in sorted(summary[key].items())]
    if "tokens" in summary:
        lines += ["", f"## Tokens (tokenizer `{summary['tokenizer']}`, prompt included)", ""]
        names = list(next(iter(summary["tokens"].values())))
        lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {level} | " + " | ".join(map(str, s.values())) + " |" for level, s in summary["tokens"].items()]
    share = summary["rejected"] / max(1, summary["rows"] + summary["rejected"])
    lines += ["", f"## Rejected: {summary['rejected']} ({share:.1%})", ""]
    lines += [f"- {n} × {reason}" for reason, n in summary["rejected_reasons"].items()]
    if "bill" in summary:
        bill = summary["bill"]
        cost = "unknown" if bill["cost"] is None else f"{bill['cost']:.4f} USD"
        lines += [
            "",
            "## Cost of this run",
            "",
            f"{bill['calls']} calls, {bill['input_tokens']} input and {bill['output_tokens']} output tokens, {cost}; "
            f"{bill['from_ledger']} answers from the ledger. Prompts: `{summary['prompts'][:16]}`.",
        ]
    return HEADER + "\n".join(lines) + "\n"
