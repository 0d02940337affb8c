"""Raw rows of files and Hub data sets, streamed: one row (or one small batch) in memory at a time.

A row that cannot be read is yielded with the reason, so that one bad line never costs a corpus. A file that cannot be
read on (torn gzip, broken JSON array) raises UserError: what follows cannot be known.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from neureasoner.errors import UserError

MAX_ROW = 64 << 20  # bytes of one row; longer ones are set aside
_CHUNK = 1 << 20
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class RawRow:
    """``number`` counts from 0 over the whole input, ``line`` from 1 in its file. No ``value`` means a ``problem``."""

    number: int
    file: str
    line: int
    value: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class HubSet:
    """A data set on the Hub, read by streaming."""

    name: str
    config: str = ""
    split: str = "train"
    revision: str = ""


def kind_of(path: Path) -> str | None:
    """jsonl, json or parquet; None for any other file."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def is_hub(name: str) -> bool:
    """Whether an input that is no file or folder here names a Hub data set."""
    if name.startswith("hub:"):
        return True
    return not Path(name).exists() and kind_of(Path(name)) is None and bool(_HUB.fullmatch(name))


def input_files(path: str | Path) -> list[Path]:
    """The data files of a path: itself, or those in the folder, sorted. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and kind_of(p) and not p.name.startswith("."))
        if not files:
            raise UserError(f"{path}: the folder holds no .jsonl, .json or .parquet file")
        return files
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder (a Hub data set is named org/name)")
    if kind_of(path) is None:
        raise UserError(f"{path}: cannot tell its format; known: .jsonl, .json, .parquet, each also as .gz or .zst")
    return [path]


def open_stream(path: Path) -> IO[bytes]:
    """A file as a byte stream, decompressed by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _CHUNK)
    return path.open("rb")


def parse_row(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """(row, "") or (None, reason). Never raises, whatever the bytes."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "not UTF-8 text"
    except RecursionError:
        return None, "not JSON (nested too deeply)"
    except json.JSONDecodeError as e:
        return None, f"not JSON ({e.msg})"
    except ValueError:
        return None, "not JSON (a number too long)"
    if not isinstance(value, dict):
        return None, f"expected a JSON object, got {type(value).__name__}"
    return value, ""


def _json_lines(stream: IO[bytes], skip: int) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(line, row, problem) of a jsonl stream after ``skip`` rows. Blank lines are no rows."""
    line = 0
    while data := stream.readline(MAX_ROW):
        line += 1
        whole = len(data) < MAX_ROW or data.endswith(b"\n")
        while not whole:
            rest = stream.readline(_CHUNK)
            whole = len(rest) < _CHUNK or rest.endswith(b"\n")
        too_long = len(data) >= MAX_ROW
        if not too_long and not data.strip():
            continue
        if skip:
            skip -= 1
            continue
        yield (line, None, f"a row of more than {MAX_ROW >> 20} MiB") if too_long else (line, *parse_row(data))


def _json_array(stream: IO[bytes], skip: int) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(position from 1, row, problem) of a JSON array, one element in memory at a time. Raises UserError."""
    text, decoder, buffer, position, more = io.TextIOWrapper(stream, "utf-8-sig"), json.JSONDecoder(), "", 0, True
    at, started = 0, False
    while True:
        while at < len(buffer) and (buffer[at].isspace() or (buffer[at] == "," and started and position)):
            at += 1
        if at < len(buffer) and not started:
            at, started = at + 1, True  # the bracket: the caller has looked
            continue
        if at < len(buffer) and buffer[at] == "]":
            return
        try:
            value, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError):
            if not more or len(buffer) - at > MAX_ROW:
                raise UserError(f"row {position + 1} of the JSON array is broken or not ended") from None
            chunk = text.read(_CHUNK)
            buffer, at, more = buffer[at:] + chunk, 0, bool(chunk)
            continue
        position += 1
        if position > skip:
            ok = isinstance(value, dict)
            yield position, value if ok else None, "" if ok else f"expected a JSON object, got {type(value).__name__}"


def _parquet(path: Path, skip: int) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """(row from 1, row, "") of a parquet file, in small batches."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        seen = 0
        for batch in file.iter_batches(batch_size=128):
            begin = min(max(skip - seen, 0), batch.num_rows)
            for i, row in enumerate(batch.slice(begin).to_pylist(), seen + begin + 1):
                yield i, row, ""
            seen += batch.num_rows
    except pyarrow.ArrowException as e:
        raise UserError(f"not a parquet file that can be read ({str(e).splitlines()[0]})") from None


def _file_rows(path: Path, skip: int) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet(path, skip)
        return
    if kind == "json":
        with open_stream(path) as stream:
            head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        kind = "array" if head.startswith(b"[") else "jsonl"  # many files named .json hold one object a line
    with open_stream(path) as stream:
        yield from (_json_array if kind == "array" else _json_lines)(stream, skip)


def file_rows(files: list[Path], skip: int = 0) -> Iterator[RawRow]:
    """Rows of files in turn, after the first ``skip``. Raises UserError naming a file that cannot be read on."""
    number = 0
    for path in files:
        skip_here = max(0, skip - number)
        if skip_here and path is not files[-1]:  # how many it holds is known only once it was read
            counted = sum(1 for _ in _guarded(path, 0))
            if number + counted <= skip:
                number += counted
                continue
        number += skip_here
        for line, value, problem in _guarded(path, skip_here):
            yield RawRow(number, path.name, line, value, problem)
            number += 1


def _guarded(path: Path, skip: int) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    try:
        yield from _file_rows(path, skip)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UserError(f"{path}: torn or damaged ({e}); fetch it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from None


def hub_rows(hub: HubSet, skip: int = 0) -> Iterator[RawRow]:
    """Rows of a Hub data set, streamed. Raises UserError when the Hub or the data set cannot be had."""
    import datasets

    try:
        rows = datasets.load_dataset(
            hub.name, hub.config or None, split=hub.split, revision=hub.revision or None, streaming=True
        )
        for i, row in enumerate(rows.skip(skip), skip):
            yield RawRow(i, hub.name, i + 1, dict(row))
    except Exception as e:  # the Hub client raises its own, requests', fsspec's and plain ValueErrors
        lines = str(e).splitlines() or [type(e).__name__]
        raise UserError(f"Hub data set '{hub.name}' (split '{hub.split}'): {lines[0]}") from None
