"""Bodies out and in: whatever a server sends back, it is an answer or it is BadBody."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.data_builders.endpoint.attempts import Road
from neureasoner.data_builders.endpoint.requests import Answer, Malformed, Message, Question, Request, Usage
from neureasoner.data_builders.endpoint.wire import (
    BadBody,
    Shape,
    build,
    clean,
    is_strict,
    load,
    read_body,
    verdict,
    worst,
)

LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
KEYS = st.sampled_from(
    ["choices", "message", "content", "refusal", "usage", "error", "output", "type", "text", "finish_reason", "status",
     "prompt_tokens", "completion_tokens", "prompt_tokens_details", "cached_tokens", "model", "incomplete_details"]
)  # fmt: skip
JSON = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=5), max_leaves=15)


@settings(max_examples=400, deadline=None)
@given(JSON, st.sampled_from(["chat", "responses"]))
def test_any_json_is_an_answer_or_a_bad_body(body: object, api: str) -> None:
    try:
        answer = read_body(body, api)
    except BadBody:
        return
    json.dumps([answer.text, answer.refusal, answer.finish_reason, answer.model]).encode()
    answer.text.encode(), answer.finish_reason.encode(), answer.model.encode()
    assert answer.usage.input >= 0 and answer.usage.output >= 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.just(b"[" * 100_000) | st.just(b"1" * 5000))
def test_any_bytes_are_json_or_a_bad_body(raw: bytes) -> None:
    with suppress(BadBody):
        load(raw)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=3, max_size=3), st.text(max_size=10), st.text(max_size=10))
def test_no_answer_leads_a_road_astray(texts: list[str], finish: str, refusal: str) -> None:
    def read(text: str) -> str:
        if text != "yes":
            raise Malformed("say yes")
        return text

    road = Road(Question("q", Request("m", (Message("user", "?"),)), read), retries=2)
    for text in texts:
        if road.request is not None:
            road.step(Answer(text, finish, refusal, Usage(1, 1)), fresh=True)
    outcome = road.outcome()
    assert road.request is None and outcome.value in (None, "yes")
    assert outcome.value is None or not refusal
    assert outcome.paid == Usage(len(outcome.keys), len(outcome.keys))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(categories=["Cs", "Lu", "So"]), max_size=20))
def test_cleaned_text_can_be_encoded_and_good_text_is_left_alone(text: str) -> None:
    clean(text).encode()
    assert clean(clean(text)) == clean(text)
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert clean(text) == text


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
REQUEST = Request(
    "m", (Message("system", "S"), Message("user", "U")), SCHEMA, "n", {"max_tokens": 5, "effort": "low", "seed": 1}
)


def test_bodies_of_both_apis() -> None:
    chat = build(REQUEST, "chat", Shape())
    assert chat["max_completion_tokens"] == 5 and chat["reasoning_effort"] == "low" and chat["seed"] == 1
    assert chat["response_format"]["json_schema"] == {"name": "n", "schema": SCHEMA, "strict": True}
    weak = build(REQUEST, "chat", Shape("none", "max_tokens"))
    assert "response_format" not in weak and weak["max_tokens"] == 5 and len(weak["messages"]) == 3
    responses = build(REQUEST, "responses", Shape("json"))
    assert responses["text"] == {"format": {"type": "json_object"}} and responses["max_output_tokens"] == 5
    assert all("max_tokens" not in body for body in (chat, responses))
    assert worst(REQUEST).output == 5 and worst(REQUEST).input > len(json.dumps(SCHEMA))


def test_strict_only_where_the_rules_of_strict_hold() -> None:
    assert is_strict(SCHEMA)
    assert not is_strict({"type": "object", "properties": {"a": {}}})
    assert not is_strict({**SCHEMA, "properties": {"a": {"type": "object"}}})


@pytest.mark.parametrize(
    ("answer", "begins"),
    [
        (Answer("x", "length"), "cut off"), (Answer(" \n"), "empty"), (Answer("x", "content_filter"), "refusal"),
        (Answer("x", refusal="no"), "refusal"), (Answer("x"), ""), (Answer("x", "eos"), ""),
    ],
)  # fmt: skip
def test_verdicts(answer: Answer, begins: str) -> None:
    assert verdict(answer).startswith(begins) and bool(verdict(answer)) == bool(begins)
