"""Formats as published corpora write them, told from the first rows, forced, and refused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neureasoner.data_builders.sources.formats import Format, detect
from neureasoner.data_builders.sources.rows import Unreadable
from neureasoner.errors import UserError

TAGGED = (
    "<|begin_of_thought|>\n\na\n\nb\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is \\boxed{5}.\n\n<|end_of_solution|>"
)
THINK = "<think>\na\n\nb\n</think>\n\nIt is \\boxed{5}."


def sharegpt(text: str, user: str = "user", assistant: str = "assistant") -> list[dict[str, str]]:
    return [{"from": user, "value": "What is 2 + 3?"}, {"from": assistant, "value": text}]


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": text}]


CORPORA: dict[str, dict[str, Any]] = {
    "bespoke_stratos": {"system": "Use tags.", "conversations": sharegpt(TAGGED)},
    "open_thoughts": {"conversations": sharegpt(THINK, "human", "gpt"), "domain": "math"},
    "sky_t1": {"conversations": sharegpt(TAGGED), "id": 7},
    "messages": {"messages": messages(THINK)},
    "messages_with_system": {"messages": [{"role": "system", "content": "s"}, *messages(THINK)]},
    "content_parts": {"messages": messages([{"type": "text", "text": THINK}])},  # type: ignore[arg-type]
    "reasoning_in_turn": {
        "messages": [
            {"role": "user", "content": "What is 2 + 3?"},
            {"role": "assistant", "content": "It is \\boxed{5}.", "reasoning_content": "a\n\nb"},
        ]
    },
    "struct_of_lists": {"conversations": {"from": ["user", "assistant"], "value": ["What is 2 + 3?", TAGGED]}},
    "deepseek_columns": {
        "problem": "What is 2 + 3?",
        "deepseek_reasoning": "a\n\nb",
        "deepseek_solution": "It is \\boxed{5}.",
        "ground_truth_solution": "5",
    },
    "s1": {
        "question": "What is 2 + 3?",
        "solution": "5",
        "thinking_trajectories": ["a\n\nb"],
        "attempt": "It is \\boxed{5}.",
    },
    "upper_case": {"Question": "What is 2 + 3?", "Response": THINK, "Answer": "5"},
    "trace": {"problem": "What is 2 + 3?", "trace": TAGGED, "gold": "5"},
}


@pytest.mark.parametrize("name", CORPORA)
def test_published_forms_read_alike(name: str) -> None:
    row = CORPORA[name]
    parsed = detect([row], name).read(row)
    assert parsed.question == "What is 2 + 3?"
    assert (parsed.thought.thinking, parsed.thought.solution) == ("a\n\nb", "It is \\boxed{5}.")
    assert parsed.thought.finished
    assert parsed.meta.get("system_dropped", False) is (name in ("bespoke_stratos", "messages_with_system"))


def test_gold_answers() -> None:
    for name, gold in (("upper_case", "5"), ("trace", "5"), ("bespoke_stratos", None)):
        assert detect([CORPORA[name]], name).read(CORPORA[name]).answer == gold
    row = {"conversations": sharegpt(TAGGED), "answer": 5}
    assert detect([row], "x").read(row).answer == "5"


def test_gsm8k_carries_its_gold_in_the_chain() -> None:
    row = {"question": "How many?", "answer": "48 / 2 = 24\n24 + 48 = 72\n#### 72"}
    with pytest.raises(UserError, match="untagged: split"):
        detect([row], "x")
    parsed = detect([row], "x", untagged="split").read(row)
    assert parsed.answer == "72" and parsed.thought.thinking.startswith("48 / 2")


def test_a_heading_is_no_gold() -> None:
    row = {"question": "How many?", "response": "<think>a</think>#### Step\n\nfive"}
    assert detect([row], "x").read(row).answer is None


def test_the_format_that_reads_most_rows_wins() -> None:
    # turns without tags beside columns with the reasoning
    row = {"messages": messages("It is 5."), "problem": "What is 2 + 3?", "reasoning": "a", "response": "It is 5."}
    assert detect([row], "x").kind == "columns"
    assert detect([CORPORA["sky_t1"] | {"problem": "p", "response": THINK}], "x").kind == "conversation"


def test_forced_formats() -> None:
    with pytest.raises(UserError, match="no row fits"):
        detect([CORPORA["sky_t1"]], "x", kind="messages")
    assert detect([CORPORA["sky_t1"]], "x", kind="sharegpt").kind == "sharegpt"
    both = {"messages": messages(THINK), "q": "other?", "r": THINK}
    named = detect([both], "x", wanted={"question": "q", "response": "r"})
    assert named.read(both).question == "other?"


def test_a_file_that_fits_nothing_names_its_columns() -> None:
    with pytest.raises(
        UserError, match=r"corpus.jsonl: no row fits.*found columns alpha, beta; expected 'conversations'"
    ):
        detect([{"alpha": 1, "beta": 2}], "corpus.jsonl")
    with pytest.raises(UserError, match=r"x: column 'questoin' \(question\) is not there; did you mean 'question'"):
        detect([{"question": "a", "response": THINK}], "x", wanted={"question": "questoin"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": []}, "empty or no list"),
        ({"conversations": None}, "empty or no list"),
        ({"conversations": ["text"]}, "no object"),
        ({"conversations": [{"from": "user"}]}, "without 'from' and 'value'"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role"),
        ({"conversations": sharegpt(THINK) * 2}, "not one question and one response"),
        ({"conversations": sharegpt("")}, "no response"),
        ({"conversations": sharegpt("It is 5.")}, "no thought tags"),
        ({"conversations": [{"from": "user", "value": " "}, {"from": "gpt", "value": THINK}]}, "no question"),
        ({"conversations": sharegpt("<think>\ud800</think>b")}, "surrogate"),
    ],
)
def test_rows_that_do_not_fit_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        Format("conversation", {"conversation": "conversations"}).read(row)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "gpt", THINK, "\ud800", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["conversations", "question", "response", "reasoning", "answer", "id"]), json_like)
)
def test_no_row_can_crash_a_format(row: dict[str, Any]) -> None:
    columns = {"question": "question", "response": "response", "reasoning": "reasoning", "answer": "answer"}
    for form in (Format("conversation", {"conversation": "conversations", "id": "id"}), Format("columns", columns)):
        form.row_id(row)
        with suppress(Unreadable):
            assert form.read(row).question
