"""How well an endpoint is used: the share of a granted limit, rejections, and what a question costs on this side.

    .venv/bin/python benchmarks/endpoint.py

Starts the tests' server as a process of its own and asks it over HTTP: 2,000 requests against each kind of limit, 2,000
without a limit, and 200,000 questions that the ledger answers. Writes ``benchmarks/endpoint.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neureasoner.artifacts import write_text
from neureasoner.data_builders.endpoint.asker import ask_all
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.ledger import Ledger
from neureasoner.data_builders.endpoint.requests import Answer, Message, Question, Request, Usage
from neureasoner.data_builders.endpoint.tally import Tally

ROOT = Path(__file__).parents[1]
SERVER = ROOT / "tests" / "data_builders" / "endpoint" / "server.py"
LIMITS = {
    "requests, a bucket": ["requests:240/10"],
    "requests, a window": ["requests:250/10/window"],
    "tokens, a bucket": ["requests:1000/10", "tokens:27000/10"],
}


def questions(n: int, config: EndpointConfig) -> Iterator[Question[Any]]:
    """Short questions, so that the endpoint and not the text is measured."""
    for i in range(n):
        messages = (Message("user", f"Is {i} right?"),)
        yield Question(str(i), Request("tiny", messages, None, "", config.params()), json.loads)


def against(limits: list[str], n: int, folder: Path) -> dict[str, Any]:
    """Ask ``n`` questions of a server with ``limits``; the figures are from the server's log."""
    folder.mkdir()
    log = folder / "log.jsonl"
    options = [x for limit in limits for x in ("--limit", limit)]
    command = [sys.executable, str(SERVER), "--log", str(log), "--latency", "0.1", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        config = EndpointConfig("tiny", base_url=url, max_tokens=100, concurrency=64, ledger=str(folder / "ledger"))
        tally, begin = Tally(), time.monotonic()
        failed = sum(o.value is None for o in ask_all(questions(n, config), config, tally=tally))
        took = time.monotonic() - begin
    finally:
        server.kill()
        server.wait()
    calls = [row for row in map(json.loads, log.read_text().splitlines()) if row["event"] == "call"]
    # the window that was open when the last call went was not meant to be used up; it is left out
    end = calls[-1]["budgets"]
    windows = any(limit.endswith("window") for limit in limits)
    last = [row for row in calls if windows and row["budgets"]["requests"][1] < end["requests"][1]] or calls
    used = max((u / g for u, g in last[-1]["budgets"].values()), default=None)
    rejected = sum(row["status"] == 429 for row in calls)
    return {"seconds": took, "rejected": rejected, "calls": len(calls), "used": used, "failed": failed}


def replay(n: int, folder: Path) -> dict[str, float]:
    """Questions that are all answered in the ledger: what one of them costs, and the memory at its highest."""
    config = EndpointConfig("tiny", base_url="http://127.0.0.1:9/v1", max_tokens=100, ledger=str(folder / "replay"))
    ledger, answer = Ledger(config.ledger), Answer(json.dumps({"why": "x" * 500}), usage=Usage(10, 150))
    with ledger.transaction():
        for q in questions(n, config):
            ledger.put(q.request.key, "tiny", answer)
    ledger.close()
    begin = time.monotonic()
    assert sum(1 for _ in ask_all(questions(n, config), config)) == n
    took = time.monotonic() - begin
    return {"rate": n / took, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="requests against each limit")
    parser.add_argument("--replay", type=int, default=200_000, help="questions answered by the ledger")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "endpoint.md"))
    args = parser.parse_args()
    lines = [
        "# Asking an endpoint",
        "",
        "`.venv/bin/python benchmarks/endpoint.py` on "
        f"{os.cpu_count()} cores, Python {platform.python_version()}; load average before the run "
        f"{os.getloadavg()[0]:.1f}. The server is a process on the same machine; all figures of the first table are "
        "from its own log.",
        "",
        f"| {args.n:,} requests | granted limit | share used | rejected (429) | seconds |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory = replay(args.replay, folder)
        for i, (kind, limits) in enumerate({**LIMITS, "no limit": []}.items()):
            r = against(limits, args.n, folder / str(i))
            print(kind, r, flush=True)
            assert not r["failed"]
            share = "–" if r["used"] is None else f"{100 * r['used']:.1f} %"
            limit = limits[-1].split(":")[1].replace("/window", "").replace("/", " in ") + " s" if limits else "–"
            rejected = f"{r['rejected']} ({100 * r['rejected'] / r['calls']:.2f} %)"
            lines.append(f"| {kind} | {limit} | {share} | {rejected} | {r['seconds']:.1f} |")
    lines += [
        "",
        "A share is what was used of what the server granted from the first call to the last, the burst that a full "
        "bucket allows included (of windows: up to the end of the last whole one).",
        "",
        f"Answered by the ledger: {args.replay:,} questions at {memory['rate']:,.0f} a second, "
        f"{memory['mib']:.0f} MiB of memory at most.",
    ]
    write_text(args.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
