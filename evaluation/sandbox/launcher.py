"""The process between us and a hostile program: builds its cage, starts it, watches it, says how it ended.

Started by ``sandbox.Sandbox`` as a script in a fresh process (so nothing of ours is forked): descriptor ``argv[1]``
holds the job as JSON, ``argv[2]`` takes the report, ``argv[3]`` is where a called function's result goes out, and when
``argv[4]`` is closed at its other end (we gave up, or died) all is over. The program gets this process's stdin, stdout
and stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import contain

_TICK = 0.02  # seconds between two looks at memory and processes
_MEMORY = ("RssAnon", "RssShmem", "VmSwap", "HugetlbPages")  # what can be written to and no file backs
RESULT = 3  # the descriptor the program finds for its result


def _limits(limits: dict[str, Any], shared_user: bool) -> None:
    seconds = max(1, int(limits["cpu_seconds"] + 0.999))
    wanted = {
        "RLIMIT_AS": limits["memory"],
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": limits["file_size"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_STACK": 64 << 20,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    if not shared_user:  # it counts all processes of a user, those outside too
        wanted["RLIMIT_NPROC"] = limits["processes"]
    for name, value in wanted.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            above = value + 1 if name == "RLIMIT_CPU" and hard == resource.RLIM_INFINITY else value
            resource.setrlimit(kind, (value, above))


def _start(job: dict[str, Any], out: int, folder: str, work: str, caged: bool) -> int:
    """Fork the program. -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(work)
        os.umask(0o077)
        shared = not caged and os.geteuid() != 0
        contain.become_nobody()
        _limits(job["limits"], shared)
        if caged:
            contain.drop_rights()
            contain.filter_calls()
        os.dup2(out, RESULT) if out != RESULT else os.set_inheritable(RESULT, True)
        os.closerange(RESULT + 1, job["limits"]["open_files"])
        env = {"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8"}
        os.execve(job["python"], [job["python"], "-I", "-B", f"{folder}/driver.py", folder], env)
    except BaseException as e:
        os.write(2, f"sandbox: the program could not be started: {e}\n".encode())
    finally:
        os._exit(125)


def _anonymous(processes: int) -> tuple[int, int]:
    """(bytes of memory that no file backs, number of tasks) of all processes of a ``/proc``."""
    total = tasks = 0
    for name in os.listdir(processes):
        if not name.isdigit() or name == "1":
            continue
        with contextlib.suppress(OSError):
            status = _status(processes, name)
            tasks += status.get("Threads", 0)
            if "RssAnon" not in status:  # its first thread has ended; any other one knows
                for thread in _names(processes, f"{name}/task"):
                    with contextlib.suppress(OSError):
                        status |= _status(processes, f"{name}/task/{thread}")
            total += sum(status.get(key, 0) for key in _MEMORY) << 10
    return total, tasks


def _status(processes: int, task: str) -> dict[str, int]:
    """Numbers of a task's ``status``: threads, and kibibytes of memory where it has any."""
    fd = os.open(f"{task}/status", os.O_RDONLY, dir_fd=processes)
    try:
        lines = os.read(fd, 8192).decode("ascii", "replace").splitlines()
    finally:
        os.close(fd)
    pairs = (line.split()[:2] for line in lines if line.startswith(("Threads:", *(f"{key}:" for key in _MEMORY))))
    return {key.rstrip(":"): int(value) for key, value in pairs}


def _names(processes: int, folder: str) -> list[str]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=processes)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def _watch(pid: int, limits: dict[str, Any], control: int, processes: int | None) -> dict[str, Any]:
    """As ``_wait``. An error now is the program's doing: it has failed, which says nothing of this machine."""
    try:
        return _wait(pid, limits, control, processes)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.write(2, f"sandbox: the program could not be watched: {e}\n".encode())
        return {"end": "crashed", "code": None}


def _wait(pid: int, limits: dict[str, Any], control: int, processes: int | None) -> dict[str, Any]:
    """Wait for the program to end by itself, to go too far, or to be given up. -> the report. Kills nothing."""
    begin, peak = time.monotonic(), 0
    news = [control, *([os.pidfd_open(pid)] if hasattr(os, "pidfd_open") else [])]
    while True:
        done, status, usage = os.wait4(-1, os.WNOHANG)
        if done == pid:
            peak = max(peak, usage.ru_maxrss << (10 if sys.platform == "linux" else 0))
            cpu, code = usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)
            return {"end": "exit", "code": code, "cpu": cpu, "seconds": time.monotonic() - begin, "memory": peak}
        if done:
            continue
        used, tasks = _anonymous(processes) if processes is not None else (0, 0)
        peak = max(peak, used)
        ended = ""
        if used > limits["memory"]:
            ended = "memory"
        elif tasks > 2 * limits["processes"]:
            ended = "processes"
        elif time.monotonic() - begin > limits["wall_seconds"]:
            ended = "timeout"
        elif control in select.select(news, [], [], _TICK)[0]:
            ended = "stopped"
        if ended:
            return {"end": ended, "code": None, "cpu": 0.0, "seconds": time.monotonic() - begin, "memory": peak}


def _caged(job: dict[str, Any], report: int, out: int, control: int) -> None:
    """Full containment: the first process of new namespaces starts the program and ends with it."""
    who = contain.enter_namespaces()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    try:
        contain.guard_supervisor()
        processes = contain.build_root(job["prefixes"], job["files"], job["limits"]["disk"], job["limits"]["inodes"])
        program = _start(job, out, contain.PROGRAM, contain.WORK, caged=True)
        os.write(report, json.dumps({**_watch(program, job["limits"], control, processes), "user": who}).encode())
    except (contain.Unavailable, OSError) as e:
        os.write(report, json.dumps({"end": "unavailable", "why": str(e)}).encode())
    finally:
        os._exit(0)  # and with it every process of the namespace


def _limited(job: dict[str, Any], report: int, out: int, control: int) -> None:
    """The weaker level: limits, another user for root, a temporary folder. Network and file system stay in reach."""
    contain.adopt_orphans()
    pid = _start(job, out, job["folder"] + "/program", job["folder"] + "/work", caged=False)
    found = _watch(pid, job["limits"], control, None)
    os.write(report, json.dumps({**found, "user": "nobody" if os.geteuid() == 0 else "own user"}).encode())
    for _ in range(100):  # what it started: its session, and on Linux whatever was handed to us
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as f:
            return [int(n) for n in f.read().split()]
    except OSError:
        return []


def main() -> None:
    """Run one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a program of the same user could send
    with os.fdopen(int(sys.argv[1]), encoding="utf-8", errors="surrogatepass") as f:
        job = json.load(f)
    report, out, control = map(int, sys.argv[2:5])
    for descriptor in (report, out, control):
        os.set_inheritable(descriptor, False)
    try:
        (_caged if job["level"] == "namespaces" else _limited)(job, report, out, control)
    except (contain.Unavailable, OSError) as e:
        os.write(report, json.dumps({"end": "unavailable", "why": str(e)}).encode())


if __name__ == "__main__":
    main()
