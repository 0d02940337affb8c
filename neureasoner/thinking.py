"""Who opens the thinking: how a prompt ends, asked of its end alone.

R1's template ends the prompt with ``<think>``, Qwen3's leaves it to the model to write it, or opens and closes it
(``enable_thinking=False``), others know no thinking. Only the assistant turn that the response goes on with counts:
what follows the last generation header of the prompt. So tags in a question, a system prompt, a tool's answer or an
earlier turn change nothing. The header is read off the chat template; where there is none (base models, ids that the
caller made, a prompt whose header was cut away), only a tag at the very end counts, white space aside.

Tags are text here: it does not matter of how many tokens they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from neureasoner.traces import NO_THINKING, OPENED, THINK_CLOSE, THINK_OPEN

# The prompt ends inside an opened thinking, after a closed one, or the response opens one itself, or never does.
OPEN, CLOSED, UNOPENED = "open", "closed", "unopened"

_TAG = re.compile(f"{THINK_OPEN}|{THINK_CLOSE}")
# What opens a thinking: the tag at the beginning of the turn, alone on its line, or last. Elsewhere it is spoken of.
_TURN = re.compile(
    rf"(?P<open>\A\s*{THINK_OPEN}|^[ \t]*{THINK_OPEN}[ \t]*$|{THINK_OPEN}\s*\Z)|{THINK_CLOSE}", re.MULTILINE
)
_USER, _SYSTEM, _TOOL = ({"role": role, "content": "zqprobe"} for role in ("user", "system", "tool"))


def thinking_state(prompt_ids: Sequence[int], tokenizer: Any) -> str:
    """OPEN, CLOSED or UNOPENED: how the prompt, and what it may hold of a response already, leaves the thinking."""
    text = tokenizer.decode(list(prompt_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    begin = max((text.rfind(m) + len(m) for m in _headers(tokenizer) if m in text), default=None)
    eos = tokenizer.eos_token
    if begin is None or (eos and eos in text[begin:]):  # no header, or that of a turn which has ended
        tags = _TAG.findall(text)
        last = tags[-1] if tags and text.rstrip().endswith(tags[-1]) else ""
        return {THINK_OPEN: OPEN, THINK_CLOSE: CLOSED, "": UNOPENED}[last]
    return state_of(text[begin:])


def state_of(turn: str) -> str:
    """The state after what an assistant turn has said so far, from its first character on."""
    *_, last = (None, *_TURN.finditer(turn))
    if last is None:
        return UNOPENED
    return OPEN if last["open"] else CLOSED


def opens_thinking(prompt_ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the first token of a response to this prompt counts as thinking: unless the thinking was closed."""
    return thinking_state(prompt_ids, tokenizer) != CLOSED


def closed_thinking(prompt_ids: Sequence[int], tokenizer: Any) -> str:
    """What NoThinking adds to this prompt: the closed thinking, opened first where nothing has; nothing after one."""
    return {OPEN: NO_THINKING, UNOPENED: OPENED + NO_THINKING, CLOSED: ""}[thinking_state(prompt_ids, tokenizer)]


_KEPT: WeakKeyDictionary[Any, tuple[str, list[str]]] = WeakKeyDictionary()


def _headers(tokenizer: Any) -> list[str]:
    """Texts that stand before an assistant turn in this tokenizer's prompts, none if there are none.

    Kept until the tokenizer gets another template.
    """
    template = repr(getattr(tokenizer, "chat_template", None))
    kept = _KEPT.get(tokenizer)
    if kept is None or kept[0] != template:
        header = _untagged(_generation_prompt(tokenizer))
        found = [header] if header else map(_between_tags, _after_messages(tokenizer))
        headers = dict.fromkeys(_as_decoded(text, tokenizer) for text in found if text)
        kept = _KEPT[tokenizer] = template, list(headers)
    return kept[1]


def _untagged(text: str) -> str:
    """What stands before the first tag."""
    return _TAG.split(text, maxsplit=1)[0].strip()


def _between_tags(text: str) -> str:
    """What stands last, but for tags at the very end: text after a message may speak of the tags before that."""
    return _TAG.split(re.sub(rf"(?:\s|{_TAG.pattern})*\Z", "", text))[-1].strip()


def _generation_prompt(tokenizer: Any) -> str:
    """What the template adds for a response; nothing where it adds none, or always does."""
    for asked in ([_USER], [_SYSTEM, _USER]):
        plain, ready = _rendered(tokenizer, asked, False), _rendered(tokenizer, asked, True)
        if plain and ready.startswith(plain):
            return ready[len(plain) :]
    return ""


def _after_messages(tokenizer: Any) -> Iterator[str]:
    """What the template writes after a message, if a response follows."""
    for asked in ([_USER], [_SYSTEM, _USER], [_USER, _TOOL], [_USER, _SYSTEM]):
        _, found, after = _rendered(tokenizer, asked, True).rpartition(_USER["content"])
        if found:
            yield after


def _rendered(tokenizer: Any, messages: list[dict[str, str]], ready: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=ready, tokenize=False))
    except Exception:  # templates refuse roles by errors of any kind, and without a template there is one more
        return ""


def _as_decoded(text: str, tokenizer: Any) -> str:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip() or text
