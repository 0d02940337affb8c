"""``data pairs``: a failing and a clean continuation of the same prefix (core.md §1.4), with what the sites showed.

Writing goes in rounds. A round lets every open sequence write ``every`` more steps (0: all of them), then the judge
reads the text so far. Where it finds a failure, the sequence's part of the round's cache is cut back to just before the
failing step (intra) or the loop's first paragraph (inter: going back one paragraph would not undo a loop), and
``tries`` other continuations are drawn from there. The first that the judge finds clean makes the pair.

With ``every = 0`` the judge is asked once per trace and once per try: the same pairs for far fewer calls.

Instance pairs need no rewinding: the first K steps on an easy and on a hard problem of one family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neureasoner.data_builders.judges import Judge
from neureasoner.data_builders.pairs_config import PairsConfig
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.pairs import Pair, pair_from_dict
from neureasoner.probes.labels import failure, instance_pairs
from neureasoner.prompts import encode_prompt
from neureasoner.responses import read_response
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.stages import StageFolder
from neureasoner.steps import Separators, StepSegmenter
from neureasoner.thinking import opens_thinking
from neureasoner.traces import Problem, Trace, read_problems, read_records, read_traces, write_rows

if TYPE_CHECKING:
    from neureasoner.sampler import Run


@dataclass
class Row:
    """One sequence that is being written. ``response``: token ids so far."""

    problem: Problem
    name: str
    prompt: list[int]
    response: list[int] = field(default_factory=list)
    open_levels: set[str] = field(default_factory=set)


class _StepsDone:
    """Stops a row when it has closed ``n`` more steps or left its thinking. ``width``: columns of the prompts."""

    def __init__(self, segmenters: Sequence[StepSegmenter], width: int, n: int):
        self.read, self.n = width, n
        self.rows = [(s, len(s.bounds)) for s in segmenters]

    def __call__(self, columns: Any) -> Any:
        import torch

        for column in columns[:, self.read :].T.tolist():
            for (segmenter, _), token in zip(self.rows, column, strict=True):
                segmenter.push(token)
        self.read = columns.shape[1]
        done = [not s.in_thinking or len(s.bounds) - begun >= self.n for s, begun in self.rows]
        return torch.tensor(done, device=columns.device)


class Writer:
    """Samples continuations and goes back."""

    def __init__(self, model: Any, tokenizer: Any, config: PairsConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.separators, self.ends = Separators.of(tokenizer), eos_ids(model, tokenizer)

    def write(self, rows: Sequence[Row], steps: int, seed: int, cache: Any = None) -> tuple[list[list[int]], Run]:
        """Continue every row by ``steps`` closed steps (0: to its end).

        -> (new token ids of each row, the run, whose cache holds all rows). ``cache`` covers all but the last token of
        every row, which must then be of one length.
        """
        from neureasoner.sampler import sample

        whole = [[*r.prompt, *r.response] for r in rows]
        room = max(1, self.config.max_new_tokens - min(len(r.response) for r in rows))
        stop = None
        if steps:
            stop = _StepsDone([self._after(r) for r in rows], max(map(len, whole)), steps)
        done = sample(
            self.model,
            whole,
            Sampling(room, self.config.temperature, self.config.top_p),
            ends=self.ends,
            pad=pad_id(self.tokenizer, self.ends),
            seed=seed,
            stop=stop,
            cache=cache,
            narrow=False,
        )
        limits = [max(0, self.config.max_new_tokens - len(r.response)) for r in rows]
        return [drawn.ids[:n] for drawn, n in zip(done.rows, limits, strict=True)], done.run

    def _after(self, row: Row) -> StepSegmenter:
        """A segmenter that has read the row's response so far."""
        segmenter = StepSegmenter(
            self.separators, in_thinking=opens_thinking(row.prompt, self.tokenizer), ends=self.ends
        )
        for i in row.response:
            segmenter.push(i)
        return segmenter

    def back(self, run: Run, row: int, n: int, copies: int) -> Any:
        """A cache of ``copies`` equal rows that holds the first ``n`` tokens of one row of ``run``, or None: then the
        prefix is read again. Nothing needs to be kept beforehand (core.md §1.4)."""
        from neureasoner.caches import prefix

        return prefix(self.model, run.cache, row, int(run.pads[row]), n, copies)

    def trace(self, row: Row, response: Sequence[int]) -> Trace:
        return read_response(self.tokenizer, row.prompt, response, self.ends).to_trace(row.name, row.problem)


def pairs_of(writer: Writer, judge: Judge, rows: Sequence[Row], seed: int, counts: dict[str, int]) -> Iterator[Pair]:
    """Write ``rows`` to their ends and yield a pair for the first failure of each level that has a clean twin."""
    config, active, round_ = writer.config, list(rows), 0
    for row in active:
        row.open_levels = set(config.levels)
    while active:
        new, run = writer.write(active, config.every, seed + 1009 * round_)
        still = []
        for i, (row, tokens) in enumerate(zip(active, new, strict=True)):
            row.response += tokens
            trace = writer.trace(row, row.response)
            trace.labels = judge.judge(trace)
            counts["judged"] += 1
            for level in sorted(row.open_levels):
                found = failure(trace, level)
                if found is None or found[1] > len(trace.steps) or not trace.steps[found[1] - 1].closed:
                    continue
                row.open_levels.discard(level)
                counts[f"{level} failures"] += 1
                pair = _twin(writer, judge, row, trace, level, found, run, i, seed + 7919 * (i + 1), counts)
                if pair is not None:
                    yield pair
            in_thinking = trace.thinking_end == len(row.response)
            room = len(row.response) < config.max_new_tokens
            if config.every and tokens and in_thinking and room and row.open_levels and not trace.finished:
                still.append(row)
        active, round_ = still, round_ + 1


def _twin(
    writer: Writer,
    judge: Judge,
    row: Row,
    trace: Trace,
    level: str,
    found: tuple[int, int],
    run: Run,
    at: int,
    seed: int,
    counts: dict[str, int],
) -> Pair | None:
    """Go back to before ``found`` and draw until the judge finds the continuation clean, or tries run out."""
    first, end = found
    begin = trace.steps[first].token_start
    tries = writer.config.tries
    prefix = Row(row.problem, row.name, row.prompt, list(row.response[:begin]))
    kept = writer.back(run, at, len(row.prompt) + begin - 1, tries)
    drawn, _ = writer.write([prefix] * tries, end - first, seed, kept)
    for n, tokens in enumerate(drawn, 1):
        clean = writer.trace(row, [*prefix.response, *tokens])
        if len(clean.steps) < end or not clean.steps[end - 1].closed:
            continue  # it ended, or left the thinking, before there was enough to compare
        clean.labels = judge.judge(clean)
        counts["judged"] += 1
        wrong = failure(clean, "intra")  # a wrong step before the prefix ends is no fault of this continuation
        if failure(clean, level) is None and (wrong is None or wrong[0] < first):
            failing = writer.trace(row, row.response[: trace.steps[end - 1].token_end])
            failing.labels = trace.labels
            return Pair(f"{row.name}/{level}", level, begin, end - first, n, failing, clean)
    counts[f"{level} without a clean twin"] += 1
    return None


def make_pairs(config: PairsConfig, judge: Judge | None = None) -> dict[str, Any]:
    """Stage ``data pairs``. Writes pairs.jsonl, and records/ of both continuations where sites were asked for."""
    from collections import Counter

    from neureasoner.data_builders.judges import ExactJudge
    from neureasoner.models import load
    from neureasoner.progress import Progress
    from neureasoner.sites import Layout

    problems = list(islice(read_problems(config.problems), config.limit or None))
    asked = [config.instance_traces, config.instance_nothinking]
    inputs: list[str | Path] = [config.problems, *model_files(config.model), *filter(None, asked)]
    folder = StageFolder(config.out, "data pairs", config, inputs=inputs)
    if folder.done:
        return folder.summary
    judge = judge or ExactJudge()
    model, tokenizer = load(config.model)
    for site in config.record:
        Layout.of(model).check(site)
    writer, counts = Writer(model, tokenizer, config), Counter[str]()
    jobs = [(p, s) for s in range(config.samples) for p in problems]
    parts = []
    with Progress() as bar:
        task = bar.add_task("pairs", total=len(jobs))
        for b in range(0, len(jobs), config.batch_size):
            part = folder.path / "parts" / f"{b:06d}.jsonl"
            parts.append(part)
            batch = jobs[b : b + config.batch_size]
            if not part.is_file():
                rows = [Row(p, f"{p.id}#{s}", encode_prompt(tokenizer, p)) for p, s in batch]
                found = list(pairs_of(writer, judge, rows, config.seed * 100_003 + b, counts))
                write_rows(part, [{"pairs": [asdict(p) for p in found], "counts": dict(counts)}])
                counts.clear()
            bar.update(task, advance=len(batch))
    kept = [row for part in parts for row in read_records(part, dict, "parts of pairs")]
    pairs = [pair_from_dict(p) for row in kept for p in row["pairs"]]
    total = sum((Counter(row["counts"]) for row in kept), Counter())
    if config.instance_traces:
        nothinking = read_traces(config.instance_nothinking) if config.instance_nothinking else []
        pairs += list(instance_pairs(read_traces(config.instance_traces), nothinking, config.first_steps))
    if not pairs:
        raise UserError(f"no pair was found ({dict(total)}); give more problems, samples or tries")
    write_rows(folder.path / "pairs.jsonl", pairs)
    if config.record:
        from neureasoner.probes.recording.record import record_to

        sides = ("failing", "clean")  # both are named after the problem
        both = [replace(getattr(p, side), id=f"{p.id}/{side}") for p in pairs for side in sides]
        record_to(folder.path / "records", model, tokenizer, both, config.record)
    levels = dict(Counter(p.level for p in pairs))
    summary = folder.finish({"pairs": len(pairs), "levels": levels, **dict(total), "traces": len(jobs)})
    for part in parts:
        part.unlink(missing_ok=True)
    print(f"{len(pairs)} pairs: {levels}; {total['judged']} texts judged")
    return summary
