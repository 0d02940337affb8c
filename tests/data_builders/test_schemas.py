"""Answers of a judge: what is read, what is refused, and that nothing else can happen."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from neureasoner.data_builders import layouts
from neureasoner.data_builders.endpoint.requests import Malformed
from neureasoner.data_builders.schemas import (
    ERROR_TYPES,
    LOOP_THEMES,
    MAX_REASON,
    SEVERITIES,
    InterAnswer,
    IntraAnswer,
    json_schema,
    read_json,
)

WRONG = {
    "has_error": True,
    "first_error_step": "2 + 2 = 5",
    "error_type": "calculation",
    "explanation": "It is 4.",
}
CLEAN = {"has_error": False, "first_error_step": None, "error_type": "none", "explanation": "All is valid."}
LOOP = {
    "is_stagnant": True,
    "loop_detected_at": "Paragraph 4",
    "loop_theme": "modular_checks",
    "severity": "low",
    "explanation": "Residues again.",
}
PROGRESS = {
    "is_stagnant": False,
    "loop_detected_at": "none",
    "loop_theme": "none",
    "severity": "none",
    "explanation": "It moves on.",
}


def test_enumerations_are_those_of_the_specification_and_not_the_rewriters() -> None:
    assert set(ERROR_TYPES) == {
        "calculation", "logic_non_sequitur", "domain_violation", "hallucination", "dropped_case", "none",
    }  # fmt: skip
    assert set(LOOP_THEMES) == {"modular_checks", "bounds_restatement", "equation_shuffling", "none"}
    assert set(SEVERITIES) == {"low", "medium", "high", "none"}
    assert set(ERROR_TYPES) != set(layouts.ERROR_TYPES) and not set(LOOP_THEMES) & set(layouts.LOOP_THEMES)


@pytest.mark.parametrize(("model", "example"), [(IntraAnswer, WRONG), (InterAnswer, LOOP)])
def test_the_schema_is_fit_for_strict_structured_output(model: Any, example: dict[str, Any]) -> None:
    schema = json_schema(model)
    assert schema["required"] == list(schema["properties"]) == list(example)
    assert schema["additionalProperties"] is False and schema["type"] == "object"
    text = json.dumps(schema)
    assert not any(word in text for word in ('"title"', '"default"', "$ref", "maxLength", "minLength", "pattern"))
    assert ("null" in text) == (model is IntraAnswer), "null is allowed for the quote and nowhere else"
    json_schema(model)["required"].clear()
    assert json_schema(model) == schema, "each call gives a schema of its own"


@pytest.mark.parametrize("wrap", [
    "{}", "  {}\n", "```json\n{}\n```", "```\n{}\n```", "Here is my verdict:\n{}",
    "I looked at {{1, 2}}.\n{}\nThat is all.",
    "So \\text{{}} holds.\n\n```json\n{}\n```\nDone.", "<think>Is it {{\"a\": 1}}?</think>{}",
])  # fmt: skip
@pytest.mark.parametrize(("model", "row"), [
    (IntraAnswer, WRONG), (IntraAnswer, CLEAN), (InterAnswer, LOOP), (InterAnswer, PROGRESS),
])  # fmt: skip
def test_an_object_is_read_in_every_usual_wrapping(wrap: str, model: Any, row: dict[str, Any]) -> None:
    assert read_json(wrap.format(json.dumps(row)), model).model_dump() == row


def test_lone_backslashes_of_latex_are_mended() -> None:
    text = json.dumps(WRONG | {"first_error_step": "QUOTE"}).replace("QUOTE", r"\(x\) = \sqrt{4} \\ \"so\"")
    assert read_json(text, IntraAnswer).first_error_step == r'\(x\) = \sqrt{4} \ "so"'
    raw = json.dumps(WRONG | {"explanation": "LINE"}).replace("LINE", "one\ntwo")
    assert read_json(raw, IntraAnswer).explanation == "one\ntwo"


def test_a_fence_or_an_object_inside_a_string_is_no_second_answer() -> None:
    row = WRONG | {"explanation": 'It says ```json\n{"has_error": false}\n``` but that is the trace.'}
    assert read_json(json.dumps(row), IntraAnswer).has_error


BAD: list[tuple[Any, str]] = [
    ("", "empty answer"), ("   \n", "empty answer"), (None, "empty answer"), (b"{}", "empty answer"),
    ("I'm sorry, but I can't help with that.", "no JSON object"), ("[]", "no JSON object"), ("null", "no JSON object"),
    ("{}", "no JSON object"), ("true", "no JSON object"), ("error code: 502", "no JSON object"),
    (json.dumps(WRONG)[:-1], "not JSON"), (json.dumps(WRONG)[:40], "not JSON"), ('{"has_error": ', "not JSON"),
    (json.dumps(WRONG) * 2, "more than one"), (json.dumps(CLEAN) + "\nor\n" + json.dumps(WRONG), "more than one"),
    ('{"error": {"message": "overloaded"}}', "unknown key 'error'"),
    ('{"has_error": NaN}', "NaN"), ('{"has_error": -Infinity}', "Infinity"), ('{"has_error": 1e999}', "has_error"),
    ('{"has_error": ' + "9" * 6000 + "}", "out of all bounds"),
    ('{"has_error": ' + "9" * 30 + "}", "out of all bounds"),
    ('{"has_error": true, "has_error": false}', "occurs twice"),
    ('{"a": {"b": 1, "b": 2}}', "occurs twice"),
    ('{"a":' * 19_000, "nested too deeply"), ('{"a":' + "[" * 90_000, "nested too deeply"),
    ("{" * 100_000, "no JSON object"), ('"' * 100_000, "no JSON object"), ("x" * 5_000_000, "too long"),
    (json.dumps(WRONG | {"explanation": "x" * 30_000}), "longer than"),
    (json.dumps(WRONG | {"explanation": "\ud800"}), "lone surrogate"),
    (json.dumps(WRONG)[:-1] + "\ud800}", "lone surrogate"),
    (json.dumps(WRONG | {"extra": 1}), "unknown key 'extra'"),
    (json.dumps(WRONG | {"x" * 5000: 1}), "unknown key"),
    (json.dumps({k: v for k, v in WRONG.items() if k != "explanation"}), "explanation: Field required"),
    (json.dumps(WRONG | {"has_error": "true"}), "has_error: Input should be a valid boolean"),
    (json.dumps(WRONG | {"has_error": 1}), "has_error: Input should be a valid boolean"),
    (json.dumps(WRONG | {"error_type": "sign_error"}), "error_type: Input should be 'calculation'"),
    (json.dumps(WRONG | {"error_type": "Calculation"}), "error_type"),
    (json.dumps(WRONG | {"error_type": None}), "error_type"),
    (json.dumps(WRONG | {"explanation": None}), "explanation"),
    (json.dumps(WRONG | {"explanation": ["x"]}), "explanation"),
    (json.dumps(WRONG | {"first_error_step": 5}), "first_error_step"),
    (json.dumps(WRONG | {"first_error_step": None}), "must quote the wrong step"),
    (json.dumps(WRONG | {"first_error_step": " "}), "must quote the wrong step"),
    (json.dumps(WRONG | {"error_type": "none"}), "must not be none"),
    (json.dumps(CLEAN | {"error_type": "calculation"}), "error_type must be none"),
    (json.dumps(CLEAN | {"first_error_step": "2 + 2 = 5"}), "first_error_step must be null"),
    (json.dumps(LOOP), "unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), BAD, ids=[f"{i}: {reason}" for i, (_, reason) in enumerate(BAD)])
def test_everything_else_is_malformed_and_says_why(text: Any, reason: str) -> None:
    start = time.monotonic()
    with pytest.raises(Malformed, match=reason) as e:
        read_json(text, IntraAnswer)
    assert len(str(e.value)) <= MAX_REASON and "\n" not in str(e.value) and str(e.value).isascii()
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("change", [
    {"loop_detected_at": "none"}, {"loop_detected_at": None}, {"severity": "none"}, {"severity": "huge"},
    {"loop_theme": "mod_checks"}, {"is_stagnant": False}, {"is_stagnant": None},
])  # fmt: skip
def test_an_inconsistent_loop_is_malformed(change: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        read_json(json.dumps(LOOP | change), InterAnswer)


@pytest.mark.parametrize("change", [
    {"loop_theme": "modular_checks"}, {"severity": "low"}, {"loop_detected_at": "Paragraph 3"}, {"is_stagnant": True},
])  # fmt: skip
def test_no_loop_has_no_place_theme_or_severity(change: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        read_json(json.dumps(PROGRESS | change), InterAnswer)


def test_a_loop_without_one_of_the_themes_is_valid() -> None:
    assert read_json(json.dumps(LOOP | {"loop_theme": "none"}), InterAnswer).is_stagnant
