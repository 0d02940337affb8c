"""Tags of every convention, whole and cut off, and the rows that are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neureasoner.data_builders.sources.rows import Unreadable
from neureasoner.data_builders.sources.thoughts import split_thought, split_untagged, thought_from_columns

BESPOKE = (
    "<|begin_of_thought|>\n\nFirst, 2 + 3.\n\nThat is 5.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is \\boxed{5}.\n\n<|end_of_solution|>"
)


@pytest.mark.parametrize(
    "text",
    [
        BESPOKE,
        BESPOKE + "<|im_end|>\n",
        "<think>\nFirst, 2 + 3.\n\nThat is 5.\n</think>\n\nIt is \\boxed{5}.",
        "First, 2 + 3.\n\n\n\nThat is 5.  \n</think>\n\nIt is \\boxed{5}.<|endoftext|>",
        "<think>First, 2 + 3.\r\n\r\nThat is 5.</think><|begin_of_solution|>It is \\boxed{5}.<|end_of_solution|>",
    ],
)
def test_every_convention_gives_the_same_thought(text: str) -> None:
    thought = split_thought(text)
    assert thought is not None
    assert (thought.thinking, thought.solution) == ("First, 2 + 3.\n\nThat is 5.", "It is \\boxed{5}.")
    assert thought.closed and thought.finished


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("<|begin_of_thought|>\n\nFirst, 2 +", False),
        ("<think>\nFirst, 2 +", False),
        ("<think>First</think>\n", True),
        (BESPOKE.replace("<|end_of_solution|>", ""), True),
    ],
)
def test_what_was_cut_off_is_marked(text: str, closed: bool) -> None:
    thought = split_thought(text)
    assert thought is not None and thought.closed is closed and not thought.finished


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>a</think>b<think>c</think>d", "more than one thought"),
        ("a</think>b</think>c", "more than one thought"),
        ("Sure! <think>a</think>b", "text before the thought"),
        ("<think> \n</think>b", "empty"),
        ("<|begin_of_thought|>a</think>b<|end_of_thought|>c", "stray </think>"),
        ("<think>a</think>b<|begin_of_solution|>c", "between"),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b<|end_of_solution|>c", "after the solution"),
    ],
)
def test_refused(text: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        split_thought(text)


def test_text_without_tags_is_none() -> None:
    assert split_thought("just an answer") is None


def test_reasoning_in_a_column_of_its_own() -> None:
    whole = thought_from_columns("a\n\nb", "It is 5.")
    assert (whole.thinking, whole.solution, whole.finished) == ("a\n\nb", "It is 5.", True)
    repeated = thought_from_columns("<think>a</think>", "<think>a</think>It is 5.")
    assert (repeated.thinking, repeated.solution) == ("a", "It is 5.")
    cut = thought_from_columns("a", "  ")
    assert not cut.closed and not cut.finished


def test_untagged_chain_is_split_before_its_answer() -> None:
    last = split_untagged("a\n\nb\n\nso \\boxed{5}")
    assert (last.thinking, last.solution) == ("a\n\nb", "so \\boxed{5}")
    earlier = split_untagged("a\n\nso \\boxed{5}\n\nI hope this helps.")
    assert (earlier.thinking, earlier.solution) == ("a", "so \\boxed{5}\n\nI hope this helps.")
    lines = split_untagged("48 / 2 = 24\n48 + 24 = 72\n#### 72")
    assert (lines.thinking, lines.solution) == ("48 / 2 = 24\n48 + 24 = 72", "#### 72")
    with pytest.raises(Unreadable, match="one line"):
        split_untagged("\\boxed{5}")


PIECES = [
    "a",
    "b",
    " ",
    "\n",
    "\n\n",
    "\r\n",
    "<think>",
    "</think>",
    "<|end_of_thought|>",
    "<|begin_of_solution|>",
    "</s>",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_is_split_or_refused_and_never_keeps_a_tag(text: str) -> None:
    try:
        thought = split_thought(text)
    except Unreadable:
        return
    if thought is None:
        assert "think" not in text and "thought" not in text
        return
    assert not any(tag in thought.thinking + thought.solution for tag in PIECES[6:10])
    assert "\n\n\n" not in thought.thinking and thought.thinking == thought.thinking.strip() != ""
