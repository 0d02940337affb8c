"""The language-model judge: questions, labels, what is refused, and traces that get no label."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from string import Template
from typing import Any

import pytest

from neureasoner.data_builders.endpoint.requests import Malformed, Outcome, Question
from neureasoner.data_builders.judges import ExactJudge
from neureasoner.data_builders.llm_judges import (
    PROMPTS,
    CallSettings,
    LLMJudge,
    Unaskable,
    inter_question,
    intra_question,
    loop_end,
    prompts_hash,
)
from neureasoner.data_builders.schemas import ERROR_TYPES, LOOP_THEMES, SEVERITIES, InterAnswer, IntraAnswer
from neureasoner.errors import UserError
from neureasoner.responses import read_response
from neureasoner.traces import IntraLabel, Problem, Trace, trace_from_dict

SETTINGS = CallSettings("judge-model", {"temperature": 0.0})
PROBLEM = Problem("c-1", "countdown", 1, "Use 3, 4 and 8, each exactly once, with + - * / to reach 20.", "8 * 3 - 4")
STEPS = [
    "Try 3 + 4 = 7, 7 + 8 = 15. Not 20.",
    "Now 8 + 4 = 11, 11 + 3 = 14. Not 20.",
    "Try 8 * 3 = 24, 24 - 4 = 20. That is 20.",
    "So 24 - 4 = 20 is what I want.",
]
CLEAN = {"has_error": False, "first_error_step": None, "error_type": "none", "explanation": "Valid."}
WRONG = {"has_error": True, "first_error_step": "8 + 4 = 11", "error_type": "calculation", "explanation": "It is 12."}
PROGRESS = {
    "is_stagnant": False, "loop_detected_at": "none", "loop_theme": "none", "severity": "none", "explanation": "On.",
}  # fmt: skip
LOOP = {
    "is_stagnant": True, "loop_detected_at": "Paragraph 2", "loop_theme": "equation_shuffling", "severity": "low",
    "explanation": "Again.",
}  # fmt: skip


@pytest.fixture
def make(tiny_tokenizer):
    def build(paragraphs: list[str], answer: str = "Done. \\boxed{8 * 3 - 4}", name: str = "t") -> Trace:
        text = "\n\n".join(paragraphs) + "\n</think>\n\n" + answer
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"] + [tiny_tokenizer.eos_token_id]
        return read_response(tiny_tokenizer, [1], ids, [tiny_tokenizer.eos_token_id]).to_trace(name, PROBLEM)

    return build


def answering(replies: dict[str, Any], seed: int | None = None):
    """An ``ask`` that reads a fixed reply per level, twice as the endpoint would; optionally in random order."""

    def ask(questions: Iterable[Question[Any]]) -> Iterator[Outcome[Any]]:
        drawn = list(questions) if seed is not None else questions
        if seed is not None:
            random.Random(seed).shuffle(drawn)
        for q in drawn:
            reply = replies.get(q.id, replies[q.id.rpartition("/")[2]])
            try:
                yield Outcome(q.id, q.read(reply if isinstance(reply, str) else json.dumps(reply)))
            except Malformed as e:
                yield Outcome(q.id, None, (str(e), str(e)))

    return ask


def test_prompts_hold_every_key_value_and_criterion(make) -> None:
    intra, inter = (f(make(STEPS), SETTINGS).request for f in (intra_question, inter_question))
    for word in (*IntraAnswer.model_fields, *ERROR_TYPES, "PROBLEM", "REASONING_TRACE", "circling", "sign"):
        assert word in intra.messages[0].content, word
    for word in (*InterAnswer.model_fields, *LOOP_THEMES, *SEVERITIES, "three or more consecutive", "calculation err"):
        assert word in inter.messages[0].content, word
    assert intra.schema["additionalProperties"] is False and intra.schema_name != inter.schema_name
    assert intra.params == {"temperature": 0.0} and intra.model == "judge-model"
    assert len(prompts_hash()) == 64 and len(PROMPTS) == 4


def test_the_trace_is_shown_with_its_paragraphs_numbered(make) -> None:
    question = intra_question(make(STEPS), SETTINGS)
    shown = question.request.messages[1].content
    assert question.id == "t/intra"
    for i, step in enumerate(STEPS, 1):
        assert f"[Paragraph {i}]\n{step}" in shown
    assert PROBLEM.question in shown and "Done" not in shown, "the answer part is no step"
    assert Template(shown).safe_substitute() == shown


def test_the_same_trace_makes_the_same_request(make) -> None:
    a, b = (intra_question(make(STEPS), SETTINGS).request for _ in range(2))
    assert a.key == b.key
    assert a.key != intra_question(make(STEPS[:3]), SETTINGS).request.key


@pytest.mark.parametrize(("quote", "how"), [
    ("8 + 4 = 11", "exact"), ("8 + 4 =  11", "normalised"), ("now 8 + 4 = 11, 11 + 3 = 14; not 20", "fuzzy"),
    ('"8 + 4 = 11, 11 + 3 = 14."', "exact"),
])  # fmt: skip
def test_a_quoted_error_has_its_step_and_the_words_of_the_trace(make, quote: str, how: str) -> None:
    trace = make(STEPS)
    label = intra_question(trace, SETTINGS).read(json.dumps(WRONG | {"first_error_step": quote}))
    assert label.step == 1 and label.error_type == "calculation" and label.found == how
    assert trace.response[slice(*label.span)] == label.first_error_step
    assert "8 + 4 = 11" in label.first_error_step
    assert set(asdict(label)) == {f.name for f in fields(IntraLabel)}


@pytest.mark.parametrize("quote", ["8 + 4 = 12", "Done.", "boxed{8 * 3 - 4}", "Paragraph 2", "=", "Use 3, 4 and 8"])
def test_a_quote_that_is_not_in_the_thinking_is_refused(make, quote: str) -> None:
    with pytest.raises(Malformed, match="quote not in the trace"):
        intra_question(make(STEPS), SETTINGS).read(json.dumps(WRONG | {"first_error_step": quote}))


def test_trigger_blocks_are_neither_shown_nor_quoted(make) -> None:
    block = '<INTRA>\n[FAILURE_INTRA] Off.\n- **error span**: "8 + 4 = 11"\n- **analysis**: It is 12.'
    question = intra_question(make([STEPS[0], block, *STEPS[2:]]), SETTINGS)
    assert "[Paragraph 2]\n(left out)" in question.request.messages[1].content
    with pytest.raises(Malformed, match="quote not in the trace"):
        question.read(json.dumps(WRONG))


@pytest.mark.parametrize(("said", "steps"), [
    ("Paragraph 2", (1, 4)), ("paragraph 2", (1, 4)), ("[Paragraph 2]", (1, 4)), ("2", (1, 4)),
    ("Paragraphs 1-3", (0, 3)), ("Paragraph 1 to Paragraph 3", (0, 3)), ("From Paragraph #2 on", (1, 4)),
])  # fmt: skip
def test_the_named_paragraph_becomes_steps(make, said: str, steps: tuple[int, int]) -> None:
    trace = make(STEPS)
    label = inter_question(trace, SETTINGS).read(json.dumps(LOOP | {"loop_detected_at": said}))
    assert label.steps == steps and label.loop_detected_at == f"Paragraph {steps[0] + 1}" and not label.attempts
    assert label.span == (trace.steps[steps[0]].char_start, trace.steps[steps[1] - 1].char_end)


@pytest.mark.parametrize("said", [
    "Paragraph 0", "Paragraph 9", "Paragraph 3", "Paragraphs 1-2", "Paragraphs 2-9", "Paragraphs 4-1", "the middle",
    "Paragraph four", "Paragraph 99999999999999", "-1", "Paragraph ٣", "x" * 5000,
])  # fmt: skip
def test_a_place_without_room_for_a_loop_is_refused(make, said: str) -> None:
    with pytest.raises(Malformed):
        inter_question(make(STEPS), SETTINGS).read(json.dumps(LOOP | {"loop_detected_at": said}))


def test_paragraphs_repeated_word_for_word_are_a_loop_whatever_the_model_says(make) -> None:
    again = ["I check the sum of the three numbers once more: it is 15.", STEPS[0] + " So I look for another way."]
    trace = make([*again, again[0], again[1], again[0], STEPS[2]])
    with pytest.raises(Malformed, match="loop overlooked: from paragraph 3"):
        inter_question(trace, SETTINGS).read(json.dumps(PROGRESS))
    assert inter_question(trace, SETTINGS).read(json.dumps(LOOP)).is_stagnant
    short = make(["Wait.", "Hm.", "Wait.", "Hm.", "Wait.", STEPS[2]])
    assert not inter_question(short, SETTINGS).read(json.dumps(PROGRESS)).is_stagnant


def test_a_loop_ends_with_its_last_like_paragraph() -> None:
    a, b = "Let me check the sum modulo nine once more.", "Alternatively, look at the parity of every term."
    other = [f"Step {i}: {chr(97 + i) * 30} and {chr(110 + i) * 20}." for i in range(9)]
    assert loop_end([a, b, a, b, a, *other], 0) == 5
    assert loop_end([a, other[0], other[1], a, other[2], a, *other[3:]], 0) == 6
    assert loop_end([a, b, *other], 0) == 11, "nothing known: to the end"
    assert loop_end([a, b, *other[:6], a], 0) == 9, "what comes back later is another loop"


def test_the_judge_labels_like_the_exact_one(make) -> None:
    trace = make(STEPS)
    exact = ExactJudge().judge(trace)
    labels = LLMJudge(SETTINGS, answering({"intra": WRONG, "inter": PROGRESS})).judge(trace)
    assert trace.labels is None, "judging changes nothing"
    assert type(labels.intra) is IntraLabel and labels.judge == "llm:judge-model"
    assert (labels.correct, labels.answer, labels.answer_token) == (exact.correct, exact.answer, exact.answer_token)
    assert (labels.intra.step, labels.intra.span, labels.intra.error_type) == (1, exact.intra.span, "calculation")
    trace.labels = labels
    assert trace_from_dict(json.loads(json.dumps(asdict(trace)))) == trace
    trace.finished = False
    assert LLMJudge(SETTINGS, answering({"intra": CLEAN, "inter": PROGRESS})).judge(trace).correct is False


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_many_traces_keep_their_order_and_drops_are_counted(make, seed: int | None) -> None:
    traces = [make(STEPS, name=f"a/{i}") for i in range(6)] + [make([], name="empty")]
    replies = {
        "intra": WRONG, "inter": PROGRESS, "a/1/intra": "I cannot answer that.", "a/2/inter": LOOP | {"severity": "?"},
        "a/3/intra": WRONG | {"first_error_step": "2 + 2 = 5"},
    }  # fmt: skip
    judge = LLMJudge(SETTINGS, answering(replies, seed))
    judged = list(judge.label(traces))
    assert [t.id for t in judged] == [t.id for t in traces]
    assert [t.labels is None for t in judged] == [False, True, True, True, False, False, True]
    assert judge.counts == {
        "labelled": 3, "quote exact": 3, "dropped": 4, "dropped: intra, no JSON object": 1,
        "dropped: inter, not as asked": 1, "dropped: intra, quote not in the trace": 1, "dropped: no thinking": 1,
    }  # fmt: skip


def test_it_streams(make) -> None:
    drawn: list[int] = []

    def traces() -> Iterator[Trace]:
        for i in range(100):
            drawn.append(i)
            yield make(STEPS, name=str(i))

    stream = LLMJudge(SETTINGS, answering({"intra": WRONG, "inter": PROGRESS})).label(traces())
    assert next(stream).id == "0" and next(stream).id == "1" and len(drawn) <= 3


def test_no_answer_at_all_gives_no_labels(make) -> None:
    judge = LLMJudge(SETTINGS, lambda questions: [])
    with pytest.raises(Malformed, match="no usable answer"):
        judge.judge(make(STEPS))
    stopped = LLMJudge(SETTINGS, lambda questions: [Outcome(q.id, None) for q in questions][:1])
    assert [t.labels for t in stopped.label([make(STEPS), make(STEPS, name="u")])] == [None, None]
    assert stopped.counts["dropped: inter, no answer"] == 2
    unasked = LLMJudge(SETTINGS, lambda questions: [])
    assert [t.id for t in unasked.label([make(STEPS), make(STEPS, name="u")])] == ["t", "u"]
    assert unasked.counts == {"dropped": 2, "dropped: not asked": 2}


def test_bad_traces_and_missing_parts_are_said(make, monkeypatch) -> None:
    with pytest.raises(Unaskable, match="no thinking"):
        intra_question(make([]), SETTINGS)
    with pytest.raises(Unaskable, match="too long"):
        inter_question(make(STEPS), CallSettings("m", max_characters=50))
    with pytest.raises(UserError, match="'t' occurs twice"):
        list(LLMJudge(SETTINGS, answering({}, seed=0)).label([make(STEPS), make(STEPS)]))
