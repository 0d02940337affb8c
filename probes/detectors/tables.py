"""Features of every decision of every trace, computed once and kept in shards, so that a kill costs one shard.

Legend: ``n`` decisions (separators), ``d`` features of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner.artifacts import read_tensors, write_tensors
from neureasoner.probes.config import FitConfig
from neureasoner.probes.features import FeatureSet
from neureasoner.probes.labels import samples
from neureasoner.probes.recording.record import record
from neureasoner.traces import Trace

SHARD = 64  # traces
PARTS = ("length", "entropy", "residual", "spectral", "random")  # random: spectral of the control channels


@dataclass
class Table:
    """One part over one window, for all decisions of a level.

    ``x [n, d]`` float32, ``y [n]`` labels, ``trace [n]``, ``step [n]``, ``token [n]`` (the separator's end), and
    ``valid`` by part: whether it can be decided upon.
    """

    x: np.ndarray
    y: np.ndarray
    trace: np.ndarray
    step: np.ndarray
    token: np.ndarray
    valid: dict[str, np.ndarray]

    def valid_for(self, parts: Sequence[str]) -> np.ndarray:
        """Decisions ``[n]`` whose features are all valid; spectra ask for more tokens than the other parts."""
        return self.valid["spectral" if "spectral" in parts else "length"]


def _sets(config: FitConfig, level: str, channels: str, origin: dict[str, Any]) -> dict[tuple[str, int], FeatureSet]:
    """Every (part, window) of a level that some candidate or control needs."""
    wanted = {"length", "spectral", "random", *(p for c in config.candidates for p in c.replace(" ", "").split("+"))}
    out = {}
    for window in dict.fromkeys(getattr(config, level)):
        for part in PARTS:
            if part in wanted:
                site = origin["random"][level] if part == "random" else channels
                name = "spectral" if part == "random" else part
                out[part, window] = FeatureSet.named(name, level, window, site, origin["residual"])
    return out


def build_tables(
    config: FitConfig,
    cache: Path,
    model: Any,
    tokenizer: Any,
    traces: Sequence[Trace],
    channels: dict[str, str],
    origin: dict[str, Any],
    easy: dict[str, int],
) -> dict[str, dict[tuple[str, int], Table]]:
    """``{level: {(part, window): Table}}`` for the levels in ``channels``. Records every trace once."""
    from rich.progress import track

    sets = {level: _sets(config, level, site, origin) for level, site in channels.items()}
    sites = list(dict.fromkeys(s for group in sets.values() for f in group.values() for s in f.sites()))
    paths = []
    starts = range(0, len(traces), SHARD)
    for begin in track(starts, description="recording", total=len(starts)):
        path = cache / f"{begin // SHARD:05d}.safetensors"
        if not path.is_file():
            members = traces[begin : begin + SHARD]
            recorded = record(model, tokenizer, members, sites, config.batch_size, thinking_only=True)
            write_tensors(path, _shard(members, recorded, sets, easy, model.config.hidden_size))
        paths.append(path)
    shards = [read_tensors(p)[0] for p in paths]
    out: dict[str, dict[tuple[str, int], Table]] = {}
    for level, group in sets.items():
        out[level] = {}
        for (part, window), _ in group.items():
            found = samples(traces, level, window, easy)
            out[level][part, window] = Table(
                x=np.concatenate([s[f"{level}/{part}/{window}"].numpy() for s in shards]),
                y=np.array([s.label for s in found], dtype=np.int64),
                trace=np.array([s.trace for s in found], dtype=np.int64),
                step=np.array([s.step for s in found], dtype=np.int64),
                token=np.array([s.bounds[-1] for s in found], dtype=np.int64),
                valid={
                    p: np.concatenate([s[f"{level}/{p}/{window}/valid"].numpy() for s in shards])
                    for p in ("length", "spectral")
                },
            )
    return out


def _shard(
    traces: Sequence[Trace],
    recorded: Any,
    sets: dict[str, dict[tuple[str, int], FeatureSet]],
    easy: dict[str, int],
    hidden_size: int,
) -> dict[str, torch.Tensor]:
    """Features of one shard's traces: ``level/part/window`` ``[n, d]`` and ``…/valid`` ``[n]``."""
    xs: dict[str, list[np.ndarray]] = {}
    valid: dict[str, list[bool]] = {}
    dims = {f"{level}/{p}/{w}": f.dim(hidden_size) for level, group in sets.items() for (p, w), f in group.items()}
    for key in dims:
        xs[key], valid[key] = [], []
    for trace, series in zip(traces, recorded, strict=True):
        for level, group in sets.items():
            for (part, window), features in group.items():
                key = f"{level}/{part}/{window}"
                for sample in samples([trace], level, window, easy):
                    x, ok = features.compute(series, sample.bounds)
                    xs[key].append(x.astype(np.float32))
                    valid[key].append(ok)
    out = {}
    for key, d in dims.items():
        out[key] = torch.from_numpy(np.stack(xs[key]) if xs[key] else np.zeros((0, d), dtype=np.float32))
        if key.split("/")[1] in ("length", "spectral"):
            out[f"{key}/valid"] = torch.tensor(valid[key], dtype=torch.bool)
    return out
