"""The environments of the Makefile, made with nothing but Python's standard library.

    python3 .ci/environment.py install      .venv, exactly as requirements.lock says
    python3 .ci/environment.py latest       .venv-latest, made anew: the newest that the majors of the ranges allow
    python3 .ci/environment.py lock [NAME…] requirements.lock from pyproject.toml; NAME… are upgraded ("all")

PyTorch comes first: uv picks the build (CPU, or CUDA for this machine's driver) from PyTorch's own index. Where that
index or uv cannot be had, pip takes the build of whatever index is configured; on Linux that is usually the CUDA one.
What the installers say goes to a log in the environment and is shown only when both fail.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT, LOCK = ROOT / "pyproject.toml", ROOT / "requirements.lock"
UV = "uv==0.13.9"
EXTRA = "dev"
STAMP, LOG, UNFINISHED = ".installed", "setup.log", "unfinished"
OF_THE_BUILD = re.compile(r"(nvidia-|cuda-|triton\b|pytorch-triton)")  # what a CUDA build of torch brings by itself
HASH = "# dependencies of pyproject.toml: sha256 "


class SetupError(Exception):
    """Something to tell the user in a line, after the end of ``log`` where an installer failed."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


def project() -> dict[str, object]:
    """The part of ``pyproject.toml`` that decides what is installed."""
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return {key: table[key] for key in ("requires-python", "dependencies", "optional-dependencies")}


def dependency_hash() -> str:
    return hashlib.sha256(json.dumps(project(), sort_keys=True).encode()).hexdigest()


def requirements(extra: str = "") -> list[str]:
    """The requirements of the core, or of an extra, those that it takes from other extras included."""
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    found: list[str] = []
    for line in table["optional-dependencies"][extra] if extra else table["dependencies"]:
        own = re.fullmatch(rf"{table['name']}\[(.+)\]", line)
        found += [r for name in own[1].split(",") for r in requirements(name.strip())] if own else [line]
    return found


def loosened(requirement: str) -> str:
    """``a>=1.2,<1.5`` → ``a>=1.2,<2``: the upper end moved to the next major."""
    return re.sub(r"<(\d+)\.[\d.]*[1-9][\d.]*", lambda m: f"<{int(m[1]) + 1}", requirement)


def pins(text: str) -> dict[str, str]:
    """Name → version of a lock's lines, names in lower case with hyphens."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def python_of(folder: Path) -> str:
    return str(folder / "bin" / "python")


def uv_of(folder: Path) -> Path:
    return folder / "bin" / "uv"


def run(folder: Path, *command: str, **environment: str) -> bool:
    """Whether the command went well. What it says goes to the environment's log."""
    with (folder / LOG).open("a", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | environment)
        except OSError as error:  # uv is not there, or not for this machine
            print(error, file=log)
            return False
    return done.returncode == 0


def pip(folder: Path, *arguments: str) -> bool:
    return run(folder, python_of(folder), "-m", "pip", *arguments, PIP_DISABLE_PIP_VERSION_CHECK="1")


def uv(folder: Path, *arguments: str, **environment: str) -> bool:
    return run(folder, str(uv_of(folder)), "pip", *arguments, "--python", python_of(folder), **environment)


def is_ready(folder: Path, *needs: Path) -> bool:
    """Whether the environment was finished, for this folder, after ``needs`` were last written."""
    stamp = folder / STAMP
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").strip() != str(ROOT):
        return False
    return all(stamp.stat().st_mtime >= path.stat().st_mtime for path in needs)


def unusable(folder: Path) -> str:
    """Why the environment lying there cannot be built on; empty if it can."""
    stamp = folder / STAMP
    said = stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else ""
    if said == UNFINISHED:
        return "was left half-made"
    if said not in ("", str(ROOT)):
        return "was made for another folder"
    probe = "import pip, venv, sys; sys.exit(sys.version_info < (3, 11))"
    try:
        works = subprocess.run([python_of(folder), "-c", probe], capture_output=True).returncode == 0
    except OSError:
        works = False
    return "" if works else "has no working pip and Python 3.11 or newer"


def remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def prepare(folder: Path) -> None:
    """A virtual environment with uv, if uv can be had. Marked as unfinished."""
    if folder.exists() and (why := unusable(folder)):
        print(f"{folder.name} {why}; making it anew", flush=True)
        remove(folder)
    if fresh := not folder.exists():
        folder.mkdir()
    (folder / STAMP).write_text(UNFINISHED, encoding="utf-8")
    (folder / LOG).write_text("", encoding="utf-8")
    if fresh and not run(folder, sys.executable, "-m", "venv", str(folder)):
        raise SetupError(
            f"'{sys.executable} -m venv' failed; on Debian and Ubuntu: apt install python3-venv", folder / LOG
        )
    if not pip(folder, "install", "--only-binary", ":all:", UV):
        print("  uv cannot be had; pip takes longer", flush=True)


def fill(folder: Path, wanted: Path, bounds: Path) -> None:
    """Install what the file ``wanted`` lists, within ``bounds`` (itself, if it lists everything), and this project."""
    exact = bounds == wanted
    torch = next(line for line in wanted.read_text(encoding="utf-8").splitlines() if re.match(r"torch\b", line))
    print(f"  {torch}", flush=True)
    if not uv(folder, "install", "--torch-backend=auto", "-c", str(bounds), torch, UV_HTTP_RETRIES="1"):
        if uv_of(folder).exists():
            print("  (uv could not choose its build for this machine; pip takes the one it is given)", flush=True)
        if not pip(folder, "install", "-c", str(bounds), torch):
            raise SetupError(f"{torch} could not be installed", folder / LOG)
    listed_in = wanted.relative_to(ROOT)
    print(f"  {listed_in}", flush=True)
    listed = ["install", *(["--no-deps"] if exact else ["-c", str(bounds)]), "-r", str(wanted)]
    if not (uv(folder, *listed, "--build-constraints", str(LOCK)) or pip(folder, *listed)):
        raise SetupError(f"{listed_in} could not be installed", folder / LOG)
    own = ["install", "--no-deps", "--no-build-isolation", "-e", "."]
    if not (uv(folder, *own) or pip(folder, *own)):
        raise SetupError("the project itself could not be installed", folder / LOG)
    if exact and not (uv(folder, "check") or pip(folder, "check")):
        raise SetupError(f"{listed_in}: what it lists does not fit together", folder / LOG)


def finish(folder: Path) -> None:
    (folder / STAMP).write_text(str(ROOT), encoding="utf-8")


def install() -> None:
    folder = ROOT / ".venv"
    if is_ready(folder, PYPROJECT, LOCK):  # another make has done it while this one waited
        return
    if HASH + dependency_hash() not in LOCK.read_text(encoding="utf-8").splitlines():
        raise SetupError("requirements.lock was not made from the dependencies in pyproject.toml: run `make lock`")
    if (folder / STAMP).exists() and not unusable(folder):
        print("Bringing .venv up to date", flush=True)
    else:
        print(f"Setting up .venv with Python {sys.version.split()[0]} (once; a few minutes)", flush=True)
    prepare(folder)
    fill(folder, LOCK, LOCK)
    finish(folder)


def latest() -> None:
    folder = ROOT / ".venv-latest"
    print(f"Setting up .venv-latest with Python {sys.version.split()[0]}", flush=True)
    remove(folder)
    prepare(folder)
    wanted, floor = folder / "requirements.txt", folder / "floor.txt"
    locked = pins(LOCK.read_text(encoding="utf-8"))
    wanted.write_text("\n".join(map(loosened, [*requirements(), *requirements(EXTRA)])), encoding="utf-8")
    # nothing older than the lock: else one package's new major can throw its neighbours back by years
    floor.write_text("\n".join(f"{name}>={version}" for name, version in locked.items()), encoding="utf-8")
    fill(folder, wanted, floor)
    finish(folder)
    listing = "import importlib.metadata as m\nfor d in m.distributions(): print(f'{d.name}=={d.version}')"
    told = subprocess.run([python_of(folder), "-c", listing], capture_output=True, text=True, check=True)
    print("\n".join(differences(locked, pins(told.stdout))), flush=True)


def differences(locked: dict[str, str], found: dict[str, str]) -> list[str]:
    """What the newest environment has otherwise than the lock, a package a line."""
    not_ours = {"neureasoner", "pip", UV.split("==")[0]}
    found = {n: v for n, v in found.items() if n not in not_ours and not OF_THE_BUILD.match(n)}
    moved = {n: v for n, v in found.items() if n in locked and v.split("+")[0] != locked[n]}
    lines = [f"{name} {locked[name]} -> {moved[name]}" for name in sorted(moved)]
    lines += [f"{name} {found[name]} is not in the lock" for name in sorted(found.keys() - locked.keys())]
    return [*(f"  {line}" for line in lines), f"  {len(found) - len(lines)} packages as in the lock"]


def lock(upgrade: list[str]) -> None:
    """Write ``requirements.lock``; pins that still fit stay, except those to upgrade."""
    folder = ROOT / ".venv"
    if unusable(folder) or not uv_of(folder).exists():
        prepare(folder)
    solved = folder / "solved.txt"
    shutil.copy(LOCK, solved) if LOCK.exists() else solved.unlink(missing_ok=True)
    flags = ["--upgrade"] if upgrade == ["all"] else [f"--upgrade-package={name}" for name in upgrade]
    lowest = re.search(r"\d+\.\d+", str(project()["requires-python"]))
    assert lowest
    command = [str(uv_of(folder)), "pip", "compile", "--universal", "--python-version", lowest[0], *flags]
    command += ["--fork-strategy", "fewest", "--no-annotate", "--no-header", "--extra", EXTRA, "-o", str(solved)]
    done = subprocess.run([*command, str(PYPROJECT)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise SetupError(done.stderr.decode(errors="replace").strip())
    kept = [line for line in solved.read_text(encoding="utf-8").splitlines() if not OF_THE_BUILD.match(line)]
    head = [
        "# Made by `make lock` from pyproject.toml, for every platform; `make` and .ci/run install it. Do not edit.",
        "# torch's build (CPU, CUDA) is chosen where it is installed, and brings its CUDA packages itself.",
        HASH + dependency_hash(),
    ]
    before = pins(LOCK.read_text(encoding="utf-8")) if LOCK.exists() else {}
    LOCK.write_text("\n".join([*head, *kept]) + "\n", encoding="utf-8")
    after = pins("\n".join(kept))
    for name in sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n)):
        print(f"  {name} {before.get(name, '(new)')} -> {after.get(name, '(gone)')}")


def show_end(log: Path) -> None:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    print(*lines[-30:], f"(the end of {log})", sep="\n", file=sys.stderr)


def main(arguments: list[str]) -> int:
    command, names = arguments[0] if arguments else "", arguments[1:]
    todo = {"install": install, "latest": latest, "lock": lambda: lock(names)}
    if command not in todo:
        print(__doc__, file=sys.stderr)
        return 2
    with Path(__file__).open("r+b") as turn:  # two makes at once take turns
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Another make is setting up; waiting for it", flush=True)
            fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            todo[command]()
        except SetupError as error:
            if error.log:
                show_end(error.log)
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
