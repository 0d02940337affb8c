"""What an import costs: rows a second and peak memory of ``data import``, decontamination included.

    .venv/bin/python benchmarks/sources.py --rows 200000 --select all

Synthetic rows (about 3,000 characters of thinking each) are written on the fly to a gzipped jsonl file, one row in 50
with a planted benchmark question, one in 100 torn. The benchmark index holds 2,000 synthetic questions. Memory is
``ru_maxrss`` of this process and of its largest child, read after the import. The counts are checked against what was
planted. Prints the figures; those of one run stand in ``benchmarks/sources.md``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.data_builders.sources.importer import import_corpus

WORDS = [a + b for a in ("ba", "ce", "di", "fo", "gu", "ha", "ki", "lo") for b in ("lar", "men", "nis", "pot", "rud")]
PLANTED, TORN, BENCHMARK = 50, 100, 2000


def sentence(rng: Random, n: int) -> str:
    """n words and numbers."""
    return " ".join(rng.choices(WORDS, k=n)) + f" {rng.randrange(1000)}"


def question(i: int) -> str:
    """Question ``i`` of the benchmark."""
    return f"{sentence(Random(f'benchmark-{i}'), 40)}?"


def rows(n: int) -> Iterator[str]:
    """Lines of the corpus. The thinking is drawn from a pool, so that making it does not take longer than reading."""
    rng = Random(0)
    pool = [sentence(rng, 60) + "." for _ in range(2000)]
    for i in range(n):
        if i % TORN == 1:
            yield '{"id": "torn", "conv'
            continue
        asked = question(rng.randrange(BENCHMARK)) if i % PLANTED == 0 else f"{sentence(rng, 40)}?"
        a, b = rng.randrange(1, 100), rng.randrange(2, 100)
        gold = (f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}") if i % 4 == 0 else (str(a), str(a))
        text = "\n\n".join(rng.choices(pool, k=8))
        answer = f"<think>\n{text}\n</think>\n\nSo it is \\boxed{{{gold[0]}}}."
        turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]
        yield json.dumps({"id": f"row-{i}", "conversations": turns, "answer": gold[1]})


def main() -> None:
    """Make the corpus, import it, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--select", default="all", choices=["all", "correct"], help="correct also runs math-verify")
    parser.add_argument("--workers", type=int, default=1, help="processes that compare answers")
    parser.add_argument("--note", default="", help="a word on the machine, kept with the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, benchmark = Path(folder) / "corpus.jsonl.gz", Path(folder) / "benchmark.jsonl"
        benchmark.write_text("".join(json.dumps({"id": i, "question": question(i)}) + "\n" for i in range(BENCHMARK)))
        with gzip.open(corpus, "wt", compresslevel=1) as f:
            f.writelines(line + "\n" for line in rows(args.rows))
        size = corpus.stat().st_size
        begin, cpu = time.perf_counter(), time.process_time()
        summary = import_corpus(
            ImportConfig(
                input=str(corpus),
                out=str(Path(folder) / "out"),
                benchmarks=[str(benchmark)],
                select=args.select,
                workers=args.workers,
            )
        )
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        written = (Path(folder) / "out" / "references.jsonl").stat().st_size
    torn = len(range(1, args.rows, TORN))
    planted = len(range(0, args.rows, PLANTED))
    assert summary["set_aside"] == torn and summary["removed_reasons"] == {"benchmark": planted}, summary
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    own, child = (
        resource.getrusage(w).ru_maxrss * unit >> 20 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    figures: dict[str, Any] = {
        "rows": args.rows,
        "select": args.select,
        "rows_per_second": round(args.rows / seconds),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_rss_mib": own,
        "largest_child_rss_mib": child,
        "input_mib": size >> 20,
        "references_mib": written >> 20,
        "kept": summary["kept"],
        "removed_as_benchmark": planted,
        "set_aside": torn,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "note": args.note,
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
