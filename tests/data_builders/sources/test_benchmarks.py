"""Benchmark files: names, question columns, what is private."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from neureasoner.data_builders.sources.benchmarks import (
    Benchmark,
    benchmark_items,
    benchmark_of,
    load_benchmarks,
    question_column,
)
from neureasoner.errors import UserError

QUESTION = "A farmer counts 14 hens, 3 dogs and 22 sheep; how many legs do they have in all?"


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def test_names_and_privacy(tmp_path: Path) -> None:
    assert benchmark_of(str(tmp_path / "math500" / "test.jsonl.gz")).name == "math500"
    assert benchmark_of("dir/amc23.jsonl").name == "amc23"
    assert benchmark_of("mine=dir/test.jsonl") == Benchmark("mine", Path("dir/test.jsonl"))
    for spec in ("gpqa=x.jsonl", "x/gpqa_diamond/test.jsonl", "mine=a/GPQA.jsonl"):
        assert benchmark_of(spec).private
    assert benchmark_of("mine=x.jsonl", ["mine"]).private


def test_question_columns() -> None:
    assert question_column({"id": 1, "Problem": "x", "solution": "y"}, "f") == ["Problem"]
    assert question_column({"Body": "a", "Question": "b"}, "f") == ["Body", "Question"]
    assert question_column({"q": "a"}, "f", "q") == ["q"]
    with pytest.raises(UserError, match="f: no question column; found q, a; expected one of question, problem"):
        question_column({"q": "a", "a": "b"}, "f")
    with pytest.raises(UserError, match="f: no column 'qq'; did you mean 'q'"):
        question_column({"q": "a"}, "f", "qq")


def test_items(tmp_path: Path) -> None:
    path = write(
        tmp_path / "b.jsonl.gz",
        [{"id": "b/7", "Body": "Tom has 3.", "Question": "How many?"}, {"id": 0, "Body": "x", "Question": "y"}],
    )
    items = list(benchmark_items(Benchmark("b", path)))
    assert [(i.name, i.question) for i in items] == [("b/7", "Tom has 3. How many?"), ("b/0", "x y")]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no rows"), (b"{", "line 1: not JSON"), (b'{"question": ""}', "is empty")]
)
def test_a_benchmark_with_holes_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_benchmarks([str(path)])


def test_files_and_saved_indexes_together(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"question": QUESTION}])
    two = write(tmp_path / "gpqa" / "test.jsonl", [{"Question": QUESTION.replace("hens", "ducks")}])
    load_benchmarks([str(two)]).save(tmp_path / "two.safetensors")
    found = load_benchmarks([str(one), str(tmp_path / "two.safetensors")])
    assert len(found) == 2
    shown, hidden = found.match(QUESTION), found.match(QUESTION.replace("hens", "ducks"))
    assert shown and not shown.private and hidden and hidden.private and hidden.item == "gpqa/0"
    assert "sheep" in str(shown) and "sheep" not in str(hidden)
    with pytest.raises(UserError, match="no benchmark is named 'on'; did you mean 'one'"):
        load_benchmarks([str(one)], private=["on"])
