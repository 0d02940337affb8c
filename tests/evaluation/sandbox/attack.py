"""Runs hostile programs and hands their runs out as JSON: a process of its own, so that it can be another user's.

Standard input: ``{"jobs": [{"name", "source", "call"}], "limits": {...}}``. Imports the sandbox
from the folder in ``argv[1]``, without the packages of any environment.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

sys.path.insert(0, sys.argv[1])
from neureasoner.evaluation.sandbox import Limits, Sandbox, Unsafe


def main() -> None:
    """Several at a time."""
    asked = json.load(sys.stdin)
    try:
        box = Sandbox(limits=Limits(**asked["limits"]))
    except Unsafe as e:
        print(json.dumps({"unsafe": str(e)}))
        return

    def attack(job: dict[str, Any]) -> dict[str, Any]:
        begin = time.monotonic()
        try:
            run = box.call(job["source"], "f", [41]) if job["call"] else box.run(job["source"], "41")
        except Unsafe as e:
            return {"name": job["name"], "unsafe": str(e)}
        coded = {k: base64.b64encode(v).decode() for k, v in asdict(run).items() if isinstance(v, bytes)}
        return {"name": job["name"], "run": asdict(run) | coded, "took": time.monotonic() - begin}

    with ThreadPoolExecutor(6) as pool:
        print(json.dumps({"runs": list(pool.map(attack, asked["jobs"]))}))


if __name__ == "__main__":
    main()
