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
from typing import Any

from neureasoner.data_builders.encoding import prompt_text
from neureasoner.data_builders.judges import Judge
from neureasoner.data_builders.pairs_config import PairsConfig
from neureasoner.data_builders.rollouts import build_trace
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.pairs import Pair, pair_from_dict
from neureasoner.probes.labels import failure, instance_pairs
from neureasoner.sampling import generation_config, left_padded
from neureasoner.stages import StageFolder
from neureasoner.steps import Separators, StepSegmenter
from neureasoner.traces import Problem, Trace, read_problems, read_records, read_traces, write_rows


@dataclass
class Row:
    """One sequence that is being written. ``response``: token ids so far."""

    problem: Problem
    name: str
    prompt: list[int]
    response: list[int] = field(default_factory=list)
    open_levels: set[str] = field(default_factory=set)


def _after(ids: Sequence[int], separators: Separators) -> StepSegmenter:
    """A segmenter that has read ``ids``."""
    segmenter = StepSegmenter(separators)
    for i in ids:
        segmenter.push(i)
    return segmenter


class _StepsDone:
    """Stopping criterion: a row is done when it has closed ``n`` more steps, left its thinking, or ended."""

    def __init__(self, separators: Separators, so_far: Sequence[Sequence[int]], width: int, n: int):
        self.read, self.n = width, n
        segmenters = [_after(ids, separators) for ids in so_far]
        self.rows = [(s, len(s.bounds)) for s in segmenters]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        for column in input_ids[:, self.read :].T.tolist():
            for (segmenter, _), token in zip(self.rows, column, strict=True):
                segmenter.push(token)
        self.read = input_ids.shape[1]
        done = [not s.in_thinking or len(s.bounds) - begun >= self.n for s, begun in self.rows]
        return torch.tensor(done, device=input_ids.device)


class Writer:
    """Samples continuations and goes back. Legend: ``B`` rows, ``W`` padded width, ``n`` tokens kept."""

    def __init__(self, model: Any, tokenizer: Any, config: PairsConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.separators = Separators.of(tokenizer)
        kinds = getattr(model.config, "layer_types", None) or []
        self.keeps_all = "sliding_attention" not in kinds  # a sliding window has thrown old keys away

    def write(
        self, rows: Sequence[Row], steps: int, seed: int, cache: Any = None
    ) -> tuple[list[list[int]], Any, list[int]]:
        """Continue every row by ``steps`` closed steps (0: to its end).

        -> (new token ids of each row, the cache, left padding of each row). ``cache`` covers all but the last token of
        every row, which must then be of one length.
        """
        import torch
        from transformers import StoppingCriteriaList

        whole = [[*r.prompt, *r.response] for r in rows]
        room = self.config.max_new_tokens - min(len(r.response) for r in rows)
        settings = generation_config(
            self.model, self.tokenizer, max(1, room), self.config.temperature, self.config.top_p
        )
        device = self.model.device
        ids, mask = left_padded(whole, settings.pad_token_id, device)
        width = ids.shape[1]
        pads = [width - len(w) for w in whole]
        more: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        if steps:
            stop = _StepsDone(self.separators, [r.response for r in rows], width, steps)
            more["stopping_criteria"] = StoppingCriteriaList([stop])  # type: ignore[list-item]
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                return_dict_in_generate=True,
                **more,
            )
        new = []
        for row, tokens in zip(rows, out.sequences[:, width:].tolist(), strict=True):
            limit = self.config.max_new_tokens - len(row.response)
            new.append(self._own(row.response, tokens, steps)[: max(limit, 0)])
        return new, out.past_key_values, pads

    def _own(self, response: Sequence[int], tokens: list[int], steps: int) -> list[int]:
        """The row's own new tokens: up to its end, or to the step that stopped it (others wrote on beside it)."""
        segmenter = _after(response, self.separators)
        begun = len(segmenter.bounds)
        for at, token in enumerate(tokens, 1):
            segmenter.push(token)
            ended = token == self.tokenizer.eos_token_id
            if ended or (steps and (not segmenter.in_thinking or len(segmenter.bounds) - begun >= steps)):
                return tokens[:at]
        return tokens

    def back(self, cache: Any, row: int, pad: int, n: int, copies: int) -> Any:
        """A cache of ``copies`` equal rows that holds the first ``n`` tokens of one row of ``cache``, or None.

        A causal cache of a prefix is a prefix of the cache, so nothing needs to be kept beforehand (§1.4). None where
        the model has thrown keys away: then the prefix is read again.
        """
        from transformers import DynamicCache

        if not self.keeps_all or n < 1:
            return None
        kept = DynamicCache(config=self.model.config)
        for i, layer in enumerate(cache.layers):
            keys, values = (
                x[row : row + 1, :, pad : pad + n].expand(copies, -1, -1, -1).contiguous()
                for x in (layer.keys, layer.values)
            )
            kept.update(keys, values, i)
        return kept

    def trace(self, row: Row, response: Sequence[int]) -> Trace:
        return build_trace(self.tokenizer, row.problem, row.name, row.prompt, response)


def pairs_of(writer: Writer, judge: Judge, rows: Sequence[Row], seed: int, counts: dict[str, int]) -> Iterator[Pair]:
    """Write ``rows`` to their ends and yield a pair for the first failure of each level that has a clean twin."""
    config, active, round_ = writer.config, list(rows), 0
    for row in active:
        row.open_levels = set(config.levels)
    while active:
        new, cache, pads = writer.write(active, config.every, seed + 1009 * round_)
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
                pair = _twin(writer, judge, row, trace, level, found, cache, i, pads[i], seed + 7919 * (i + 1), counts)
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
    cache: Any,
    at: int,
    pad: int,
    seed: int,
    counts: dict[str, int],
) -> Pair | None:
    """Go back to before ``found`` and draw until the judge finds the continuation clean, or tries run out."""
    first, end = found
    begin = trace.steps[first].token_start
    tries = writer.config.tries
    prefix = Row(row.problem, row.name, row.prompt, list(row.response[:begin]))
    kept = writer.back(cache, at, pad, len(row.prompt) + begin - 1, tries)
    drawn, _, _ = writer.write([prefix] * tries, end - first, seed, kept)
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
                rows = [
                    Row(
                        p,
                        f"{p.id}#{s}",
                        tokenizer(prompt_text(tokenizer, p.question), add_special_tokens=False)["input_ids"],
                    )
                    for p, s in batch
                ]
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
