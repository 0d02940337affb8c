"""Recording by teacher forcing: what a model's sites showed while it wrote a trace.

Legend: ``B`` batch, ``P`` prompt tokens, ``T`` response tokens, ``C`` channels of a site, ``V`` vocabulary.

Row ``t`` belongs to response token ``t``: its activations are those of position ``P + t`` (the pass that read it); its
``logits`` row ``(entropy, -log p)`` comes from position ``P + t - 1``, the distribution it was drawn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner.artifacts import fingerprint
from neureasoner.errors import UserError
from neureasoner.forward import read
from neureasoner.models import fingerprint as model_fingerprint
from neureasoner.models import input_device, tokenizer_fingerprint
from neureasoner.probes.recording.store import SeriesStore
from neureasoner.sites import Layout, Site, read_sites
from neureasoner.traces import Trace

CHUNK = 8_000_000  # logits held at once
AHEAD = 8  # batches sorted by length together


def logit_rows(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Raw ``logits [n, V]`` and the tokens drawn ``[n]`` -> ``[n, 2]`` entropy and surprisal, nats, float32."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)
    return torch.stack([entropy, -logp.gather(-1, drawn[:, None])[:, 0]], dim=-1)


def _logits_series(layout: Layout, hidden: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """``hidden [T, D]`` after the final norm -> ``[T, 2]``, never holding more than CHUNK logits."""
    head: Any = layout.lm_head
    step = max(1, CHUNK // int(head.weight.shape[0]))
    pieces = [logit_rows(head(hidden[i : i + step]), drawn[i : i + step]) for i in range(0, len(drawn), step)]
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, 2).float()


def _forward(
    model: Any, batch: Sequence[tuple[list[int], list[int]]], sites: Sequence[str], padding: str, pad: int
) -> list[dict[str, np.ndarray]]:
    """One padded pass over ``(prompt ids, response ids)`` pairs."""
    rows = [[*p, *r] for p, r in batch]
    width, device = max(map(len, rows)), input_device(model)
    gaps = [width - len(r) if padding == "left" else 0 for r in rows]
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
        ids[i, gap : gap + len(row)] = torch.tensor(row)
        mask[i, gap : gap + len(row)] = 1
    got: dict[str, list[torch.Tensor]] = {s: [] for s in sites if s != "logits"}
    with torch.inference_mode(), read_sites(model, got, lambda name, value: got[name].append(value)) as layout:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = read(model, ids.to(device), mask.to(device), positions.to(device))
        for name, values in got.items():
            if [v.shape[:2] for v in values] != [ids.shape]:
                raise UserError(
                    f"site '{name}' gave {[tuple(v.shape[:2]) for v in values]} rows for {tuple(ids.shape)} tokens; "
                    "the model skips this module, so it cannot be monitored"
                )
        out = []
        for i, ((prompt, response), gap) in enumerate(zip(batch, gaps, strict=True)):
            begin, n = gap + len(prompt), len(response)
            series = {name: values[0][i, begin : begin + n] for name, values in got.items()}
            if "logits" in sites:
                drawn = torch.tensor(response, device=device)
                series["logits"] = _logits_series(layout, hidden[i, begin - 1 : begin - 1 + n], drawn)
            # a copy: a view would keep the whole padded batch in memory for as long as one series lives
            out.append({s: series[s].to("cpu", torch.float32, copy=True).numpy() for s in sites})
    for series_i, (_, response) in zip(out, batch, strict=True):
        for name, value in series_i.items():
            if value.shape[0] != len(response):
                raise UserError(f"site '{name}': {value.shape[0]} rows for {len(response)} response tokens")
    return out


def _names(model: Any, sites: Sequence[str]) -> list[str]:
    """Site strings in their one spelling, each once. Raises UserError for one that is not in this model."""
    layout = Layout.of(model)
    return [str(layout.check(s)) for s in dict.fromkeys(map(str, map(Site.parse, sites)))]


def _check(trace: Trace, tokenizer: Any, vocabulary: int) -> None:
    """Raises UserError unless this model and this tokenizer are those of the trace; one decode, far below a forward."""
    if not trace.prompt_ids:
        raise UserError(f"trace '{trace.id}' has no prompt tokens; sample it again with data rollouts")
    ids = [*trace.prompt_ids, *trace.response_ids]
    if min(ids) < 0 or max(ids) >= vocabulary:
        wrong = next(i for i in ids if not 0 <= i < vocabulary)
        raise UserError(
            f"trace '{trace.id}' holds token {wrong}, the model knows 0 to {vocabulary - 1}; "
            "name the model the trace was sampled from"
        )
    # as read_response and Separators decode
    text = tokenizer.decode(trace.response_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text != trace.response:
        pairs = zip(text, trace.response, strict=False)
        shared = min(len(text), len(trace.response))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
        raise UserError(
            f"trace '{trace.id}': with this tokenizer its tokens spell {text[at : at + 20]!r} at character {at}, its "
            f"text has {trace.response[at : at + 20]!r}; name the model the trace was sampled from"
        )


def _check_finite(trace: Trace, series: dict[str, np.ndarray], model: Any) -> None:
    for site, values in series.items():
        finite = np.isfinite(values)
        if not finite.all():
            t, c = np.argwhere(~finite)[0]
            raise UserError(
                f"site '{site}', trace '{trace.id}', response token {t}, channel {c}: the model gave {values[t, c]} in "
                f"{str(model.dtype).removeprefix('torch.')}; load it in bfloat16 or float32, and if it is, its weights "
                "are damaged"
            )


def record(
    model: Any,
    tokenizer: Any,
    traces: Iterable[Trace],
    sites: Sequence[str],
    batch_size: int = 16,
    *,
    thinking_only: bool = False,
    padding: str = "right",
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the series ``{site: float32 [T, C]}`` of every trace, in order.

    ``thinking_only`` feeds and returns only the first ``trace.thinking_end`` rows. Raises UserError for a site that is
    not in the model, a trace without a prompt or of another vocabulary, a site that does not fire once per token, and
    a value that is not finite.
    """
    names, vocabulary = _names(model, sites), int(model.get_input_embeddings().weight.shape[0])
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    pending: list[Trace] = []

    def flush() -> Iterator[dict[str, np.ndarray]]:
        pairs = [(t.prompt_ids, t.response_ids[: t.thinking_end] if thinking_only else t.response_ids) for t in pending]
        for trace in pending:
            _check(trace, tokenizer, vocabulary)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        done: dict[int, dict[str, np.ndarray]] = {}
        for i in range(0, len(order), batch_size):
            members = order[i : i + batch_size]
            found = _forward(model, [pairs[m] for m in members], names, padding, pad)
            for m, series in zip(members, found, strict=True):
                _check_finite(pending[m], series, model)
                done[m] = series
        yield from (done[i] for i in range(len(pairs)))

    for trace in traces:
        pending.append(trace)
        if len(pending) == batch_size * AHEAD:
            yield from flush()
            pending = []
    yield from flush()


def record_to(
    folder: str | Path,
    model: Any,
    tokenizer: Any,
    traces: Sequence[Trace],
    sites: Sequence[str],
    batch_size: int = 16,
    shard: int = 64,
    dtype: str = "float32",
) -> SeriesStore:
    """Record into the store in ``folder``, ``shard`` traces an append, and return it.

    Traces that are in the store are skipped, so a kill costs one shard. Raises UserError as ``record`` and
    ``SeriesStore.create`` do, for two traces of one id, and for one that was recorded from other tokens.
    """
    from neureasoner.progress import Progress

    layout, names = Layout.of(model), _names(model, sites)
    store = SeriesStore.create(
        folder,
        {name: layout.width(name) for name in names},
        model_fingerprint=model_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        dtype=dtype,
    )
    keys: dict[str, str] = {}
    for trace in traces:
        if trace.id in keys:
            raise UserError(f"trace id '{trace.id}' occurs twice; ids must be unique")
        keys[trace.id] = fingerprint(trace.prompt_ids, trace.response_ids)
        if trace.id in store and store.key(trace.id) != keys[trace.id]:
            raise UserError(
                f"{folder}: trace '{trace.id}' was recorded from other tokens; choose another folder or delete it"
            )
    todo = [t for t in traces if t.id not in store]
    with Progress() as bar:
        task = bar.add_task("recording", total=len(traces), completed=len(traces) - len(todo))
        for i in range(0, len(todo), shard):
            part = todo[i : i + shard]
            recorded = record(model, tokenizer, part, names, batch_size)
            store.append([(t.id, s) for t, s in zip(part, recorded, strict=True)], [keys[t.id] for t in part])
            bar.update(task, advance=len(part))
    return store
