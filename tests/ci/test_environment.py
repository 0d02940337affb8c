"""How the Makefile's environments are made: which installer gets what, and which leftovers are made anew."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "environment.py"


@pytest.fixture
def environment(tmp_path: Path) -> ModuleType:
    """The script, in a copy of its surroundings that may be written to."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/environment.py", "pyproject.toml", "requirements.lock", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location("environment", tmp_path / ".ci" / "environment.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert tmp_path == module.ROOT
    return module


class Installers:
    """Stands in for the commands that install: notes them, and fails where the test says so."""

    def __init__(self, environment: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
        self.called: list[str] = []
        self.fails, self.root = fails, environment.ROOT
        monkeypatch.setattr(environment, "run", self.run)
        monkeypatch.setattr(environment, "unusable", lambda folder: "")

    def run(self, folder: Path, *command: str, **_: str) -> bool:
        if "venv" in command:
            (folder / "bin").mkdir()
            return True
        line = " ".join(command).replace(f"{folder}/bin/", "").replace(str(self.root) + "/", "")
        self.called.append(line.replace("python -m pip", "pip").replace(" --python python", ""))
        if "--only-binary" in command and not re.search(self.fails, self.called[-1]):
            (folder / "bin" / "uv").touch()
        return not re.search(self.fails, self.called[-1])


TORCH = r"torch==[\d.]+"


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        ("never", ["pip .*uv", f"uv pip .*auto .*{TORCH}", "uv pip .*lock", r"uv pip .*-e \.", "uv pip check"]),
        (
            "torch-backend",  # PyTorch's index is out of reach: pip has the build, uv the rest
            ["pip .*uv", "uv pip .*auto", f"pip install .*{TORCH}", "uv pip .*lock", r"uv pip .*-e \.", "uv pip check"],
        ),
    ],
)
def test_torch_comes_first_and_uv_does_what_it_can(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: str, expected: list[str]
) -> None:
    installers = Installers(environment, monkeypatch, fails)
    assert environment.main(["install"]) == 0
    assert len(installers.called) == len(expected)
    for called, pattern in zip(installers.called, expected, strict=True):
        assert re.match(pattern, called), called
    assert environment.is_ready(environment.ROOT / ".venv", environment.LOCK)


def test_without_uv_pip_installs_the_same(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    installers = Installers(environment, monkeypatch, r"^uv|uv==")
    assert environment.main(["install"]) == 0
    by_pip = [line for line in installers.called if line.startswith("pip")]
    assert [line for line in by_pip if "--no-deps -r requirements.lock" in line]
    assert [line for line in by_pip if "--no-deps --no-build-isolation -e ." in line]


@pytest.mark.parametrize("fails", [TORCH, "-r requirements.lock", r"-e \.", "check", "venv"])
def test_a_failed_step_is_an_error_and_leaves_nothing_that_counts_as_done(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Installers(environment, monkeypatch, fails)
    if fails == "venv":
        monkeypatch.setattr(environment, "run", lambda *_, **__: False)
    assert environment.main(["install"]) == 2
    folder = environment.ROOT / ".venv"
    assert not environment.is_ready(folder) and str(folder / "setup.log") in capsys.readouterr().err
    monkeypatch.undo()
    assert environment.unusable(folder) == "was left half-made"


def test_what_cannot_be_built_on_is_named(environment: ModuleType, tmp_path: Path) -> None:
    """A user's own environment is built on; ours only where it was finished, in this place."""
    folder = tmp_path / ".venv"
    folder.mkdir()
    assert "pip" in environment.unusable(folder)  # nothing in it: `python -m venv` was killed
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(tmp_path / "gone")
    assert "pip" in environment.unusable(folder)  # the interpreter was uninstalled
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to(sys.executable)
    assert not environment.unusable(folder)
    for said, why in ((environment.UNFINISHED, "half"), ("/elsewhere", "another folder"), (str(tmp_path), "")):
        (folder / environment.STAMP).write_text(said)
        assert (why in environment.unusable(folder)) if why else not environment.unusable(folder)


def test_a_lock_of_other_dependencies_is_refused(
    environment: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installers = Installers(environment, monkeypatch, "never")
    text = environment.PYPROJECT.read_text()
    environment.PYPROJECT.write_text(text.replace('"rich>=13', '"rich>=14'))
    assert environment.main(["install"]) == 2 and not installers.called
    assert "make lock" in capsys.readouterr().err


def test_a_second_setup_waits_for_the_first(tmp_path: Path, environment: ModuleType) -> None:
    script, done = tmp_path / ".ci" / "environment.py", tmp_path / ".venv" / environment.STAMP
    holder = (
        f"import fcntl, time; f = open({str(script)!r}, 'r+b'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", holder + "; time.sleep(60)"], stdout=subprocess.PIPE) as first:
        assert first.stdout and first.stdout.readline()
        second = subprocess.Popen([sys.executable, str(script), "install"], stdout=subprocess.PIPE, text=True)
        assert second.stdout and "waiting" in second.stdout.readline()
        done.parent.mkdir()
        done.write_text(str(tmp_path))  # the first has made it
        first.kill()
        assert second.wait(30) == 0 and second.stdout.read() == ""
        second.stdout.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("transformers>=5.16.1,<5.25", "transformers>=5.16.1,<6"),
        ("peft>=0.21,<0.22", "peft>=0.21,<1"),
        ("datasets>=5,<6", "datasets>=5,<6"),
        ("x>=1.0,<2.0", "x>=1.0,<2.0"),
        ("x[a]>=1.9.1,<1.9.10; python_version<'3.12'", "x[a]>=1.9.1,<2; python_version<'3.12'"),
    ],
)
def test_loosened_to_the_next_major(environment: ModuleType, given: str, expected: str) -> None:
    assert environment.loosened(given) == expected


def test_the_newest_is_never_older_than_the_lock(environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    installers = Installers(environment, monkeypatch, "never")
    monkeypatch.setattr(environment, "python_of", lambda folder: sys.executable)
    assert environment.main(["latest"]) == 0
    folder = environment.ROOT / ".venv-latest"
    wanted, floor = ((folder / name).read_text().splitlines() for name in ("requirements.txt", "floor.txt"))
    assert "transformers>=5.16.1,<6" in wanted and not [line for line in wanted if line.startswith("neureasoner")]
    assert set(floor) == {f"{n}>={v}" for n, v in environment.pins(environment.LOCK.read_text()).items()}
    assert [line for line in installers.called if "-r .venv-latest/requirements.txt" in line and "floor.txt" in line]


def test_differences_name_what_moved(environment: ModuleType) -> None:
    locked = {"torch": "2.13.0", "trl": "1.16.0", "tzdata": "1"}
    found = {"torch": "2.13.0+cpu", "trl": "1.17.0", "nvidia-cublas": "13", "pip": "23", "new-one": "3"}
    lines = [line.strip() for line in environment.differences(locked, found)]
    assert lines == ["trl 1.16.0 -> 1.17.0", "new-one 3 is not in the lock", "1 packages as in the lock"]


make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """make, as from a shell: the tests themselves may run under one."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=own, capture_output=True, text=True)


def dry(folder: Path, target: str) -> str:
    done = call(folder, "-n", target)
    assert done.returncode == 0, done.stderr
    return done.stdout


@make
@pytest.mark.parametrize("target", ["quickstart", "test", "test-slow", "check", "install"])
def test_every_command_sets_itself_up_once(environment: ModuleType, target: str) -> None:
    folder, setup = environment.ROOT, ".ci/environment.py install"
    assert setup in dry(folder, target)
    (folder / ".venv").mkdir()
    environment.finish(folder / ".venv")
    assert setup not in dry(folder, target)
    for name in ("pyproject.toml", "requirements.lock"):
        later = time.time() + 10
        os.utime(folder / name, (later, later))
        assert setup in dry(folder, target)
        os.utime(folder / name, (0, 0))
    (folder / ".venv" / environment.STAMP).write_text(environment.UNFINISHED)
    assert setup in dry(folder, target)


@make
def test_an_old_python_is_refused_by_name(environment: ModuleType, tmp_path: Path) -> None:
    old = tmp_path / "python3.6"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for target in ("install", "lock", "test-latest"):
        done = call(tmp_path, target, f"PYTHON={old}")
        assert done.returncode == 2 and "3.11" in done.stderr and str(old) in done.stderr
    assert not (tmp_path / ".venv").exists()


@make
def test_help_lists_every_target(environment: ModuleType) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)) - {"help"}
    told = call(environment.ROOT).stdout
    assert set(re.findall(r"^make ([a-z-]+)", told, re.M)) == targets
