"""A small job, to be run as a process of its own and killed: asks, and writes its outcomes.

    python job.py URL LEDGER OUT N [key=value …]

``batch=1`` uses batches first. The output is written whole at the end; the exit status is 2 for a message to the user.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from neureasoner.artifacts import write_text
from neureasoner.data_builders.endpoint.asker import ask_all
from neureasoner.data_builders.endpoint.batches import run_batches
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.requests import Malformed, Message, Question, Request
from neureasoner.errors import UserError

SCHEMA = {"type": "object", "properties": {"verdict": {"enum": ["good", "bad"]}}}


def read(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        raise Malformed("it is not JSON") from None
    if value.get("verdict") not in ("good", "bad"):
        raise Malformed("'verdict' must be good or bad")
    return value


def main() -> int:
    url, ledger, out, n, *more = sys.argv[1:]
    settings: dict[str, Any] = {k: json.loads(v) for k, _, v in (m.partition("=") for m in more)}
    batch, marker, start = settings.pop("batch", 0), settings.pop("marker", ""), settings.pop("start", 0)
    poll = settings.pop("poll", 0.05)
    config = EndpointConfig(
        model="tiny", base_url=url, ledger=ledger, key_env="TEST_KEY", max_tokens=100, backoff=0.02, **settings
    )

    def questions() -> Any:
        for i in range(start, start + int(n)):
            messages = (Message("user", f"Is {i} right? {marker}"),)
            yield Question(f"q{i}", Request("tiny", messages, SCHEMA, "verdict", config.params()), read)

    try:
        if batch:
            run_batches(questions, config, poll=poll, max_requests=batch)
        lines = [json.dumps([o.id, o.value, o.problems, o.keys]) for o in ask_all(questions(), config)]
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    write_text(Path(out), "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
