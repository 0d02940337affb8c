"""What an endpoint says about its limits: headers in, numbers out."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


@dataclass(frozen=True)
class Told:
    """One budget as the endpoint reports it: how much it grants, how much is left, seconds until all is back."""

    limit: float | None = None
    remaining: float | None = None
    reset: float | None = None


@dataclass(frozen=True)
class Limits:
    """Both budgets, and how long to keep quiet (None: not said)."""

    requests: Told = Told()
    tokens: Told = Told()
    retry_after: float | None = None


def seconds(text: str | None) -> float | None:
    """``20ms``, ``1.5s``, ``6m0s`` or a bare number of seconds; None for anything else."""
    text = (text or "").strip()
    if re.fullmatch(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+", text):
        return sum(float(n) * _UNITS[unit] for n, unit in _PART.findall(text))
    return _number(text)


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d{1,15}(?:\.\d{1,9})?", text.strip()) else None


def _after(headers: Mapping[str, str]) -> float | None:
    exact = _number(headers.get("retry-after-ms"))
    if exact is not None:
        return exact / 1000
    text = headers.get("retry-after", "")
    plain = _number(text)
    if plain is not None or not text:
        return plain
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def read_limits(headers: Mapping[str, str]) -> Limits:
    """The limits in a reply's headers (names in lower case, or a mapping that ignores case)."""

    def told(name: str) -> Told:
        return Told(
            _number(headers.get(f"x-ratelimit-limit-{name}")),
            _number(headers.get(f"x-ratelimit-remaining-{name}")),
            seconds(headers.get(f"x-ratelimit-reset-{name}")),
        )

    return Limits(told("requests"), told("tokens"), _after(headers))
