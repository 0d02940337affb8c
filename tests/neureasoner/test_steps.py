"""Promise 5: incremental segmentation = offline, and both = a split of the decoded text."""

from __future__ import annotations

import copy
import re
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.steps import Separators, StepSegmenter, segment
from neureasoner.traces import Step

BLANK_LINE = re.compile(r"[^ \t\n\r\v\f].*?\n\n", re.DOTALL)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def prefixes(tokenizer: Any, ids: list[int]) -> list[str]:
    return [
        tokenizer.decode(ids[:t], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for t in range(len(ids) + 1)
    ]


def oracle(tokenizer: Any, ids: list[int]) -> tuple[list[Step], int]:
    """From decoded prefixes alone: at each token look for a blank line after text in what the step says so far."""
    texts = prefixes(tokenizer, ids)
    end = len(ids)
    for stop in ("</think>", tokenizer.eos_token):
        stop_id = tokenizer.convert_tokens_to_ids(stop)
        end = min(end, ids.index(stop_id)) if stop_id in ids else end
    complete = [len(t.rstrip("\ufffd")) for t in texts]
    complete[-1] = len(texts[-1])
    steps, a = [], 0
    for t in range(1, end + 1):
        if BLANK_LINE.search(texts[t][complete[a] :]):
            steps.append(Step(complete[a], complete[t], a, t))
            a = t
    if texts[end][complete[a] :].strip(string.whitespace):
        steps.append(Step(complete[a], complete[end], a, end, closed=False))
    return steps, end


PIECES = ["a", "Wait", ".", " ", "\n", "\n\n", ".\n\n", "\n\n\n", ":\n", "7", "é", "🙂", "数", "</think>", "\t"]
texts = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts, data=st.data())
def test_promise_5_incremental_equals_offline_equals_text(tiny_tokenizer: Any, text: str, data: Any) -> None:
    ids = encode(tiny_tokenizer, text)
    if data.draw(st.booleans()):  # a model may spell the same text with other tokens
        ids = [i for c in text.replace("</think>", "") for i in encode(tiny_tokenizer, c)]
    steps, thinking = segment(ids, tiny_tokenizer)
    assert (steps, thinking) == oracle(tiny_tokenizer, ids)
    segmenter = StepSegmenter(Separators.of(tiny_tokenizer))
    closed = [t for t, i in enumerate(ids, 1) if segmenter.push(i)]
    assert [0, *closed] == segmenter.bounds
    assert closed == [s.token_end for s in steps if s.closed]
    assert segmenter.thinking_tokens == thinking


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 380), max_size=40))
def test_any_ids_tile_the_thinking(tiny_tokenizer: Any, ids: list[int]) -> None:
    """Also ids that spell broken characters: boundaries never go back, and steps follow each other without a gap."""
    text, bounds = Separators.of(tiny_tokenizer).offsets(ids)
    assert text == prefixes(tiny_tokenizer, ids)[-1]
    assert bounds == sorted(bounds) and bounds[-1] == len(text)
    steps, thinking = segment(ids, tiny_tokenizer)
    assert [s.token_start for s in steps] == [0, *[s.token_end for s in steps]][: len(steps)]
    assert all(s.closed for s in steps[:-1]) and all(s.token_end <= thinking for s in steps)


def test_bounds_seen_so_far_never_change(tiny_tokenizer: Any) -> None:
    ids = encode(tiny_tokenizer, "a.\n\n\nb\n\n \n\nc:\n\n\n\nd</think>\n\ne\n\n")
    segmenter = StepSegmenter(Separators(tiny_tokenizer))
    before = [0]
    for i in ids:
        segmenter.push(i)
        assert segmenter.bounds[: len(before)] == before
        before = list(segmenter.bounds)
    steps, _ = segment(ids, tiny_tokenizer)
    text = tiny_tokenizer.decode(ids)
    assert [text[s.char_start : s.char_end].strip() for s in steps] == ["a.", "b", "c:", "d"]


def test_separators_merged_split_and_tripled(tiny_tokenizer: Any) -> None:
    merged = encode(tiny_tokenizer, "Wait.\n\nso")
    assert ".\n\n" in [tiny_tokenizer.decode([i]) for i in merged]
    assert Separators.of(tiny_tokenizer).contains_separator(encode(tiny_tokenizer, ".\n\n")[0])
    newline = encode(tiny_tokenizer, "\n")
    a, b = encode(tiny_tokenizer, "a"), encode(tiny_tokenizer, "b")
    split, _ = segment(a + newline + newline + b, tiny_tokenizer)
    assert [(s.token_start, s.token_end, s.closed) for s in split] == [(0, 3, True), (3, 4, False)]
    tripled, _ = segment(a + newline * 3 + b, tiny_tokenizer)
    assert [(s.token_start, s.token_end, s.closed) for s in tripled] == [(0, 3, True), (3, 5, False)]


def test_leading_newlines_belong_to_the_first_step(tiny_tokenizer: Any) -> None:
    steps, _ = segment(encode(tiny_tokenizer, "\n\na\n\nb"), tiny_tokenizer)
    assert [(s.char_start, s.char_end) for s in steps] == [(0, 5), (5, 6)]
    assert segment(encode(tiny_tokenizer, "\n\n\n</think>"), tiny_tokenizer)[0] == []
    assert segment([], tiny_tokenizer) == ([], 0)


def test_thinking_ends_before_close_and_before_eos(tiny_tokenizer: Any) -> None:
    ids = encode(tiny_tokenizer, "a\n\nb\n</think>\n\nc\n\n")
    steps, thinking = segment(ids, tiny_tokenizer)
    assert ids[thinking] == tiny_tokenizer.convert_tokens_to_ids("</think>")
    assert [s.closed for s in steps] == [True, False] and steps[-1].token_end == thinking
    ids = [*encode(tiny_tokenizer, "a\n\nb"), tiny_tokenizer.eos_token_id]
    assert segment(ids, tiny_tokenizer)[1] == len(ids) - 1


def test_ids_above_the_tokenizer_say_nothing(tiny_tokenizer: Any) -> None:
    a = encode(tiny_tokenizer, "a\n\n")
    assert segment([*a, len(tiny_tokenizer) + 3], tiny_tokenizer)[0] == segment(a, tiny_tokenizer)[0]


def test_separators_follow_a_tokenizer_that_grows(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    size = Separators.of(tokenizer).size
    assert Separators.of(tokenizer) is Separators.of(tokenizer)
    tokenizer.add_tokens(["<INTRA>"])
    assert Separators.of(tokenizer).size == size + 1
    ids = encode(tokenizer, "a <INTRA> b\n\nc")
    assert segment(ids, tokenizer) == oracle(tokenizer, ids)


@pytest.mark.parametrize("text", ["Hello.\n\nWe say 数学 🙂 twice\n\n\nand go\n</think>\n\nend", "🙂\n\n🙂\n\n"])
def test_tokenizers_with_byte_fallback(text: str) -> None:
    """Llama-2-like: Metaspace pieces and <0x0A> bytes, whose text depends on their neighbours."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</think>", "<eos>", *[f"<0x{b:02X}>" for b in range(256)], "▁", *string.ascii_letters, "."]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_tokens(["</think>"])
    ids = encode(tokenizer, text)
    separators = Separators(tokenizer)
    assert not separators.byte_level
    assert segment(ids, separators) == oracle(tokenizer, ids)
