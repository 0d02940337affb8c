"""The key is in the environment and in the Authorization header, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("job.py")
CANARY = "sk-canary-0123456789abcdef"


@pytest.mark.parametrize("marker", ["", "[[401]]", "[[500]]", "[[leak]]", "[[403]]"])
def test_a_canary_key_is_seen_nowhere(marker: str, serve, tmp_path: Path) -> None:
    # the server says the key aloud in its errors, and one model even in its answers
    server = serve("--canary", CANARY)
    folder = tmp_path / "job"
    folder.mkdir()
    command = [sys.executable, str(JOB), server.url, str(folder / "ledger.sqlite"), str(folder / "out.jsonl"), "5"]
    done = subprocess.run(
        [*command, f'marker="{marker}"', "tries=2"],
        env=os.environ | {"TEST_KEY": CANARY, "OPENAI_LOG": "debug"},
        capture_output=True,
        timeout=60,
    )
    assert b"DEBUG" in done.stderr, "the SDK's own log was on"
    assert done.returncode == (2 if marker in ("[[401]]", "[[403]]") else 0), done.stderr[-2000:]
    if marker == "[[401]]":
        assert b"Incorrect API key provided: [key]" in done.stderr
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert any(p.name == "ledger.sqlite" for p in files)
    for what in (done.stdout, done.stderr, *(p.read_bytes() for p in files)):
        assert b"canary" not in what
    if marker == "[[leak]]":
        assert b"[key]" in (folder / "out.jsonl").read_bytes()


def test_the_key_was_really_used(serve, make_config, make_question) -> None:
    """The canary's own witness: a server that refuses says which key it was shown, and ours is scrubbed from that."""
    from neureasoner.data_builders.endpoint.asker import ask_all
    from neureasoner.errors import UserError

    with pytest.raises(UserError, match=r"Incorrect API key provided: \[key\]"):
        list(ask_all([make_question("a", "[[401]]")], make_config(serve())))
