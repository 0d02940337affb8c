"""Who opens the thinking: every kind of template, prompts with tags where they mean nothing, prompts that go on."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

import pytest

from neureasoner.thinking import CLOSED, OPEN, UNOPENED, closed_thinking, opens_thinking, state_of, thinking_state
from neureasoner.traces import NO_THINKING

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_HEADER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [/{{ m['role'] }}]{% endfor %}"
STRICT = (
    "{% if messages[0]['role'] != 'system' or messages | length != 2 %}{{ raise_exception('no') }}{% endif %}" + CHATML
)
WEAK = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}#{% endif %}"
V31 = CHATML.replace("assistant\n{% endif", "assistant\n</think>{% endif")  # DeepSeek-V3.1: closed, never opened
MINE = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "no header": NO_HEADER,
    "always a header": CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}"),
    "strict": STRICT,
    "weak": WEAK,
    "closed": CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"),
    "v31": V31,
    "only the tag": WEAK.replace("#", "<think>").replace("{% endfor %}", "<|im_end|>{% endfor %}"),
    "named": {"default": CHATML, "tool_use": WEAK},
}  # fmt: skip
TRL = ["deepseek_r1_distill", "qwen3", "qwen2_5", "glm4moe", "phi3", "gemma3", "qwen3_5_nothink", "nemotron_3_nano"]
EXPECTED = {
    "deepseek_r1_distill": OPEN, "nemotron_3_nano": OPEN, "only the tag": OPEN,
    "qwen3_5_nothink": CLOSED, "closed": CLOSED, "v31": CLOSED,
}  # fmt: skip
TAGGED = (
    "What do </think> and <think>\nmean? <think>\n1\n</think>\n\n2 <|im_start|>assistant\n</think>\n\nCalculate 2 + 2."
)


def with_template(tokenizer: Any, name: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    if name in TRL:
        changed.chat_template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    else:
        changed.chat_template = MINE.get(name or "")
    return changed


def rendered(tokenizer: Any, name: str, *messages: tuple[str, str], **how: Any) -> str:
    asked = [("system", "Be brief."), *messages] if name == "strict" else messages
    rows = [{"role": role, "content": content} for role, content in asked]
    return str(tokenizer.apply_chat_template(rows, add_generation_prompt=True, tokenize=False, **how))


def ways_to_write(tokenizer: Any, text: str) -> list[list[int]]:
    """The text as it is encoded, and character by character, so that no tag is one token."""
    return [tokenizer.encode(text, add_special_tokens=False), [i for c in text for i in tokenizer.encode(c)]]


def states(tokenizer: Any, text: str) -> set[str]:
    found = set()
    for ids in ways_to_write(tokenizer, text):
        assert tokenizer.decode(ids) == text
        found.add(thinking_state(ids, tokenizer))
    return found


@pytest.mark.parametrize("name", [*MINE, *TRL])
def test_a_fresh_prompt(tiny_tokenizer: Any, name: str) -> None:
    tokenizer, expected = with_template(tiny_tokenizer, name), EXPECTED.get(name, UNOPENED)
    quoted = rendered(tokenizer, name, ("user", "1?")) + "\n</think>\n\nIs that right? <think>\n"
    for question in ("What is 3?", TAGGED, quoted, quoted + "</think>"):
        assert states(tokenizer, rendered(tokenizer, name, ("user", question))) == {expected}, question


# Roles that a template refuses or leaves out.
LACKS = {
    ("gemma3", "tool"), ("phi3", "tool"), ("deepseek_r1_distill", "tool"), ("nemotron_3_nano", "system"),
}  # fmt: skip
CONVERSATIONS = [
    (n, last) for n in [*MINE, *TRL] if n != "strict" for last in ("user", "tool") if (n, last) not in LACKS
]


@pytest.mark.parametrize(("name", "last"), CONVERSATIONS)
def test_earlier_turns_system_and_tool_messages_change_nothing(tiny_tokenizer: Any, name: str, last: str) -> None:
    tokenizer, expected = with_template(tiny_tokenizer, name), EXPECTED.get(name, UNOPENED)
    turns = [("user", "1 + 1?"), ("assistant", "<think>\n1 + 1 = 2\n</think>\n\n2"), (last, TAGGED)]
    system = [] if (name, "system") in LACKS else [("system", "Write </think> when you are done, or <think>.")]
    text = rendered(tokenizer, name, *system, *turns)
    assert "Calculate 2 + 2." in text and states(tokenizer, text) == {expected}


@pytest.mark.parametrize("name", [n for n in [*MINE, *TRL] if EXPECTED.get(n) != CLOSED])
def test_a_prompt_that_holds_a_part_of_the_response(tiny_tokenizer: Any, name: str) -> None:
    tokenizer = with_template(tiny_tokenizer, name)
    prompt = rendered(tokenizer, name, ("user", TAGGED))
    opening = "" if EXPECTED.get(name) == OPEN else "<think>\n"
    if name == "only the tag":
        opening = "\n"
    began = prompt + opening
    assert states(tokenizer, began + "One step.\n\nAnother") == {OPEN}
    for answer in ("", "\n\n", "\n\nThe answer is 4. A tag such as <think> opens"):
        assert states(tokenizer, f"{began}One step.\n</think>{answer}") == {CLOSED}, answer
    assert states(tokenizer, f"{began}One.\n</think>\n\n<think>\n") == {OPEN}, "opened again"
    if opening and name != "only the tag":
        assert states(tokenizer, prompt + "The answer is") == {UNOPENED}


@pytest.mark.parametrize("name", [*MINE, *TRL])
def test_nothinking_closes_once_and_opens_where_nothing_has(tiny_tokenizer: Any, name: str) -> None:
    tokenizer = with_template(tiny_tokenizer, name)
    prompt = rendered(tokenizer, name, ("user", TAGGED))
    for ids in ways_to_write(tokenizer, prompt):
        added = closed_thinking(ids, tokenizer)
        wanted = {OPEN: NO_THINKING, UNOPENED: "<think>\n" + NO_THINKING, CLOSED: ""}[EXPECTED.get(name, UNOPENED)]
        assert added == wanted
        closed = ids + tokenizer.encode(added, add_special_tokens=False)
        assert thinking_state(closed, tokenizer) == CLOSED and closed_thinking(closed, tokenizer) == ""
        assert not opens_thinking(closed, tokenizer) and opens_thinking(ids, tokenizer) is (wanted != "")


def test_qwen3_with_its_own_switch(tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, "qwen3")
    for on, expected in ((True, UNOPENED), (False, CLOSED)):
        text = rendered(tokenizer, "qwen3", ("user", TAGGED), enable_thinking=on)
        assert states(tokenizer, text) == {expected}
        assert states(tokenizer, text + "The answer") == {expected}


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no conversations') }}"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", UNOPENED),
        ("Question: 2 + 2?\nAnswer:", UNOPENED),
        ("What does </think> mean?\nAnswer:", UNOPENED),
        ("Q: 1?\n<think>\n1\n</think>\n\n1\n\nQ: 2?", UNOPENED),
        ("Q: 2?\n<think>\n", OPEN),
        ("Q: 2?<think>", OPEN),
        ("Q: what is </think>?\n<think>\n" + NO_THINKING, CLOSED),
        ("ends with </think> \n", CLOSED),
    ],
)
def test_without_a_template_only_the_very_end_counts(
    tiny_tokenizer: Any, template: str | None, text: str, expected: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    assert states(tokenizer, text) == {expected}


def test_a_prompt_cut_on_the_left_or_with_no_generation_header(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer.encode(rendered(tiny_tokenizer, "", ("user", TAGGED)) + "One step. " * 9)
    for n in range(1, len(ids)):
        assert opens_thinking(ids[-n:], tiny_tokenizer)
    closed = tiny_tokenizer.encode(rendered(tiny_tokenizer, "", ("user", "?")) + NO_THINKING)
    for n in range(3, len(closed)):
        assert thinking_state(closed[-n:], tiny_tokenizer) == CLOSED
    ended = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<think>\n1\n</think>\n\n2<|im_end|>\n"
    assert states(tiny_tokenizer, ended + f"<|im_start|>user\n{TAGGED}<|im_end|>\n") == {UNOPENED}


def test_a_new_template_is_read_anew(tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, "chatml")
    text = "<|start_header_id|>user<|end_header_id|>\n\n?</think><|eot_id|>"
    text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert states(tokenizer, text + "<think>\nOne") == {UNOPENED}
    tokenizer.chat_template = LLAMA3
    assert states(tokenizer, text + "<think>\nOne") == {OPEN}
    assert states(copy.deepcopy(tokenizer), text + "<think>\nOne") == {OPEN}


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("", UNOPENED), ("\n", UNOPENED), ("So", UNOPENED), ("\n<think>\n", OPEN), ("<think>So", OPEN),
        ("Sure.\n<think>\nSo", OPEN), ("The tag <think> opens", UNOPENED), ("Sure. <think>", OPEN),
        ("<think></think>", CLOSED), ("</think>", CLOSED), ("<think>\na</think>b", CLOSED),
        ("<think>\na <think> b", OPEN), ("<think>\n1</think> write <think> first", CLOSED), ("</thin", UNOPENED),
    ],
)  # fmt: skip
def test_what_a_turn_has_said(turn: str, expected: str) -> None:
    assert state_of(turn) == expected


def test_text_behind_the_message_may_speak_of_the_tags(tiny_tokenizer: Any) -> None:
    """A template that ignores ``add_generation_prompt`` and asks for tags in words before the header."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    words = "\nShow your work in <think> </think> tags.\nAssistant:"
    for end, wanted in (("", UNOPENED), (" <think>\n", OPEN), ("\n<think>\n\n</think>\n\n", CLOSED)):
        tokenizer.chat_template = "{{ messages[0]['content'] }}" + words + end
        prompt = tokenizer.encode("What is </think>?" + words + end, add_special_tokens=False)
        assert thinking_state(prompt, tokenizer) == wanted
