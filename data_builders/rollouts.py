"""``data rollouts``: sample responses in batches; every finished batch is kept, so a kill costs one batch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import islice
from typing import Any

from neureasoner.data_builders.config import RolloutsConfig
from neureasoner.data_builders.encoding import prompt_text
from neureasoner.data_builders.families import FAMILIES
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.model_files import model_files
from neureasoner.sampling import generation_config, left_padded
from neureasoner.stages import StageFolder
from neureasoner.steps import segment
from neureasoner.traces import NO_THINKING, Problem, Trace, read_problems, read_traces, write_rows


def build_trace(
    tokenizer: Any, problem: Problem, name: str, prompt_ids: Sequence[int], response_ids: Sequence[int], **meta: Any
) -> Trace:
    """Assemble a Trace: text, steps and whether it ended by itself."""
    ids = list(response_ids)
    finished = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    steps, thinking = segment(ids, tokenizer)
    return Trace(
        name, problem, list(prompt_ids), ids, text, steps, finished, meta={"thinking_tokens": thinking, **meta}
    )


def sample_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], config: RolloutsConfig, seed: int
) -> list[list[int]]:
    """Sample one response per prompt (left-padded batch). Returns token ids up to and with EOS."""
    import torch

    settings = generation_config(model, tokenizer, config.max_new_tokens, config.temperature, config.top_p)
    ids, mask = left_padded(prompts, settings.pad_token_id, model.device)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
        )
    eos = tokenizer.eos_token_id
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


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
    texts = [prompt_text(tokenizer, p.question) + (NO_THINKING if config.no_thinking else "") for p, _ in batch]
    prompts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    responses = sample_batch(model, tokenizer, prompts, config, seed)
    traces = [
        build_trace(tokenizer, p, f"{p.id}#{s}", prompt, response, seed=seed, no_thinking=config.no_thinking)
        for (p, s), prompt, response in zip(batch, prompts, responses, strict=True)
    ]
    if config.no_thinking:  # the thinking was closed in the prompt: nothing of the response belongs to it
        for t in traces:
            t.steps, t.meta["thinking_tokens"] = [], 0
    return traces
