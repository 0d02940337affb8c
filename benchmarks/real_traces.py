"""A dataset job over real long traces: imported, judged, rewritten; killed again and again, and compared with one that
was not.

    .venv/bin/python benchmarks/real_traces.py --traces skyt1_math500.jsonl.gz --benchmarks aime24.jsonl,gsm8k.jsonl \\
        --rows 200 --kills 5 --out runs/real

``--traces`` is any file that ``neureasoner data import`` reads. The endpoint is the tests' own server, a process that
answers mechanically (``tests/data_builders/endpoint/author.py``) and breaks a rule in every eleventh answer: traces,
HTTP, checks and kills are real, what the answers say is not, so nothing here tells how good a judge is.
Every command is a process of its own; a killed one gets SIGKILL after a random number of calls. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SERVER = Path(__file__).parents[1] / "tests" / "data_builders" / "endpoint" / "server.py"
CLI = [sys.executable, "-m", "neureasoner.cli"]


class Server:
    """The tests' server with its log of calls."""

    def __init__(self, log: Path):
        self.log = log
        log.unlink(missing_ok=True)
        command = [sys.executable, str(SERVER), "--author", "--latency", "0.1", "--log", str(log)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().split()[-1]}/v1"

    def rows(self, event: str) -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        rows = (json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}"))
        return [row for row in rows if row["event"] == event]


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OPENAI_API_KEY": "sk-nothing-0123456789"}
    return subprocess.Popen([*CLI, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def once(arguments: Sequence[str]) -> float:
    """Run a command to its end. Returns seconds."""
    begin = time.monotonic()
    if start(arguments).wait():
        sys.exit(f"failed: neureasoner {' '.join(arguments)}")
    return time.monotonic() - begin


def killed(arguments: Sequence[str], server: Server, kills: int, calls: int, rng: random.Random) -> int:
    """Run a command, kill it ``kills`` times at random places of its ``calls`` calls, and let it end."""
    done = 0
    for _ in range(kills):
        process, begun = start(arguments), len(server.rows("call"))
        until = begun + rng.randrange(1, max(2, 2 * calls // (kills + 1)))
        while process.poll() is None and len(server.rows("call")) < until:
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
    once(arguments)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", required=True)
    parser.add_argument("--benchmarks", default="", help="comma-separated files the questions must not occur in")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/real_traces"))
    options = parser.parse_args()
    out, rng = options.out, random.Random(options.seed)
    out.mkdir(parents=True, exist_ok=True)

    imported = ["data", "import", "--input", options.traces, "--select", "correct", "--out", str(out / "import")]
    imported += ["--benchmarks", options.benchmarks] if options.benchmarks else []
    table: list[tuple[str, str]] = [("import", f"{once(imported):.1f} s")]
    summary = json.loads((out / "import" / "summary.json").read_text())
    table.append(("read, kept, removed", f"{summary['read']}, {summary['kept']}, {summary['removed']}"))
    references = out / "references.jsonl"
    with (out / "import" / "references.jsonl").open() as f:
        references.write_text("".join(line for _, line in zip(range(options.rows), f)))  # noqa: B905

    made: dict[str, dict[str, bytes]] = {}
    for mode in ("whole", "cut"):
        for job, what in (
            ("judge", ["--judge", "llm", "--tokenizer", "tiny"]),
            ("reconstruct", ["--rewriter", "llm", "--intra", "0.6", "--inter", "0.6"]),
        ):
            server, folder = Server(out / f"{job}-{mode}.log"), out / f"{job}-{mode}"
            endpoint = f"model=paper,base_url={server.url},backoff=0.02,concurrency=16,ledger={folder}.sqlite"
            arguments = ["data", job, "--references", str(references), *what, "--endpoint", endpoint]
            arguments += ["--out", str(folder)]
            try:
                if mode == "whole":
                    seconds = once(arguments)
                    bill = json.loads((folder / "summary.json").read_text())["bill"]
                    table.append((f"{job}: calls, seconds", f"{bill['calls']}, {seconds:.1f}"))
                    made[job] = {}
                else:
                    calls = len([1 for line in (out / f"{job}-whole.log").open() if '"call"' in line])
                    table.append((f"{job}: killed", f"{killed(arguments, server, options.kills, calls, rng)} times"))
                    asked = Counter(row["digest"] for row in server.rows("call"))
                    whole = len({json.loads(x)["digest"] for x in (out / f"{job}-whole.log").open() if '"call"' in x})
                    table.append((f"{job}: requests, of them sent again", f"{len(asked)} ({whole} in the whole run), "
                                  f"{sum(n - 1 for n in asked.values())}"))  # fmt: skip
                name = "traces.jsonl" if job == "judge" else "train.jsonl"
                made[job][mode] = (folder / name).read_bytes()
            finally:
                server.process.kill()
    for job, files in made.items():
        table.append((f"{job}: the killed job's file", "identical" if files["whole"] == files["cut"] else "DIFFERENT"))
    judged = json.loads((out / "judge-whole" / "summary.json").read_text())
    table += [(f"judge: {k}", str(v)) for k, v in judged["counts"].items()]
    rewritten = json.loads((out / "reconstruct-whole" / "summary.json").read_text())
    table += [("reconstruct: rows", str(rewritten["levels"])), ("reconstruct: rejected", str(rewritten["rejected"]))]
    table += [(f"reconstruct, rejected: {k}", str(v)) for k, v in rewritten["rejected_reasons"].items()]
    print("| | |\n|---|---|")
    for name, value in table:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
