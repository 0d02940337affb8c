"""``data judge``: label traces, by computing or by asking a language model; and how far two judges agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neureasoner.artifacts import write_json
from neureasoner.data_builders.asking import Endpoint, stage_settings
from neureasoner.data_builders.config import JudgeConfig
from neureasoner.data_builders.judges import ExactJudge, Summary
from neureasoner.errors import UserError
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces, stream_traces, write_rows

if TYPE_CHECKING:
    from neureasoner.data_builders.llm_judges import LLMJudge


def judge_traces(config: JudgeConfig) -> dict[str, Any]:
    """Stage ``data judge``. Writes traces.jsonl with labels, summary.json, and agreement.json where asked to compare.

    With the judge ``llm`` every answer is kept in a ledger and paid for once; a trace without a usable answer is left
    out and counted. Raises UserError when nothing could be labelled.
    """
    if config.dry_run:
        return _dry_run(config)
    inputs = [p for p in (config.traces, config.references, config.compare) if p]
    folder = StageFolder(config.out, "data judge", stage_settings(config), inputs=inputs)
    if folder.done:
        return folder.summary
    summary, more = Summary(), dict[str, Any]()

    def counted() -> Iterator[Trace]:
        for trace in _exact(config) if config.judge == "exact" else _asked(config, more):
            summary.add(trace)
            yield trace

    write_rows(folder.path / "traces.jsonl", counted())
    done = {**summary.result(), **more}
    if config.compare:
        done["agreement"] = _compare(config.compare, read_traces(folder.path / "traces.jsonl"), folder)
    write_json(folder.path / "summary.json", done)
    return folder.finish(done)


def traces_of(config: JudgeConfig) -> Iterator[Trace]:
    """The traces to judge, one at a time. Imported references become traces of the tokenizer's model, as if it had
    written them."""
    if config.traces:
        yield from stream_traces(config.traces)
        return
    from neureasoner.data_builders.sources.rows import read_sources
    from neureasoner.models import load_tokenizer
    from neureasoner.prompts import encode_prompt, encode_text
    from neureasoner.responses import read_response

    tokenizer = load_tokenizer(config.tokenizer)
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for row in read_sources(config.references):
        finished = row.closed and row.finished
        ids = encode_text(tokenizer, row.response) + (ends if finished else [])
        response = read_response(tokenizer, encode_prompt(tokenizer, row.question), ids, ends, finished)
        yield response.to_trace(row.id, row.problem(), source=row.source)


def _exact(config: JudgeConfig) -> Iterator[Trace]:
    from rich.progress import track

    judge = ExactJudge()
    with open(config.traces or config.references, "rb") as f:
        total = sum(1 for line in f if line.strip())
    for trace in track(traces_of(config), description="judging", total=total):
        trace.labels = judge.judge(trace)
        yield trace


def _llm(config: JudgeConfig) -> tuple[Endpoint, LLMJudge]:
    from neureasoner.data_builders.llm_judges import LLMJudge

    endpoint = Endpoint(config.endpoint, config.out, "judging")
    return endpoint, LLMJudge(endpoint.settings, endpoint.ask)


def _questions(judge: LLMJudge, traces: Iterable[Trace]) -> Iterator[Any]:
    from neureasoner.data_builders.llm_judges import Unaskable, inter_question, intra_question

    for trace in traces:
        try:
            yield from (intra_question(trace, judge.settings), inter_question(trace, judge.settings))
        except Unaskable:
            continue


def _dry_run(config: JudgeConfig) -> dict[str, Any]:
    if config.judge == "exact":
        raise UserError("key 'dry_run' is for judge llm; the exact judge costs nothing")
    endpoint, judge = _llm(config)
    return dict(endpoint.forecast(_questions(judge, traces_of(config)), config.probe))


def _asked(config: JudgeConfig, more: dict[str, Any]) -> Iterator[Trace]:
    """The traces that a usable answer came for. ``more`` gets what there is to tell of the asking at the end."""
    endpoint, judge = _llm(config)
    if config.batch:
        endpoint.batch(lambda: _questions(judge, traces_of(config)))
    dropped = labelled = 0
    for trace in judge.label(traces_of(config)):
        if trace.labels is None:
            dropped += 1
            continue
        labelled += 1
        yield trace
    counts = dict(sorted(judge.counts.items()))
    if not labelled:
        raise UserError(f"{config.traces or config.references}: no trace could be labelled ({counts})")
    if dropped:
        reasons = ", ".join(f"{n} {k}" for k, n in counts.items() if k.startswith("dropped: "))
        print(f"{dropped} of {dropped + labelled} traces got no usable answer: {reasons}")
    more |= {"judge": judge.name, "counts": counts, "bill": endpoint.tally.summary()}


def _compare(other: str, traces: Sequence[Trace], folder: StageFolder) -> dict[str, Any]:
    from neureasoner.data_builders.agreement import compare, table

    agreement = compare(read_traces(other), traces)
    print(table(agreement))
    write_json(folder.path / "agreement.json", asdict(agreement))
    return {"judges": list(agreement.judges), "n": agreement.n}
