"""Promise 5: incremental segmentation = offline, and both = a split of the decoded text."""

from __future__ import annotations

import copy
import itertools
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


def byte_fallback_tokenizer(*pieces: str) -> Any:
    """Llama-2-like: Metaspace pieces and <0x0A> bytes, whose text depends on their neighbours."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    vocab = dict.fromkeys(["<unk>", "<eos>", *bytes_, "▁", *string.ascii_letters, ".", ">", *pieces])
    model = models.BPE({p: i for i, p in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("text", ["Hello.\n\nWe say 数学 🙂 twice\n\n\nand go\n</think>\n\nend", "🙂\n\n🙂\n\n"])
def test_tokenizers_with_byte_fallback(text: str) -> None:
    tokenizer = byte_fallback_tokenizer("</think>")
    tokenizer.add_tokens(["</think>"])
    ids = encode(tokenizer, text)
    separators = Separators(tokenizer)
    assert not separators.byte_level
    assert segment(ids, separators) == oracle(tokenizer, ids)


TAG = "</think>"
# Tokens that split the tag at every place and merge it with what stands beside it.
PARTS = [TAG[a:b] for a in range(len(TAG)) for b in range(a + 1, len(TAG) + 1)]
MERGED = [
    ".</",
    "\n\n<",
    "a\n\n</th",
    "ink>\n\n",
    ">\n\n",
    ">.",
    "><",
    TAG + "</",
    f"a{TAG}b",
    "<" + TAG,
    "k>" + TAG,
    "g>",
]
SPELLED = list(dict.fromkeys([*PARTS, *MERGED, "a", "b", ".", " ", "\n", "\n\n"]))


@pytest.fixture(scope="module")
def speller() -> Any:
    """Its token ``i`` is the text ``SPELLED[i]``."""
    return spelling_tokenizer(SPELLED)


def spelling_tokenizer(pieces: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {" ": "Ġ", "\n": "Ċ"}
    written = ["".join(alphabet.get(c, c) for c in piece) for piece in pieces]
    rest = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in written]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate([*written, *rest, "<eos>", "<eot>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def spelled_oracle(pieces: list[str], ended: int) -> tuple[list[tuple[int, int, bool]], int]:
    """Steps ``(first token, end, closed)`` and thinking tokens, by looking for the tag's text. ``ended``: where an end
    token stands."""
    at = [0]
    for piece in pieces[:ended]:
        at.append(at[-1] + len(piece))
    text = "".join(pieces[:ended])
    tag = text.find(TAG)
    read = ended if tag < 0 else next(t for t in range(ended) if at[t + 1] >= tag + len(TAG))
    bounds = [0]
    for t in range(1, read + 1):
        if BLANK_LINE.search(text[at[bounds[-1]] : at[t]]):
            bounds.append(t)
    thinking = read if tag < 0 else max(bounds[-1], max(t for t in range(ended) if at[t] <= tag))
    steps = [(a, b, True) for a, b in itertools.pairwise(bounds)]
    if text[at[bounds[-1]] : at[thinking]].strip():
        steps.append((bounds[-1], thinking, False))
    return steps, thinking


@settings(max_examples=600, deadline=None)
@given(ids=st.lists(st.integers(0, len(SPELLED) - 1), max_size=14), end=st.none() | st.integers(0, 14))
def test_promise_5_holds_for_a_tag_in_several_tokens(speller: Any, ids: list[int], end: int | None) -> None:
    eot = speller.convert_tokens_to_ids("<eot>")
    pieces, ended = [SPELLED[i] for i in ids], len(ids)
    if end is not None and end <= len(ids):
        ids, ended = [*ids[:end], eot, *ids[end:]], end
    wanted = spelled_oracle(pieces, ended)
    steps, thinking = segment(ids, speller, ends=[speller.eos_token_id, eot])
    assert ([(s.token_start, s.token_end, s.closed) for s in steps], thinking) == wanted
    segmenter, bounds = StepSegmenter(Separators.of(speller), ends=[eot]), [0]
    for t, i in enumerate(ids, 1):
        was_thinking = segmenter.in_thinking
        closes = segmenter.push(i)
        assert segmenter.bounds[: len(bounds)] == bounds and closes == (len(segmenter.bounds) > len(bounds))
        assert was_thinking or not (closes or segmenter.in_thinking)
        assert segmenter.in_thinking == (t <= ended and TAG not in "".join(pieces[:t])), "told at that very token"
        bounds = list(segmenter.bounds)
    assert (segmenter.bounds[1:], segmenter.thinking_tokens) == ([b for _, b, closed in wanted[0] if closed], thinking)


@pytest.mark.parametrize("cuts", [c for n in range(8) for c in itertools.combinations(range(1, 8), n)][::5])
def test_every_way_to_spell_the_tag_ends_the_thinking(speller: Any, cuts: tuple[int, ...]) -> None:
    pieces = [TAG[a:b] for a, b in itertools.pairwise([0, *cuts, len(TAG)])]
    ids = [SPELLED.index(p) for p in ["a", ".", "\n\n", "b", *pieces, "\n\n", "a", "\n\n"]]
    steps, thinking = segment(ids, speller)
    assert [(s.token_start, s.token_end, s.closed) for s in steps] == [(0, 3, True), (3, 4, False)] and thinking == 4


@pytest.mark.parametrize(
    ("pieces", "thinking"),
    [
        (["a", "</thin", "g>", "b"], None),
        (["a", "<", "</think>"], 2),
        (["a", "</think", "</think>", "b"], 2),
        (["a", "<", "</", "think", ">"], 2),
        (["a", "</think", " ", ">"], None),
        (["b", ".</", "think", ">\n\n"], 1),
        (["b", "\n\n<", "/think>"], 2),  # the step is closed: its bound stays
    ],
)
def test_near_misses_and_merged_tags(speller: Any, pieces: list[str], thinking: int | None) -> None:
    ids = [i for p in pieces for i in ([SPELLED.index(p)] if p in SPELLED else encode(speller, p))]
    assert segment(ids, speller)[1] == (len(ids) if thinking is None else thinking)


def test_ids_without_text_do_not_break_a_tag() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "</": 1, "think>": 3}, []))  # no token 2, and none above 3
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for between in (2, 9):
        ids = [0, 1, between, 3, 0]
        assert tokenizer.decode(ids) == "a</think>a" and segment(ids, tokenizer)[1] == 1


def test_one_token_and_a_spelling_both_end_the_thinking(tiny_tokenizer: Any) -> None:
    one, spelled = (
        encode(tiny_tokenizer, "a\n</think>b"),
        [i for c in "a\n</think>b" for i in encode(tiny_tokenizer, c)],
    )
    assert tiny_tokenizer.convert_tokens_to_ids(TAG) in one and len(spelled) == 11
    assert tiny_tokenizer.convert_tokens_to_ids(TAG) not in spelled
    assert segment(one, tiny_tokenizer)[1] == segment(spelled, tiny_tokenizer)[1] == 2
    assert tiny_tokenizer.convert_tokens_to_ids(TAG) in Separators.of(tiny_tokenizer).closing


def test_every_end_of_the_list_is_no_thinking(tiny_tokenizer: Any) -> None:
    text, (pad, eos) = encode(tiny_tokenizer, "a\n\nb"), tiny_tokenizer.convert_tokens_to_ids(["<|pad|>", "<|im_end|>"])
    for end in (pad, eos):
        steps, thinking = segment([*text, end], tiny_tokenizer, ends=[pad, eos])
        assert thinking == len(text) == steps[-1].token_end
    assert segment([*text, pad], tiny_tokenizer)[1] == len(text) + 1, "by default only the tokenizer's own"
    assert segment(text, tiny_tokenizer, in_thinking=False) == ([], 0)


def test_what_cannot_be_spelled_is_known(speller: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def words(*texts: str) -> Any:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({t: i for i, t in enumerate(("[UNK]", *texts))}, "[UNK]"))
        )

    assert Separators.of(speller).spells_close
    assert not Separators.of(words("</thin", "think>", "a")).spells_close
    assert not Separators.of(words("</thin", "k", "<")).spells_close
    assert Separators.of(words("a", "</think>")).spells_close
    plain = Separators.of(words("</thin", "k>"))
    assert plain.spells_close and plain.eos is None and segment([1, 2], plain) == ([], 0)


def test_a_space_that_a_token_begins_with_is_no_part_of_the_tag() -> None:
    """Llama-2-like decoders drop the first space of a text, so a token alone looks as if it had none."""
    tokenizer = byte_fallback_tokenizer("</", "think", "▁>")
    ids = tokenizer.convert_tokens_to_ids(["a", "</", "think", "▁>", "b"])
    assert tokenizer.decode(ids) == "a</think >b" and tokenizer.decode(ids[3:4]) == ">"
    assert segment(ids, tokenizer)[1] == 5
    closed = tokenizer.convert_tokens_to_ids(["a", "</", "think", ">", "b"])
    assert tokenizer.decode(closed) == "a</think>b" and segment(closed, tokenizer)[1] == 1
