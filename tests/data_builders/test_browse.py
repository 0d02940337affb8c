"""The page to browse records: self-contained, complete, and nothing in a record can break out of it."""

from __future__ import annotations

import json
import re

import pytest

from neureasoner.data_builders.browse import write_page
from neureasoner.data_builders.config import ReconstructConfig
from neureasoner.data_builders.inspect import inspect, read_records
from neureasoner.data_builders.inspect_config import InspectConfig
from neureasoner.data_builders.reconstruct import reconstruct
from neureasoner.errors import UserError
from neureasoner.traces import Problem, write_rows

EVIL = "</script><script>alert(1)</script><!-- \u2028 \ud800 {{data}} & \"'"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    reconstruct(ReconstructConfig(out=str(root), corpus=40, seed=1))
    return root


def data_of(page: str) -> list:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_every_row_is_there_with_its_marks_and_the_rejected_with_their_reasons(rows):
    inspect(InspectConfig(path=str(rows / "train.jsonl"), html=str(rows / "page.html")))
    data = data_of((rows / "page.html").read_text())
    records = read_records(str(rows / "train.jsonl"))
    rejected = [json.loads(x) for x in (rows / "rejected.jsonl").read_text().splitlines()]
    assert len(data) == len(records) + len(rejected) and len(rejected) > 0
    for row, record in zip(data, records, strict=False):
        assert row["text"] == record.response and row["question"] == record.problem.question
        spans = {kind: (a, b) for a, b, kind in row["marks"] if kind != "masked"}
        assert spans.get("fail") == record.failure_span and spans.get("block") == record.block_span
        if record.level != "plain":  # what does not train holds the trigger
            assert any(k == "masked" and a <= record.trigger_span[0] < b for a, b, k in row["marks"])
    assert [r["reason"] for r in data[len(records) :]] == [r["reason"] for r in rejected]


def test_nothing_loads_from_elsewhere_and_nothing_breaks_out(tmp_path):
    write_rows(tmp_path / "problems.jsonl", [Problem("p", "words", 1, "fine", "1")])
    records = [Problem(EVIL, "words", 1, EVIL, EVIL)]
    write_page(tmp_path / "page.html", EVIL, records)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "alert(1)</script>" not in page
    assert not re.findall(r"""(?:src|href)\s*=""", page) and "default-src 'none'" in page
    assert data_of(page)[0]["question"] == EVIL.replace("\ud800", "?")


def test_an_empty_selection_is_refused(rows, tmp_path):
    with pytest.raises(UserError, match="no record to browse"):
        inspect(InspectConfig(path=str(rows / "train.jsonl"), html=str(tmp_path / "x.html"), kind="nothing"))
