"""Files of every kind hold the same rows; damage costs a row, or is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neureasoner.data_builders.sources import readers
from neureasoner.data_builders.sources.readers import HubSet, file_rows, hub_rows, input_files, is_hub, parse_row
from neureasoner.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"question": f"q{i} ü", "n": i, "turns": [{"from": "user", "value": "x"}]} for i in range(300)
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    import pyarrow
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    name = path.name
    if ".parquet" in name:
        pq.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=50)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as out:
            out.write(lines)
    elif "array" in name:
        path.write_text(json.dumps(rows, indent=2))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "array.json", "lines.json"])
@pytest.mark.parametrize("skip", [0, 1, 128, 299, 300])
def test_every_kind_yields_the_same_rows(tmp_path: Path, name: str, skip: int) -> None:
    rows = list(file_rows([write(tmp_path / name)], skip))
    assert [r.value for r in rows] == ROWS[skip:]
    assert [r.number for r in rows] == list(range(skip, 300)) == [r.line - 1 for r in rows]


@pytest.mark.parametrize("skip", [0, 5, 10, 15, 29])
def test_a_folder_is_read_in_order(tmp_path: Path, skip: int) -> None:
    for i, name in enumerate(["a.jsonl", "b.parquet", "c.jsonl.gz"]):
        write(tmp_path / name, ROWS[10 * i : 10 * i + 10])
    (tmp_path / "readme.md").write_text("no data")
    rows = list(file_rows(input_files(tmp_path), skip))
    assert [r.value for r in rows] == ROWS[skip:30] and [r.number for r in rows] == list(range(skip, 30))


def test_bad_lines_are_yielded_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW", 100)
    monkeypatch.setattr(readers, "_CHUNK", 16)
    path = tmp_path / "a.jsonl"
    lines = [b'{"a": 1}', b"", b'{"a": ', b"[1]", b'{"a": "\xff"}', b'{"a": "' + b"x" * 500 + b'"}', b'{"a": 2}']
    path.write_bytes(b"\n".join(lines))
    rows = list(file_rows([path]))
    assert [(r.line, r.value) for r in rows if r.value] == [(1, {"a": 1}), (7, {"a": 2})]
    problems = {r.line: r.problem for r in rows if not r.value}
    assert "not JSON" in problems[3] and "got list" in problems[4] and "UTF-8" in problems[5]
    assert "more than" in problems[6] and [r.number for r in rows] == list(range(6))
    for skip in range(7):
        assert list(file_rows([path], skip)) == rows[skip:]


@given(st.binary(max_size=80))
def test_any_bytes_are_a_row_or_a_reason(data: bytes) -> None:
    value, problem = parse_row(data)
    assert (value is None) == bool(problem)


def test_hostile_json_is_a_reason() -> None:
    for data in (b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}", b'{"a"' * 50_000):
        assert parse_row(data)[0] is None


def test_torn_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: torn"):
        list(file_rows([path]))
    (tmp_path / "b.json").write_text('[{"a": 1}, {"a": ')
    with pytest.raises(UserError, match=r"b\.json: row 2 of the JSON array"):
        list(file_rows([tmp_path / "b.json"]))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"c\.parquet: not a parquet"):
        list(file_rows([tmp_path / "c.parquet"]))


def test_missing_and_unknown_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        input_files(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"known: \.jsonl"):
        input_files(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        input_files(tmp_path / "empty")


def test_hub_names(tmp_path: Path) -> None:
    assert is_hub("org/name") and is_hub("hub:org/name")
    assert not is_hub("org/name.jsonl") and not is_hub(str(tmp_path)) and not is_hub("name.parquet")


def test_hub_rows_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs, args=args)
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS[:5]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(hub_rows(HubSet("org/name", split="train"), skip=2))
    assert [r.value for r in rows] == ROWS[2:5] and rows[0].number == 2
    assert asked["streaming"] is True and asked["args"] == ("org/name", None)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"'org/name' \(split 'train'\): no route$"):
        list(hub_rows(HubSet("org/name")))
