"""Quotes found again in a text: exactly, folded, loosely, never in the wrong number; fast on a megabyte."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from neureasoner.data_builders.quotes import (
    MAX_QUOTE,
    SIMILARITY,
    QuoteFinder,
    approximate,
    dense,
    find_quote,
    fold,
    neutral,
    step_of,
    step_tokens,
    token_span,
)
from neureasoner.responses import read_response
from neureasoner.steps import Separators
from neureasoner.traces import Problem

TEXT = "First, 12 + 30 = 42.\n\nThen we  double it —\nthat is “84”.\n\n"
TEXT += "So f(x) ≤ x² for all x ∈ ℝ. Then 12 + 30 = 42 again."


def table(quote: str, text: str) -> list[int]:
    """Naive oracle: least edits between the quote and any piece of the text that ends at each place."""
    column = list(range(len(quote) + 1))
    ends = [column[-1]]
    for c in text:
        new = [0]
        for i, q in enumerate(quote, 1):
            new.append(min(column[i] + 1, new[-1] + 1, column[i - 1] + (q != c)))
        column = new
        ends.append(column[-1])
    return ends


def edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


@pytest.mark.parametrize(("quote", "how", "found"), [
    ("12 + 30 = 42", "exact", "12 + 30 = 42"),
    ("  12 + 30 = 42\n", "exact", "12 + 30 = 42"),
    ("we double it", "normalised", "we  double it"),
    ("we double it - that is", "normalised", "we  double it —\nthat is"),
    ('that is "84".', "normalised", "that is “84”."),
    ("f(x) ≤ x2 for all x ∈ R", "normalised", "f(x) ≤ x² for all x ∈ ℝ"),
    ("Then we double it: that was “84”", "fuzzy", "Then we  double it —\nthat is “84”"),
    ("THEN WE DOUBLE IT", "fuzzy", "Then we  double it"),
])  # fmt: skip
def test_a_quote_is_found_and_how(quote: str, how: str, found: str) -> None:
    place = find_quote(quote, TEXT)
    assert place is not None and (place.how, TEXT[slice(*place.span)]) == (how, found)
    assert SIMILARITY <= place.similarity <= 1 and (place.similarity == 1 or how == "fuzzy")


@pytest.mark.parametrize("quote", [
    "", " ", "=", "42", '""“', '"42"', "12 + 30 = 43", "12 + 31 = 42 again", "nothing of this kind", "f(x) > x",
    "a" * 500,
    "x" * (MAX_QUOTE + 1), "\0\0\0\0", "\ud800\ud800\ud800", "\u200b\u200b\u200b\u200b", "\ufffd\ufffd\ufffd\ufffd",
])  # fmt: skip
def test_what_is_not_there_is_not_found(quote: str) -> None:
    assert find_quote(quote, TEXT) is None


def test_numbers_are_never_matched_loosely() -> None:
    text = "We see that the sum of all the terms is 4100 in the end."
    assert find_quote("We see that the sum of all terms is 4100 in the end.", text)
    assert find_quote("We see that the sum of all the terms is 4200 in the end.", text) is None
    assert find_quote("the sum of all terms is 410", text) is None, "a number is not cut either"


def test_the_first_occurrence_counts_unless_a_place_is_named_or_a_number_cut() -> None:
    first, second = TEXT.find("12 + 30"), TEXT.rfind("12 + 30")
    assert find_quote("12 + 30 = 42", TEXT).span[0] == first
    assert find_quote("12 + 30 = 42", TEXT, within=(second - 3, len(TEXT))).span[0] == second
    assert find_quote("12 +  30 = 42", TEXT, within=(second - 3, len(TEXT))).span[0] == second
    assert find_quote("12 + 30 = 42", TEXT, within=(first + 4, second)).span[0] == first, "a name may be wrong"
    assert find_quote("x = 4", "x = 41, x = 4.").span == (8, 13)
    assert find_quote("x = 4", "x = 41, x = 42.").span == (0, 5)


def test_latex_that_json_swallowed_is_found() -> None:
    text = r"So \frac{1}{2} \times 4 = 2 and \beta \neq \rho holds."
    assert find_quote("\frac{1}{2} \times 4 = 2", text).span == (3, 27)
    assert find_quote("\beta \neq \rho", text).span == (32, 47)
    assert find_quote(r"\\frac{1}{2} \\times 4 = 2", text).span == (3, 27)


letters = st.text('abcdeé ²＜<–-“"\n1', max_size=40)


@settings(max_examples=300, deadline=None)
@given(text=letters, quote=letters)
def test_against_a_naive_search(text: str, quote: str) -> None:
    place, stripped = find_quote(quote, text), quote.strip()
    assume(stripped.strip("\"'“”") == stripped)  # those are tried without their marks too
    folded, needle = fold(text), fold(stripped)
    loose, wanted = dense(folded).text, dense(needle).text
    if len(wanted) < 3:
        assert place is None
    elif stripped in text:
        assert place.how == "exact" and text[slice(*place.span)] == stripped
    elif needle.text in folded.text:
        assert place.how == "normalised" and fold(text[slice(*place.span)]).text == needle.text
    elif min(table(wanted, loose)) > (1 - SIMILARITY) * len(wanted) + 1e-9:
        assert place is None
    elif place is not None:
        assert place.how == "fuzzy"
        distance = edits(wanted, dense(fold(text[slice(*place.span)])).text)
        assert distance <= (1 - SIMILARITY) * len(wanted) + 1e-9
        assert place.similarity == pytest.approx(1 - distance / len(wanted))
    else:
        assert any(c in loose + wanted for c in "12<"), "only numbers and relations may stand in the way"


@settings(max_examples=300, deadline=None)
@given(quote=st.text("abc", min_size=1, max_size=12), text=st.text("abc", max_size=40), most=st.integers(0, 12))
def test_the_bit_parallel_search_equals_the_table(quote: str, text: str, most: int) -> None:
    ends = table(quote, text)
    found = list(approximate(quote, text, most))
    assert all(ends[end] == n <= most for n, end in found)
    assert min((n for n, _ in found), default=None) == min((e for e in ends[1:] if e <= most), default=None)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_folding_knows_where_its_characters_come_from(text: str) -> None:
    for f in (fold(text), dense(fold(text))):
        assert len(f.text) == len(f.at) and list(f.at) == sorted(f.at)
    assert fold(fold(text).text).text == fold(text).text or any(ord(c) > 0x300 for c in text)
    shown = neutral(text)
    assert len(shown) == len(text) and neutral(shown) == shown
    shown.encode()


@pytest.mark.parametrize("kind", ["prose", "period", "marks"])
def test_a_megabyte_is_searched_in_bounded_time(kind: str) -> None:
    rng = random.Random(1)
    words = [f"{rng.choice('bcdfglmnprst')}{rng.choice('aeiou')}{rng.choice('lnrst')}{i % 97}" for i in range(4000)]
    text = {
        "prose": " ".join(rng.choice(words) for _ in range(180_000)),
        "period": "ab" * 500_000,
        "marks": "< " * 500_000,
    }[kind][:1_000_000]
    finder = QuoteFinder(neutral(text))
    start = time.monotonic()
    for size in (40, 4000, MAX_QUOTE):
        at = rng.randrange(len(text) - size - 20)
        at = text.find(" ", at) + 1 if kind == "prose" else at  # a number cut in two is not found again
        broken = list(text[at : at + size].rpartition(" ")[0] or text[at : at + size])
        for i in range(3, len(broken) - 3, 15):
            if broken[i].isalpha():
                broken[i] = "q"
        place = finder.find("".join(broken))
        if kind == "prose":
            assert place is not None and abs(place.span[0] - at) <= 2, size
        finder.find("zq" * (size // 2))
        finder.find("ab" * (size // 2 - 2) + "zzzz")
    assert time.monotonic() - start < 20


def test_from_characters_to_tokens_and_steps(tiny_tokenizer) -> None:
    text = "First, 12 + 30 = 42.\n\nThat is wrong.\n\nSo 7.\n</think>\n\nThe answer is \\boxed{7}."
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"] + [tiny_tokenizer.eos_token_id]
    trace = read_response(tiny_tokenizer, [1], ids, []).to_trace("t", Problem("p", "words", 1, "?", "7"))
    place = find_quote("That is wrong", trace.response)
    assert place is not None and step_of(trace, place.span) == 1
    offsets = Separators.of(tiny_tokenizer).offsets(ids)[1]
    a, b = token_span(offsets, place.span)
    assert offsets[a] <= place.span[0] < offsets[a + 1] and offsets[b - 1] < place.span[1] <= offsets[b]
    step = trace.steps[1]
    assert step_tokens(trace, place.span) == (step.token_start, step.token_end)
    both = (place.span[0] - 5, place.span[1])
    assert step_of(trace, both) == 0 and step_tokens(trace, both) == (0, step.token_end)
    answer = find_quote("The answer is", trace.response)
    assert step_of(trace, answer.span) is None and step_tokens(trace, answer.span) is None
