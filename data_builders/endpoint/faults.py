"""What went wrong with a call, and what follows from it: stop, wait, try again, or give this request up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from neureasoner.data_builders.endpoint.limits import Limits, read_limits
from neureasoner.data_builders.endpoint.scrub import Scrubber

FATAL, LIMITED, AGAIN, REFUSED = "fatal", "limited", "again", "refused"
_ADVICE = {
    401: "the key is not accepted; check {key_env}",
    402: "the account has no credit left",
    403: "the key may not use this model or endpoint",
    404: "no such model or address; check 'model' and 'base_url' (it ends in /v1)",
}
_BROKE = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated")


@dataclass(frozen=True)
class Fault:
    """One failed call. ``count``: the name it is counted under; ``charged``: whether it may have been paid for."""

    kind: str
    count: str
    reason: str
    limits: Limits | None = None
    charged: bool = False
    words: str = field(default="", repr=False)  # everything the endpoint said, in lower case


def _said(body: Any) -> tuple[str, str]:
    """The endpoint's own message, and every word of its error."""
    error = body if isinstance(body, dict) else {"message": body}
    named = [str(error.get(k) or "") for k in ("message", "code", "type", "param")]
    return named[0] or str(body or ""), " ".join(named).lower()


def classify(error: Exception, scrub: Scrubber, key_env: str) -> Fault:
    """The fault behind an exception of the SDK."""
    import openai

    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return Fault(AGAIN, "timeout", "no answer in time", charged=True)
    if not isinstance(error, openai.APIStatusError):
        cause = type(error.__cause__).__name__ if error.__cause__ is not None else type(error).__name__
        # what broke off may have been answered and charged; what never reached the server was not
        return Fault(AGAIN, "connection", f"the connection failed ({cause})", charged="Connect" not in cause)
    status, limits = error.status_code, read_limits(error.response.headers)
    message, words = _said(error.body)
    reason = f"{status} {scrub.error(message)}".strip()
    if status in _ADVICE or (status == 429 and any(b in words for b in _BROKE)):
        advice = _ADVICE.get(status, "the account has no credit left").format(key_env=key_env)
        return Fault(FATAL, f"http_{status}", f"{reason} ({advice})", limits, words=words)
    if status == 429:
        return Fault(LIMITED, "http_429", reason, limits, words=words)
    if status in (408, 409, 425) or status >= 500:
        return Fault(AGAIN, f"http_{status}", reason, limits, words=words)
    return Fault(REFUSED, f"http_{status}", reason, limits, words=words)
