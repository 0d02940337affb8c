"""``data inspect``: look at problems, judged traces or reconstructed rows in the terminal, steps numbered and marked.

Red is a failure, yellow a trigger with its block. Tokens that do not train (label -100) are dim on blue, which needs a
tokenizer; without one the spans alone are shown.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from neureasoner.data_builders.encoding import IGNORE, encode_row, trigger_ids
from neureasoner.data_builders.inspect_config import InspectConfig
from neureasoner.data_builders.layouts import Reconstruction, paragraphs, reconstruction_from_dict
from neureasoner.errors import UserError
from neureasoner.traces import THINK_CLOSE, Problem, Trace, problem_from_dict, read_jsonl, trace_from_dict

FAILURE, TRIGGER, MASKED, ANSWER = "red", "yellow", "dim on blue", "green"
Record = Problem | Trace | Reconstruction


def read_records(path: str) -> list[Record]:
    """Rows of any of the three files; which one is told by the keys. Raises UserError with the line number."""
    records: list[Record] = []
    for number, row in read_jsonl(path):
        try:
            if "level" in row:
                records.append(reconstruction_from_dict(row))
            else:
                records.append(trace_from_dict(row) if "response_ids" in row else problem_from_dict(row))
        except UserError as e:
            raise UserError(f"{path}, line {number}: {e}") from None
    if not records:
        raise UserError(f"{path}: is empty")
    return records


def kinds(record: Record) -> set[str]:
    """Words ``kind`` may ask for."""
    if isinstance(record, Problem):
        return {record.family}
    if isinstance(record, Reconstruction):
        return {record.problem.family, record.level}
    found = {record.problem.family}
    if record.labels is not None:
        wrong, loops = record.labels.intra.has_error, record.labels.inter.is_stagnant
        found |= {"intra"} if wrong else set()
        found |= {"inter"} if loops else set()
        found |= set() if wrong or loops else {"clean"}
    return found


def choose(records: list[Record], config: InspectConfig) -> list[Record]:
    """The records to show, in file order. Raises UserError when there is none."""
    if config.id:
        chosen = [r for r in records if r.id == config.id]
        if not chosen:
            raise UserError(f"{config.path}: no record has the id '{config.id}', e.g. '{records[0].id}' has one")
        return chosen
    fitting = [i for i, r in enumerate(records) if not config.kind or config.kind in kinds(r)]
    if not fitting:
        known = sorted(set().union(*(kinds(r) for r in records)))
        raise UserError(f"{config.path}: nothing of kind '{config.kind}'; there are {', '.join(known)}")
    picked = random.Random(config.seed).sample(fitting, min(config.n, len(fitting)))
    return [records[i] for i in sorted(picked)]


def numbered(text: Text) -> Text:
    """Put the step's number before each paragraph of the thinking; colours stay."""
    plain = text.plain
    end = plain.find(THINK_CLOSE)
    marked, last = Text(), 0
    for number, (start, _) in enumerate(paragraphs(plain[:end] if end >= 0 else plain)):
        marked.append_text(text[last:start])
        marked.append(f"{number:>3} ", style="bold cyan")
        last = start
    marked.append_text(text[last:])
    return marked


def trace_text(trace: Trace) -> Text:
    """Response of a trace: wrong step and loop red, forced text yellow, the first statement of the answer green."""
    text = Text(trace.response)
    if trace.labels is not None:
        for label in (trace.labels.intra, trace.labels.inter):
            if label.span is not None:
                text.stylize(FAILURE, *label.span)
    for token in ("<INTRA>", "<INTER>"):
        text.highlight_words([token], style=TRIGGER)
    text.highlight_regex(r"\\boxed\{[^}]*\}", style=ANSWER)
    return text


def row_text(row: Reconstruction, tokenizer: Any = None, mask_failure: bool = False) -> Text:
    """Response of a row: failure red, block yellow; with a tokenizer, what carries label -100 on blue."""
    text = Text(row.response)
    if row.failure_span:
        text.stylize(FAILURE, *row.failure_span)
    if row.block_span:
        text.stylize(TRIGGER, *row.block_span)
    if tokenizer is not None:
        for start, end in masked_spans(row, tokenizer, mask_failure):
            text.stylize(MASKED, start, end)
    return text


def masked_spans(row: Reconstruction, tokenizer: Any, mask_failure: bool = False) -> list[tuple[int, int]]:
    """Characters of the response whose tokens carry label -100 in training, from the very function training uses."""
    encoded = encode_row(row, tokenizer, trigger_ids(tokenizer), mask_failure)
    spans: list[tuple[int, int]] = []
    for label, (start, end) in zip(encoded.labels, encoded.spans, strict=True):
        if label == IGNORE and start >= 0:
            begin = spans.pop()[0] if spans and spans[-1][1] == start else start
            spans.append((begin, end))
    return spans


def facts_of(record: Record) -> list[str]:
    """What is known of a record besides its text, one line each."""
    problem = record if isinstance(record, Problem) else record.problem
    facts = [f"{problem.family}, difficulty {problem.difficulty}, answer {problem.answer or '?'}"]
    if isinstance(record, Trace):
        tokens = f"{len(record.response_ids)} tokens, {len(record.steps)} steps"
        facts.append(tokens if record.finished else tokens + ", cut off")
        if record.labels is not None:
            labels = record.labels
            facts.append(f"{'right' if labels.correct else 'wrong'} ({labels.answer}), judge {labels.judge}")
            facts += [_label("intra", asdict(labels.intra))] if labels.intra.has_error else []
            facts += [_label("inter", asdict(labels.inter))] if labels.inter.is_stagnant else []
            if labels.answer_token is not None:
                facts.append(f"the answer first stands at token {labels.answer_token} of {record.thinking_end}")
    elif isinstance(record, Reconstruction):
        facts.append(f"level {record.level}, source {record.source or '?'}, reference {record.reference_id or '?'}")
        facts += [", ".join(f"{k} {v}" for k, v in record.control.items())] if record.control else []
    return facts


def show(record: Record, console: Console, tokenizer: Any = None, mask_failure: bool = False) -> None:
    """Print one record."""
    problem = record if isinstance(record, Problem) else record.problem
    title = f"{type(record).__name__.lower()} {record.id}"
    body = Text(problem.question + "\n", style="bold")
    if isinstance(record, Trace):
        body = Text.assemble(body, "\n", numbered(trace_text(record)))
    elif isinstance(record, Reconstruction):
        body = Text.assemble(body, "\n", numbered(row_text(record, tokenizer, mask_failure)))
    facts = facts_of(record)
    console.print(Panel(body, title=Text(title), subtitle=Text(facts[0]), title_align="left"))
    for fact in facts[1:]:
        console.print(Text("  " + fact))


def _label(level: str, values: dict[str, Any]) -> str:
    return f"{level}: " + ", ".join(f"{k} {v}" for k, v in values.items() if v not in (None, "", "none", [], True))


def _tokenizer(name: str, console: Console) -> Any:
    """Tokenizer of ``name``, with a word instead of an error where the shipped reasoner is not there."""
    if not name:
        return None
    from neureasoner.models import load_tokenizer

    try:
        return load_tokenizer(name)
    except UserError as e:
        if name != "tiny":
            raise
        console.print(Text(f"(masks are not shown: {e})", style="dim"))
        return None


def inspect(config: InspectConfig, console: Console | None = None) -> dict[str, Any]:
    """Print a sample of ``config.path``; returns how many records there are and which were shown."""
    console = console or Console(highlight=False)
    records = read_records(config.path)
    if config.html:
        return _page(config, records, console)
    chosen = choose(records, config)
    rows = any(isinstance(r, Reconstruction) for r in chosen)
    tokenizer = _tokenizer(config.model, console) if rows else None
    legend = Text.assemble(
        f"{len(chosen)} of {len(records)} in {config.path}: ", ("failure", FAILURE), ", ", ("trigger block", TRIGGER)
    )
    if tokenizer is not None:
        legend.append_text(Text.assemble(", ", ("does not train", MASKED), " (nor does the question)"))
    console.print(legend)
    for record in chosen:
        show(record, console, tokenizer, config.mask_failure)
    return {"records": len(records), "shown": [r.id for r in chosen]}


def _page(config: InspectConfig, records: list[Record], console: Console) -> dict[str, Any]:
    """Write all records that fit into one page."""
    from neureasoner.data_builders.browse import rejected, write_page

    fitting = [r for r in records if not config.kind or config.kind in kinds(r)]
    tokenizer = _tokenizer(config.model, console) if any(isinstance(r, Reconstruction) for r in fitting) else None
    others = [] if config.kind else rejected(config.path)
    n = write_page(config.html, config.path, fitting, others, tokenizer, config.mask_failure)
    console.print(f"{n} records in {config.html}; open it in a browser", soft_wrap=True)
    return {"records": n, "html": config.html}
