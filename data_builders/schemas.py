"""What a judge may answer (core.md §1.3), and the reader that lets nothing else through.

The enumerations are the judge's own: the rewriter's control fields (``layouts``) have other error types and themes.
A model's answer is hostile text. ``read_json`` gives a valid object or raises Malformed; time and memory are bounded.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any, Literal, TypeVar, get_args

from neureasoner.data_builders.endpoint.requests import Malformed
from neureasoner.errors import UserError

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
except ImportError as e:
    raise UserError("the judge needs pydantic; pip install neureasoner[openai]") from e

ErrorType = Literal["calculation", "logic_non_sequitur", "domain_violation", "hallucination", "dropped_case", "none"]
LoopTheme = Literal["modular_checks", "bounds_restatement", "equation_shuffling", "none"]
Severity = Literal["low", "medium", "high", "none"]
ERROR_TYPES: tuple[str, ...] = get_args(ErrorType)
LOOP_THEMES: tuple[str, ...] = get_args(LoopTheme)
SEVERITIES: tuple[str, ...] = get_args(Severity)

MAX_ANSWER = 100_000  # characters of an answer that are looked at
MAX_FIELD = 20_000  # characters of one text in it
MAX_REASON = 300  # characters of a reason: it goes into the next prompt and into the counts

_OPENING = re.compile(r'\{\s*"')  # how a JSON object begins, and LaTeX or a set of numbers does not
_FENCE = re.compile(r"```[a-zA-Z]{0,10}[ \t]*\n(.*?)```", re.DOTALL)
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|["\\/bfnrt]|)', re.DOTALL)
_NOTHING = ("", "none", "null", "n/a")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="after")
    def _short(self) -> _Answer:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str) and len(value) > MAX_FIELD:
                raise ValueError(f"{name} is longer than {MAX_FIELD} characters")
        return self


class IntraAnswer(_Answer):
    """The intra judge's answer. ``first_error_step`` is null exactly when there is no error."""

    has_error: bool = Field(description="Whether any step is locally invalid")
    first_error_step: str | None = Field(description="The first wrong sentence or equation, verbatim; null if none")
    error_type: ErrorType = Field(description="Kind of the first error; none if there is none")
    explanation: str = Field(description="One or two sentences")

    @model_validator(mode="after")
    def _consistent(self) -> IntraAnswer:
        quoted = bool((self.first_error_step or "").strip())
        if self.has_error and not quoted:
            raise ValueError("has_error is true, so first_error_step must quote the wrong step")
        if self.has_error and self.error_type == "none":
            raise ValueError("has_error is true, so error_type must not be none")
        if not self.has_error and quoted:
            raise ValueError("has_error is false, so first_error_step must be null")
        if not self.has_error and self.error_type != "none":
            raise ValueError("has_error is false, so error_type must be none")
        return self


class InterAnswer(_Answer):
    """The inter judge's answer. A loop may have theme none: going to and fro between two approaches has no name."""

    is_stagnant: bool = Field(description="Whether three or more consecutive paragraphs make no progress")
    loop_detected_at: str = Field(description="First paragraph of the loop, such as Paragraph 4; none if no loop")
    loop_theme: LoopTheme = Field(description="What the loop is about; none if no loop, or none of these")
    severity: Severity = Field(description="How much is lost to the loop; none if no loop")
    explanation: str = Field(description="One or two sentences")

    @model_validator(mode="after")
    def _consistent(self) -> InterAnswer:
        placed = self.loop_detected_at.strip().lower() not in _NOTHING
        if self.is_stagnant and not placed:
            raise ValueError("is_stagnant is true, so loop_detected_at must name a paragraph")
        if self.is_stagnant and self.severity == "none":
            raise ValueError("is_stagnant is true, so severity must not be none")
        if not self.is_stagnant and placed:
            raise ValueError("is_stagnant is false, so loop_detected_at must be none")
        if not self.is_stagnant and (self.loop_theme != "none" or self.severity != "none"):
            raise ValueError("is_stagnant is false, so loop_theme and severity must be none")
        return self


M = TypeVar("M", bound=BaseModel)


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema for structured output in strict mode: every key required, no other key, no titles, no defaults."""
    schema = copy.deepcopy(model.model_json_schema())
    schema.pop("title", None)
    schema.pop("description", None)
    for entry in schema["properties"].values():
        entry.pop("title", None)
    schema["required"] = list(schema["properties"])
    schema["additionalProperties"] = False
    return schema


def printable(text: str, limit: int = 60) -> str:
    """A piece of an answer for use in a reason: short, one line, ASCII."""
    return ascii(text[:limit] + ("…" if len(text) > limit else ""))


def check_text(text: object, limit: int = MAX_ANSWER) -> str:
    """The text itself. Raises Malformed unless it is a string of valid Unicode, not empty, within ``limit``."""
    if not isinstance(text, str) or not text.strip():
        raise Malformed("empty answer")
    if len(text) > limit:
        raise Malformed(f"too long: {len(text)} characters, at most {limit} are read")
    _valid_unicode(text)
    return text


def _valid_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed("not valid Unicode: a lone surrogate") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise Malformed("not JSON as asked: a key occurs twice")
    return row


def _constant(name: str) -> Any:
    raise Malformed(f"not JSON as asked: {name}")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise Malformed("not JSON as asked: a number out of all bounds")
    return int(digits)


# Raw newlines inside strings (strict=False) are what models without structured output write; nothing is ambiguous.
_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer, strict=False)


def _decode(text: str, start: int) -> tuple[Any, int, str]:
    """The value at ``start``, its end, and the text in which that end counts. LaTeX's lone backslashes are mended."""
    try:
        return *_DECODER.raw_decode(text, start), text
    except Malformed:
        raise
    except RecursionError:
        raise Malformed("not JSON as asked: nested too deeply") from None
    except json.JSONDecodeError as e:
        first = e
    except ValueError:
        raise Malformed("not JSON as asked: a number out of all bounds") from None
    if "escape" in first.msg:
        mended = text[:start] + _ESCAPE.sub(lambda m: m[0] if m[1] else "\\\\", text[start:])
        try:
            return *_DECODER.raw_decode(mended, start), mended
        except Malformed:
            raise
        except (ValueError, RecursionError):
            pass
    raise Malformed(f"not JSON: {first.msg} at character {first.pos}")


def _body(text: str) -> str:
    """The part of the answer that should hold the object: after a leaked thought, inside the only code fence."""
    text = text.rpartition("</think>")[2] if text.lstrip().startswith("<think>") else text
    opening = _OPENING.search(text)
    fences = [m for m in _FENCE.finditer(text) if _OPENING.search(m[1])]
    # A fence inside the object's own strings is no fence around the object.
    if len(fences) == 1 and opening and fences[0].start() < opening.start():
        return fences[0][1]
    return text


def read_json(text: object, model: type[M]) -> M:
    """Read an answer: a JSON object, alone, in a code fence or after a few words.

    Raises Malformed, and nothing else, for whatever is not exactly one valid object: torn, empty, a refusal, wrong
    keys, types or values, keys twice, NaN, numbers or nesting out of all bounds, lone surrogates, megabytes.
    """
    body = _body(check_text(text))
    opening = _OPENING.search(body)
    if opening is None:
        raise Malformed("no JSON object")
    value, end, body = _decode(body, opening.start())
    if _OPENING.search(body, end):
        raise Malformed("more than one JSON object")
    try:
        answer = model.model_validate(value)
    except ValidationError as e:
        raise Malformed(_reason(e)) from None
    except RecursionError:
        raise Malformed("not JSON as asked: nested too deeply") from None
    for part in value.values():
        if isinstance(part, str):
            _valid_unicode(part)
    return answer


def _reason(error: ValidationError) -> str:
    """What is wrong, without a word of the answer except the names of keys that do not belong."""
    parts = []
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    for e in sorted(errors, key=lambda e: e["type"] != "extra_forbidden")[:4]:
        where = ".".join(str(x) for x in e["loc"])
        if e["type"] == "extra_forbidden":
            parts.append(f"unknown key {printable(where, 40)}")
        else:
            message = e["msg"].removeprefix("Value error, ")
            parts.append(f"{where}: {message}" if where else message)
    return ("not as asked: " + "; ".join(parts))[:MAX_REASON]
