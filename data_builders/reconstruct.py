"""``data reconstruct``: references -> trigger-training rows, every one validated; the rejected kept with reasons."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

from neureasoner.artifacts import write_json, write_text
from neureasoner.data_builders.asking import Endpoint, stage_settings
from neureasoner.data_builders.card import TokenCount, card
from neureasoner.data_builders.config import ReconstructConfig
from neureasoner.data_builders.corpus import traces
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.judges import BLOCK_STARTS, review_steps
from neureasoner.data_builders.layouts import Reconstruction
from neureasoner.data_builders.rewriters import ExactRewriter, Reference, Rejected, Rewriter, reference_from
from neureasoner.errors import UserError
from neureasoner.stages import StageFolder
from neureasoner.traces import FINISHED, NO_THINKING, THINK_CLOSE, Problem, read_traces, write_rows


def rollouts(path: str) -> Iterator[Reference]:
    """The references among judged traces. Raises UserError for a trace that was not judged."""
    for trace in read_traces(path):
        labels = trace.labels
        if labels is None:
            raise UserError(f"{path}: trace '{trace.id}' has no labels; run `neureasoner data judge` first")
        if any(mark in trace.response for mark in (*BLOCK_STARTS, FINISHED, NO_THINKING)):
            continue  # the model wrote a trigger or closing text by itself: no untouched reference
        if labels.correct and not labels.intra.has_error and not labels.inter.is_stagnant:
            # Everything up to the end token, which belongs to the tokenizer and not to the text.
            text = trace.response[: trace.response.rindex("}") + 1] + "."
            try:
                yield reference_from(trace.id, trace.problem, text, "rollout")
            except Rejected:
                continue


def shortest(refs: Iterable[Reference], n: int) -> Iterator[Reference]:
    """Of each problem the ``n`` shortest references, so that fine-tuning does not teach to go on longer than needed."""
    of_problem: dict[str, list[Reference]] = {}
    for ref in refs:
        kept = of_problem.setdefault(ref.problem.id, [])
        kept.append(ref)
        kept.sort(key=lambda r: len(r.response))
        del kept[n:]
    for kept in of_problem.values():
        yield from kept


def references(config: ReconstructConfig) -> Iterator[Reference]:
    """Correct, faultless traces: judged rollouts and, where asked for, the tiny reasoner's corpus."""
    if config.traces:
        yield from shortest(rollouts(config.traces), config.shortest) if config.shortest else rollouts(config.traces)
    if config.references:
        from neureasoner.data_builders.sources.rows import read_sources

        for row in read_sources(config.references):
            try:
                yield row.reference()
            except Rejected:
                continue
    names = list(FAMILIES)
    for i, (question, response) in enumerate(traces(config.seed + 7919, config.corpus, no_thinking=0.0)):
        name = names[i % len(names)]
        yield reference_from(f"corpus-{i}", Problem(f"corpus-{i}", name, 0, question, ""), response, "corpus")


def variants(refs: Iterable[Reference], config: ReconstructConfig) -> Iterator[tuple[Reference, str, Random]]:
    """What to make of each reference: (reference, level, randomness); the choice is a function of seed and id."""
    for ref in refs:
        rng = Random(f"{config.seed}-{ref.id}")
        for level, share in (
            ("intra", config.intra),
            ("inter", config.inter),
            ("plain", config.plain),
            ("instance", config.instance),
        ):
            if share and rng.random() < share:
                yield ref, level, rng


def make_rows(
    refs: Iterable[Reference], rewriter: Rewriter, config: ReconstructConfig, rejected: list[dict[str, str]]
) -> Iterator[Reconstruction]:
    """Rows, in the order of the references; what is rejected is added to ``rejected`` with its reason."""
    for ref, level, rng in variants(refs, config):
        if level == "plain":
            yield plain(ref)
            continue
        try:
            if level == "instance":
                yield closed(ref, rng)
                continue
            row = rewriter.intra(ref, rng) if level == "intra" else rewriter.inter(ref, rng)
        except Rejected as e:
            rejected.append({"id": ref.id, "level": level, "reason": str(e)})
            continue
        yield without_failure(row, ref) if config.control_arm else row


def plain(ref: Reference) -> Reconstruction:
    """The untouched reference as a row."""
    return Reconstruction(
        f"{ref.id}/plain", ref.problem, "plain", ref.problem.question, ref.response,
        reference_id=ref.id, source=ref.source,
    )  # fmt: skip


def closed(ref: Reference, rng: Random) -> Reconstruction:
    """The reference with its thinking closed early by the text that the instance rule forces; answer untouched.

    Large models answer well from there by themselves (core.md §5.9); the embedded one has to be shown. Where the
    thinking is a search it is closed after the solution only: a right answer before it would be a guess. Raises
    Rejected when nothing would be cut off.
    """
    solved = [i for i, r in enumerate(review_steps(ref.problem, ref.paragraphs)) if r.solves]
    first = solved[0] + 1 if ref.problem.family == "countdown" and solved else 2
    if first > len(ref.paragraphs) - 2:
        raise Rejected("too short to close early")
    head = "".join(p + "\n\n" for p in ref.paragraphs[: rng.randint(first, min(first + 3, len(ref.paragraphs) - 2))])
    answer = ref.ending.replace(THINK_CLOSE, "", 1).strip()
    return Reconstruction(
        f"{ref.id}/instance", ref.problem, "instance", ref.problem.question, head + FINISHED + answer,
        trigger_span=(len(head), len(head) + len(FINISHED)), reference_id=ref.id, source=ref.source,
    )  # fmt: skip


def without_failure(row: Reconstruction, ref: Reference) -> Reconstruction:
    """Control arm: what the rewriter wrote, less the failure and the block."""
    assert row.failure_span and row.block_span
    text = row.response[: row.failure_span[0]] + row.response[row.block_span[1] :].lstrip("\n")
    return Reconstruction(
        row.id + "/control", ref.problem, "plain", row.prompt, text, reference_id=ref.id, source=row.source
    )


def reconstruct(config: ReconstructConfig) -> dict[str, Any]:
    """Stage ``data reconstruct``. Writes train.jsonl, rejected.jsonl, summary.json and the card README.md.

    With the rewriter ``llm`` every answer is kept in a ledger and paid for once. Raises UserError when no row was made.
    """
    if config.dry_run:
        return _dry_run(config)
    inputs = [p for p in (config.traces, config.references) if p]
    folder = StageFolder(config.out, "data reconstruct", stage_settings(config), inputs=inputs)
    if folder.done:
        return folder.summary
    rejected: list[dict[str, str]] = []
    counts: dict[str, Counter[str]] = {"levels": Counter(), "kinds": Counter(), "sources": Counter()}
    more: dict[str, Any] = {}
    tokens = _token_count(config.tokenizer)
    if config.rewriter == "llm":
        rows = _asked_rows(config, rejected, more)
    else:
        rows = make_rows(references(config), ExactRewriter(), config, rejected)

    def counted() -> Iterator[Reconstruction]:
        for row in rows:
            counts["levels"][row.level] += 1
            counts["kinds"][str(row.control.get("error_type", row.control.get("loop_theme", "-")))] += 1
            counts["sources"][row.source] += 1
            if tokens:
                tokens.add(row)
            yield row
        if not counts["levels"]:
            raise UserError(
                "reconstruct: no reference could be used; need correct traces without a wrong step or a loop "
                f"({len(rejected)} rejected: {dict(Counter(r['reason'] for r in rejected).most_common(3))})"
            )

    write_rows(folder.path / "train.jsonl", counted())
    write_rows(folder.path / "rejected.jsonl", rejected)
    summary: dict[str, Any] = {
        "rows": sum(counts["levels"].values()),
        **{k: dict(v) for k, v in counts.items()},
        "rejected": len(rejected),
        "rejected_reasons": dict(Counter(r["reason"] for r in rejected).most_common(10)),
        "rewriter": config.rewriter,
        "seed": config.seed,
        **more,
    }
    if tokens:
        summary |= {"tokenizer": config.tokenizer, "tokens": tokens.summary()}
    write_json(folder.path / "summary.json", summary)
    write_text(folder.path / "README.md", card(summary))
    print(f"{summary['rows']} rows: {summary['levels']}, {len(rejected)} rejected")
    return folder.finish(summary)


def _token_count(tokenizer: str) -> TokenCount | None:
    if not tokenizer:
        return None
    from neureasoner.models import load_tokenizer

    return TokenCount(load_tokenizer(tokenizer))


def _llm(config: ReconstructConfig) -> tuple[Endpoint, Any]:
    from neureasoner.data_builders.llm_rewriters import LLMRewriter

    endpoint = Endpoint(config.endpoint, config.out, "rewriting")
    return endpoint, LLMRewriter(endpoint.settings, endpoint.ask)


def _questions(
    config: ReconstructConfig,
    rewriter: Any,
    rejected: list[dict[str, str]],
    waiting: deque[tuple[Reference | Reconstruction, str]],
) -> Iterator[Any]:
    """One question for every variant that needs the model. ``waiting``: each variant not rejected, in order.

    Control fields are balanced over the references of a level, in their order.
    """
    from neureasoner.data_builders.llm_rewriters import controls

    made: Counter[str] = Counter()
    for ref, level, rng in variants(references(config), config):
        if level in ("plain", "instance"):
            try:
                waiting.append((plain(ref) if level == "plain" else closed(ref, rng), ""))
            except Rejected as e:
                rejected.append({"id": ref.id, "level": level, "reason": str(e)})
            continue
        fields = controls(level, made[level], config.seed)
        try:
            write = rewriter.intra_question if level == "intra" else rewriter.inter_question
            question = write(ref, rng, fields)
        except Rejected as e:
            rejected.append({"id": ref.id, "level": level, "reason": str(e)})
            continue
        made[level] += 1
        waiting.append((ref, level))
        yield question


def _asked_rows(
    config: ReconstructConfig, rejected: list[dict[str, str]], more: dict[str, Any]
) -> Iterator[Reconstruction]:
    from neureasoner.data_builders.llm_judges import prompts_hash

    endpoint, rewriter = _llm(config)
    if config.batch:
        endpoint.batch(lambda: _questions(config, rewriter, [], deque()))
    waiting: deque[tuple[Reference | Reconstruction, str]] = deque()  # filled by the thread that draws the questions
    for outcome in endpoint.ask(_questions(config, rewriter, rejected, waiting)):
        # Rows that need no model stand between the asked ones; the order is that of the references.
        while isinstance((variant := waiting.popleft())[0], Reconstruction):
            yield variant[0]
        ref, level = variant
        assert isinstance(ref, Reference)
        assert outcome.id == f"{ref.id}/{level}"
        if outcome.value is None:
            reason = outcome.problems[-1] if outcome.problems else "no answer"
            rejected.append({"id": ref.id, "level": level, "reason": reason})
        else:
            yield without_failure(outcome.value, ref) if config.control_arm else outcome.value
    yield from (row for row, _ in waiting if isinstance(row, Reconstruction))
    more |= {"rewriter": rewriter.name, "prompts": prompts_hash(), "bill": endpoint.tally.summary()}


def _dry_run(config: ReconstructConfig) -> dict[str, Any]:
    if config.rewriter == "exact":
        raise UserError("key 'dry_run' is for rewriter llm; the exact rewriter costs nothing")
    endpoint, rewriter = _llm(config)
    return dict(endpoint.forecast(_questions(config, rewriter, [], deque()), config.probe))
