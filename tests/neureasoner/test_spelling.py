"""Which characters a tokenizer drops: real losses are named, other forms of a character are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as vocabularies

from neureasoner.models import loses
from neureasoner.spelling import SAMPLE

TEXT = ["Hello, world! The café has 3 apples.\n\nIt's 'so' so: a_b <think> x = 4 </think>", SAMPLE, "<|end|> <unk>"]


def wrapped(tokenizer: Tokenizer, **settings: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **settings)


def byte_level(normaliser: Any = None, **settings: Any) -> Any:
    tokenizer = Tokenizer(vocabularies.BPE())
    tokenizer.normalizer = normaliser
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return wrapped(tokenizer, **settings)


def characters(fallback: bool = False) -> Any:
    """As sentencepiece: blanks become ``▁``, one before the first word; other characters are bytes or unknown."""
    extra = [f"<0x{i:02X}>" for i in range(256)] if fallback else []
    tokenizer = Tokenizer(vocabularies.BPE(unk_token="<unk>", byte_fallback=fallback, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", *extra], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return wrapped(tokenizer, unk_token="<unk>")


def words(cleanup: bool = False) -> Any:
    """As an uncased BERT with newlines: lower case without accents, blanks around punctuation on the way back."""
    tokenizer = Tokenizer(vocabularies.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    blank = pre_tokenizers.Split(" ", "removed")
    newline = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([blank, newline, pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    return wrapped(tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=cleanup)


@pytest.mark.parametrize(
    "build",
    [
        byte_level,
        lambda: byte_level(normalizers.NFC()),
        lambda: byte_level(normalizers.NFKC()),
        lambda: byte_level(normalizers.Lowercase()),
        lambda: byte_level(clean_up_tokenization_spaces=True),
        lambda: characters(fallback=True),
        characters,
        words,
        lambda: words(cleanup=True),
    ],
)
def test_other_forms_of_a_character_are_no_loss(build: Callable[[], Any]) -> None:
    tokenizer = build()
    for text in [*TEXT[:2], "Hello , world !", "<|end|>Hello<|end|>", ""]:
        assert loses(tokenizer, text) is None, (text, tokenizer.decode(tokenizer.encode(text)))


@pytest.mark.parametrize("normaliser", [normalizers.NFC(), normalizers.NFKC(), normalizers.NFD(), None])
def test_bytes_spell_everything(normaliser: Any) -> None:
    tokenizer = byte_level(normaliser)
    for text in ("ﬁ ½ … ™ Ａ İ ß é", "привет 你好 हिन्दी 👩‍👩‍👧", "a\tb  c\r\n d ", "\ufeffx\x07"):
        assert loses(tokenizer, text) is None, text
    assert loses(characters(fallback=True), "привет 你好 हिन्दी 👩‍👩‍👧") is None


def test_what_has_no_token_is_named_once_and_in_order() -> None:
    tokenizer = characters()
    assert loses(tokenizer, "Hello Ф!\nф 你") == "Фф你"
    assert loses(tokenizer, "So ½") == "½"
    # the text may spell the unknown token itself; that holds nothing but itself
    assert loses(tokenizer, "<unk> and 'so'") is None
    assert loses(tokenizer, "<unk> and ф") == "ф"
    assert loses(words(), "Hello 你 world") == "你"


def test_dropped_without_an_unknown_token() -> None:
    tokenizer = Tokenizer(vocabularies.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(["only lower letters"], trainers.BpeTrainer(show_progress=False))
    found = wrapped(tokenizer)
    assert loses(found, "only lower letters") is None
    assert loses(found, "only 4 letters\n\nwell") == "4\n"
    assert loses(found, "<|end|>only letters") is None


def test_a_blank_between_words_and_a_newline_are_characters() -> None:
    fused = byte_level(normalizers.Replace(" ", ""))
    assert loses(fused, "Hello world") == " " and loses(fused, " Hello , ") is None
    flat = byte_level(normalizers.Replace("\n", " "))
    assert loses(flat, "Hello\n\nworld") == "\n"


def test_a_normaliser_may_take_accents_and_invisible_characters_but_no_letters() -> None:
    bare = byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]))
    assert loses(bare, "café à la ñ") is None
    clean = byte_level(normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=False, lowercase=False))
    assert loses(clean, "a\u200bb\x00c") is None
    latin = byte_level(normalizers.Replace(Regex("[^\\x00-\\x7F]"), ""))
    assert loses(latin, "so привет") == "привет"


def test_without_a_vocabulary_everything_is_lost() -> None:
    empty = wrapped(Tokenizer(vocabularies.BPE()))
    assert loses(empty, "So so") == "Sos"
    assert loses(empty, "<|end|>") is None


def test_the_shipped_tokenizers_spell_the_sample(tiny_tokenizer: Any) -> None:
    from neureasoner.models import load_tokenizer

    for tokenizer in (tiny_tokenizer, load_tokenizer("tiny"), load_tokenizer("tiny-steered")):
        assert loses(tokenizer, SAMPLE + "привет 你好") is None
