"""The sandbox against programs that attack it, and against programs that are right.

Each file in ``hostile/`` attempts one thing; it prints ESCAPED if it gets through. Its first line says how it may end.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from neureasoner.errors import UserError
from neureasoner.evaluation.benchmarks.code import judge
from neureasoner.evaluation.benchmarks.suites import Suite
from neureasoner.evaluation.sandbox import Limits, Run, Sandbox, Unsafe, sandbox

HERE = Path(__file__).parent
HOSTILE = sorted((HERE / "hostile").glob("*.txt"))
CORRECT = sorted((HERE / "correct").glob("*.txt"))
SMALL = Limits(
    cpu_seconds=1.0,
    wall_seconds=3.0,
    memory=256 << 20,
    output=1 << 20,
    file_size=2 << 20,
    disk=8 << 20,
    inodes=128,
    open_files=32,
    processes=12,
)
PATIENT = Limits(cpu_seconds=10.0, wall_seconds=60.0, memory=512 << 20)
PLUS_ONE = Suite((("41", "42"),))
CALL = Suite((("41", "42"),), function="f")
ORDINARY = 54321  # nobody's user number
SCRIPT = ("-B", str(HERE / "attack.py"), str(HERE.parents[2] / ".typecheck"))


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return Sandbox()
    except Unsafe as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What the programs must not reach: a file anybody may write, a listening port, a secret in the environment."""
    canary = tmp_path_factory.mktemp("outside") / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    for folder in canary.parents:
        if folder.owner() == canary.owner() and str(folder).startswith(str(tmp_path_factory.getbasetemp().parent)):
            folder.chmod(folder.stat().st_mode | 0o111)
    os.environ["MY_SECRET_KEY"] = "canary-in-the-environment"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield SimpleNamespace(canary=canary, port=listener.getsockname()[1], listener=listener)
    del os.environ["MY_SECRET_KEY"]


def processes_inside() -> list[int]:
    """Processes of sandboxes that are still there: programs and launchers."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any("driver.py" in part or "sandbox/launcher.py" in part for part in process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


def hostile_run(jobs: list[dict[str, Any]], user: int | None) -> dict[str, Any]:
    """(run, seconds) by name, of programs run by a process of ours or of another user; for an abort its message."""
    python = next(filter(lambda p: can_run(p, user), (sandbox._OURS, "/usr/bin/python3")), None)
    if python is None:
        pytest.skip(f"user {user} has no Python that could run the sandbox from here")
    asked = {"jobs": jobs, "limits": asdict(SMALL)}
    done = subprocess.run([python, *SCRIPT], input=json.dumps(asked), **child(user))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if "unsafe" in said:
        pytest.skip(said["unsafe"])
    found: dict[str, Any] = {}
    for row in said["runs"]:
        if "unsafe" in row:
            found[row["name"]] = row["unsafe"]
            continue
        streams = {k: base64.b64decode(row["run"][k] or "") for k in ("stdout", "stderr", "value")}
        found[row["name"]] = Run(**row["run"] | streams), row["took"]
    return found


def child(user: int | None) -> dict[str, Any]:
    """How a process of a user is started."""
    other = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    return {"capture_output": True, "text": True, "cwd": "/", "timeout": 250, **other}


def can_run(python: str, user: int | None) -> bool:
    code = f"import sys; sys.path.insert(0, {SCRIPT[-1]!r}); import neureasoner.evaluation.sandbox"
    try:
        return subprocess.run([python, "-B", "-c", code], **child(user)).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module", params=["as_we_are", pytest.param("as_an_ordinary_user", marks=pytest.mark.slow)])
def attacks(request: pytest.FixtureRequest, box: Sandbox, outside: SimpleNamespace) -> dict[str, Any]:
    """All hostile programs, run by us and, where we are root, by somebody who is not."""
    user = None if request.param == "as_we_are" else ORDINARY
    if user and os.geteuid() != 0:
        pytest.skip("we are an ordinary user already")
    jobs = []
    for path in HOSTILE:
        source = path.read_text()
        for name, value in (("CANARY", outside.canary), ("PORT", outside.port), ("HOST", os.getpid())):
            source = re.sub(rf"\b{name}\b", str(value), source)
        jobs.append({"name": path.stem, "source": source, "call": "# mode: call" in source})
    return hostile_run(jobs, user)


@pytest.mark.parametrize("name", [p.stem for p in HOSTILE])
def test_a_hostile_program_is_contained_and_wrong(name: str, attacks: dict[str, Any], outside: SimpleNamespace) -> None:
    assert not isinstance(attacks[name], str), f"a program ended the evaluation: {attacks[name]}"
    (run, seconds), text = attacks[name], (HERE / "hostile" / f"{name}.txt").read_text()
    replay = SimpleNamespace(containment=SimpleNamespace(level=run.level), run=lambda *_: run, call=lambda *_: run)
    assert judge(text, CALL if "# mode: call" in text else PLUS_ONE, replay).state != "passed"  # type: ignore[arg-type]
    assert b"ESCAPED" not in run.stdout + run.stderr + (run.value or b"")
    assert b"canary-in-the-environment" not in run.stdout + run.stderr
    first = text.splitlines()[0]
    assert run.status in first.removeprefix("# ends:").split(), (run.status, run.code, run.stderr[-500:])
    assert run.level == "namespaces"
    assert seconds < SMALL.wall_seconds + 20
    assert len(run.stdout) <= SMALL.output + 1
    assert len(run.stderr) <= SMALL.output + 1
    assert outside.canary.read_text() == "alive"
    assert not outside.canary.with_name("canary-pickled").exists()


def test_nothing_is_left_and_nobody_called(attacks: dict[str, Any], outside: SimpleNamespace) -> None:
    assert len(attacks) == len(HOSTILE) >= 30
    deadline = time.monotonic() + 5
    while processes_inside() and time.monotonic() < deadline:  # the kernel clears a namespace up in its own time
        time.sleep(0.05)
    assert processes_inside() == []
    with pytest.raises(BlockingIOError):
        outside.listener.accept()
    assert not list(outside.canary.parent.glob("canary?*"))


def test_what_goes_wrong_once_the_program_runs_is_a_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a word on what this machine offers, which would end the evaluation."""
    from neureasoner.evaluation.sandbox import launcher

    def refused(processes: int) -> tuple[int, int]:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(launcher, "_anonymous", refused)
    said, program = [], subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(launcher.os, "write", lambda fd, text: said.append((fd, text)))
    monkeypatch.setattr(launcher.os, "wait4", lambda *_: (0, 0, None))  # other children here are not its to reap
    read, write = os.pipe()
    try:
        found = launcher._watch(program.pid, asdict(SMALL), read, processes=0)
    finally:
        program.kill()
        program.wait()
        os.close(read)
        os.close(write)
    assert found["end"] == "crashed" and b"could not be watched: [Errno 22]" in said[0][1] and said[0][0] == 2


def test_memory_is_counted_wherever_it_went(tmp_path: Path) -> None:
    """Swapped out, in huge pages, or of a process whose first thread has ended; the first process is ours."""
    from neureasoner.evaluation.sandbox import launcher

    states = {
        "1": "Threads:\t1\nRssAnon:\t 999 kB\n",
        "7": "Name:\tx\nVmRSS:\t 90 kB\nRssAnon:\t 1 kB\nRssFile:\t 80 kB\nRssShmem:\t 2 kB\nVmSwap:\t 4 kB\n"
        "HugetlbPages:\t 8 kB\nThreads:\t3\n",
        "8": "Name:\tx\nState:\tZ (zombie)\nThreads:\t2\n",
        "8/task/8": "Name:\tx\nThreads:\t2\n",
        "8/task/9": "Name:\tx\nRssAnon:\t 16 kB\nThreads:\t2\n",
        "10": "State:\tZ (zombie)\nThreads:\t1\n",
    }
    for task, text in states.items():
        (tmp_path / task).mkdir(parents=True)
        (tmp_path / task / "status").write_text(text)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert launcher._anonymous(fd) == (31 << 10, 6)
    finally:
        os.close(fd)


@pytest.mark.parametrize("path", CORRECT, ids=lambda p: p.stem)
def test_a_correct_program_is_right(path: Path, box: Sandbox) -> None:
    graded = judge(path.read_text(), PLUS_ONE, box, PATIENT)
    assert (graded.state, graded.level) == ("passed", "namespaces")


def test_large_input_and_output_come_through_whole(box: Sandbox) -> None:
    numbers = "\n".join(map(str, range(400_000)))
    run = box.run("import sys\nsys.stdout.write(sys.stdin.read())", numbers, PATIENT)
    assert run.status == "finished" and run.stdout.decode() == numbers


def test_an_output_at_the_cap_is_whole_and_one_byte_more_is_not(box: Sandbox) -> None:
    assert box.run(f"print('x' * {SMALL.output - 1})", limits=SMALL).status == "finished"
    assert box.run(f"print('x' * {SMALL.output})", limits=SMALL).status == "output"


def test_a_run_says_how_it_ended(box: Sandbox) -> None:
    run = box.run("import time\nx = bytearray(50 << 20)\ntime.sleep(0.3)\nraise SystemExit(7)", limits=PATIENT)
    assert (run.status, run.code, run.level) == ("crashed", 7, "namespaces")
    assert 0.3 <= run.seconds < 20 and 0 < run.cpu_seconds < 5
    assert 50 << 20 <= run.memory < 200 << 20
    died = box.run("import os; os.kill(os.getpid(), 11)")
    assert (died.status, died.code) == ("crashed", -11)
    assert b"ZeroDivisionError" in box.run("1 / 0").stderr


def test_a_call_hands_out_json(box: Sandbox) -> None:
    run = box.call(
        "class Solution:\n    def f(self, a, b):\n        print('noise')\n        return (a, {'b': b})", "f", [1, [2]]
    )
    assert (run.status, run.value, run.stdout) == ("finished", b'[1, {"b": [2]}]', b"")  # stdout is not flushed: unread
    assert box.call("def f():\n    return {1, 2}", "f", []).status == "crashed"


def test_processor_time_counts_and_waiting_does_not(box: Sandbox) -> None:
    limits = Limits(cpu_seconds=1.0, wall_seconds=30.0)
    assert box.run("import time; time.sleep(2); print(1)", limits=limits).status == "finished"
    burned = box.run("while True: pass", limits=limits)
    assert burned.status == "timeout" and burned.seconds < 29


def test_program_text_of_any_kind(box: Sandbox) -> None:
    assert box.run("print('\udcff')", limits=PATIENT).status == "crashed"  # a lone surrogate
    assert box.run("x = 1\x00", limits=PATIENT).status == "crashed"
    assert box.run("", limits=PATIENT).status == "finished"
    assert box.run("print(ascii(input()))", "\u2028é", PATIENT).stdout == b"'\\u2028\\xe9'\n"


def test_nothing_outlives_the_process_that_asked(box: Sandbox, tmp_path: Path) -> None:
    """Our own process is killed in the middle of a run: the program dies with it."""
    script = tmp_path / "asks.py"
    script.write_text(
        "from neureasoner.evaluation.sandbox import Sandbox, Limits\n"
        "box = Sandbox()\nprint('ready', flush=True)\n"
        "box.run('import time; time.sleep(600)', limits=Limits(wall_seconds=600))"
    )
    before = set(processes_inside())
    asker = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert asker.stdout and asker.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while len(set(processes_inside()) - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(processes_inside()) - before
    asker.kill()
    asker.wait()
    asker.stdout.close()
    deadline = time.monotonic() + 10
    while set(processes_inside()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(processes_inside()) - before


def test_the_containment_is_named_with_what_was_seen_to_hold(box: Sandbox) -> None:
    found = box.containment
    assert found.level == "namespaces"
    assert set(sandbox.NEEDED["namespaces"]) <= set(found.held)
    assert str(found).startswith(f"namespaces; {found.user}; held: network, ")


def test_without_namespaces_it_refuses_and_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_known", {})
    monkeypatch.setattr(sandbox, "probe", lambda python, level: Unsafe("namespaces (unshare): not permitted"))
    with pytest.raises(Unsafe) as caught:
        Sandbox()
    for word in ("not permitted", "user namespaces", "docker run", "NEUREASONER_SANDBOX=limits"):
        assert word in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_check_that_gets_through_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe believes what the check program saw, not what was asked for: here nothing contains it but limits."""
    real = sandbox.execute
    monkeypatch.setattr(sandbox, "execute", lambda python, level, *rest: real("/usr/bin/python3", "limits", *rest))
    found = sandbox.probe("/usr/bin/python3", "namespaces")
    assert isinstance(found, Unsafe)
    assert "got through: network" in str(found)


def test_the_weaker_level_has_to_be_accepted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip("needs an interpreter that another user can run")
    real = sandbox.probe
    monkeypatch.setattr(sandbox, "_known", {})
    monkeypatch.setattr(sandbox, "probe", lambda p, level: Unsafe("none") if level == "namespaces" else real(p, level))
    with pytest.raises(Unsafe):
        Sandbox(python=python)
    weak = Sandbox("limits", python=python)
    assert weak.containment.level == "limits"
    assert judge("print(int(input()) + 1)", PLUS_ONE, weak, PATIENT).level == "limits"
    assert weak.run("while True: pass", limits=SMALL).status == "timeout"
    assert weak.run("x = bytearray(1 << 30)", limits=SMALL).status == "memory"
    assert weak.run("while True: print('x' * 10000)", limits=SMALL).status == "output"
    begin = time.monotonic()
    left = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(600)\nprint(1, flush=True)"
    )
    assert weak.run(left, limits=SMALL).status == "finished"
    assert time.monotonic() - begin < 10  # it held stdout open, and was found and killed


def test_an_interpreter_may_stand_in_the_folder_of_temporary_files(box: Sandbox) -> None:
    """Where the program finds its own writable folder otherwise."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        python = Path(folder, "bin", "python")
        python.parent.mkdir()
        python.write_text(
            "#!/usr/bin/python3\nimport os, sys\nos.execv('/usr/bin/python3', ['python3', *sys.argv[1:]])\n"
        )
        for path in (Path(folder), python):
            path.chmod(0o755)
        if not os.access("/usr/bin/python3", os.X_OK):
            pytest.skip("needs an interpreter that any sandbox shows")
        there = Sandbox(python=python)
        assert judge("open('x', 'w').close(); print(int(input()) + 1)", PLUS_ONE, there, PATIENT).state == "passed"


def test_an_interpreter_that_does_not_run_is_named(box: Sandbox) -> None:
    assert str(sandbox.probe("/bin/false", "namespaces")) == "/bin/false did not run the check program (crashed)"


def test_bad_settings_are_named() -> None:
    with pytest.raises(UserError, match="unknown containment 'chroot'; known: namespaces, limits"):
        Sandbox("chroot")
    with pytest.raises(UserError, match="/nowhere/python: not a Python interpreter"):
        Sandbox(python="/nowhere/python")
    with pytest.raises(UserError, match="limit 'memory' must be above 0"):
        Limits(memory=0)
