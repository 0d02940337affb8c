"""A server process of its own for each test that asks, and questions to ask it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.requests import Malformed, Message, Question, Request

SERVER = Path(__file__).with_name("server.py")
SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": ["good", "bad"]}, "score": {"type": "integer"}, "why": {"type": "string"}},
    "required": ["verdict", "score", "why"],
    "additionalProperties": False,
}
CANARY = "sk-canary-0123456789abcdef"
PRICES = "models:\n  tiny: {input: 1.0, cached: 0.5, output: 4.0, batch: 0.5}\n"


def read_verdict(text: str) -> dict[str, Any]:
    """What a job would do with an answer."""
    try:
        value = json.loads(text)
    except ValueError:
        raise Malformed("it is not JSON") from None
    if not isinstance(value, dict) or value.get("verdict") not in ("good", "bad"):
        raise Malformed("'verdict' must be good or bad")
    return value


class Server:
    """A running server, and its log."""

    def __init__(self, folder: Path, *options: str):
        self.log = folder / f"requests-{len(list(folder.glob('requests-*')))}.jsonl"
        self.log.touch()
        command = [sys.executable, str(SERVER), "--log", str(self.log), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def rows(self, event: str = "") -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [r for r in rows if not event or r["event"] == event]

    def asked(self) -> Counter[str]:
        """How often each request reached the server and was let in."""
        return Counter(r["digest"] for r in self.rows("call") if r["status"] == 0)

    def keys(self) -> Counter[str]:
        """The same by the keys that the client gave its requests."""
        return Counter(r["id"].partition("-")[0] for r in self.rows("call") if r["status"] == 0)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``serve("--latency", "0.1")``: start a server."""
    running: list[Server] = []

    def start(*options: str) -> Server:
        running.append(Server(tmp_path, *options))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def make_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EndpointConfig]:
    """``make_config(server, concurrency=4)``: a configuration with a ledger in the test's folder."""
    monkeypatch.setenv("TEST_KEY", CANARY)
    (tmp_path / "prices.yaml").write_text(PRICES)

    def make(server: Server, **settings: Any) -> EndpointConfig:
        plain = {
            "model": "tiny", "base_url": server.url, "key_env": "TEST_KEY", "max_tokens": 100, "backoff": 0.02,
            "ledger": str(tmp_path / "ledger.sqlite"), "prices": str(tmp_path / "prices.yaml"),
        }  # fmt: skip
        return EndpointConfig(**(plain | settings))

    return make


def question(name: str, text: str = "", config: EndpointConfig | None = None, **more: Any) -> Question[dict[str, Any]]:
    """A question that the server can answer."""
    messages = (Message("system", "Judge."), Message("user", text or f"Is {name} right?"))
    params = config.params() if config is not None else {"max_tokens": 100}
    return Question(name, Request("tiny", messages, SCHEMA, "verdict", params, **more), read_verdict)


@pytest.fixture
def make_question() -> Callable[..., Question[dict[str, Any]]]:
    """``make_question("a", "text [[500:2]]")``: one question."""
    return question


@pytest.fixture
def ask_for() -> Callable[..., list[Question[dict[str, Any]]]]:
    """``ask_for(10)``: so many questions."""
    return lambda n, text="Is {} right?", start=0: [question(f"q{i}", text.format(i)) for i in range(start, start + n)]
