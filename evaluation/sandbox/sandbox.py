"""Programs that nobody has read, run so that they can neither harm nor cheat.

Two levels. ``namespaces`` (the default, Linux): own user, process, network, mount and IPC namespaces, a root that holds
the system's programs read-only and one small writable folder, no rights, a system call filter, limits on memory,
processor time, files and processes; everything inside ends with its first process. ``limits`` (weaker, only for who
asks for it by name): resource limits and a temporary folder; the network and the user's files stay in reach. What a
machine offers is tried out before the first run, by a program that attempts what must fail (``checks.py``).

Expected results never enter the sandbox: what comes out is data, compared here.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neureasoner.errors import UserError

LEVELS = ("namespaces", "limits")
NEEDED = {  # what must hold at a level, in the words of checks.py
    "namespaces": (
        "network",
        "files outside",
        "writing outside",
        "processes outside",
        "user",
        "new rights",
        "environment",
        "descriptors",
        "memory",
        "disk",
        "process number",
        "system calls",  # without which memory could be had that no limit counts
    ),
    "limits": ("environment", "descriptors", "memory"),
}
_HOW = (
    "Full containment needs Linux 5.12 or newer with user namespaces: as a user, `sysctl -w "
    "kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu) or `kernel.unprivileged_userns_clone=1` (Debian); in a "
    "Docker container, `docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined`; on macOS "
    "and Windows, run inside such a container. Whoever trusts the code can accept the level 'limits' (environment "
    "variable NEUREASONER_SANDBOX=limits), which leaves the network and the user's files in reach"
)
_OURS = os.path.realpath(str(getattr(sys, "_base_executable", sys.executable)))  # not the virtual environment's
_GRACE = 20.0  # seconds for starting and clearing up, beyond the program's own
_FOLDER = Path(__file__).resolve().parent
_known: dict[tuple[str, str], Containment | Unsafe] = {}
_lock = threading.Lock()


class Unsafe(UserError):
    """This machine does not offer the containment that was asked for."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one run. Bytes and seconds; ``processes`` counts threads too."""

    cpu_seconds: float = 10.0
    wall_seconds: float = 30.0
    memory: int = 1 << 30
    output: int = 16 << 20
    file_size: int = 16 << 20
    disk: int = 64 << 20
    inodes: int = 2048
    open_files: int = 64
    processes: int = 32

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if value <= 0:
                raise UserError(f"limit '{key}' must be above 0, got {value}")


@dataclass(frozen=True)
class Containment:
    """What holds here: the level, whose rights the program has outside, and every attempt that was seen to fail."""

    level: str
    user: str
    held: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.level}; {self.user}; held: {', '.join(self.held)}"


@dataclass(frozen=True)
class Run:
    """How a program ended.

    ``status``: finished (exit code 0), crashed (any other end of its own), timeout, memory, output, processes.
    ``value``: JSON text that a called function's result became; None if there is none.
    """

    status: str
    code: int | None
    stdout: bytes
    stderr: bytes
    value: bytes | None
    seconds: float
    cpu_seconds: float
    memory: int
    level: str


class Sandbox:
    """Runs Python programs under containment.

    Usage::

        box = Sandbox()
        print(box.containment)
        run = box.run("print(int(input()) + 1)", stdin="41")
        run = box.call("def f(x): return x * 2", "f", [21])      # run.value == b"42"

    ``accept`` is the weakest level that will do; ``python`` another interpreter than ours. Raises ``Unsafe`` where the
    level cannot be had, with how to get it. Safe to use from several threads.
    """

    def __init__(self, accept: str = "namespaces", limits: Limits | None = None, python: str | Path | None = None):
        if accept not in LEVELS:
            raise UserError(f"unknown containment '{accept}'; known: {', '.join(LEVELS)}")
        self.limits = limits or Limits()
        self.python = os.path.realpath(python or _OURS)
        if not os.access(self.python, os.X_OK):
            raise UserError(f"{self.python}: not a Python interpreter that can be run")
        self.containment = self._offered(accept)

    def _offered(self, accept: str) -> Containment:
        failures = []
        for level in LEVELS[: LEVELS.index(accept) + 1]:
            with _lock:
                if (self.python, level) not in _known:
                    _known[self.python, level] = probe(self.python, level)
                found = _known[self.python, level]
            if isinstance(found, Containment):
                return found
            failures.append(f"{level}: {found}")
        raise Unsafe(f"no sandbox for programs that a model wrote ({'; '.join(failures)}). {_HOW}")

    def run(self, source: str, stdin: str = "", limits: Limits | None = None) -> Run:
        """Run a program with ``stdin`` as its input."""
        return execute(self.python, self.containment.level, source, stdin, None, limits or self.limits)

    def call(self, source: str, function: str, arguments: Sequence[Any], limits: Limits | None = None) -> Run:
        """Call ``function`` (of ``Solution``, if the program has such a class) with JSON-able arguments."""
        task = {"function": function, "arguments": list(arguments)}
        return execute(self.python, self.containment.level, source, "", task, limits or self.limits)


def probe(python: str, level: str) -> Containment | Unsafe:
    """Try the level out: what does a program get that attempts everything?"""
    if level == "namespaces" and sys.platform != "linux":
        return Unsafe(f"{sys.platform} has no namespaces")
    if os.name != "posix":
        return Unsafe(f"{os.name} has no resource limits")
    limits = Limits(20, 60, memory=256 << 20, disk=4 << 20, file_size=1 << 20, inodes=64, processes=12)
    with socket.socket() as listener, tempfile.NamedTemporaryFile() as outside:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.chmod(outside.name, 0o644)
        asked = {**asdict(limits), "port": listener.getsockname()[1], "file": outside.name}
        program = (_FOLDER / "checks.py").read_text(encoding="utf-8")
        try:
            run = execute(python, level, program, json.dumps(asked), None, limits)
        except Unsafe as e:
            return e
    try:
        held = json.loads(run.stdout)
    except ValueError:
        last = run.stderr.decode(errors="replace").strip().splitlines() or [run.status]
        return Unsafe(f"{python} did not run the check program ({last[-1]})")
    missing = [name for name in NEEDED[level] if not held.get(name)]
    if missing:
        return Unsafe(f"the check program got through: {', '.join(missing)}")
    who = _user(level)
    return Containment(level, who, tuple(name for name, ok in held.items() if ok))


def _user(level: str) -> str:
    root = os.geteuid() == 0
    return "as another user (nobody)" if root else "as the same user" + (", without rights" * (level == "namespaces"))


def execute(python: str, level: str, source: str, stdin: str, task: Mapping[str, Any] | None, limits: Limits) -> Run:
    """One run in a launcher of its own. Raises Unsafe where the containment cannot be built."""
    files = {
        "driver.py": (_FOLDER / "driver.py").read_text(encoding="utf-8"),
        "main.py": source,
        "task.json": json.dumps(task),
    }
    job: dict[str, Any] = {"level": level, "python": python, "limits": asdict(limits), "files": files}
    job["prefixes"] = [] if python.startswith("/usr/") else [str(Path(python).parent.parent)]
    with tempfile.TemporaryDirectory(prefix="neureasoner-") as folder:
        (Path(folder) / "stdin").write_bytes(stdin.encode("utf-8", "surrogatepass"))
        if level == "limits":
            job["folder"] = folder
            _write_program(Path(folder), files)
        (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        streams, report = _run_job(folder, limits)
    if report.get("end") == "unavailable":
        raise Unsafe(str(report.get("why")))
    return _ended(streams, report, level, limits)


def _write_program(folder: Path, files: Mapping[str, str]) -> None:
    folder.chmod(0o755)
    for name in ("program", "work"):
        (folder / name).mkdir()
    for name, text in files.items():
        (folder / "program" / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    if os.geteuid() == 0:
        shutil.chown(folder / "work", 65534, 65534)


def _run_job(folder: str, limits: Limits) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Start the launcher, gather what comes out (each stream up to its cap), stop it when it goes too far."""
    pairs = {name: os.pipe() for name in ("report", "value", "control")}
    with open(f"{folder}/stdin", "rb") as stdin, open(f"{folder}/job.json", "rb") as job:
        given = (job.fileno(), pairs["report"][1], pairs["value"][1], pairs["control"][0])
        process = subprocess.Popen(
            [_OURS, "-I", "-S", "-B", str(_FOLDER / "launcher.py"), *map(str, given)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=given,
            env={},
            cwd="/",
            start_new_session=True,
        )
    for name, end in (("report", 1), ("value", 1), ("control", 0)):
        os.close(pairs[name][end])
    assert process.stdout and process.stderr
    sources = {
        process.stdout.fileno(): "stdout",
        process.stderr.fileno(): "stderr",
        pairs["report"][0]: "report",
        pairs["value"][0]: "value",
    }
    held = {name: bytearray() for name in sources.values()}
    control, over = pairs["control"][1], ""
    deadline = time.monotonic() + limits.wall_seconds + _GRACE
    try:
        with selectors.DefaultSelector() as selector:
            for fd in sources:
                selector.register(fd, selectors.EVENT_READ)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fd)
                        continue
                    stream = held[sources[key.fd]]
                    stream += data[: limits.output + 1 - len(stream)]
                    if len(stream) > limits.output and not over:
                        over = "output"
                        os.close(control)  # the launcher ends it
                        deadline = time.monotonic() + _GRACE
    finally:
        if not over:
            os.close(control)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        os.close(pairs["report"][0])
        os.close(pairs["value"][0])
    try:
        report = json.loads(bytes(held["report"]))
    except ValueError:  # the supervisor itself was killed, by the kernel say
        report = {"end": "memory", "code": None}
    return {k: bytes(v) for k, v in held.items()}, {**report, **({"end": over} if over else {})}


def _ended(streams: Mapping[str, bytes], report: Mapping[str, Any], level: str, limits: Limits) -> Run:
    code, cpu = report.get("code"), float(report.get("cpu") or 0.0)
    status = str(report["end"])
    if status == "stopped":  # by us, at the deadline
        status = "timeout"
    elif status == "exit":
        status = "finished" if code == 0 else "crashed"
        # the kernel counts ticks where it enforces, so what it reports may fall a little short of the limit
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= 0.9 * limits.cpu_seconds):
            status = "timeout"
        elif code and b"MemoryError" in streams["stderr"][-400:]:
            status = "memory"
    return Run(
        status=status,
        code=code,
        stdout=streams["stdout"],
        stderr=streams["stderr"][-65536:],
        value=streams["value"] or None,
        seconds=float(report.get("seconds") or 0.0),
        cpu_seconds=cpu,
        memory=int(report.get("memory") or 0),
        level=level,
    )
