"""``data rollouts``: sample responses in batches; every finished batch is kept, so a kill costs one batch."""

from __future__ import annotations

from importlib import import_module
from itertools import islice
from typing import Any

from neureasoner.data_builders.config import RolloutsConfig
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.model_files import model_files
from neureasoner.prompts import encode_prompt
from neureasoner.responses import read_response
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.stages import StageFolder
from neureasoner.traces import Problem, Trace, read_problems, read_traces, write_rows


def sample_rollouts(config: RolloutsConfig) -> dict[str, Any]:
    """Stage ``data rollouts``. Writes traces.jsonl (and records/ where sites were asked for)."""
    from neureasoner.models import load, load_tokenizer
    from neureasoner.progress import Progress

    problems = list(islice(read_problems(config.problems), config.limit or None))
    for p in problems:  # an unreadable question should not cost a batch
        if p.family in FAMILIES:
            FAMILIES[p.family].parse(p.question)
    # nor an answer that nothing can match; the check knows the benchmarks, which stand in a room above this one
    import_module("neureasoner.evaluation.problems").check_golds(problems, config.problems)
    folder = StageFolder(config.out, "data rollouts", config, inputs=[config.problems, *model_files(config.model)])
    if folder.done:
        return folder.summary
    tokenizer = load_tokenizer(config.model)
    jobs = [(p, s) for s in range(config.samples) for p in problems]
    # Neighbours of like length waste the least padding: a batch runs until its longest response ends.
    jobs.sort(key=lambda job: (job[1], job[0].family, job[0].difficulty))
    batches = [jobs[i : i + config.batch_size] for i in range(0, len(jobs), config.batch_size)]
    parts = [folder.path / "parts" / f"{i:05d}.jsonl" for i in range(len(batches))]
    model: Any = None
    if config.record:  # a wrong site should not cost the sampling
        from neureasoner.sites import Layout

        model, _ = load(config.model)
        for site in config.record:
            Layout.of(model).check(site)
    right = done = 0
    with Progress() as bar:
        task = bar.add_task("sampling", total=len(jobs))
        for i, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            if not part.is_file():
                if model is None:
                    model, _ = load(config.model)
                traces = _sample_part(model, tokenizer, batch, config, config.seed * 100_003 + i)
                write_rows(part, traces)
            else:
                traces = read_traces(part)
            done += len(batch)
            right += sum(grade(t.problem, answer_of(t.problem, t.response)) for t in traces if t.finished)
            bar.update(task, advance=len(batch), so_far=f"{right / done:.0%} right")
    write_rows(folder.path / "traces.jsonl", (t for part in parts for t in read_traces(part)))
    if config.record:
        from neureasoner.probes.recording.record import record_to  # heavy, and only needed here

        record_to(folder.path / "records", model, tokenizer, read_traces(folder.path / "traces.jsonl"), config.record)
    summary = folder.finish({"n": len(jobs), "accuracy": round(right / max(1, done), 4)})
    for part in parts:  # only now: a kill before this line costs nothing
        part.unlink(missing_ok=True)
    return summary


def _sample_part(
    model: Any, tokenizer: Any, batch: list[tuple[Problem, int]], config: RolloutsConfig, seed: int
) -> list[Trace]:
    """One response to each (problem, sample) of a batch."""
    from neureasoner.sampler import sample  # heavy, and only needed here

    ends = eos_ids(model, tokenizer)
    prompts = [encode_prompt(tokenizer, p, config.no_thinking) for p, _ in batch]
    settings = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    drawn = sample(model, prompts, settings, ends=ends, pad=pad_id(tokenizer, ends), seed=seed).rows
    return [
        read_response(tokenizer, prompt, row.ids, ends).to_trace(
            f"{p.id}#{s}", p, seed=seed, no_thinking=config.no_thinking
        )
        for (p, s), prompt, row in zip(batch, prompts, drawn, strict=True)
    ]
