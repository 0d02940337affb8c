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

from neureasoner.artifacts import read_tensors, write_tensors
from neureasoner.errors import UserError
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
    width, device = max(map(len, rows)), next(model.parameters()).device
    gaps = [width - len(r) if padding == "left" else 0 for r in rows]
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
        ids[i, gap : gap + len(row)] = torch.tensor(row)
        mask[i, gap : gap + len(row)] = 1
    got: dict[str, list[torch.Tensor]] = {s: [] for s in sites if s != "logits"}
    with torch.inference_mode(), read_sites(model, got, lambda name, value: got[name].append(value)) as layout:
        hidden = model.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=False,
        ).last_hidden_state
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
            out.append({s: series[s].float().cpu().numpy() for s in sites})
    for series_i, (_, response) in zip(out, batch, strict=True):
        for name, value in series_i.items():
            if value.shape[0] != len(response):
                raise UserError(f"site '{name}': {value.shape[0]} rows for {len(response)} response tokens")
    return out


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
    not in the model, a trace without a prompt, or a site that does not fire once per token.
    """
    layout = Layout.of(model)
    names = [str(layout.check(s)) for s in dict.fromkeys(map(str, map(Site.parse, sites)))]
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    pending: list[Trace] = []

    def flush() -> Iterator[dict[str, np.ndarray]]:
        pairs = [(t.prompt_ids, t.response_ids[: t.thinking_end] if thinking_only else t.response_ids) for t in pending]
        for trace in pending:
            if not trace.prompt_ids:
                raise UserError(f"trace '{trace.id}' has no prompt tokens; sample it again with data rollouts")
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        done: dict[int, dict[str, np.ndarray]] = {}
        for i in range(0, len(order), batch_size):
            members = order[i : i + batch_size]
            done.update(zip(members, _forward(model, [pairs[m] for m in members], names, padding, pad), strict=True))
        yield from (done[i] for i in range(len(pairs)))

    for trace in traces:
        pending.append(trace)
        if len(pending) == batch_size * AHEAD:
            yield from flush()
            pending = []
    yield from flush()


def save_series(path: str | Path, items: Sequence[tuple[str, dict[str, np.ndarray]]]) -> None:
    """Write ``(trace id, series)`` pairs as one safetensors shard."""
    tensors = {f"{i}/{site}": torch.from_numpy(v) for i, (_, series) in enumerate(items) for site, v in series.items()}
    write_tensors(path, tensors, {"ids": [name for name, _ in items]})


def load_series(path: str | Path) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Inverse of ``save_series``."""
    tensors, meta = read_tensors(path)
    out: list[tuple[str, dict[str, np.ndarray]]] = [(name, {}) for name in meta["ids"]]
    for key, value in tensors.items():
        i, site = key.split("/", 1)
        out[int(i)][1][site] = value.numpy()
    return out


def record_to(
    folder: str | Path,
    model: Any,
    tokenizer: Any,
    traces: Sequence[Trace],
    sites: Sequence[str],
    batch_size: int = 16,
    shard: int = 128,
) -> list[Path]:
    """Record into ``folder/00000.safetensors``, …; shards that exist are kept, so a kill costs one shard."""
    paths = []
    for i in range(0, len(traces), shard):
        part = traces[i : i + shard]
        path = Path(folder) / f"{i // shard:05d}.safetensors"
        if not path.is_file():
            ids = [t.id for t in part]
            save_series(path, list(zip(ids, record(model, tokenizer, part, sites, batch_size), strict=True)))
        paths.append(path)
    return paths
