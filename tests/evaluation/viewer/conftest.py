"""A real browser without a driver package, and an evaluation to look at in it.

Chromium is driven by its own protocol over a pipe: JSON messages ended by NUL, on descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neureasoner.artifacts import fingerprint, write_json, write_tensors, write_text
from neureasoner.evaluation.config import EvaluateConfig
from neureasoner.evaluation.report import write_report
from neureasoner.evaluation.results import build
from neureasoner.evaluation.runner import outcomes
from neureasoner.evaluation.viewer.details import COLUMNS, FREQUENCIES
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Step, Trace

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")


class Browser:
    """One page in a headless Chromium. ``problems`` collects exceptions, console errors and requests that left."""

    def __init__(self, program: str, profile: Path):
        commands, replies = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands[0], replies[1])]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]

        def take_their_ends() -> None:
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        self.process = subprocess.Popen(
            [program, *flags],
            preexec_fn=take_their_ends,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (commands[0], replies[1], *theirs):
            os.close(fd)
        self._out, self._in, self._rest, self._id = commands[1], replies[0], b"", 0
        self.problems: list[str] = []
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if getattr(self, "_session", ""):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def _read(self, wait: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], wait)[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has gone")
            self._rest += piece
        raw, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(raw)
        self._note(message)
        return dict(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method", ""), message.get("params", {})
        self.events.append({"method": method, "params": params})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(str(details.get("exception", {}).get("description", details["text"])))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(f"request to {params['request']['url']}")
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, path: Path, ready: str = "document.querySelectorAll('.side').length > 0") -> None:
        """Load a file and wait until the viewer stands."""
        self.events.clear()
        self.problems.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.until(f"document.readyState === 'complete' && ({ready})")

    def until(self, condition: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not self.js(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}; {self.problems}")
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def key(self, key: str) -> None:
        """Press one key, as a person would."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        x, y = self.js(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def pdf(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))

    def first_paint(self) -> float:
        """Milliseconds from the start of the navigation to the first paint with content."""
        self.until("performance.getEntriesByName('first-contentful-paint').length > 0")
        return float(self.js("performance.getEntriesByName('first-contentful-paint')[0].startTime"))

    def close(self) -> None:
        os.close(self._out)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: Any) -> Iterator[Browser]:
    """A headless Chromium: the one that CHROMIUM names, or one on the path."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not program:
        pytest.skip(f"no browser here: install chromium, or name one in CHROMIUM (looked for {', '.join(NAMES)})")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!-- <a href=\"javascript:"
    'window.hacked=1">go</a> ]]> " \' ` ${window.hacked=1} {{data}} \\u003cb\\u003e \\ \u2028 \u2029 \x00 '
    "\x1b[2J\x1b]0;owned\x07"
    " \ud800 \U0001f9e0 <svg onload=window.hacked=1> <iframe srcdoc='<script>top.hacked=1</script>'> &lt;b&gt;"
)
LONG, PROBLEMS = 16_000, 100


def _trace(i: int, arm: str) -> Trace:
    """Problem i in an arm. 0 is long, 7 hostile; every fifth has a wrong step (the second), and emoji before it."""
    full, long = arm == "full", i == 0
    count = 700 if long else 4
    words = "x " * (40 if long else 3)
    paragraphs = [f"\U0001f9e0 {k}: {words}\n\n" for k in range(count)]
    wrong = (40 if long else 1) if i % 5 == 0 else None
    if wrong is not None:
        paragraphs[wrong] = "\U0001f9e0 so 1 + 1 = 3.\n\n"
    act = {0: "intra"}.get(i, "instance" if i % 4 == 0 else "intra" if i % 10 in (1, 5) else "") if full else ""
    after = 40 if long else 1
    if act:
        paragraphs[after + 1] = "<INTRA>\n" + paragraphs[after + 1]
    if i == 7:
        paragraphs[2] = HOSTILE + "\n\n"
    tokens, per = (LONG, 22) if long else (40, 8)
    starts = [sum(map(len, paragraphs[:k])) for k in range(count + 1)]
    steps = [Step(starts[k], starts[k + 1], k * per, (k + 1) * per) for k in range(count)]
    right = long or i % 2 == 0 if full else not long and i % 3 == 0
    scored = [{"step": k, "token": (k + 1) * per, "rule": "intra", "score": (k % 7) / 10} for k in range(count)]
    event = {"step": after, "token": steps[after].token_end, "rule": act, "score": 0.9, "threshold": 0.65}
    begin = starts[after + 1]
    span = (starts[wrong] + 5, starts[wrong] + 14) if wrong is not None else None
    name = HOSTILE if i == 7 else f"p{i}"
    return Trace(
        f"{name}#0",
        Problem(name, ("arithmetic", "words")[i % 2], 1 + i % 3, HOSTILE if i == 7 else f"Question {i}?", "2"),
        [1],
        list(range(tokens)),
        "".join(paragraphs) + "</think>\n\nIt is \\boxed{2}.",
        steps,
        True,
        Labels(
            right,
            HOSTILE if i == 7 else "2",
            IntraLabel(wrong is not None, "1 + 1 = 3", "calculation", "it is 2", span, wrong),
            InterLabel(),
        ),
        [event | {"action": "<INTRA>", "suppressed": False}] if act else [],
        {
            "arm": arm,
            "sample": 0,
            "scores": scored if full else [],
            "forced": [steps[after].token_end] if act else [],
            "forced_chars": [[begin, begin + 7]] if act else [],
        },
    )


def _details(folder: Path, traces: dict[str, list[Trace]]) -> None:
    """A details file of made-up neurons: two levels, 5 and 3 channels."""
    rng, channels = np.random.default_rng(0), {"intra": 5, "inter": 3}
    entries, heat, spectra, column, step = {}, {k: [] for k in channels}, {k: [] for k in channels}, 0, 0
    for arm, rows in traces.items():
        for t in rows:
            per = -(-len(t.response_ids) // COLUMNS)
            size = -(-len(t.response_ids) // per)
            for level, n in channels.items():
                heat[level].append(rng.integers(0, 256, (size, n), dtype=np.uint8))
                spectra[level].append(rng.dirichlet(np.ones(24), len(t.steps)).astype(np.float16))
            scores = [] if arm == "full" else [["intra", 0, 8, 0.25], ["intra", 1, 16, 0.5]]
            places = {"columns": [column, column + size], "steps": [step, step + len(t.steps)]}
            entries[f"{arm}/{t.id}"] = {"tokens": fingerprint(t.response_ids), "per": per, "scores": scores, **places}
            column, step = column + size, step + len(t.steps)
    tensors = {}
    for level, n in channels.items():
        tensors[f"{level}.heat"] = torch.from_numpy(np.concatenate(heat[level]))
        tensors[f"{level}.spectrum"] = torch.from_numpy(np.concatenate(spectra[level]))
        tensors[f"{level}.scale"] = torch.ones(n)
    meta = {"sites": {"intra": "neuron:3[0,1,2,3,4]", "inter": "head:3[0,1,2]"}, "traces": entries}
    meta |= {"frequencies": FREQUENCIES.tolist(), "thresholds": {"intra": 0.65}}
    write_tensors(folder / "details.safetensors", tensors, meta)


@pytest.fixture(scope="session")
def traces() -> dict[str, list[Trace]]:
    """200 traces: two arms of 100 problems, one pair of 16,000 tokens, one hostile."""
    return {arm: [_trace(i, arm) for i in range(PROBLEMS)] for arm in ("vanilla", "full")}


@pytest.fixture(scope="session")
def run(tmp_path_factory: Any, traces: dict[str, list[Trace]]) -> Path:
    """The folder of an evaluation that gave these traces, with details, and its report."""
    folder = tmp_path_factory.mktemp("run")
    for arm, rows in traces.items():  # escaped, so that half a surrogate pair survives as in a file of another program
        text = "".join(json.dumps(asdict(t)) + "\n" for t in rows)
        write_text(folder / "traces" / f"{arm}.jsonl", text)
    problems = [t.problem for t in traces["vanilla"]]
    write_text(folder / "problems.jsonl", "".join(json.dumps(asdict(p)) + "\n" for p in problems))
    config = EvaluateConfig("model", str(folder / "problems.jsonl"), str(folder), resamples=50)
    results = build(config, "base", problems, {k: outcomes(v, LONG) for k, v in traces.items()}, {}, {})
    write_json(folder / "results.json", results)
    _details(folder, traces)
    write_report(folder, 200)
    return folder
