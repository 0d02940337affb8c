"""Block layouts of core.md §1.8: written and read to the letter, and every reason to reject a sample."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from neureasoner.data_builders.layouts import (
    InterBlock,
    IntraBlock,
    LayoutError,
    Reconstruction,
    compose,
    paragraphs,
    parse,
    read_reconstructions,
    reconstruction_from_dict,
    render,
    validate_inter,
    validate_intra,
)
from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA, Problem, write_rows

INTRA_BLOCK = IntraBlock("An error is close by.", "2 + 2 = 5", "It is 4, not 5.")
INTER_BLOCK = InterBlock("I am circling.", "tried 8 - 3 twice", "It never gives 24.", "Now multiply, first 8 * 3.")
REFERENCE = ["Let me see.", "First, 1 + 1 = 2.", "Then 2 + 2 = 4.", "Then 4 + 4 = 8.", "So it is 8."]
ENDING = "</think>\n\nThe answer is \\boxed{8}."
WRONG = "Then 2 + 2 = 5."
LOOP = ["Try 8 - 3 = 5.", "Again 8 - 3 = 5.", "Once more 8 - 3."]

INTRA_TEXT = """\
<INTRA>
[FAILURE_INTRA] An error is close by.
- **error span**: "2 + 2 = 5"
- **analysis**: It is 4, not 5."""
INTER_TEXT = """\
<INTER>
[FAILURE_INTER] I am circling.
- **past attempts summary:** tried 8 - 3 twice
- **problem-grounded analysis:** It never gives 24.

Now multiply, first 8 * 3."""


def right(text: str) -> bool:
    return text.rpartition("\\boxed{")[2].startswith("8}")


def intra_text() -> str:
    return str(compose(REFERENCE[:2], [WRONG], INTRA_BLOCK, ["Back: 2 + 2 = 4.", *REFERENCE[3:]], ENDING)["response"])


def inter_text(loop: list[str] = LOOP) -> str:
    return str(compose(REFERENCE[:2], loop, INTER_BLOCK, REFERENCE[2:], ENDING)["response"])


def test_blocks_are_written_to_the_letter() -> None:
    assert render(INTRA_BLOCK) == INTRA_TEXT and render(INTER_BLOCK) == INTER_TEXT


@pytest.mark.parametrize("block", [INTRA_BLOCK, INTER_BLOCK])
def test_what_is_written_is_read(block: IntraBlock | InterBlock) -> None:
    made = compose(REFERENCE[:2], [WRONG], block, ["Back."], ENDING)
    text = made["response"]
    found = parse(text)
    assert found.block == block
    assert (found.trigger_span, found.span) == (made["trigger_span"], made["block_span"])
    assert text[slice(*made["failure_span"])] == WRONG
    assert text[slice(*made["trigger_span"])] == block.trigger
    assert text[slice(*made["block_span"])] == render(block)
    assert text[made["failure_span"][1] : made["trigger_span"][0]] == "\n\n", "directly after the wrong step"
    assert text.endswith("\n" + ENDING)


@pytest.mark.parametrize("gap", ["\n\n", "\n", "\n \n", "\n\n\n"])
def test_the_pivot_plan_is_read_in_the_block_and_after_it(gap: str) -> None:
    head, _, pivot = INTER_TEXT.rpartition("\n\n")
    text = f"Before.\n\n{head}{gap}{pivot}\n\nThen on."
    found = parse(text)
    assert found.block == INTER_BLOCK and text[slice(*found.span)].endswith(pivot)


def test_a_pivot_plan_that_ends_the_thinking() -> None:
    text = INTER_TEXT + "\n</think>\n\nDone."
    found = parse(text)
    assert found.block == INTER_BLOCK and text[slice(*found.span)] == INTER_TEXT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (INTRA_TEXT.replace("span**:", "span:**"), "label 'error span' missing"),
        (INTRA_TEXT.replace("- **analysis**: ", "analysis: "), "label 'analysis' missing"),
        (INTRA_TEXT.replace('"', ""), "the error span is not quoted"),
        (INTRA_TEXT.replace("[FAILURE_INTRA] ", ""), r"label '\[FAILURE_INTRA\]' missing"),
        (INTRA_TEXT + "\nMore.", "text after the analysis"),
        (INTRA_TEXT.replace("<INTRA>\n", "<INTRA> "), "no trigger on a line of its own"),
        (INTER_TEXT.replace("summary:**", "summary**:"), "label 'past attempts summary' missing"),
        (INTER_TEXT.replace("analysis:**", "analysis**:"), "label 'problem-grounded analysis' missing"),
        (INTER_TEXT.rpartition("\n\n")[0], "pivot plan missing"),
        (INTER_TEXT.rpartition("\n\n")[0] + "\n\n</think>\n\nDone.", "pivot plan missing"),
    ],
)
def test_a_wrong_layout_is_refused(text: str, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        parse(text)


@pytest.mark.parametrize("part", ["", "  ", "two\nlines"])
def test_only_single_lines_are_written(part: str) -> None:
    with pytest.raises(LayoutError, match="analysis must be one line"):
        render(IntraBlock("a", "b", part))


def test_paragraphs_are_split_at_blank_lines() -> None:
    text = "One.\nStill one.\n\nTwo.\n \n\n  Three.\n"
    assert [text[a:b] for a, b in paragraphs(text)] == ["One.\nStill one.", "Two.", "Three."]
    assert paragraphs("\n\n") == []


def test_valid_samples_have_no_reasons() -> None:
    for keep in (2, 3, 4):
        assert validate_intra(REFERENCE, intra_text(), right, keep=keep) == []
    assert validate_inter(REFERENCE, inter_text(), right, loop_paragraphs=3) == []
    spaced = intra_text().replace("Let me see.", "Let  me see.")
    assert validate_intra(REFERENCE, spaced, right) == [], "white space does not count"
    first = compose([], ["Let me see 2 + 2 = 5."], INTRA_BLOCK, REFERENCE, ENDING)["response"]
    assert validate_intra(REFERENCE, first, right) == [], "nothing to copy before a failure in the first step"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("First, 1 + 1 = 2.", "First, 1 + 1 = 3."), "only 1 of the first 2 steps equal the reference"),
        (("2 + 2 = 5.\n\n<", "2 + 2 = 6.\n\n<"), "the quoted error span does not occur before the trigger"),
        (("- **analysis**: It is 4, not 5.", "It is 4, not 5."), "label 'analysis' missing"),
        (("\\boxed{8}", "\\boxed{9}"), "final answer differs from the reference"),
        (("So it is 8.", "So it is 8. <INTRA>"), "2 times <INTRA> instead of once"),
        (("<INTRA>\n", ""), "0 times <INTRA> instead of once"),
        (("So it is 8.", "So it is 8. <INTER>"), "trigger-like text elsewhere"),
        (("So it is 8.", "So it is 8. </intra>"), "trigger-like text elsewhere"),
        (("So it is 8.", "So it is 8. [FAILURE_INTER]"), "trigger-like text elsewhere"),
        (("So it is 8.", "So it is 8. [failure]"), "trigger-like text elsewhere"),
        (("= 5.\n\n<INTRA>", "= 5.\n<INTRA>"), "the trigger does not directly follow a finished step"),
        (("Let me see.", "</think>"), "the trigger stands outside the thinking"),
    ],
)
def test_every_reason_to_reject_an_intra_sample(change: tuple[str, str], reason: str) -> None:
    assert change[0] in intra_text()
    assert reason in validate_intra(REFERENCE, intra_text().replace(*change), right)


def test_reasons_to_reject_an_inter_sample() -> None:
    assert validate_inter(REFERENCE, inter_text(LOOP[:2]), right, loop_paragraphs=3) == [
        "the loop has 2 paragraphs instead of 3"
    ]
    made = compose(REFERENCE[:2], LOOP, INTER_BLOCK, REFERENCE[2:], ENDING)
    text, (start, end) = made["response"], made["failure_span"]
    check = {"loop_paragraphs": 3, "keep": 2}
    assert validate_inter(REFERENCE, text, right, failure_span=(start, end), **check) == []
    off = "the failure span does not end directly before the trigger"
    assert off in validate_inter(REFERENCE, text, right, failure_span=(start, end - 5), **check)
    assert "0 times <INTER> instead of once" in validate_inter(REFERENCE, intra_text(), right, loop_paragraphs=3)
    copied = compose([REFERENCE[0]], LOOP, INTER_BLOCK, REFERENCE[2:], ENDING)["response"]
    assert validate_inter(REFERENCE, copied, right, loop_paragraphs=3) == []
    other = compose(["Hm.", REFERENCE[1]], LOOP, INTER_BLOCK, REFERENCE[2:], ENDING)
    reasons = validate_inter(REFERENCE, other["response"], right, failure_span=other["failure_span"], **check)
    assert reasons == ["only 0 of the first 2 steps equal the reference"]


def test_a_loop_may_begin_like_the_reference_where_its_span_is_given() -> None:
    loop = [REFERENCE[2], *LOOP[1:]]
    made = compose(REFERENCE[:2], loop, INTER_BLOCK, REFERENCE[2:], ENDING)
    args = {"loop_paragraphs": 3, "failure_span": made["failure_span"]}
    assert validate_inter(REFERENCE, made["response"], right, **args) == []


def rows() -> list[Reconstruction]:
    problem = Problem("p", "sum", 1, "4 + 4?", "8")
    made = compose(REFERENCE[:2], [WRONG], INTRA_BLOCK, REFERENCE[2:], ENDING)
    plain = Reconstruction("b", problem, "plain", problem.question, "Yes.")
    return [Reconstruction("a", problem, "intra", problem.question, **made, control={"style": "x"}), plain]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", rows())
    assert read_reconstructions(tmp_path / "train.jsonl") == rows()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"level": "both"}, "level 'both' is not one of"),
        ({"level": "plain"}, "must not have a trigger_span"),
        ({"trigger_span": None}, "must have a trigger_span"),
        ({"failure_span": [5, 100_000]}, "lies outside the response"),
        ({"answer": 3}, r"unknown keys \['answer'\]"),
    ],
)
def test_a_bad_row_is_refused(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        reconstruction_from_dict(asdict(rows()[0]) | change)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no reconstructed"):
        read_reconstructions(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('\n{"id": 1}\n')
    with pytest.raises(UserError, match="line 2: not a reconstructed trace: missing keys"):
        read_reconstructions(tmp_path / "train.jsonl")


def test_triggers_are_the_shared_ones() -> None:
    assert (IntraBlock.trigger, InterBlock.trigger) == (INTRA, INTER)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("hostile", ["<" + " " * 200_000, "[" + " " * 200_000, "\n" + " " * 200_000, "\n " * 100_000])
def test_hostile_white_space_is_read_in_linear_time(hostile):
    assert validate_intra(["a"], hostile, lambda text: True)
