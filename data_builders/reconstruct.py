"""``data reconstruct``: references -> trigger-training rows, every one validated; the rejected kept with reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

from neureasoner.artifacts import write_json, write_text
from neureasoner.data_builders.config import ReconstructConfig
from neureasoner.data_builders.corpus import traces
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.judges import BLOCK_STARTS
from neureasoner.data_builders.layouts import Reconstruction
from neureasoner.data_builders.rewriters import ExactRewriter, Reference, Rejected, Rewriter, reference_from
from neureasoner.errors import UserError
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem, read_traces, write_rows


def references(config: ReconstructConfig) -> Iterator[Reference]:
    """Correct, faultless traces: judged rollouts and, where asked for, the tiny reasoner's corpus."""
    if config.traces:
        for trace in read_traces(config.traces):
            labels = trace.labels
            if labels is None:
                raise UserError(
                    f"{config.traces}: trace '{trace.id}' has no labels; run `neureasoner data judge` first"
                )
            if any(mark in trace.response for mark in BLOCK_STARTS):
                continue  # the model wrote a trigger by itself: no untouched reference
            if labels.correct and not labels.intra.has_error and not labels.inter.is_stagnant:
                # Everything up to the end token, which belongs to the tokenizer and not to the text.
                text = trace.response[: trace.response.rindex("}") + 1] + "."
                try:
                    yield reference_from(trace.id, trace.problem, text, "rollout")
                except Rejected:
                    continue
    names = list(FAMILIES)
    for i, (question, response) in enumerate(traces(config.seed + 7919, config.corpus, no_thinking=0.0)):
        name = names[i % len(names)]
        yield reference_from(f"corpus-{i}", Problem(f"corpus-{i}", name, 0, question, ""), response, "corpus")


def make_rows(
    refs: Iterator[Reference], rewriter: Rewriter, config: ReconstructConfig
) -> tuple[list[Reconstruction], list[dict[str, str]]]:
    """Rows and rejections. A pure function of the references, the rewriter and the settings."""
    rng, rows, rejected = Random(config.seed), list[Reconstruction](), list[dict[str, str]]()
    for ref in refs:
        for level, share, write in (("intra", config.intra, rewriter.intra), ("inter", config.inter, rewriter.inter)):
            if rng.random() >= share:
                continue
            try:
                row = write(ref, rng)
            except Rejected as e:
                rejected.append({"id": ref.id, "level": level, "reason": str(e)})
                continue
            rows.append(without_failure(row, ref) if config.control_arm else row)
        if rng.random() < config.plain:
            rows.append(plain(ref))
    rng.shuffle(rows)
    return rows, rejected


def plain(ref: Reference) -> Reconstruction:
    """The untouched reference as a row."""
    return Reconstruction(
        f"{ref.id}/plain", ref.problem, "plain", ref.problem.question, ref.response,
        reference_id=ref.id, source=ref.source,
    )  # fmt: skip


def without_failure(row: Reconstruction, ref: Reference) -> Reconstruction:
    """Control arm: what the rewriter wrote, less the failure and the block."""
    assert row.failure_span and row.block_span
    text = row.response[: row.failure_span[0]] + row.response[row.block_span[1] :].lstrip("\n")
    return Reconstruction(
        row.id + "/control", ref.problem, "plain", row.prompt, text, reference_id=ref.id, source=row.source
    )


def reconstruct(config: ReconstructConfig) -> dict[str, Any]:
    """Stage ``data reconstruct``."""
    import json

    folder = StageFolder(config.out, "data reconstruct", config, inputs=[config.traces] if config.traces else [])
    if folder.done:
        return folder.summary
    rows, rejected = make_rows(references(config), ExactRewriter(), config)
    if not rows:
        raise UserError("reconstruct: no reference could be used; need correct traces without a wrong step or a loop")
    summary: dict[str, Any] = {
        "rows": len(rows),
        "levels": dict(Counter(r.level for r in rows)),
        "kinds": dict(Counter(str(r.control.get("error_type", r.control.get("loop_theme", "-"))) for r in rows)),
        "sources": dict(Counter(r.source for r in rows)),
        "rejected": len(rejected),
        "rejected_reasons": dict(Counter(r["reason"] for r in rejected).most_common(10)),
        "seed": config.seed,
    }
    write_rows(folder.path / "train.jsonl", rows)
    write_text(folder.path / "rejected.jsonl", "".join(json.dumps(r) + "\n" for r in rejected))
    write_json(folder.path / "summary.json", summary)
    print(f"{len(rows)} rows: {summary['levels']}, {len(rejected)} rejected")
    return folder.finish(summary)
