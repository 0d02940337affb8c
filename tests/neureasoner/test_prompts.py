"""What a caller may give as prompts, against what Transformers' own tokenizer makes of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from neureasoner.errors import UserError
from neureasoner.prompts import as_prompts, check_ids, encode_prompt, prompt_text
from neureasoner.traces import NO_THINKING, Problem

PROBLEM = Problem("p", "f", 1, "What is 2 + 2?", "4")
TALK = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("What is 2 + 2?", ["What is 2 + 2?"]),
        (PROBLEM, [PROBLEM]),
        (["a", PROBLEM], ["a", PROBLEM]),
        (("a", "b"), ["a", "b"]),
        ((q for q in "ab"), ["a", "b"]),
        (TALK, [TALK]),
        ([TALK, TALK], [TALK, TALK]),
        (TALK[0], [TALK]),
        ({"messages": TALK, "id": 3}, [TALK]),
        ([{"messages": TALK}, "a"], [TALK, "a"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ((5, 6), [[5, 6]]),
        (list(np.array([5, 6])), [[5, 6]]),
        (list(torch.tensor([5, 6])), [[5, 6]]),
        (torch.tensor([5, 6, 7]), [[5, 6, 7]]),
        (torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (torch.tensor([[0, 6], [7, 8]]), [[6], [7, 8]]),
        (np.array([[5, 6]], dtype=np.int32), [[5, 6]]),
        ([torch.tensor([5, 6]), np.array([7])], [[5, 6], [7]]),
        ([torch.tensor([[5, 6]])], [[5, 6]]),
        (BatchEncoding({"input_ids": [[5, 6], [7]]}), [[5, 6], [7]]),
        (
            {"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])},
            [[5], [6, 7]],
        ),
        ({"input_ids": [5, 6], "attention_mask": [1, 1]}, [[5, 6]]),
        ({"input_ids": torch.tensor([[0, 5]])}, [[5]]),
        ([{"input_ids": [5, 6]}, "a"], [[5, 6], "a"]),
        ([], []),
        ([[]], [[]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([TALK, TALK], dtype=object), [TALK, TALK]),
    ],
)
def test_every_form_is_a_list_of_prompts(given: Any, wanted: list[Any]) -> None:
    assert as_prompts(given, pad=0) == wanted


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (7, "int is no prompt"),
        (None, "NoneType"),
        (b"bytes", "bytes"),
        (torch.tensor(3), "single number"),
        (torch.tensor([[0.5, 1.0]]), "float"),
        ([[5, "a"]], "str among token ids"),
        ([5, "a"], "int is no prompt"),
        ([[True, False]], "bool"),
        ({"question": "a"}, "keys question"),
        ([3.5], "float"),
        ([torch.tensor(True)], "prompt"),
        (np.array([0.5]), "float"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask"),
    ],
)
def test_what_is_no_prompt_is_named(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        as_prompts(given)


def test_ids_are_held_against_the_model() -> None:
    check_ids([[0, 9]], 10)
    for ids, words in (([[1], []], "prompt 1 is empty"), ([[1, 10]], "token id 10.* 0 to 9"), ([[-1]], "token id -1")):
        with pytest.raises(UserError, match=words):
            check_ids(ids, 10)


def test_text_goes_through_the_template(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    for prompt in (PROBLEM, PROBLEM.question, TALK, TALK[0], ids, tuple(ids)):
        assert encode_prompt(tiny_tokenizer, prompt) == ids
    assert tiny_tokenizer(prompt_text(tiny_tokenizer, PROBLEM.question)).input_ids == ids
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2 + 2?"}]}]
    assert encode_prompt(tiny_tokenizer, parts) == ids
    system = [{"role": "system", "content": "Be brief."}, *TALK]
    assert encode_prompt(tiny_tokenizer, "What is 2 + 2?", system="Be brief.") == encode_prompt(tiny_tokenizer, system)
    closed = tiny_tokenizer.decode(encode_prompt(tiny_tokenizer, PROBLEM, nothinking=True))
    assert closed == prompt_text(tiny_tokenizer, PROBLEM.question) + NO_THINKING


def test_settings_reach_the_template(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}|{{ enable_thinking | default('unset') }}|"
    for given, said in ((None, "unset"), ({"enable_thinking": False}, "False")):
        assert tokenizer.decode(encode_prompt(tokenizer, "hi", template=given)) == f"hi|{said}|"


def test_an_answer_that_has_begun_goes_on(tiny_tokenizer: Any) -> None:
    begun = [*TALK, {"role": "assistant", "content": "It is"}]
    text = tiny_tokenizer.decode(encode_prompt(tiny_tokenizer, begun))
    assert text.endswith("It is") and text.count("assistant") == 1


@pytest.mark.parametrize(
    ("prompt", "how", "words"),
    [
        (" \n", {}, "empty text"),
        (Problem("p", "f", 1, "", "4"), {}, "empty text"),
        ([5], {"system": "x"}, "system is for"),
        ([5], {"template": {"enable_thinking": False}}, "chat_template_kwargs is for"),
        ([{"role": "system", "content": "x"}, *TALK], {"system": "y"}, "system is given"),
        ([{"role": "user"}], {}, "'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "type 'image'"),
        ([{"role": "user", "content": None}], {}, "user.*NoneType"),
        ([{"role": "user", "content": {"a": 1}}], {}, "user.*dict"),
        ([{"role": None, "content": "a"}], {}, "role"),
        ("a", {"system": ["b"]}, "system.*str"),
        ("a", {"template": "enable_thinking"}, "chat_template_kwargs"),
        ("half a character: \ud83d", {}, "ud83d"),
    ],
    ids=repr,
)
def test_a_prompt_that_cannot_be_rendered_is_named(tiny_tokenizer: Any, prompt: Any, how: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode_prompt(tiny_tokenizer, prompt, **how)


def test_what_a_template_refuses_is_one_line(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('only user and assistant roles') }}"
    with pytest.raises(UserError, match=r"roles system, user\): only user and assistant roles"):
        encode_prompt(tokenizer, "hi", system="x")


@pytest.mark.parametrize(
    ("template", "words"),
    [("", "writes nothing"), ("{{ 1 / 0 }}", "division"), ("{{ messages[0].content.a.b }}", "'a'"),
     ("{{ broken", "end of"), ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion")],
)  # fmt: skip
def test_a_template_that_fails_is_one_line(tiny_tokenizer: Any, template: str, words: str) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=rf"chat template .*roles user.*{words}|chat template {words}.*roles user"):
        encode_prompt(tokenizer, "hi")


@pytest.mark.parametrize("bos", [False, True])
def test_a_base_model_is_asked_plainly(tiny_tokenizer: Any, bos: bool) -> None:
    """As its own tokenizer would encode the text, special tokens and all."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.bos_token = "<|im_start|>"
        post = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = post
    wanted = tokenizer("What is 2 + 2?\nAnswer:").input_ids
    assert (wanted[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")) == bos
    assert encode_prompt(tokenizer, PROBLEM) == encode_prompt(tokenizer, TALK) == wanted
    for prompt, how in (([*TALK, *TALK], {}), ("hi", {"system": "x"}), ("hi", {"template": {"a": 1}})):
        with pytest.raises(UserError, match="no chat template"):
            encode_prompt(tokenizer, prompt, **how)
