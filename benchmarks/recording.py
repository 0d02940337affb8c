"""What the store of recorded series costs to write and to read, and what recording's checks cost beside the model.

    .venv/bin/python benchmarks/recording.py --model FOLDER --traces traces.jsonl

Prints two Markdown tables. The store: one site of ``--channels`` channels, traces of ``--length`` tokens, ``--shard``
tokens an append, every append synced to the disk. Reading is done by a fresh process, first cold (its files are put out
of the page cache), then warm:

write          MB/s over all appends, MB of what is on the disk
trace          milliseconds to read one trace chosen at random, median and 95th percentile of ``--reads``
stream         MB/s of ``chunks`` over all tokens, each summed in float64
peak           growth of the reading process's peak memory over both
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner.probes.recording import record as recording
from neureasoner.probes.recording.store import SeriesStore

SITE = "residual:0"


def peak() -> float:
    """Peak memory of this process in MB (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def forget(folder: Path) -> None:
    """Put a store's files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(folder: Path, dtype: str, args: argparse.Namespace) -> float:
    """Fill a store; MB/s of the appends alone."""
    prints = {"model_fingerprint": "", "tokenizer_fingerprint": ""}
    store = SeriesStore.create(folder, {SITE: args.channels}, dtype=dtype, **prints)
    rng, seconds = np.random.default_rng(0), 0.0
    while store.n_tokens < args.tokens:
        rows = rng.standard_normal((args.shard, args.channels), dtype=np.float32)
        pieces = [rows[i : i + args.length] for i in range(0, args.shard, args.length)]
        items = [(f"t{len(store) + i}", {SITE: piece}) for i, piece in enumerate(pieces)]
        begin = time.perf_counter()
        store.append(items)
        seconds += time.perf_counter() - begin
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6 / seconds


def read(folder: Path, reads: int) -> list[str]:
    """Cells of the table: open, traces cold and warm, stream cold and warm, peak."""
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6
    begin = time.perf_counter()
    store = SeriesStore(folder)
    cells = [f"{(time.perf_counter() - begin) * 1e3:.0f} ms"]
    names, rng = list(store), np.random.default_rng(0)
    store[names[0]]
    Path("/proc/self/clear_refs").write_text("5")
    before, picked = peak(), rng.integers(0, len(names), reads)
    for cold in (True, False):
        if cold:
            forget(folder)
        times = []
        for i in picked:
            begin = time.perf_counter()
            store[names[i]]
            times.append((time.perf_counter() - begin) * 1e3)
        cells.append(f"{np.median(times):.2f}, {np.percentile(times, 95):.2f} ms")
    for cold in (True, False):
        if cold:
            forget(folder)
        begin, total = time.perf_counter(), np.zeros(store.sites[SITE])
        for chunk in store.chunks(SITE):
            total += chunk.sum(0, dtype=np.float64)
        cells.append(f"{size / (time.perf_counter() - begin):,.0f} MB/s")
    return [*cells, f"{peak() - before:.0f} MB"]


def checks(args: argparse.Namespace) -> None:
    """Record with every check timed, and print what they take of the whole."""
    from neureasoner.models import load
    from neureasoner.traces import read_traces

    model, tokenizer = load(args.model)
    traces, spent = read_traces(args.traces)[: args.rows], dict[str, float]()

    def timed(name: str) -> None:
        check = getattr(recording, name)

        def run(*values: Any) -> None:
            begin = time.perf_counter()
            check(*values)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin

        setattr(recording, name, run)

    timed("_check")
    timed("_check_finite")
    block = model.config.num_hidden_layers // 2
    sites = [f"neuron:{block}[{','.join(map(str, range(64)))}]", f"head:{block}", "logits"]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        store = recording.record_to(folder, model, tokenizer, traces, sites)
        whole = time.perf_counter() - begin
    print("\n| recording | |\n|---|---|")
    print(f"| traces, tokens, sites | {len(store)}, {store.n_tokens:,}, {', '.join(s.split('[')[0] for s in sites)} |")
    print(f"| seconds, tokens per second | {whole:.1f}, {store.n_tokens / whole:,.0f} |")
    for name, what in (("_check", "ids and text of the trace"), ("_check_finite", "finite values")):
        print(f"| of it, {what} | {spent[name]:.3f} s, {spent[name] / whole:.2%} |")


def main() -> None:
    """Measure every dtype and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a trace")
    parser.add_argument("--shard", type=int, default=250_000, help="tokens of an append")
    parser.add_argument("--reads", type=int, default=500)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--traces", default="", help="traces.jsonl of that model; none: the store alone")
    parser.add_argument("--rows", type=int, default=200, help="traces to record")
    args = parser.parse_args()
    print(
        f"{args.tokens:,} tokens x {args.channels} channels, traces of {args.length}, {args.shard:,} tokens an append; "
        f"{os.cpu_count()} cores, load average before the run {os.getloadavg()[0]:.1f}\n"
    )
    columns = ["dtype", "write", "open", "trace, cold", "trace, warm", "stream, cold", "stream, warm", "peak"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as name:
            speed = write(Path(name), dtype, args)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                cells = pool.apply(read, (Path(name), args.reads))
        print(f"| {dtype} | {speed:,.0f} MB/s | " + " | ".join(cells) + " |", flush=True)
    if args.traces:
        checks(args)


if __name__ == "__main__":
    main()
