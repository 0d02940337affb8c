"""Rows that a tokenizer cannot spell are refused; what a normaliser may change is not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from neureasoner.data_builders import encoding
from neureasoner.data_builders.encoding import IGNORE, check_spelled, encode_row, trigger_ids
from neureasoner.data_builders.layouts import Reconstruction
from neureasoner.errors import UserError
from neureasoner.traces import Problem

TEMPLATE = "{{ messages[0].content }}\nA:"
PLAIN = "First 3 + 4 = 7.\n\nSo it is 7.\n</think>\n\nThe answer is 7"


def row(response: str = PLAIN, question: str = "What is 3 + 4?") -> Reconstruction:
    return Reconstruction("r1", Problem("p", "sum", 1, question, "7"), "plain", question, response)


def fast(model: Any, normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None, **more: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if part is not None:
            setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE, **more
    )


def alphabet(extra: str = "") -> dict[str, int]:
    letters = sorted({*PLAIN, *"What is 3 + 4?\nA:", *extra})
    return {c: i for i, c in enumerate(letters)}


def characters(extra: str = "", **more: Any) -> Any:
    """BPE of single characters, without bytes: what it does not know, it drops."""
    from tokenizers import decoders, models

    return fast(models.BPE(alphabet(extra), []), decoder=decoders.Fuse(), **more)


@pytest.mark.parametrize(
    ("response", "question", "lost"),
    [
        (PLAIN + " ж", "What is 3 + 4?", "ж"),
        (PLAIN, "Сколько 3 + 4?", "Сколь"),
        (PLAIN.replace("So", "所以"), "What is 3 + 4?", "所以"),
        (PLAIN.replace("7.", "7!"), "What is 3 + 4?", "!"),
    ],
)
def test_a_tokenizer_without_bytes_loses_what_it_does_not_know(response: str, question: str, lost: str) -> None:
    tokenizer = characters()
    encode_row(row(), tokenizer, trigger_ids(tokenizer))
    with pytest.raises(UserError, match=f"row r1: .*'{lost}"):
        encode_row(row(response, question), tokenizer, trigger_ids(tokenizer))


def test_unknown_tokens_and_lost_line_breaks_are_lost_text() -> None:
    from tokenizers import models, pre_tokenizers

    words = {w: i for i, w in enumerate(dict.fromkeys(["<unk>", *PLAIN.split()]))}
    tokenizer = fast(models.WordLevel(words, "<unk>"), None, pre_tokenizers.WhitespaceSplit(), unk_token="<unk>")
    ids = tokenizer(PLAIN).input_ids
    assert len(ids) == len(PLAIN.split()) and tokenizer.unk_token_id not in ids, "every word is known"
    with pytest.raises(UserError, match="row r1"):  # the steps could not be told apart again
        check_spelled("r1", tokenizer, PLAIN, ids)
    check_spelled("r1", tokenizer, "So it is 7.", tokenizer("So it is 7.").input_ids)
    text = "So it is <unk> zebra"
    with pytest.raises(UserError, match=r"row r1: .*'z"):
        check_spelled("r1", tokenizer, text, tokenizer(text).input_ids)


def test_a_folder_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    """As a download that was cut off: added tokens and no vocabulary."""
    from transformers import AutoTokenizer

    added = {
        str(i): {"content": c, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                 "special": True}
        for i, c in enumerate(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    }  # fmt: skip
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "chat_template": TEMPLATE}
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="row r1"):
        encode_row(row(), tokenizer, trigger_ids(tokenizer))


def test_what_a_normaliser_changes_is_not_lost(tiny_tokenizer: Any) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    composed = characters("é", normalizer=normalizers.NFC())
    encode_row(row(PLAIN + " e\u0301"), composed, trigger_ids(composed))
    # Llama's way: a blank before the first word, blanks as ▁
    extra = "▁"
    spaced = characters(extra, pre_tokenizer=pre_tokenizers.Metaspace(), normalizer=None)
    spaced.backend_tokenizer.decoder = decoders.Metaspace()
    encode_row(row(), spaced, trigger_ids(spaced))
    for text in ("Ünïcode 所以 ж 🙂", "tabs\tand  two blanks", "a\r\nb"):  # a tokenizer of bytes has them all
        encode_row(row(PLAIN + text), tiny_tokenizer, trigger_ids(tiny_tokenizer))


def test_a_row_that_decodes_to_itself_is_not_looked_at_again(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "loses", lambda *_: pytest.fail("encoded a second time"))
    encoded = encode_row(row(), tiny_tokenizer, trigger_ids(tiny_tokenizer))
    assert encoded.labels[-1] == tiny_tokenizer.eos_token_id != IGNORE


def test_a_slow_tokenizer_and_one_without_eos_are_refused_by_name(tiny_tokenizer: Any) -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    slow.chat_template = TEMPLATE
    with pytest.raises(UserError, match=r"ByT5Tokenizer.*tokenizer\.json"):
        encode_row(row(), slow, {})
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        encode_row(row(), endless, {})
