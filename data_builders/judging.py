"""``data judge``: label traces, by computing or by asking a language model; and how far two judges agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from neureasoner.artifacts import write_json
from neureasoner.data_builders.asking import Endpoint, stage_settings
from neureasoner.data_builders.config import JudgeConfig
from neureasoner.data_builders.judges import ExactJudge, summarise
from neureasoner.errors import UserError
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, read_traces, write_rows

if TYPE_CHECKING:
    from neureasoner.data_builders.llm_judges import LLMJudge


def judge_traces(config: JudgeConfig) -> dict[str, Any]:
    """Stage ``data judge``. Writes traces.jsonl with labels, summary.json, and agreement.json where asked to compare.

    With the judge ``llm`` every answer is kept in a ledger and paid for once; a trace without a usable answer is left
    out and counted. Raises UserError when nothing could be labelled.
    """
    if config.dry_run:
        return _dry_run(config)
    inputs = [config.traces, *([config.compare] if config.compare else [])]
    folder = StageFolder(config.out, "data judge", stage_settings(config), inputs=inputs)
    if folder.done:
        return folder.summary
    more: dict[str, Any] = {}
    if config.judge == "exact":
        traces = list(_exact(read_traces(config.traces)))
    else:
        traces, more = _asked(config)
    summary = {**summarise(traces), **more}
    if config.compare:
        summary["agreement"] = _compare(config.compare, traces, folder)
    write_rows(folder.path / "traces.jsonl", traces)
    write_json(folder.path / "summary.json", summary)
    return folder.finish(summary)


def _exact(traces: Sequence[Trace]) -> Iterator[Trace]:
    from rich.progress import track

    judge = ExactJudge()
    for trace in track(traces, description="judging"):
        trace.labels = judge.judge(trace)
        yield trace


def _llm(config: JudgeConfig) -> tuple[Endpoint, LLMJudge]:
    from neureasoner.data_builders.llm_judges import LLMJudge

    endpoint = Endpoint(config.endpoint, config.out, "judging")
    return endpoint, LLMJudge(endpoint.settings, endpoint.ask)


def _questions(judge: LLMJudge, traces: Sequence[Trace]) -> Iterator[Any]:
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
    return dict(endpoint.forecast(_questions(judge, read_traces(config.traces)), config.probe))


def _asked(config: JudgeConfig) -> tuple[list[Trace], dict[str, Any]]:
    endpoint, judge = _llm(config)
    traces = read_traces(config.traces)
    if config.batch:
        endpoint.batch(lambda: _questions(judge, traces))
    judged = [t for t in judge.label(traces) if t.labels is not None]
    bill = endpoint.tally.summary()
    counts = dict(sorted(judge.counts.items()))
    if not judged:
        raise UserError(f"{config.traces}: no trace could be labelled ({counts})")
    dropped = len(traces) - len(judged)
    if dropped:
        reasons = ", ".join(f"{n} {k}" for k, n in counts.items() if k.startswith("dropped: "))
        print(f"{dropped} of {len(traces)} traces got no usable answer: {reasons}")
    return judged, {"judge": judge.name, "counts": counts, "bill": bill}


def _compare(other: str, traces: Sequence[Trace], folder: StageFolder) -> dict[str, Any]:
    from neureasoner.data_builders.agreement import compare, table

    agreement = compare(read_traces(other), traces)
    print(table(agreement))
    write_json(folder.path / "agreement.json", asdict(agreement))
    return {"judges": list(agreement.judges), "n": agreement.n}
