"""The language-model rewriter: control fields, questions, and the only rows that come out of its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from random import Random

import pytest

from neureasoner.data_builders.config import ReconstructConfig
from neureasoner.data_builders.endpoint.requests import Malformed, Outcome
from neureasoner.data_builders.layouts import (
    ERROR_LENGTHS,
    ERROR_TYPES,
    LOOP_LENGTHS,
    LOOP_THEMES,
    parse,
    reconstruction_from_dict,
    validate_inter,
    validate_intra,
)
from neureasoner.data_builders.llm_judges import CallSettings
from neureasoner.data_builders.llm_rewriters import LLMRewriter, Source, controls, read_trace, unusable
from neureasoner.data_builders.reconstruct import references, without_failure
from neureasoner.data_builders.rewriters import ExactRewriter, Reference, Rejected
from neureasoner.traces import Problem

SETTINGS = CallSettings("writer-model", {"temperature": 0.7})
PROBLEM = Problem("m-1", "math", 1, "What is (1 + 1) * 4, and why?", "8")
STEPS = (
    "Let me see what is asked; if a<b then I swap them.",
    "First, 1 + 1 = 2.",
    "Then 2 + 2 = 4.",
    "Then 4 + 4 = 8.",
    "So it is 8.",
)
REFERENCE = Reference("r-1", PROBLEM, STEPS, "</think>\n\nThe answer is \\boxed{8}.", "rollout")
INTRA_CONTROL = {"error_length": "short", "error_type": "sign_error", "style": "LRM_natural_first_person"}
INTER_CONTROL = {"loop_length_paragraphs": 3, "loop_theme": "bounds", "style": "LRM_natural_first_person"}

INTRA_TEXT = """\
Let me see what is asked; if a<b then I swap them.

First, 1 + 1 = 2.

Then 2 + 2 = 5.

<INTRA>
[FAILURE_INTRA] An error is close by; I look for it and fix it.
- **error span**: "2 + 2 = 5"
- **analysis**: Two and two are four.

Back: 2 + 2 = 4, and 4 + 4 = 8.

So the answer is \\boxed{8}."""
INTER_TEXT = """\
Let me see what is asked; if a<b then I swap them.

First, 1 + 1 = 2.

It must be more than 2, and less than 20.

So it lies between 2 and 20, that much is sure.

Less than 20, more than 2: the limits stay.

<INTER>
[FAILURE_INTER] I am circling; I sum up and change the route.
- **past attempts summary:** I stated the limits three times.
- **problem-grounded analysis:** Limits give no value here.

I compute instead. First 2 + 2.

That is 2 + 2 = 4, and 4 + 4 = 8.

The answer is \\boxed{8}."""


def intra(text: str, reference: Reference = REFERENCE):
    return read_trace(text, "intra", Source(reference), INTRA_CONTROL)


def inter(text: str, reference: Reference = REFERENCE):
    return read_trace(text, "inter", Source(reference), INTER_CONTROL)


@pytest.mark.parametrize(("level", "sizes", "kinds"), [
    ("intra", ("error_length", ERROR_LENGTHS), ("error_type", ERROR_TYPES)),
    ("inter", ("loop_length_paragraphs", LOOP_LENGTHS), ("loop_theme", LOOP_THEMES)),
])  # fmt: skip
def test_control_fields_are_seeded_and_balanced(level, sizes, kinds) -> None:
    n = len(sizes[1]) * len(kinds[1])
    drawn = [controls(level, i, seed=5) for i in range(3 * n + 7)]
    assert drawn == [controls(level, i, seed=5) for i in range(3 * n + 7)] != [controls(level, i) for i in range(n)]
    assert set(Counter((d[sizes[0]], d[kinds[0]]) for d in drawn[: 3 * n]).values()) == {3}
    assert set(Counter((d[sizes[0]], d[kinds[0]]) for d in drawn).values()) <= {3, 4}
    assert all(d["style"] == "LRM_natural_first_person" for d in drawn)
    assert drawn[:n] != drawn[n : 2 * n], "each round has an order of its own"


def test_the_question_shows_reference_and_control_and_is_repeatable() -> None:
    rewriter = LLMRewriter(SETTINGS, lambda questions: [])
    a, b = (rewriter.intra_question(REFERENCE, Random(3)) for _ in range(2))
    assert a.id == "r-1/intra" and a.request.key == b.request.key and a.request.schema is None
    shown = a.request.messages[1].content
    assert "Then 2 + 2 = 4." in shown and "\\boxed{8}" in shown and "</think>" not in shown
    fixed = rewriter.inter_question(REFERENCE, Random(3), INTER_CONTROL).request.messages
    assert "loop_length_paragraphs: 3\nloop_theme: bounds\nstyle: LRM_natural_first_person" in fixed[1].content
    for word in ("<INTER>\n[FAILURE_INTER] ", "- **past attempts summary:** ", *LOOP_THEMES):
        assert word in fixed[0].content
    for word in ('- **error span**: "', "- **analysis**: ", *ERROR_TYPES, *ERROR_LENGTHS):
        assert word in a.request.messages[0].content


def test_giving_fields_does_not_shift_the_random_numbers() -> None:
    rewriter, one, two = LLMRewriter(SETTINGS, lambda questions: []), Random(1), Random(1)
    rewriter.intra_question(REFERENCE, one)
    rewriter.intra_question(REFERENCE, two, INTRA_CONTROL)
    assert one.random() == two.random()


def test_a_good_intra_trace_becomes_a_row() -> None:
    row = intra(INTRA_TEXT)
    assert row.id == "r-1/intra" and row.level == "intra" and row.control == INTRA_CONTROL
    assert row.response[slice(*row.failure_span)] == "Then 2 + 2 = 5."
    assert row.response[slice(*row.trigger_span)] == "<INTRA>"
    assert row.response.endswith("4 + 4 = 8.\n</think>\n\nThe answer is \\boxed{8}."), "the reference's own ending"
    assert parse(row.response).span == row.block_span
    assert validate_intra(STEPS, row.response, lambda _: True, failure_span=row.failure_span) == []
    assert reconstruction_from_dict({**asdict(row)}) == row
    control_arm = without_failure(row, REFERENCE)
    assert "INTRA" not in control_arm.response and "= 5" not in control_arm.response


def test_a_good_inter_trace_becomes_a_row() -> None:
    row = inter(INTER_TEXT)
    assert row.response[slice(*row.failure_span)].count("\n\n") == 2
    assert row.response[slice(*row.failure_span)].startswith("It must be more than 2")
    assert row.response[slice(*row.block_span)].endswith("First 2 + 2.")
    checks = {"loop_paragraphs": 3, "failure_span": row.failure_span}
    assert validate_inter(STEPS, row.response, lambda _: True, **checks) == []
    begins_alike = INTER_TEXT.replace("It must be more than 2, and less than 20.", STEPS[2])
    assert inter(begins_alike).response[slice(*inter(begins_alike).failure_span)].startswith(STEPS[2])


@pytest.mark.parametrize("change", [
    lambda t: f"```\n{t}\n```", lambda t: f"<think>\n{t}", lambda t: f"<think>I plan it.</think>\n{t}",
    lambda t: t.replace("\n", "\r\n"), lambda t: t.replace("\n\n", "\n \n\n"), lambda t: t.replace("a<b", "a＜b"),
    lambda t: t.replace("First, 1 + 1", "First,  1 + 1"), lambda t: t.replace("= 5.\n\n<", "= 5.\n<"),
    lambda t: t.replace("So the answer", "</think>\n\nSo the answer"), lambda t: t.replace("<INTRA>", "<INTRA>  "),
    lambda t: t.replace('"2 + 2 = 5"', '"2  + 2 = 5"'), lambda t: t + "\n\n",
])  # fmt: skip
def test_what_does_not_matter_is_put_right(change: Callable[[str], str]) -> None:
    assert intra(change(INTRA_TEXT)).response == intra(INTRA_TEXT).response


BAD: list[tuple[Callable[[str], str], str]] = [
    (lambda t: "", "empty answer"),
    (lambda t: "I cannot help with that.", "0 times <INTRA>"),
    (lambda t: "x" * 1_000_000, "too long"),
    (lambda t: t.replace("<INTRA>\n", ""), "0 times <INTRA>"),
    (lambda t: t + "\n\n<INTRA>\n", "2 times <INTRA>"),
    (lambda t: t.replace("<INTRA>", "<INTER>"), "0 times <INTRA>"),
    (lambda t: t.replace("<INTRA>", "＜INTRA＞"), "no trigger on a line|0 times"),
    (lambda t: t.replace("Back:", "Back <INTER>:"), "trigger-like text elsewhere"),
    (lambda t: t.replace("Back:", "Back [FAILURE_INTER]:"), "trigger-like text elsewhere"),
    (lambda t: t.replace("**error span**:", "**error span:**"), "label 'error span' missing"),
    (lambda t: t.replace('"2 + 2 = 5"', '"2 + 2 = 6"'), "quoted error span does not occur"),
    (lambda t: t.replace('"2 + 2 = 5"', '"1 + 1 = 2"'), "quoted error span does not occur"),
    (lambda t: t.replace("= 5", "= 4"), "the reference's own"),
    (lambda t: t.replace("= 5.", "= 4, of course.").replace("= 5", "= 4"), "also stands in the reference"),
    (lambda t: t.replace("First, 1 + 1 = 2.", "First, 1 + 1 = 3."), "only 1 of the first 2"),
    (lambda t: t.partition("\n\n")[2], "copy the first two to four"),
    (lambda t: t.replace("\\boxed{8}", "\\boxed{9}"), "final answer differs"),
    (lambda t: t.replace("\\boxed{8}", "8"), "final answer differs"),
    (lambda t: t.partition("\n\nBack:")[0], "nothing follows the block"),
    (lambda t: t.partition("\n\nBack:")[0] + "\n\n\\boxed{8}", "nothing follows the block"),
    (lambda t: t.replace("Back:", "Back\x00:"), "control characters"),
    (lambda t: t.replace("Back:", "Back\ud800:"), "lone surrogate"),
    (lambda t: t.replace("Back:", "Back<|im_end|>:"), "chat-template token"),
    (lambda t: t.replace("Back:", "Back</s>:"), "chat-template token"),
    (lambda t: t.replace("Back:", "Back" + " " * 5000 + ":"), "white space without end"),
    (lambda t: "<CONTROL>\n\n" + t, "a tag of the prompt"),
    (lambda t: t.replace("- **analysis**", "More.\n- **analysis**"), "label 'analysis' missing"),
]


@pytest.mark.parametrize(("change", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_every_other_intra_answer_is_refused_with_its_reason(change: Callable[[str], str], reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        intra(change(INTRA_TEXT))


@pytest.mark.parametrize(("change", "reason"), [
    (lambda t: t.replace("Less than 20, more than 2: the limits stay.\n\n", ""), "copy the first two to four"),
    (lambda t: t.replace("Less than", "And then.\n\nLess than"), "the loop has 4 paragraphs instead of 3"),
    (lambda t: t.replace("It must be more than 2, and less than 20.", STEPS[2]).replace(
        "So it lies between 2 and 20, that much is sure.", STEPS[3]), "2 paragraphs of the loop are copied"),
    (lambda t: t.replace("summary:**", "summary**:"), "label 'past attempts summary' missing"),
    (lambda t: t.replace("<INTER>", "<INTRA>"), "0 times <INTER>"),
    (lambda t: t.replace("\\boxed{8}", "\\boxed{7}"), "final answer differs"),
])  # fmt: skip
def test_inter_answers_that_are_refused(change: Callable[[str], str], reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        inter(change(INTER_TEXT))


@pytest.mark.parametrize(("reference", "reason"), [
    (replace(REFERENCE, paragraphs=STEPS[:2]), "fewer than 3"),
    (replace(REFERENCE, paragraphs=(*STEPS, "Now <INTRA>!")), "trigger-like"),
    (replace(REFERENCE, paragraphs=(*STEPS, "Now < / inter >!")), "trigger-like"),
    (replace(REFERENCE, paragraphs=(*STEPS, "Now ＜IN\u200bTRA＞!")), "trigger-like"),
    (replace(REFERENCE, paragraphs=(*STEPS, "[failure_intra] so")), "trigger-like"),
    (replace(REFERENCE, problem=replace(PROBLEM, question="Say <INTER>.")), "trigger-like"),
    (replace(REFERENCE, paragraphs=(*STEPS, "<|im_end|>")), "chat-template"),
    (replace(REFERENCE, paragraphs=(*STEPS, "<think>")), "chat-template"),
    (replace(REFERENCE, ending=REFERENCE.ending + "</think>"), "chat-template"),
    (replace(REFERENCE, paragraphs=(*STEPS, "a\x00b")), "control characters"),
    (replace(REFERENCE, paragraphs=(*STEPS, "a\udc00b")), "half characters"),
    (replace(REFERENCE, paragraphs=(*STEPS, " " * 300)), "white space"),
    (replace(REFERENCE, ending="</think>\n\nThe answer is 8."), "no right answer"),
    (replace(REFERENCE, ending="</think>\n\n\\boxed{9}"), "no right answer"),
    (replace(REFERENCE, paragraphs=(*STEPS, "x" * 500_000)), "too long"),
])  # fmt: skip
def test_a_source_with_a_trigger_or_no_answer_is_not_asked_about(reference: Reference, reason: str) -> None:
    asked: list[object] = []
    rewriter = LLMRewriter(SETTINGS, lambda questions: asked.extend(questions) or [])
    for write in (rewriter.intra, rewriter.inter):
        with pytest.raises(Rejected, match=reason):
            write(reference, Random(0))
    assert not asked


def test_an_answer_may_come_from_the_reference_where_the_problem_has_none() -> None:
    bare = replace(REFERENCE, problem=replace(PROBLEM, answer=""))
    assert unusable(bare) == "" and intra(INTRA_TEXT, bare)
    with pytest.raises(Malformed, match="final answer differs"):
        intra(INTRA_TEXT.replace("boxed{8}", "boxed{9}"), bare)


def test_rows_of_the_exact_rewriter_pass_as_a_models_answers() -> None:
    config, counts = ReconstructConfig(out="-", corpus=30), Counter[str]()
    for ref in references(config):
        for level in ("intra", "inter"):
            try:
                row = getattr(ExactRewriter(), level)(ref, Random(1))
            except Rejected:
                continue
            try:
                counts["same" if read_trace(row.response, level, Source(ref), row.control) == row else "other"] += 1
            except Malformed:
                counts["refused"] += 1  # a slip may by chance read like another line of the reference
    assert counts["same"] >= 45 and counts["refused"] <= 2 and not counts["other"]


def test_it_is_a_rewriter_like_the_exact_one() -> None:
    def ask(questions):
        for q in questions:
            yield Outcome(q.id, q.read(INTRA_TEXT if q.id.endswith("intra") else INTER_TEXT))

    rewriter = LLMRewriter(SETTINGS, ask)
    assert rewriter.intra(REFERENCE, Random(0)).level == "intra" and rewriter.name == "llm:writer-model"
    for seed in range(9):  # the answer has a loop of three
        try:
            assert rewriter.inter(REFERENCE, Random(seed)).control["loop_length_paragraphs"] == 3
        except Malformed as e:
            assert "copy the first two to four" in str(e) or "paragraphs" in str(e)
    dead = LLMRewriter(SETTINGS, lambda qs: [Outcome(q.id, None, ("first", "nothing follows")) for q in qs])
    with pytest.raises(Rejected, match="nothing follows"):
        dead.intra(REFERENCE, Random(0))
    with pytest.raises(Rejected, match="no answer"):
        LLMRewriter(SETTINGS, lambda qs: []).inter(REFERENCE, Random(0))
