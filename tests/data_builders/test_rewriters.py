"""The exact rewriter: every row obeys the layout, holds exactly one error, and its repair is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neureasoner.data_builders.config import ReconstructConfig
from neureasoner.data_builders.encoding import IGNORE, encode_row, prompt_text, trigger_ids
from neureasoner.data_builders.families import extract_answer, score
from neureasoner.data_builders.judges import review_steps
from neureasoner.data_builders.layouts import parse
from neureasoner.data_builders.reconstruct import make_rows, reconstruct, references, shortest
from neureasoner.data_builders.rewriters import ExactRewriter
from neureasoner.errors import UserError
from neureasoner.traces import FINISHED, INTER, INTRA


@pytest.fixture(scope="module")
def rows():
    config = ReconstructConfig(out="-", corpus=240, intra=1, inter=1, plain=0.5, seed=4)
    rejected = []
    return list(make_rows(references(config), ExactRewriter(), config, rejected)), rejected


def test_every_level_and_family_occurs(rows) -> None:
    made, rejected = rows
    assert {(r.level, r.problem.family) for r in made} >= {
        (level, name) for level in ("intra", "inter", "plain") for name in ("arithmetic", "countdown", "words")
    }
    assert len(rejected) < 0.35 * len(made)
    assert all(r["reason"] for r in rejected)


def test_one_trigger_at_its_span_and_the_right_answer(rows) -> None:
    for r in rows[0]:
        assert score(r.problem, extract_answer(r.response)), r.response
        n = r.response.count(INTRA) + r.response.count(INTER)
        assert n == (r.level != "plain")
        if r.level == "plain":
            continue
        a, b = r.trigger_span
        assert r.response[a:b] == (INTRA if r.level == "intra" else INTER)
        assert r.response[a - 2 : a] == "\n\n" and r.response[b] == "\n"
        block = parse(r.response).block
        if r.level == "intra":
            assert block.error_span in r.response[: r.trigger_span[0]]


def test_control_arm_has_neither_failure_nor_block() -> None:
    config = ReconstructConfig(out="-", corpus=60, intra=1, inter=1, plain=0, control_arm=True)
    made = list(make_rows(references(config), ExactRewriter(), config, []))
    assert made and all(INTRA not in r.response and "FAILURE" not in r.response for r in made)
    assert all(score(r.problem, extract_answer(r.response)) for r in made)


def test_stage_is_reproducible_and_finishes_once(tmp_path: Path) -> None:
    a = reconstruct(ReconstructConfig(out=str(tmp_path / "a"), corpus=30))
    reconstruct(ReconstructConfig(out=str(tmp_path / "b"), corpus=30))
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()
    before = (tmp_path / "a/train.jsonl").stat().st_mtime_ns
    assert reconstruct(ReconstructConfig(out=str(tmp_path / "a"), corpus=30)) == a
    assert (tmp_path / "a/train.jsonl").stat().st_mtime_ns == before


def test_an_early_closed_row_trains_all_but_the_closing_text(tiny_tokenizer) -> None:
    config = ReconstructConfig(out="-", corpus=60, intra=0, inter=0, plain=0, instance=1, seed=3)
    made = list(make_rows(references(config), ExactRewriter(), config, []))
    full = {r.id: r for r in references(config)}
    assert {r.problem.family for r in made} == {"arithmetic", "countdown", "words"}
    for row in made:
        reference = full[row.reference_id]
        assert row.level == "instance" and row.response.count(FINISHED) == 1
        assert score(row.problem, extract_answer(row.response))
        kept = row.response[: row.trigger_span[0]].strip().split("\n\n")
        assert kept == list(reference.paragraphs[: len(kept)]) and len(kept) < len(reference.paragraphs)
        if row.problem.family == "countdown":
            assert any(r.solves for r in review_steps(row.problem, kept)), "a search is closed after its solution only"
        encoded = encode_row(row, tiny_tokenizer, trigger_ids(tiny_tokenizer))
        begin = len(tiny_tokenizer(prompt_text(tiny_tokenizer, row.prompt), add_special_tokens=False).input_ids)
        masked = [i for i, label in enumerate(encoded.labels) if label == IGNORE and i >= begin]
        assert tiny_tokenizer.decode([encoded.input_ids[i] for i in masked]) == FINISHED
        assert masked == list(range(masked[0], masked[0] + len(masked)))


def test_the_shortest_references_of_each_problem_are_kept() -> None:
    refs = list(references(ReconstructConfig(out="-", corpus=12)))
    same = [replace(r, problem=refs[i % 2].problem) for i, r in enumerate(refs)]  # two problems, six references each
    kept = list(shortest(same, 2))
    assert {r.problem.id for r in kept} == {"corpus-0", "corpus-1"} and len(kept) == 4
    for name in ("corpus-0", "corpus-1"):
        lengths = sorted(len(r.response) for r in same if r.problem.id == name)
        assert [len(r.response) for r in kept if r.problem.id == name] == lengths[:2]
    with pytest.raises(UserError, match="shortest"):
        ReconstructConfig(out="-", corpus=1, shortest=-1)
