"""Benchmark files -> BenchmarkIndex."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neureasoner.config import closest
from neureasoner.data_builders.sources.decontaminate import BenchmarkIndex, Item
from neureasoner.data_builders.sources.readers import file_rows, input_files
from neureasoner.errors import UserError

INDEX_SUFFIX = ".safetensors"
_QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input", "text")
_IDS = ("id", "unique_id", "question_id", "problem_id", "task_id")
_PLAIN_NAMES = {"test", "train", "validation", "data", "questions", "main", "all"}


@dataclass(frozen=True)
class Benchmark:
    """A file of questions and the name its items are reported under."""

    name: str
    path: Path
    private: bool = False


def benchmark_of(spec: str, private: Sequence[str] = ()) -> Benchmark:
    """``path`` or ``name=path``. The name of ``math500/test.jsonl.gz`` is ``math500``. GPQA is always private:
    its authors ask that no item be shown in public."""
    name, found, path = spec.partition("=")
    if not found:
        path = spec
        name = Path(spec).name.split(".")[0]
        name = Path(spec).resolve().parent.name if name.lower() in _PLAIN_NAMES else name
    hidden = "gpqa" in f"{name} {path}".lower() or name in private
    return Benchmark(name, Path(path), hidden)


def question_column(row: Mapping[str, Any], where: str, column: str = "") -> list[str]:
    """The columns whose text, joined, is the question (SVAMP: Body and Question). Raises UserError."""
    if column:
        if column not in row:
            raise UserError(f"{where}: no column '{column}'{closest(column, map(str, row))}; found {', '.join(row)}")
        return [column]
    lower = {str(k).lower(): str(k) for k in row}
    found = next((lower[q] for q in _QUESTIONS if q in lower), None)
    if found is None:
        raise UserError(
            f"{where}: no question column; found {', '.join(map(str, row))}; expected one of {', '.join(_QUESTIONS)}, "
            "or name it with key 'benchmark_column'"
        )
    return [lower["body"], found] if "body" in lower and found.lower() == "question" else [found]


def benchmark_items(benchmark: Benchmark, column: str = "") -> Iterator[Item]:
    """The questions of a benchmark file. Raises UserError for a row that cannot be read: a hole would let items by."""
    names: list[str] = []
    for row in file_rows(input_files(benchmark.path)):
        where = f"{benchmark.path}, line {row.line}"
        if row.value is None:
            raise UserError(f"{where}: {row.problem}")
        if not names:
            names = question_column(row.value, str(benchmark.path), column)
        text = " ".join(str(row.value.get(n) or "") for n in names)
        if not text.strip():
            raise UserError(f"{where}: column '{names[-1]}' is empty")
        own = next((row.value[k] for k in _IDS if isinstance(row.value.get(k), (str, int))), row.number)
        yield Item(f"{benchmark.name}/{str(own).removeprefix(f'{benchmark.name}/')}", text, benchmark.private)
    if not names:
        raise UserError(f"{benchmark.path}: holds no rows")


def load_benchmarks(specs: Sequence[str], column: str = "", private: Sequence[str] = ()) -> BenchmarkIndex:
    """One index of benchmark files and saved indexes (``.safetensors``). Raises UserError."""
    benchmarks = [benchmark_of(s, private) for s in specs]
    unknown = [p for p in private if p not in {b.name for b in benchmarks}]
    if unknown:
        raise UserError(
            f"key 'private': no benchmark is named '{unknown[0]}'{closest(unknown[0], [b.name for b in benchmarks])}"
        )
    saved = [b for b in benchmarks if b.path.name.endswith(INDEX_SUFFIX)]
    fresh = [b for b in benchmarks if not b.path.name.endswith(INDEX_SUFFIX)]
    index = BenchmarkIndex.build(item for b in fresh for item in benchmark_items(b, column))
    for b in saved:
        index = index.joined(BenchmarkIndex.load(b.path))
    return index
