"""Requests as the two APIs want them, and their bodies read back. Pure functions; a body is never trusted.

A ``Shape`` is what the server was found to understand: how the answer's form is demanded, and what the cap on tokens
is called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from neureasoner.data_builders.endpoint.requests import Answer, Request, Usage

PATHS = {"chat": "/chat/completions", "responses": "/responses"}
WEAKER = {"schema": "json", "json": "none"}


class BadBody(ValueError):
    """A reply with status 200 that holds no answer."""


@dataclass(frozen=True)
class Shape:
    """``structured``: schema, json or none. ``cap``: the chat API's name for the cap on tokens."""

    structured: str = "schema"
    cap: str = "max_completion_tokens"

    def weaker(self) -> Shape | None:
        """The next, less demanding shape; None when there is none."""
        below = WEAKER.get(self.structured)
        return replace(self, structured=below) if below else None


def clean(text: str) -> str:
    """Text that can be encoded: surrogate pairs joined, lone surrogates replaced."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {_clean(k): _clean(v) for k, v in value.items()}
    return [_clean(v) for v in value] if isinstance(value, (list, tuple)) else value


def is_strict(schema: Any) -> bool:
    """Whether every object of the schema names all its keys as required and forbids others (OpenAI's strict mode)."""
    if isinstance(schema, (list, tuple)):
        return all(is_strict(s) for s in schema)
    if not isinstance(schema, Mapping):
        return True
    if "properties" in schema or schema.get("type") == "object":
        known = set(schema.get("properties", {}))
        if schema.get("additionalProperties") is not False or set(schema.get("required", [])) != known:
            return False
    return all(is_strict(v) for v in schema.values())


def build(request: Request, api: str, shape: Shape) -> dict[str, Any]:
    """The body of a call. Where the server takes no schema, the schema is shown in the prompt instead."""
    messages = [{"role": m.role, "content": clean(m.content)} for m in request.messages]
    params = {k: _clean(v) for k, v in request.params.items()}
    cap, effort = params.pop("max_tokens", None), params.pop("effort", None)
    body: dict[str, Any] = {"model": request.model, **params}
    schema = None if request.schema is None else _clean(request.schema)
    name = request.schema_name or "answer"
    form: dict[str, Any] | None = None
    if schema is not None and shape.structured == "schema":
        form = {"type": "json_schema", "name": name, "schema": schema, "strict": is_strict(schema)}
    elif schema is not None:
        shown = json.dumps(schema, ensure_ascii=False)
        told = {
            "role": "system",
            "content": f"Answer with one JSON object, nothing else, that fits this schema: {shown}",
        }
        first = 1 if messages and messages[0]["role"] == "system" else 0
        messages.insert(first, told)
        form = {"type": "json_object"} if shape.structured == "json" else None
    if api == "chat":
        body["messages"] = messages
        if form is not None:
            inner = {k: v for k, v in form.items() if k != "type"}
            body["response_format"] = {"type": form["type"], **({"json_schema": inner} if inner else {})}
        if cap:
            body[shape.cap] = cap
        if effort:
            body["reasoning_effort"] = effort
    else:
        body |= {"input": messages, "store": False}
        if form is not None:
            body["text"] = {"format": form}
        if cap:
            body["max_output_tokens"] = cap
        if effort:
            body["reasoning"] = {"effort": effort}
    return body


def _bytes(request: Request) -> int:
    size = sum(len(m.content.encode(errors="replace")) for m in request.messages)
    return size if request.schema is None else size + len(json.dumps(_clean(request.schema)))


def estimate(request: Request) -> int:
    """Tokens of the input, roughly: four bytes each, and a few for every turn."""
    return _bytes(request) // 4 + 4 * len(request.messages) + 3


def worst(request: Request) -> Usage:
    """The most that a call can use: no tokenizer makes more tokens than bytes, and no server more than was asked."""
    return Usage(_bytes(request) + 16 * len(request.messages) + 192, int(request.params.get("max_tokens") or 0))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53 else 0


def _at(value: Any, *path: str | int) -> Any:
    """``value[a][b]…``, or None where the road ends."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and len(value) > step else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    """A content that is a text, or a list of parts as some servers send it."""
    if isinstance(value, list):
        value = "".join(t for t in (_at(p, "text") for p in value) if isinstance(t, str))
    return clean(value) if isinstance(value, str) else ""


def read_usage(body: Any) -> Usage:
    """Tokens as either API reports them; what is missing or absurd counts as 0."""
    usage = _at(body, "usage")
    return Usage(
        _count(_at(usage, "prompt_tokens")) or _count(_at(usage, "input_tokens")),
        _count(_at(usage, "completion_tokens")) or _count(_at(usage, "output_tokens")),
        _count(_at(usage, "prompt_tokens_details", "cached_tokens"))
        or _count(_at(usage, "input_tokens_details", "cached_tokens")),
    )


def load(text: str | bytes) -> Any:
    """JSON of a body. Raises BadBody."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadBody("the body is not JSON") from None


def read_body(body: Any, api: str) -> Answer:
    """The answer in a parsed body. Raises BadBody when there is none."""
    error = _at(body, "error")
    if error:
        raise BadBody(f"status 200 with an error: {_at(error, 'message') or error}")
    return _read_chat(body) if api == "chat" else _read_responses(body)


def _read_chat(body: Any) -> Answer:
    choice = _at(body, "choices", 0)
    message = _at(choice, "message")
    if not isinstance(message, Mapping):
        raise BadBody("the body holds no message")
    reason = _at(choice, "finish_reason")
    return Answer(
        text=_text(message.get("content")),
        finish_reason=clean(reason) if isinstance(reason, str) else "stop",
        refusal=_text(message.get("refusal")),
        usage=read_usage(body),
        model=_text(_at(body, "model")),
    )


def _read_responses(body: Any) -> Answer:
    output = _at(body, "output")
    if not isinstance(output, list):
        raise BadBody("the body holds no output")
    messages = [_at(item, "content") for item in output if _at(item, "type") == "message"]
    parts = [p for content in messages if isinstance(content, list) for p in content]
    status, why = _at(body, "status"), _at(body, "incomplete_details", "reason")
    if status in ("failed", "cancelled"):
        raise BadBody(f"the response is {status}")
    reason = "stop"
    if status == "incomplete":
        reason = "length" if why == "max_output_tokens" else str(why or "incomplete")
    return Answer(
        text=_text([p for p in parts if _at(p, "type") == "output_text"]),
        finish_reason=clean(reason),
        refusal="".join(_text(_at(p, "refusal")) for p in parts if _at(p, "type") == "refusal"),
        usage=read_usage(body),
        model=_text(_at(body, "model")),
    )


def verdict(answer: Answer) -> str:
    """Why an answer cannot be used whatever it says ("" when it may be read)."""
    if answer.refusal or answer.finish_reason == "content_filter":
        return "refusal: the model declined to answer"
    if answer.finish_reason == "length":
        return "cut off: the answer is longer than the cap on tokens; be brief"
    if not answer.text.strip():
        return "empty: there is no text"
    return ""
