"""The store of recorded series: a folder that grows by whole shards and is read by rows.

Legend: ``T`` tokens of a trace, ``N`` tokens of the store, ``C`` channels of a site.

index.json            sites with their widths, dtype, fingerprints of model and vocabulary; written once, at the start
00000.safetensors, …  one append each: per site one tensor ``[sum of T, C]``, the rows of a trace together; the header
                      says which traces these are

A shard's traces stand in its own header and nowhere else. So one rename makes an append: no second file can be left
behind by a kill, and what an append costs does not grow with the store. Opening pays for it, with one header a shard.
Appends hold a file lock, so several processes may share a store; readers need none, a shard never changes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from neureasoner.artifacts import SCHEMA, fingerprint, read_json, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.fingerprints import known_as
from neureasoner.sites import Site

INDEX, LOCK, SHARD = "index.json", ".lock", "[0-9]*.safetensors"
CHUNK = 1 << 22  # values read at once
DTYPES = {"float32": ("F32", torch.float32), "float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}
KEYS = ("sites", "dtype", "model_fingerprint", "tokenizer_fingerprint")


@dataclass(frozen=True)
class Shard:
    """``first``: token of the store that is row 0 here."""

    path: Path
    first: int
    rows: int


class Place(NamedTuple):
    """Where a trace's rows are: ``[begin, end)`` of a shard. ``key``: what it was recorded from."""

    shard: Shard
    begin: int
    end: int
    key: str


class SeriesStore:
    """Series ``{site: float32 [T, C]}`` by trace id, in the order of their appends. ``store[id]`` reads all sites.

    ``SeriesStore(folder)`` opens what is there, ``SeriesStore.create`` to append. Attributes: ``sites`` (with widths),
    ``dtype`` on disk, ``model_fingerprint``, ``tokenizer_fingerprint``, ``n_tokens``. Nothing is kept in memory but
    where each trace is. Raises UserError for a folder that is no store and, by name, for a damaged shard.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_json(self.folder / INDEX)
        if not isinstance(index, dict) or index.get("dtype") not in DTYPES or any(k not in index for k in KEYS):
            raise UserError(f"{self.folder / INDEX}: not the index of a store of series; choose another folder")
        if index.get("schema", SCHEMA) > SCHEMA:
            raise UserError(f"{self.folder / INDEX}: written by a newer version; update neureasoner")
        self.sites: dict[str, int] = index["sites"]
        self.dtype: str = index["dtype"]
        self.model_fingerprint: str = index["model_fingerprint"]
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        self._key = fingerprint(index)
        self._shards: list[Shard] = []
        self._places: dict[str, Place] = {}
        self._next = 0
        for path in sorted(self.folder.glob(SHARD), key=lambda p: int(p.stem)):
            self._enter(path)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        sites: Mapping[str, int],
        *,
        model_fingerprint: str,
        tokenizer_fingerprint: str,
        dtype: str = "float32",
    ) -> SeriesStore:
        """Make a store, or open the one that is there to append to it. ``sites``: widths by site string.

        Raises UserError if the store there has other sites, another dtype, model or vocabulary. What a killed append
        left behind is removed.
        """
        folder = Path(folder)
        if dtype not in DTYPES:
            raise UserError(f"dtype '{dtype}' is unknown; use one of {', '.join(DTYPES)}")
        asked = dict(zip(KEYS, (dict(sites), dtype, model_fingerprint, tokenizer_fingerprint), strict=True))
        with _alone(folder):
            if not (folder / INDEX).is_file():
                if any(folder.glob(SHARD)):
                    raise UserError(f"{folder}: holds safetensors files but no {INDEX}; delete it or choose another")
                write_json(folder / INDEX, {"schema": SCHEMA, **asked})
            for left in folder.glob(".*.tmp"):  # no writer is at work: we hold the lock
                left.unlink()
        store = cls(folder)
        for key, value in asked.items():
            if getattr(store, key) not in (known_as(str(value)) if key == "model_fingerprint" else (value,)):
                what = key.replace("_", " ")
                raise UserError(
                    f"{folder}: was recorded with {what} {_short(getattr(store, key))}, not {_short(value)}; "
                    "choose another folder or delete it"
                )
        return store

    def append(self, items: Sequence[tuple[str, Mapping[str, np.ndarray]]], keys: Sequence[str] = ()) -> None:
        """Add ``(trace id, series)`` pairs as one shard: all of them, or after a kill none.

        ``keys``: per trace, what it was recorded from (any short text), told by ``key``. Raises UserError for an id
        that is in the store or given twice, other sites, other shapes, and a value that overflows the store's dtype.
        """
        if not items:
            return
        counts = [self._check(name, series) for name, series in items]
        if len({name for name, _ in items}) != len(items):
            raise UserError(f"{self.folder}: a trace id occurs twice in one append; ids must be unique")
        tensors = {site: self._narrowed(site, items) for site in self.sites}
        traces = list(zip([name for name, _ in items], counts, keys or [""] * len(items), strict=True))
        with _alone(self.folder):
            while (path := self._path(self._next)).is_file():  # another process has appended
                self._enter(path)
            for name, _ in items:
                if name in self:
                    raise UserError(f"{self.folder}: trace '{name}' is in the store already; a trace is kept once")
            write_tensors(path, tensors, {"store": self._key, "traces": traces})
        self._enter(path)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, trace_id: object) -> bool:
        return trace_id in self._places

    def __getitem__(self, trace_id: str) -> dict[str, np.ndarray]:
        return self.series(trace_id)

    @property
    def n_tokens(self) -> int:
        """Rows of every site."""
        return self._shards[-1].first + self._shards[-1].rows if self._shards else 0

    def length(self, trace_id: str) -> int:
        """Tokens of a trace. Raises UserError for an unknown id."""
        place = self._place(trace_id)
        return place.end - place.begin

    def key(self, trace_id: str) -> str:
        """What was given as the trace's key when it was appended. Raises UserError for an unknown id."""
        return self._place(trace_id).key

    def series(
        self, trace_id: str, sites: Sequence[str] | None = None, channels: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """``{site: float32 [T, C]}`` of a trace, reading its rows only. ``channels``: columns of every site asked for.

        Raises UserError for an unknown trace id, site or channel, and for a damaged shard.
        """
        shard, begin, end, _ = self._place(trace_id)
        names, out = list(self.sites) if sites is None else [self._site(s) for s in sites], {}
        with _opened(shard.path) as f:
            for name in names:
                value = f.get_slice(name)[begin:end]
                if channels is not None:
                    value = value[:, self._columns(name, channels)]
                out[name] = value.to(torch.float32, copy=True).numpy()  # a copy: the file is closed on return
        return out

    def rows(self, site: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens ``start`` up to ``stop`` (default: the end) of the whole store, in order, float32 ``[n, C]``."""
        name, stop = self._site(site), self.n_tokens if stop is None else stop
        if not 0 <= start <= stop <= self.n_tokens:
            raise UserError(f"{self.folder}: rows {start} to {stop} are out of range; there are {self.n_tokens}")
        out = np.empty((stop - start, self.sites[name]), np.float32)
        first = max(bisect_right(self._shards, start, key=lambda s: s.first) - 1, 0)
        for shard in self._shards[first:]:
            if shard.first >= stop:
                break
            begin, end = max(start - shard.first, 0), min(stop - shard.first, shard.rows)
            at = shard.first + begin - start
            with _opened(shard.path) as f:
                torch.from_numpy(out[at : at + end - begin]).copy_(f.get_slice(name)[begin:end])
        return out

    def chunks(self, site: str, size: int | None = None) -> Iterator[np.ndarray]:
        """All tokens of the store in order, float32 ``[at most size, C]`` at a time (default: 16 MB), one in memory."""
        size = size or max(1, CHUNK // self.sites[self._site(site)])
        for start in range(0, self.n_tokens, size):
            yield self.rows(site, start, min(start + size, self.n_tokens))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _place(self, trace_id: str) -> Place:
        if trace_id not in self._places:
            some = ", ".join(list(self._places)[:3]) or "none"
            raise UserError(f"{self.folder}: no trace '{trace_id}'; there are {len(self)} ({some}, …)")
        return self._places[trace_id]

    def _site(self, site: str) -> str:
        name = str(Site.parse(site))
        if name not in self.sites:
            raise UserError(f"{self.folder}: site '{name}' was not recorded; there are {', '.join(self.sites)}")
        return name

    def _enter(self, path: Path) -> None:
        """Read a shard's header and take its traces in."""
        with _opened(path) as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            metadata = f.metadata() or {}
        try:
            meta = json.loads(metadata["meta"])
            owner, traces = meta["store"], [(str(n), int(t), str(k)) for n, t, k in meta["traces"]]
        except (KeyError, ValueError, TypeError) as e:
            raise _damaged(path, f"its header is not that of a shard: {e!r}") from None
        if owner != self._key:
            raise UserError(f"{path}: belongs to another store; take it out of this folder")
        rows = sum(t for _, t, _ in traces)
        if found != {s: (DTYPES[self.dtype][0], (rows, c)) for s, c in self.sites.items()}:
            raise _damaged(path, "its tensors are not those of its traces")
        shard, begin = Shard(path, self.n_tokens, rows), 0
        for name, t, key in traces:
            if name in self._places:
                raise UserError(f"{path}: trace '{name}' is in {self._places[name].shard.path.name} too; delete one")
            self._places[name] = Place(shard, begin, begin + t, key)
            begin += t
        self._shards.append(shard)
        self._next = int(path.stem) + 1

    def _columns(self, site: str, channels: Sequence[int]) -> list[int]:
        width = self.sites[site]
        wrong = [c for c in channels if not 0 <= c < width]
        if wrong:
            raise UserError(f"site '{site}': channel {wrong[0]} is out of range; it has channels 0 to {width - 1}")
        return list(channels)

    def _check(self, name: str, series: Mapping[str, np.ndarray]) -> int:
        """Tokens of a series that fits this store."""
        if set(series) != set(self.sites):
            raise UserError(
                f"{self.folder}: trace '{name}' brings sites {_short(list(series))}, the store holds "
                f"{_short(list(self.sites))}; record it with the store's sites, or into another folder"
            )
        counts = {len(v) for v in series.values()}
        for site, value in series.items():
            if value.shape != (min(counts), self.sites[site]):
                raise UserError(
                    f"{self.folder}: trace '{name}', site '{site}' has shape {list(value.shape)}, "
                    f"expected [{min(counts)}, {self.sites[site]}]"
                )
        return min(counts)

    def _narrowed(self, site: str, items: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> torch.Tensor:
        """All rows of a site in the store's dtype ``[sum of T, C]``."""
        joined = np.concatenate([series[site] for _, series in items], dtype=np.float32)
        narrow = torch.from_numpy(joined).to(DTYPES[self.dtype][1])
        if self.dtype != "float32" and not torch.isfinite(narrow).all():
            for name, series in items:
                fits = torch.isfinite(torch.from_numpy(series[site].astype(np.float32)).to(narrow.dtype)).numpy()
                if not fits.all():
                    t, c = np.argwhere(~fits)[0]
                    raise UserError(
                        f"site '{site}', trace '{name}', token {t}, channel {c}: {series[site][t, c]:g} does not fit "
                        f"{self.dtype}; keep the store in float32"
                    )
        return narrow


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets it go when its process ends, however it ends."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror}; choose a folder you may write to") from None
    with lock as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The shard mapped into memory; only what is read of it is loaded. Raises UserError if it is damaged."""
    try:
        with safe_open(str(path), framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise _damaged(path, e) from None


def _damaged(path: Path, reason: Any) -> UserError:
    return UserError(f"{path}: damaged ({reason}); delete this file and record again, the other shards stay")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 160 else text[:157] + "…"
