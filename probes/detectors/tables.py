"""Features of every decision of every trace, computed once and kept in shards, so that a kill costs one shard.

Legend: ``n`` decisions (separators), ``d`` features of a set, ``m`` traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner.artifacts import read_tensors, write_tensors
from neureasoner.probes.features import FeatureSet
from neureasoner.probes.labels import Closing, Sample, samples
from neureasoner.probes.recording.record import record
from neureasoner.traces import Trace

SHARD = 64  # traces
Sets = Mapping[str, Mapping[str, FeatureSet]]  # by level, then by any key


@dataclass
class Table:
    """One feature set, for all decisions of its level.

    ``x [n, d]`` float32, ``valid [n]`` whether it can be decided upon, ``y [n]`` labels, ``trace [n]``, ``step [n]``,
    ``token [n]`` (the separator's end).
    """

    x: np.ndarray
    valid: np.ndarray
    y: np.ndarray
    trace: np.ndarray
    step: np.ndarray
    token: np.ndarray


def beside(tables: Sequence[Table]) -> Table:
    """Several feature sets of the same decisions as one; valid where all are."""
    first = tables[0]
    return Table(
        x=np.concatenate([t.x for t in tables], axis=1) if len(tables) > 1 else first.x,
        valid=np.logical_and.reduce([t.valid for t in tables]),
        y=first.y,
        trace=first.trace,
        step=first.step,
        token=first.token,
    )


def build_tables(
    cache: Path,
    model: Any,
    tokenizer: Any,
    traces: Sequence[Trace],
    sets: Sets,
    easy: dict[str, int],
    batch_size: int,
    closings: Sequence[Sequence[Closing]] | None = None,
) -> dict[str, dict[str, Table]]:
    """``{level: {key: Table}}`` for the feature sets given. Records every trace once, into shards under ``cache``.

    ``closings``: forecasts of each trace, the decisions of feature sets that are an exit.
    """
    from neureasoner.progress import track

    sites = list(dict.fromkeys(s for group in sets.values() for f in group.values() for s in f.sites()))
    paths = []
    starts = range(0, len(traces), SHARD)
    for begin in track(starts, "recording", len(starts)):
        path = cache / f"{begin // SHARD:05d}.safetensors"
        if not path.is_file():
            members = traces[begin : begin + SHARD]
            recorded = record(model, tokenizer, members, sites, batch_size, thinking_only=True)
            forecast = closings and closings[begin : begin + SHARD]
            write_tensors(path, _shard(members, recorded, sets, easy, model.config.hidden_size, forecast))
        paths.append(path)
    shards = [read_tensors(p)[0] for p in paths]
    out: dict[str, dict[str, Table]] = {}
    for level, group in sets.items():
        out[level] = {}
        for key, features in group.items():
            found = _samples(traces, features, easy, closings)
            out[level][key] = Table(
                x=np.concatenate([s[f"{level}/{key}"].numpy() for s in shards]),
                valid=np.concatenate([s[f"{level}/{key}/valid"].numpy() for s in shards]),
                y=np.array([s.label for s in found], dtype=np.int64),
                trace=np.array([s.trace for s in found], dtype=np.int64),
                step=np.array([s.step for s in found], dtype=np.int64),
                token=np.array([s.bounds[-1] for s in found], dtype=np.int64),
            )
    return out


def _samples(
    traces: Sequence[Trace], features: FeatureSet, easy: dict[str, int], closings: Sequence[Sequence[Closing]] | None
) -> list[Sample]:
    return samples(traces, features.level, features.window, easy, closings if features.exit_from else None)


def _shard(
    traces: Sequence[Trace],
    recorded: Any,
    sets: Sets,
    easy: dict[str, int],
    hidden_size: int,
    closings: Sequence[Sequence[Closing]] | None,
) -> dict[str, torch.Tensor]:
    """Features of one shard's traces: ``level/key`` ``[n, d]`` and ``level/key/valid`` ``[n]``."""
    xs: dict[str, list[np.ndarray]] = {f"{level}/{key}": [] for level, group in sets.items() for key in group}
    valid: dict[str, list[bool]] = {name: [] for name in xs}
    for i, (trace, series) in enumerate(zip(traces, recorded, strict=True)):
        for level, group in sets.items():
            for key, features in group.items():
                for sample in _samples([trace], features, easy, closings and closings[i : i + 1]):
                    x, ok = features.compute(series, sample.bounds)
                    xs[f"{level}/{key}"].append(x.astype(np.float32))
                    valid[f"{level}/{key}"].append(ok)
    out = {}
    for level, group in sets.items():
        for key, features in group.items():
            name = f"{level}/{key}"
            empty = np.zeros((0, features.dim(hidden_size)), dtype=np.float32)
            out[name] = torch.from_numpy(np.stack(xs[name]) if xs[name] else empty)
            out[f"{name}/valid"] = torch.tensor(valid[name], dtype=torch.bool)
    return out
