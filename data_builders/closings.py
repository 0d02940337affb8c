"""``data closings``: what closing the thinking costs at a separator, forecast by sampling both continuations.

From a separator on, the model itself writes ``samples`` answers behind the closing text and ``left`` continuations of
the trace left alone; both are graded. (With ``left`` 0 the trace itself is the continuation left alone: one sample,
which costs nothing, so there can be more traces.) So whether closing costs nothing is measured where the decision
falls, instead of told from whether the question is easy: a question may be easy because the model thinks about it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice
from typing import Any

from neureasoner.artifacts import write_json
from neureasoner.data_builders.closings_config import ClosingsConfig
from neureasoner.data_builders.grading.grade import answer_of, grade
from neureasoner.errors import UserError
from neureasoner.model_files import model_files
from neureasoner.probes.labels import Closing, bounds_of, hopeless_problems, labels_of, read_closings
from neureasoner.prompts import encode_text
from neureasoner.sampling import Sampling, eos_ids, pad_id
from neureasoner.stages import StageFolder
from neureasoner.traces import Trace, stream_traces, write_rows

Place = tuple[Trace, int]  # a trace and the index of a step that a separator closes


def closings(config: ClosingsConfig) -> dict[str, Any]:
    """Stage ``data closings``. Writes closings.jsonl (``probes.labels.Closing``) and summary.json."""
    from neureasoner.models import load, load_tokenizer
    from neureasoner.progress import Progress

    traces = list(islice(stream_traces(config.traces), config.limit or None))
    tokenizer = load_tokenizer(config.model)
    closing = _check(config, traces, tokenizer)
    places = [(t, step) for t in traces for step in places_of(t, config, len(closing))]
    if not places:
        raise UserError(
            f"{config.traces}: no trace closes {config.first} thinking steps within {config.max_new_tokens} tokens "
            "(keys 'first', 'max_new_tokens')"
        )
    folder = StageFolder(config.out, "data closings", config, inputs=[config.traces, *model_files(config.model)])
    if folder.done:
        return folder.summary
    print(forecast(places, config, len(closing)), flush=True)
    # Neighbours of like length waste the least padding, and end at about the same time.
    order = sorted(places, key=lambda place: (len(place[0].prompt_ids) + _end(place), place[0].id, place[1]))
    size = max(1, config.batch_size // max(config.samples, config.left))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    parts = [folder.path / "parts" / f"{i:06d}.jsonl" for i in range(len(batches))]
    model, rows = None, list[Closing]()
    with Progress() as bar:
        task = bar.add_task("closing", total=len(places))
        for i, (batch, part) in enumerate(zip(batches, parts, strict=True)):
            if not part.is_file():
                model = model or load(config.model)[0]
                write_rows(
                    part, _forecast_part(model, tokenizer, batch, config, closing, config.seed * 200_003 + 2 * i)
                )
            rows += read_closings(part)
            free = sum(row.label for row in rows) / len(rows)
            bar.update(task, advance=len(batch), so_far=f"{free:.0%} cost nothing")
    found = {(row.trace, row.step): row for row in rows}
    rows = [found[trace.id, step] for trace, step in places]
    write_rows(folder.path / "closings.jsonl", rows)
    summary = describe(rows, traces) | {"first": config.first, "samples": config.samples, "left": config.left}
    write_json(folder.path / "summary.json", summary)
    done = folder.finish(summary)
    for part in parts:  # only now: a kill before this line costs nothing
        part.unlink(missing_ok=True)
    print(_told(summary) + f"\nnext: probes fit with closings: {folder.path / 'closings.jsonl'}")
    return done


def _check(config: ClosingsConfig, traces: Sequence[Trace], tokenizer: Any) -> list[int]:
    """Ids of the closing text. Raises UserError for traces that cannot be used, before anything is sampled."""
    if len({t.id for t in traces}) < len(traces):
        raise UserError(f"{config.traces}: some trace id occurs twice; forecasts are told by id, so give each its own")
    problems = {t.problem.id: t.problem for t in traces}
    # an answer that nothing can match would make every question hopeless; benchmarks stand in a room above this one
    import_module("neureasoner.evaluation.problems").check_golds(list(problems.values()), config.traces)
    for t in traces:
        labels_of(t)
        told = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        if tokenizer.decode(t.response_ids, **told) != t.response:
            raise UserError(
                f"{config.traces}, trace '{t.id}': its tokens are not those of model '{config.model}'; name the model "
                "that wrote the traces"
            )
    closing = encode_text(tokenizer, config.text)
    if tokenizer.decode(closing, skip_special_tokens=False) != config.text:
        raise UserError(f"key 'text': the tokenizer of '{config.model}' cannot spell {config.text!r}")
    return closing


def places_of(trace: Trace, config: ClosingsConfig, closing: int) -> list[int]:
    """Steps whose separators are forecast: one drawn from each of ``most`` equal stretches of those considered.

    ``closing``: tokens of the closing text, which has to fit in. The draw depends on seed and trace alone.
    """
    import numpy as np

    ends = bounds_of(trace)[1:]
    steps = [s for s in range(config.first - 1, len(ends), config.every) if ends[s] + closing < config.max_new_tokens]
    if not config.most or len(steps) <= config.most:
        return steps
    rng = np.random.default_rng([config.seed % 2**64, zlib.crc32(trace.id.encode())])
    return [int(rng.choice(stretch)) for stretch in np.array_split(steps, config.most)]


def _end(place: Place) -> int:
    """Response tokens up to the separator."""
    trace, step = place
    return trace.steps[step].token_end


def forecast(places: Sequence[Place], config: ClosingsConfig, closing: int) -> str:
    """What will be sampled, told before: a trace goes on about as it did, an answer is about as long as the traces'."""
    answers = [len(t.response_ids) - t.thinking_end for t, _ in places if t.finished] or [config.max_new_tokens]
    rest = sum(len(place[0].response_ids) - _end(place) for place in places)
    tokens = config.left * rest + config.samples * round(len(places) * sum(answers) / len(answers))
    read = sum(len(place[0].prompt_ids) + _end(place) for place in places) / len(places)
    return (
        f"{len(places):,} separators of {len({t.id for t, _ in places}):,} traces, {config.samples} continuations "
        f"closed and {config.left or 'none'} left alone at each: {(config.samples + config.left) * len(places):,} "
        f"responses behind "
        f"prefixes of {read:,.0f} tokens (and {closing} of the closing text), about {tokens:,} tokens to sample"
    )


def _forecast_part(
    model: Any, tokenizer: Any, batch: Sequence[Place], config: ClosingsConfig, closing: list[int], seed: int
) -> list[Closing]:
    """Both continuations of the separators of one part."""
    closed = _continue(model, tokenizer, batch, config, closing, seed, config.samples)
    if config.left:
        left = _continue(model, tokenizer, batch, config, [], seed + 1, config.left)
    else:
        left = [(int(labels_of(t).correct), float(len(t.response_ids) - _end((t, step)))) for t, step in batch]
    rows = []
    for (trace, step), (right_closed, tokens_closed), (right_left, tokens_left) in zip(
        batch, closed, left, strict=True
    ):
        end, stood, p = trace.steps[step].token_end, labels_of(trace).answer_token, trace.problem
        rows.append(
            Closing(
                trace=trace.id,
                problem=p.id,
                family=p.family,
                difficulty=p.difficulty,
                first=config.first,
                step=step,
                token=end,
                n=config.samples,
                n_left=config.left or 1,
                right_closed=right_closed,
                right_left=right_left,
                tokens_closed=tokens_closed,
                tokens_left=tokens_left,
                answered=stood is not None and stood <= end,
            )
        )
    return rows


def _continue(
    model: Any, tokenizer: Any, batch: Sequence[Place], config: ClosingsConfig, forced: list[int], seed: int, n: int
) -> list[tuple[int, float]]:
    """``n`` continuations of each prefix behind ``forced``: (how many are right, mean number of further tokens).

    A response that reaches the cap is not right, as everywhere.
    """
    from neureasoner.sampler import sample_all  # heavy, and only needed here

    ends = eos_ids(model, tokenizer)
    heads = [[*place[0].response_ids[: _end(place)], *forced] for place in batch]
    prompts = [[*t.prompt_ids, *head] for (t, _), head in zip(batch, heads, strict=True) for _ in range(n)]
    # rows of a part may be of different length, the sampler's cap is one: what is beyond a row's own cap is cut off
    settings = Sampling(config.max_new_tokens - min(map(len, heads)), config.temperature, config.top_p)
    drawn = sample_all(
        model,
        prompts,
        settings,
        batch_size=config.batch_size,
        seed=seed,
        ends=ends,
        pad=pad_id(tokenizer, ends),
    )
    out = []
    for at, ((trace, _), head) in enumerate(zip(batch, heads, strict=True)):
        right = tokens = 0
        for row in drawn[at * n : (at + 1) * n]:
            ids = row.ids[: config.max_new_tokens - len(head)]
            tokens += len(forced) + len(ids)
            if ids[-1] in ends:
                text = tokenizer.decode([*head, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
                right += grade(trace.problem, answer_of(trace.problem, text))
        out.append((right, tokens / n))
    return out


def describe(rows: Sequence[Closing], traces: Sequence[Trace]) -> dict[str, Any]:
    """Over all separators, and by what is known of their questions: see ``_figures``."""
    hopeless = hopeless_problems(rows, traces)
    answered = {True: "the answer stands", False: "the answer does not stand yet"}

    def split(key: Callable[[Closing], Any]) -> dict[str, Any]:
        names = sorted({key(row) for row in rows})
        return {str(name): _figures([row for row in rows if key(row) == name]) for name in names}

    return {
        "separators": len(rows),
        "traces": len({row.trace for row in rows}),
        "problems": len({row.problem for row in rows}),
        "tokens": round(sum(row.n * row.tokens_closed + row.n_left * row.tokens_left for row in rows)),
        "all": _figures(rows),
        "by_question": split(lambda row: "hopeless" if row.problem in hopeless else "solved"),
        "by_family": split(lambda row: row.family),
        "by_difficulty": split(lambda row: row.difficulty),
        "by_answer": split(lambda row: answered[row.answered]),
    }


def _figures(rows: Sequence[Closing]) -> dict[str, Any]:
    """``n`` separators; ``free``: share at which closing costs nothing; ``points`` of accuracy closing everywhere gains
    (negative: costs); ``saved``: per cent of a response's tokens that closing everywhere saves, ``saved_free``: that
    closing where it is free saves."""
    whole = sum(row.token + row.tokens_left for row in rows)
    saved = [row.tokens_left - row.tokens_closed for row in rows]
    return {
        "n": len(rows),
        "free": round(sum(row.label for row in rows) / len(rows), 4),
        "points": round(
            100 * sum(row.right_closed / row.n - row.right_left / row.n_left for row in rows) / len(rows), 2
        ),
        "saved": round(100 * sum(saved) / whole, 2),
        "saved_free": round(100 * sum(s for s, row in zip(saved, rows, strict=True) if row.label) / whole, 2),
    }


def _told(summary: dict[str, Any]) -> str:
    groups = {"all": summary["all"]}
    for kind in ("by_question", "by_family", "by_difficulty", "by_answer"):
        label = {"by_difficulty": "difficulty "}.get(kind, "")
        groups |= {f"{label}{name}": entry for name, entry in summary[kind].items()}
    width = max(map(len, groups))
    head = f"{'':{width}}  separators  costs nothing  points closing all  tokens saved (where free)"
    lines = [
        f"{name:{width}}  {e['n']:10,}  {e['free']:13.0%}  {e['points']:+18.1f}  {e['saved']:11.1f} % "
        f"({e['saved_free']:.1f} %)"
        for name, e in groups.items()
    ]
    return "\n".join([head, *lines])
