"""What SmolLM2 shows while it reads other models' chains, or writes its own: recorded and kept in shards.

Legend: ``T`` response tokens, ``F`` neurons of the block, ``D`` hidden size, ``n`` decisions.

A decision is ``(window, line, end)`` in response tokens: it falls after token ``end - 1``, looks back to ``window``,
and ``line`` is where the line it closes began. All ``F`` neurons of the block are kept, as the few numbers of their
spectra, so that channels can be chosen later, on the training problems of each split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner.artifacts import read_tensors, write_tensors
from neureasoner.errors import UserError
from neureasoner.probes.recording.record import logit_rows
from neureasoner.probes.spectrum import spectrum
from neureasoner.sites import Layout, read_sites

NUMBERS = ("r_hf", "entropy", "energy", "r_dom", "r_lf")  # of a spectrum: those of all three levels
Series = dict[str, np.ndarray]  # neuron [T, F], residual [T, D], logits [T, 2], question [1, D]
Decision = tuple[int, int, int]


@dataclass
class Response:
    """Token ids of a response, its decisions, and per decision what the tables need to know of it."""

    ids: list[int]
    decisions: list[Decision]
    notes: list[dict[str, Any]] = field(default_factory=list)


class Recorder:
    """Reads one block (the middle one) and the logits."""

    def __init__(self, model: Any):
        self.model, self.layout = model, Layout.of(model)
        self.layer = self.layout.n_layers // 2
        self.sites = {f"neuron:{self.layer}": "neuron", f"residual:{self.layer}": "residual"}

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """One pass -> ``neuron [B, T, F]``, ``residual [B, T, D]`` and ``hidden [B, T, D]`` (after the final norm)."""
        got: dict[str, torch.Tensor] = {}
        with read_sites(self.model, self.sites, lambda name, value: got.__setitem__(self.sites[name], value)):
            got["hidden"] = self.model.model(**inputs, use_cache=True).last_hidden_state
        return got

    def read(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> list[Series]:
        """Teacher forcing of responses that share a prompt, whose pass is made once. One series a response."""
        from transformers import DynamicCache

        width = max(map(len, responses))
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in responses])
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            before = self.forward(input_ids=torch.tensor([list(prompt)]), past_key_values=cache)
            cache.batch_repeat_interleave(len(responses))
            got = self.forward(input_ids=ids, past_key_values=cache)  # causal: padding on the right is never seen
            out = []
            for i, response in enumerate(responses):
                n = len(response)
                hidden = torch.cat([before["hidden"][0, -1:], got["hidden"][i, : n - 1]])
                pieces = zip(hidden.split(128), ids[i, :n].split(128), strict=True)  # few logits at once
                logits = torch.cat([logit_rows(self.layout.lm_head(h), t) for h, t in pieces])
                series = {"logits": logits, "question": before["residual"][0, -1:]}
                series |= {name: got[name][i, :n] for name in ("neuron", "residual")}
                out.append({name: value.numpy() for name, value in series.items()})
        return out

    def write(
        self, shared: Sequence[int], prompts: Sequence[Sequence[int]], temperature: float, longest: int,
        after: Callable[[int, list[int]], list[int] | None], seed: int,
    ) -> list[tuple[list[int], Series]]:  # fmt: skip
        """Sample a response to ``shared + prompt`` for each prompt, at most ``longest`` tokens.

        ``after(i, ids)`` is asked after every sampled token of response ``i``: tokens to put next (mostly none), or
        None to end. Forced tokens are part of the response.
        """
        from transformers import DynamicCache

        from neureasoner.sampling import left_padded

        draw = torch.Generator().manual_seed(seed)
        ids, mask = left_padded(prompts, 0, "cpu")
        mask = torch.cat([torch.ones(len(prompts), len(shared), dtype=torch.long), mask], dim=1)
        place = mask.cumsum(1)[:, -ids.shape[1] :].clamp(min=1) - 1
        cache = DynamicCache(config=self.model.config)
        out: list[list[int]] = [[] for _ in prompts]
        queue = [after(i, []) for i in range(len(prompts))]
        kept: list[dict[str, torch.Tensor]] = []
        with torch.inference_mode():
            self.forward(input_ids=torch.tensor([list(shared)]), past_key_values=cache)
            cache.batch_repeat_interleave(len(prompts))
            got = self.forward(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache)
            question, place = got["residual"][:, -1:], place[:, -1:]
            while any(q is not None for q in queue) and len(kept) < longest:
                logits = self.layout.lm_head(got["hidden"][:, -1])
                drawn = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draw)
                for i, forced in enumerate(queue):
                    if forced:
                        drawn[i, 0] = forced[0]
                    if forced is not None:
                        out[i].append(int(drawn[i, 0]))
                        queue[i] = forced[1:] or after(i, out[i])
                rows = logit_rows(logits, drawn[:, 0])
                mask, place = torch.cat([mask, torch.ones_like(drawn)], dim=1), place + 1
                got = self.forward(input_ids=drawn, attention_mask=mask, position_ids=place, past_key_values=cache)
                kept.append({"neuron": got["neuron"][:, 0], "residual": got["residual"][:, 0], "logits": rows})
        series = {name: torch.stack([k[name] for k in kept], 1).numpy() for name in ("neuron", "residual", "logits")}
        return [
            (ids_i, {**{k: v[i, : len(ids_i)] for k, v in series.items()}, "question": question[i].numpy()})
            for i, ids_i in enumerate(out)
        ]


def uncertainty(logits: np.ndarray) -> np.ndarray:
    """``[T, 2]`` -> ``[8]``: mean, largest, last and standard deviation of entropy and of surprisal."""
    x = logits.astype(np.float64)
    return np.stack([x.mean(0), x.max(0), x[-1], x.std(0)], axis=1).ravel()


def numbers(series: Series, decision: Decision) -> Series:
    """What a decision may look at, by name.

    ``spectra [5, F]``, ``level [F]`` (mean |a|), ``residual [3, D]`` (last token, mean of the line, of the window),
    ``uncertainty [16]`` (of line and window), ``question [D]`` (residual before the response).
    """
    window, line, end = decision
    neurons, residual, logits = (series[k] for k in ("neuron", "residual", "logits"))
    found = spectrum(neurons[window:end].T)
    return {
        "spectra": np.stack([found[k] for k in NUMBERS]),
        "level": np.abs(neurons[window:end]).mean(0),
        "residual": np.stack([residual[end - 1], residual[line:end].mean(0), residual[window:end].mean(0)]),
        "uncertainty": np.concatenate([uncertainty(logits[line:end]), uncertainty(logits[window:end])]),
        "question": series["question"][0],
    }


def line_starts(offsets: Sequence[int], text: str) -> list[int]:
    """``[0, end of line 0, …]`` in tokens, of lines closed by a newline; the token that holds the newline closes it.

    ``offsets``: the ``T + 1`` character boundaries of the tokens in ``text``. An empty line is no line.
    """
    bounds, filled = [0], False
    for t, (a, b) in enumerate(pairwise(offsets)):
        head = text[a:b].split("\n")[0]
        filled = filled or bool(head.strip())
        if "\n" in text[a:b] and filled:
            bounds.append(t + 1)
            filled = False
    return bounds


def save(path: Path, found: Sequence[tuple[Response, Series]], cost: dict[str, float]) -> None:
    """One shard: the decisions of some responses, stacked, their notes, and what it cost."""
    rows = [numbers(series, d) for response, series in found for d in response.decisions]
    notes = [note for response, _ in found for note in response.notes]
    stacked = {k: torch.from_numpy(np.stack([r[k] for r in rows]).astype(np.float32)) for k in rows[0]} if rows else {}
    write_tensors(path, stacked, {"notes": notes, "cost": cost})


def in_shards(
    folder: Path, jobs: Sequence[Any], size: int, minutes: float, make: Callable[[int, Sequence[Any]], Any]
) -> None:
    """Save ``make(i, jobs of shard i)`` for shards not there yet, until the time is used up; progress is printed."""
    from rich.progress import track

    begin = time.monotonic()
    for i in track(range(0, len(jobs), size), description=folder.name):
        path = folder / f"{i // size:04d}.safetensors"
        if path.is_file():
            continue
        if time.monotonic() - begin > 60 * minutes:
            return
        clock, processor = time.monotonic(), time.process_time()
        made = make(i // size, jobs[i : i + size])
        cost = {
            "responses": len(made),
            "tokens": sum(len(r.ids) for r, _ in made),
            "seconds": round(time.monotonic() - clock, 1),
            "processor": round(time.process_time() - processor, 1),
        }
        save(path, made, cost)
        print(path.name, cost, flush=True)


def load_shards(folder: Path) -> tuple[Series, list[dict[str, Any]], dict[str, float]]:
    """All shards of a folder: arrays ``[n, …]``, the decisions' notes, sums of the costs. Raises UserError if empty."""
    shards = [read_tensors(p) for p in sorted(folder.glob("*.safetensors"))]
    full = [arrays for arrays, _ in shards if arrays]
    if not full:
        raise UserError(f"{folder}: holds no recording; run the command '{folder.name}' first")
    cost = {k: sum(meta["cost"][k] for _, meta in shards) for k in shards[0][1]["cost"]}
    stacked = {k: np.concatenate([arrays[k].numpy() for arrays in full]) for k in full[0]}
    return stacked, [note for _, meta in shards for note in meta["notes"]], cost
