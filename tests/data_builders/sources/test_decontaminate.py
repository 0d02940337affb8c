"""Overlaps against a naive search, planted overlaps, near misses, and what a private benchmark may show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.artifacts import write_tensors
from neureasoner.data_builders.sources.decontaminate import BenchmarkIndex, Item
from neureasoner.data_builders.sources.ngrams import Table, Windows, text_hash, word_hashes
from neureasoner.data_builders.sources.normalise import tokens, words
from neureasoner.errors import UserError

LONG = (
    "Tom walks to the old market with 12 baskets of red apples and sells every third basket "
    "to his neighbour before noon on the first day of May."
)
SHORT = "Evaluate the sum 3 + 4 of these two small numbers"  # 10 words
TINY = "What is $3 + 4$?"


def index(*questions: str, private: bool = False) -> BenchmarkIndex:
    return BenchmarkIndex.build(Item(f"bench/{i}", q, private) for i, q in enumerate(questions))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is $3 + 4$?", "what  is 3+4"),
        (r"Compute $\dfrac{1}{2}\,x$.", r"Compute \( \frac {1}{2} x \)"),
        (r"Let $a\le b$ and $c \cdot d$", "let a ≤ b and c × d"),
        ("It costs 10,000 dollars", "It costs 10{,}000 dollars."),
        (r"$\left(3x\right)$ \text{ men}", "(3 x) men"),
        ("Tom’s dog — a big one", "Tom's dog a big one"),
        ("ＴＯＭ runs", "tom runs"),
        ("a well-known fact", "a well known fact"),
        (r"$\begin{align*} x &= 1 \\ y &= 2 \end{align*}$", "x = 1 y = 2"),
    ],
)
def test_spelling_does_not_count(one: str, other: str) -> None:
    assert tokens(one) == tokens(other)


@pytest.mark.parametrize(
    ("one", "other"), [("3 + 4", "3 - 4"), ("x < 2", "x > 2"), ("2^3", "2 3"), ("5! - 1", "5 - 1"), ("a - b", "a + b")]
)
def test_operators_count(one: str, other: str) -> None:
    assert tokens(one) != tokens(other) and words(one) == words(other)


def test_exact_match() -> None:
    found = index(LONG, TINY)
    for text in (TINY, "What is 3+4", r"Return your final response within \boxed{}. What is \(3+4\)?"):
        match = found.match(text)
        assert match is not None and (match.kind, match.item) == ("exact", "bench/1")
    assert found.match("What is 3 - 4?") is None
    assert found.match("Tell me: what is 3 + 4?") is None  # shorter than 8 words: whole questions only
    assert found.match(TINY, whole=False) is None


def test_thirteen_words_match_and_twelve_do_not() -> None:
    w = LONG.split()
    found = index(LONG)
    for begin in range(0, len(w) - 13, 4):
        thirteen = "Once " + "  ".join(w[begin : begin + 13]).upper() + " it ended."
        match = found.match(thirteen)
        assert match is not None and match.kind == "ngram"
        assert match.words.split() == words(" ".join(w[begin : begin + 13]))
        assert found.match("Once " + " ".join(w[begin : begin + 12]) + " it ended.") is None
    broken = [*w[:12], "never", *w[12:24], "never", *w[24:]]
    assert found.match(" ".join(broken)) is None


def test_short_questions_are_found_whole() -> None:
    found = index(SHORT)
    match = found.match("Please be quick. " + SHORT.replace("3 + 4", "$3+4$") + ", and say why")
    assert match is not None and (match.kind, match.item) == ("contained", "bench/0")
    assert found.match("Please be quick. " + SHORT.replace("+", "-") + ", and say why") is None
    assert found.match("Please be quick. " + " ".join(SHORT.split()[:-1])) is None


def test_private_benchmarks_show_no_text() -> None:
    found = index(LONG, SHORT, private=True)
    for text in (LONG, LONG[:100] + " or not", "well, " + SHORT):
        match = found.match(text)
        assert match is not None and match.private
        assert match.words.startswith("hash ") and not set(words(match.words)) & {"tom", "basket", "evaluate"}


def test_saved_and_joined(tmp_path: Path) -> None:
    one, other = index(LONG, TINY), index(SHORT, private=True)
    one.save(tmp_path / "one.safetensors")
    loaded = BenchmarkIndex.load(tmp_path / "one.safetensors")
    both = loaded.joined(other)
    assert len(both) == 3
    for text in (LONG, TINY, "so " + SHORT, "nothing of the sort"):
        assert both.match(text) == (one.match(text) or other.match(text))
    content = (tmp_path / "one.safetensors").read_bytes()
    assert b"market" not in content and b"basket" not in content


def test_only_an_index_is_loaded(tmp_path: Path) -> None:
    import torch

    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="not a benchmark index"):
        BenchmarkIndex.load(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a safetensors file"):
        BenchmarkIndex.load(tmp_path / "y.safetensors")


def test_hashes_are_the_same_everywhere() -> None:
    assert text_hash("tom") == 0x7FC9592CF22D5B42
    assert Windows(word_hashes(["a", "b", "c"])).of(3).tolist() == [0x4066ACB08B929A3A]
    one, again = Windows(word_hashes(["a", "b", "c"])).of(2), Windows(word_hashes(["x", "a", "b"])).of(2)
    assert one[0] == again[1] and one[1] != again[0]  # a window's hash does not depend on where it stands


def naive(items: list[list[str]], text: list[str]) -> bool:
    """Exact, or 13 words in a row, or a whole item of 8 to 12 words; by comparing lists."""
    for item in items:
        n = min(len(item), 13)
        if item == text:
            return True
        if n >= 8 and any(
            text[i : i + n] == item[j : j + n] for i in range(len(text) - n + 1) for j in range(len(item) - n + 1)
        ):
            return True
    return False


some_words = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(some_words, min_size=1, max_size=4), some_words)
def test_matches_are_those_of_a_naive_search(items: list[list[str]], text: list[str]) -> None:
    assert (index(*map(" ".join, items)).match(" ".join(text)) is not None) == naive(items, text)


@settings(max_examples=60, deadline=None)
@given(some_words, st.integers(0, 40), st.data())
def test_planted_items_are_always_found(item: list[str], pad: int, data: st.DataObject) -> None:
    before = ["x"] * data.draw(st.integers(0, pad))
    match = index(" ".join(item)).match(" ".join([*before, *item, *["y"] * (pad - len(before))]))
    assert (match is not None) == (len(item) >= 8 or pad == 0)


def test_table_finds_what_a_dict_finds() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 50, 200).astype(np.uint64)
    table = Table(hashes, np.arange(200, dtype=np.int32))
    first: dict[int, int] = {}
    for i, h in enumerate(hashes.tolist()):
        first.setdefault(h, i)
    queries = np.arange(80, dtype=np.uint64)
    found = [int(table.items[e]) if e >= 0 else None for e in table.find(queries)]
    assert found == [first.get(q) for q in queries.tolist()]
    assert Table(np.zeros(0, np.uint64), np.zeros(0, np.int32)).find(queries).tolist() == [-1] * 80
