"""Settings of an endpoint. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from neureasoner.errors import UserError

OPENAI = "https://api.openai.com/v1"
CHOICES = {"api": ("chat", "responses"), "structured": ("auto", "schema", "json", "none")}


@dataclass
class EndpointConfig:
    """Which model is asked, where, how fast and for how much money."""

    model: str = field(metadata={"help": "model name as the endpoint knows it"})
    base_url: str = field(default="", metadata={"help": "address up to /v1 (empty: OpenAI); no keys in it"})
    key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "environment variable that holds the key; never the key itself"}
    )
    api: str = field(default="chat", metadata={"help": "chat (every server knows it) or responses"})
    structured: str = field(
        default="auto",
        metadata={"help": "how an answer's shape is demanded: schema, json, none, or auto (the best the server takes)"},
    )
    temperature: float | None = field(default=None, metadata={"help": "sampling temperature; none: not sent"})
    effort: str = field(default="", metadata={"help": "reasoning effort (low, medium, high …); empty: not sent"})
    max_tokens: int = field(
        default=4096, metadata={"help": "cap on the tokens of an answer, reasoning included; 0: not sent"}
    )
    timeout: float = field(default=300.0, metadata={"help": "seconds to wait for one answer"})
    concurrency: int = field(default=16, metadata={"help": "calls under way at once, at most"})
    requests_per_minute: float = field(default=0.0, metadata={"help": "limit to keep; 0: learn it from the endpoint"})
    tokens_per_minute: float = field(
        default=0.0, metadata={"help": "limit to keep, counting input plus max_tokens; 0: learn it from the endpoint"}
    )
    retries: int = field(default=2, metadata={"help": "how often the model is told what was wrong with its answer"})
    tries: int = field(default=6, metadata={"help": "how often a call is made that the endpoint fails to answer"})
    backoff: float = field(default=0.5, metadata={"help": "seconds before the second try; doubles with each further"})
    max_cost: float = field(default=0.0, metadata={"help": "stop before this run has paid more (USD); 0: no limit"})
    ledger: str = field(default="answers.sqlite", metadata={"help": "file that keeps every answer; may be shared"})
    prices: str = field(default="", metadata={"help": "own price table (YAML); empty: the shipped one"})

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UserError("key 'model' must name a model")
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise UserError(f"key '{key}' must be one of {', '.join(known)}, got '{getattr(self, key)}'")
        self._check_url()
        if not self.key_env.replace("_", "").isalnum():
            # the likely slip is to paste the key here, so what stands here is not repeated
            raise UserError("key 'key_env' must be the name of an environment variable, not a key")
        for key in ("concurrency", "tries"):
            if getattr(self, key) < 1:
                raise UserError(f"key '{key}' must be at least 1, got {getattr(self, key)}")
        for key in ("max_tokens", "retries", "backoff", "max_cost", "requests_per_minute", "tokens_per_minute"):
            if not getattr(self, key) >= 0:
                raise UserError(f"key '{key}' must not be negative, got {getattr(self, key)}")
        if not self.timeout > 0:
            raise UserError(f"key 'timeout' must be above 0, got {self.timeout}")
        if self.temperature is not None and not self.temperature >= 0:
            raise UserError(f"key 'temperature' must not be negative, got {self.temperature}")
        if self.max_cost and not self.max_tokens:
            raise UserError("key 'max_cost' needs 'max_tokens': without a cap one answer may cost anything")
        if not self.ledger:
            raise UserError("key 'ledger' must be a file to keep the answers in")

    def _check_url(self) -> None:
        if not self.base_url:
            return
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("key 'base_url' must look like http://host:port/v1")
        if parts.username or parts.password or parts.query:
            # a recipe is shared and logged; a key belongs in the environment
            raise UserError("key 'base_url' must hold no user, password or query; put the key into the environment")

    @property
    def url(self) -> str:
        """The address that is called."""
        return self.base_url.rstrip("/") or OPENAI

    def params(self) -> dict[str, Any]:
        """The settings that can change an answer, as ``Request.params``; they are part of a request's key."""
        settings = {"temperature": self.temperature, "effort": self.effort, "max_tokens": self.max_tokens}
        return {k: v for k, v in settings.items() if v is not None and v != "" and not (k == "max_tokens" and v == 0)}

    def key(self) -> str:
        """The key from the environment ("" where a server of one's own needs none). Raises UserError."""
        key = os.environ.get(self.key_env, "").strip()
        if not key and not self.base_url:
            raise UserError(
                f"no key: set the environment variable {self.key_env}, or give 'base_url' (your own server)"
            )
        if any(not " " < c < "\x7f" for c in key):
            raise UserError(f"the environment variable {self.key_env} holds characters that no key has")
        return key
