"""From what a caller gives to token ids: the one way into a model, for data, training, inference and evaluation.

A prompt is a Problem or a question (one user turn), chat messages, or token ids, which are taken as they are. Questions
go through the tokenizer's chat template; a base model without one is asked ``{question}\\nAnswer:``, with the special
tokens that its tokenizer puts first. Light: imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from neureasoner.errors import UserError
from neureasoner.thinking import closed_thinking
from neureasoner.traces import Problem

Prompt = Problem | str | Mapping[str, str] | Sequence[Mapping[str, str]] | Sequence[int]

FORMS = "a Problem, a question, chat messages ({'role': …, 'content': …}), token ids, or a list of these"
PLAIN = "{question}\nAnswer:"


def as_prompts(prompts: Any, pad: int | None = None) -> list[Prompt]:
    """What a caller of ``generate`` gives, as a list of prompts.

    One prompt counts as a list of one: a string, a Problem, a conversation, a flat row of ids. Tensors, arrays and what
    a tokenizer returns (``input_ids`` with ``attention_mask``) are rows of ids without their padding; where no mask
    says what that is, the ids ``pad`` at either end are. Raises UserError for anything else.
    """
    if isinstance(prompts, str | Problem):
        return [prompts]
    if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids"):
        return _from_mapping(prompts, pad)
    if hasattr(prompts, "tolist"):  # a tensor or an array
        rows = _listed(prompts)
        if not isinstance(rows, list):
            raise UserError(f"prompts: a single number is no prompt; give {FORMS}")
        if not rows or (isinstance(rows[0], list) and not any(map(_is_message, rows[0]))):
            return [_stripped(r, pad) for r in rows] or [[]]
        prompts = rows  # one row of ids, or an array of texts or messages
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise UserError(f"prompts: {type(prompts).__name__} is no prompt; give {FORMS}")
    listed = list(prompts)
    if listed and all(_is_int(p) for p in listed):
        return [_ids(listed)]
    if listed and all(_is_message(p) for p in listed):
        return [listed]
    return [_one(p, pad) for p in listed]


def _one(prompt: Any, pad: int | None) -> Prompt:
    if isinstance(prompt, str | Problem):
        return prompt
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        found = _from_mapping(prompt, pad)
        if len(found) != 1:
            raise UserError(f"prompts: one entry holds {len(found)} rows of input_ids; give each as an entry")
        return found[0]
    if hasattr(prompt, "tolist"):
        prompt = _listed(prompt)
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list):
            prompt = prompt[0]
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise UserError(f"prompts: {type(prompt).__name__} is no prompt; give {FORMS}")
    listed = list(prompt)
    return listed if listed and all(_is_message(m) for m in listed) else _ids(listed)


def _from_mapping(given: Any, pad: int | None) -> list[Prompt]:
    """A tokenizer's output, one message, or a row of a data set that holds messages."""
    if _is_message(given):
        return [[given]]
    if isinstance(given, Mapping) and "messages" in given:
        return [_one(given["messages"], pad)]
    get = given.get if isinstance(given, Mapping) else lambda key: getattr(given, key, None)
    ids, mask = get("input_ids"), get("attention_mask")
    if ids is None:
        raise UserError(f"prompts: a mapping with keys {', '.join(map(str, given))} is no prompt; give {FORMS}")
    rows, masks = _rows(ids), None if mask is None else _rows(mask)
    if masks is None:
        return [_stripped(r, pad) for r in rows]
    if [len(r) for r in rows] != [len(m) for m in masks]:
        raise UserError("prompts: attention_mask has another shape than input_ids")
    return [_ids([i for i, on in zip(r, m, strict=True) if on]) for r, m in zip(rows, masks, strict=True)]


def _rows(values: Any) -> list[list[Any]]:
    values = _listed(values)
    values = [_listed(v) for v in values] if isinstance(values, list | tuple) else [values]
    return values if values and isinstance(values[0], list | tuple) else [values]


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_int(value: Any) -> bool:
    return (isinstance(value, Integral) and not isinstance(value, bool)) or (
        hasattr(value, "item") and getattr(value, "ndim", 1) == 0 and type(value.item()) is int
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _ids(values: Any) -> list[int]:
    for value in values:
        if not _is_int(value):
            raise UserError(f"prompts: {type(value).__name__} among token ids; give {FORMS}")
    return [int(v) for v in values]


def _stripped(values: Any, pad: int | None) -> list[int]:
    """Ids without padding before and behind them."""
    ids = _ids(values)
    own = [t for t, i in enumerate(ids) if i != pad]
    return ids[own[0] : own[-1] + 1] if own else []


def check_ids(prompt_ids: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Raises UserError naming a prompt that is empty, or holds an id that the model has no embedding for."""
    for place, ids in enumerate(prompt_ids):
        if not ids:
            raise UserError(f"prompt {place} is empty; give every prompt at least one token")
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise UserError(
                f"prompt {place} has token id {wrong}; the model knows ids 0 to {vocabulary - 1} (another tokenizer's?)"
            )


def prompt_text(tokenizer: Any, question: str) -> str:
    """The question as the model sees it, up to the first token of its response (special tokens written out)."""
    return _rendered(tokenizer, [{"role": "user", "content": question}], {})


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt or a piece of a response; nothing is added, the text has what it wants.

    Raises UserError for a text that is none: with half of a character (a lone surrogate, as broken JSON holds them).
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"a text holds {text[e.start]!r} at {e.start}, half of a character; repair it first") from None
    return [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    nothinking: bool = False,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of one prompt.

    nothinking  the thinking is closed in the prompt, as its template wants it (``thinking.closed_thinking``; core.md
                §5.9)
    system      a system message put before a question or conversation
    template    more settings of the chat template, such as ``{"enable_thinking": False}``

    A conversation whose last message is the assistant's is continued in that message. Raises UserError where the
    template refuses the messages, or for settings that token ids cannot take.
    """
    if isinstance(prompt, Problem):
        prompt = prompt.question
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("a question is empty text; give every prompt some")
        prompt = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Mapping):
        prompt = [prompt]
    if not isinstance(template or {}, Mapping):
        raise UserError(f"chat_template_kwargs has to be a mapping of settings to values, got {template!r}")
    if not prompt or not isinstance(prompt[0], Mapping):
        if system is not None or template:
            raise UserError(
                f"{'system' if system is not None else 'chat_template_kwargs'} is for text; this prompt is ids"
            )
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
        return ids + (encode_text(tokenizer, closed_thinking(ids, tokenizer)) if nothinking else [])
    messages = [_message(m) for m in prompt]
    if system is not None:
        if messages[0]["role"] == "system":
            raise UserError("system is given, but the conversation has a system message of its own")
        messages = [_message({"role": "system", "content": system}), *messages]
    text = _rendered(tokenizer, messages, dict(template or {}))
    ids = encode_text(tokenizer, text)
    return encode_text(tokenizer, text + closed_thinking(ids, tokenizer)) if nothinking else ids


def _message(given: Any) -> dict[str, Any]:
    """A message with its text parts joined. Raises UserError for a part that is no text, and for one without any that
    calls no tool."""
    message = dict(given)
    if not isinstance(message["role"], str):
        raise UserError(f"a message has {message['role']!r} for its role; name one, such as 'user'")
    content = message.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
                raise UserError(
                    f"a message of role {message['role']!r} has a part of type {kind!r}; only text is taken"
                )
        message["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        kind = type(content).__name__
        raise UserError(f"a message of role {message['role']!r} has no text as its 'content' but a {kind}")
    return message


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], template: dict[str, Any]) -> str:
    if tokenizer.chat_template is None:
        return _plain(tokenizer, messages, template)
    goes_on = messages[-1]["role"] == "assistant"
    roles = ", ".join(m["role"] for m in messages)
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=not goes_on, continue_final_message=goes_on, tokenize=False, **template
        )
    except Exception as e:  # a template is a program of the model's folder, and fails by errors of any kind
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"the chat template refuses these messages (roles {roles}): {said}") from None
    if not text:
        raise UserError(f"the chat template writes nothing for these messages (roles {roles})")
    return str(text)


def _plain(tokenizer: Any, messages: list[dict[str, Any]], template: dict[str, Any]) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user" or template:
        raise UserError(
            "the tokenizer has no chat template, so it can be asked single questions only; set "
            "tokenizer.chat_template, or give one user message, a text or token ids"
        )
    first = tokenizer.encode("")[:1]  # what the tokenizer puts before a text, BOS where it has one
    lead = tokenizer.bos_token or "" if first and first[0] == tokenizer.bos_token_id else ""
    return lead + PLAIN.format(question=messages[0]["content"])
