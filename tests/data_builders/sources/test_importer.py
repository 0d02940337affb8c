"""The stage: what is kept, removed and set aside; shards, resumes and kills."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from neureasoner.data_builders.grading.verifier import MathVerifier, Verdict
from neureasoner.data_builders.sources import conversion, importer
from neureasoner.data_builders.sources.config import ImportConfig
from neureasoner.data_builders.sources.importer import import_corpus
from neureasoner.data_builders.sources.rows import read_sources
from neureasoner.errors import UserError

OUTPUTS = ("references.jsonl", "removed.jsonl", "set_aside.jsonl", "summary.json")
LEAK = "On Monday a baker sells 12 rolls, on Tuesday 15 and on Friday 21; how many rolls were sold in all?"


class Quick:
    """Judges by equal text, so that no process is needed."""

    def check(self, pairs: Any) -> list[Verdict]:
        return [Verdict("correct" if rf"\boxed{{{gold}}}" in said else "wrong") for gold, said in pairs]


def row(i: int, answer: int | None = None, **changes: Any) -> dict[str, Any]:
    said = 2 * i if answer is None else answer
    text = f"<think>\nTwice {i}.\n\nThat is {said}.\n</think>\n\nIt is \\boxed{{{said}}}."
    return {"id": f"r{i}", "question": f"What is twice {i}?", "response": text, "answer": str(2 * i)} | changes


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def config(tmp_path: Path, corpus: Path, out: str = "out", **settings: Any) -> ImportConfig:
    return ImportConfig(input=str(corpus), out=str(tmp_path / out), **settings)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [
        row(0),
        row(1, answer=3),
        row(2, question=LEAK),
        row(3, response="<think>cut of"),
        row(4, response="<think>a <INTRA> b</think>c"),
        row(5, response="<think>a</think>b <|im_start|>user"),
        row(6, answer=None) | {"answer": None},
        row(7, response="no tags"),
        "{broken",
        row(0),
        row(8, response="<think>[FAILURE_INTER] b</think>c"),
        row(9),
    ]
    return write(tmp_path / "corpus.jsonl", rows)


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    return write(tmp_path / "bakery.jsonl", [{"id": 4, "question": LEAK}])


def test_every_row_goes_where_it_belongs(
    tmp_path: Path, corpus: Path, benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = import_corpus(config(tmp_path, corpus, benchmarks=[str(benchmark)]), Quick())
    out = tmp_path / "out"
    assert [r.id for r in read_sources(out / "references.jsonl")] == ["r0", "r6", "r9"]
    assert {r["id"]: r["reason"] for r in records(out / "removed.jsonl")} == {
        "r1": "wrong", "r2": "benchmark", "r3": "unfinished", "r4": "trigger_text", "r5": "control_tokens",
        "r8": "trigger_text",
    }  # fmt: skip
    aside = {r["line"]: r["reason"] for r in records(out / "set_aside.jsonl")}
    assert sorted(aside) == [8, 9, 10]
    assert "no thought tags" in aside[8] and "not JSON" in aside[9] and "an id that came before" in aside[10]
    assert (summary["read"], summary["kept"], summary["removed"], summary["set_aside"]) == (12, 3, 6, 3)
    assert summary["verdicts"] == {"correct": 2, "no_gold": 1, "wrong": 1}
    assert json.loads((out / "summary.json").read_text()) == summary
    printed = capsys.readouterr().out
    assert "removed r2: exact match with bakery/4 'on monday a baker" in printed and "12 rows read, 3 kept" in printed
    assert not (out / "progress.json").exists() and not list(out.glob(".*partial"))
    kept = next(read_sources(out / "references.jsonl"))
    assert kept.response == "Twice 0.\n\nThat is 0.\n</think>\n\nIt is \\boxed{0}." and kept.meta["line"] == 1


def test_a_private_benchmark_is_not_quoted_anywhere(
    tmp_path: Path, corpus: Path, benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_corpus(config(tmp_path, corpus, benchmarks=[f"gpqa={benchmark}"]), Quick())
    removed = (tmp_path / "out" / "removed.jsonl").read_text()
    assert '"benchmark_item": "gpqa/4"' in removed and '"hash": "hash ' in removed
    for text in (removed, capsys.readouterr().out, (tmp_path / "out" / "summary.json").read_text()):
        assert "baker" not in text.replace("bakery", "").lower()


def test_options(tmp_path: Path, corpus: Path) -> None:
    keep = {"unfinished": "keep", "trigger_text": "keep"}
    marked = import_corpus(config(tmp_path, corpus, "mark", select="mark", keep=["answer"], **keep), Quick())
    assert marked["kept"] == 9 and marked["unfinished"] == 1
    rows = {r.id: r for r in read_sources(tmp_path / "mark" / "references.jsonl")}
    assert rows["r1"].meta["verdict"] == "wrong" and rows["r1"].meta["columns"] == {"answer": "2"}
    assert not rows["r3"].closed and "</think>" not in rows["r3"].response
    assert import_corpus(config(tmp_path, corpus, "all", select="all", **keep))["verdicts"] == {}
    assert (
        import_corpus(config(tmp_path, corpus, "drop", gold_missing="drop"), Quick())["removed_reasons"]["no_gold"] == 1
    )
    split = import_corpus(config(tmp_path, corpus, "first", limit=2), Quick())
    assert (split["read"], split["kept"]) == (2, 1)


def test_overlaps_in_the_response(tmp_path: Path, benchmark: Path) -> None:
    text = f"<think>It says: {LEAK}</think>It is \\boxed{{0}}."
    corpus = write(tmp_path / "corpus.jsonl", [row(0, response=text)])
    assert import_corpus(config(tmp_path, corpus, "a", benchmarks=[str(benchmark)]), Quick())["kept"] == 1
    found = import_corpus(config(tmp_path, corpus, "b", benchmarks=[str(benchmark)], scan_response=True), Quick())
    assert found["kept"] == 0 and found["benchmark_matches"] == {"ngram": 1}
    assert records(tmp_path / "b" / "removed.jsonl")[0]["part"] == "thinking"


def test_with_math_verify(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    half = "<think>a</think>It is \\boxed{\\frac{1}{2}}."
    rows = [row(i, response=half) | {"answer": gold} for i, gold in enumerate(["0.5", "1/3"])]
    summary = import_corpus(config(tmp_path, write(tmp_path / "corpus.jsonl", rows)))
    assert summary["verdicts"] == {"correct": 1, "wrong": 1} and summary["kept"] == 1


def test_tokens_are_counted(tmp_path: Path, corpus: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neureasoner.models.load_tokenizer", lambda name: tiny_tokenizer)
    summary = import_corpus(config(tmp_path, corpus, tokenizer="tiny"), Quick())
    rows = read_sources(tmp_path / "out" / "references.jsonl")
    lengths = [len(tiny_tokenizer(r.response, add_special_tokens=False)["input_ids"]) for r in rows]
    assert (summary["tokens"]["sum"], summary["tokens"]["max"]) == (sum(lengths), max(lengths))
    assert summary["steps"]["sum"] == 8


@pytest.mark.parametrize("own_ids", [True, False])
def test_shards_are_disjoint_and_make_the_whole(tmp_path: Path, own_ids: bool) -> None:
    rows = [row(i) for i in range(200)]
    if not own_ids:
        rows = [{k: v for k, v in r.items() if k != "id"} for r in rows]
    corpus = write(tmp_path / "corpus.jsonl", rows)
    import_corpus(config(tmp_path, corpus, "whole"), Quick())
    whole = (tmp_path / "whole" / "references.jsonl").read_text().splitlines()
    shards = []
    for i in (1, 2, 3):
        import_corpus(config(tmp_path, corpus, f"s{i}", shard=f"{i}/3"), Quick())
        shards.append((tmp_path / f"s{i}" / "references.jsonl").read_text().splitlines())
    assert sorted(line for s in shards for line in s) == sorted(whole) and len(whole) == 200
    assert all(40 < len(s) < 95 for s in shards)


def test_share_is_seeded(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [row(i) for i in range(200)])
    taken = [import_corpus(config(tmp_path, corpus, f"o{s}", share=0.3, seed=s), Quick())["kept"] for s in (0, 1)]
    assert all(35 < n < 90 for n in taken)


def test_run_again_returns_at_once_and_other_inputs_are_refused(tmp_path: Path, corpus: Path) -> None:
    first = import_corpus(config(tmp_path, corpus), Quick())
    assert import_corpus(config(tmp_path, corpus, workers=3)) == first  # no verifier: it is not run
    with corpus.open("a") as f:
        f.write(json.dumps(row(50)) + "\n")
    with pytest.raises(UserError, match="other settings or inputs"):
        import_corpus(config(tmp_path, corpus), Quick())


def test_an_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "PART_ROWS", 10)
    corpus = write(tmp_path / "corpus.jsonl", [*(row(i) for i in range(45)), row(3), row(44)])
    import_corpus(config(tmp_path, corpus, "whole"), Quick())
    seen: list[int] = []

    class Stops(Quick):
        def check(self, pairs: Any) -> list[Verdict]:
            seen.append(len(pairs))
            if len(seen) == 3:
                raise KeyboardInterrupt
            return super().check(pairs)

    with pytest.raises(KeyboardInterrupt):
        import_corpus(config(tmp_path, corpus), Stops())
    assert not (tmp_path / "out" / "references.jsonl").exists()
    import_corpus(config(tmp_path, corpus), Stops())
    assert seen == [10, 10, 10, 10, 10, 5]  # the two finished parts were not made again
    for name in OUTPUTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


KILLED = """
import sys
from neureasoner.data_builders.sources import conversion, importer
from neureasoner.data_builders.sources.config import ImportConfig
conversion.PART_ROWS = 50
importer.import_corpus(ImportConfig(input=sys.argv[1], out=sys.argv[2], select="all"))
"""


def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus.jsonl", [row(i) for i in range(3000)])
    command = [sys.executable, "-c", KILLED, str(corpus)]
    begin = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - begin
    for share in (0.6, 0.85):
        process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL)
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    for name in OUTPUTS:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        import_corpus(config(tmp_path, tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="holds no rows"):
        import_corpus(config(tmp_path, write(tmp_path / "empty.jsonl", [])))
    corpus = write(tmp_path / "odd.jsonl", [{"alpha": 1}])
    with pytest.raises(UserError, match=r"no row fits.*found columns alpha"):
        import_corpus(config(tmp_path, corpus))
    good = write(tmp_path / "good.jsonl", [row(0)])
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        import_corpus(config(tmp_path, good, benchmarks=[str(tmp_path / "none.jsonl")]))


def test_a_part_ends_by_size_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "PART_BYTES", 1000)
    rows = [importer.RawRow(i, "f", i, {"turns": [{"value": "x" * 300}]}) for i in range(9)]
    assert [len(p) for p in conversion.parts(iter(rows))] == [4, 4, 1]


def test_hostile_rows_are_counted_and_never_stop_it(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    hostile: list[Any] = [
        row(0),
        row(1, question="\u202eevil\u0000"),
        '{"id": "\\ud800", "question": "q", "response": "<think>a</think>b"}',
        row(2, response="<think>" + "x" * 3_000_000 + "</think>b"),
        row(3, response="<think>" + "\\boxed{" * 20_000 + "</think>" + "\\boxed{" * 20_000),
        row(4, response="<think>a</think></think>b"),
        row(7, response="<think>a<" + " " * 200_000 + "b</think>c" + "{" * 100_000 + "<|im_end|>" * 20_000),
        row(8, response="<think>a</think>\\boxed{" + "\\text{" * 5_000 + "}" * 5_001),
        row(9, question="\\text" * 20_000 + "$" * 100_000 + "! " * 50_000 + "1," * 50_000),
        row(5, id={"a": 1}),
        row(6, id="../../etc/x\n"),
        "[" * 50_000,
        "null",
    ]
    begin = time.monotonic()
    bench = write(tmp_path / "bench.jsonl", [{"question": LEAK}])
    settings = {"select": "mark", "benchmarks": [str(bench)], "scan_response": True}
    with MathVerifier(timeout=2) as verifier:
        summary = import_corpus(config(tmp_path, write(tmp_path / "corpus.jsonl", hostile), **settings), verifier)
    assert summary["read"] == 13 and summary["set_aside"] == 4 and summary["kept"] == 9
    assert len(list(read_sources(tmp_path / "out" / "references.jsonl"))) == 9
    assert time.monotonic() - begin < 20
