"""What is published: an sdist, the wheel built from it, and the wheel used in an environment and folder of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
NOT_COPIED = (".git", ".venv*", "runs", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".hypothesis")
# What people leave lying in a checkout.
JUNK = (
    "build/lib/neureasoner/old.py",
    "dist/old.whl",
    "neureasoner/__pycache__/old.cpython-311.pyc",
    "probes/scratch.tmp",
    "runs/quickstart/run.json",
    "tests/test_old.py",
)
# Notes every file and folder of the checkout that a process of the environment opens.
GUARD = """
import os, sys
OURS, ELSEWHERE, NOTES = {ours!r}, {elsewhere!r}, {notes!r}
def note(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(OURS) and not path.startswith(ELSEWHERE):
            notes = os.open(NOTES, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            os.write(notes, (path + "\\n").encode())
            os.close(notes)
sys.addaudithook(note)
"""


def package_files() -> dict[str, str]:
    """Every file that is published, modules and what they read: place in the wheel → place in the checkout."""
    found = {}
    for package, folder in SETUPTOOLS["package-dir"].items():
        data = SETUPTOOLS["package-data"]
        for pattern in ("*.py", *data["*"], *data.get(package, ())):
            for path in (ROOT / folder).glob(pattern):
                if path.is_file():
                    place = Path(package.replace(".", "/")) / path.relative_to(ROOT / folder)
                    found[str(place)] = str(path.relative_to(ROOT))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``python -m build`` without a network, in a copy of the checkout full of junk: sdist and wheel."""
    source = tmp_path_factory.mktemp("built") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
    for name in JUNK:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    out = source.parent / "out"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
    about = {n for n in names if re.match(r"neureasoner-[\d.]+\.dist-info/", n)}
    assert names - about == set(package_files())
    assert {Path(n).name for n in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
        "LICENSE",
    }


def test_the_sdist_holds_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {n.name.partition("/")[2] for n in archive.getmembers() if n.isfile()}
    rest = {n for n in names - set(package_files().values()) if not n.startswith("neureasoner.egg-info/")}
    assert rest == {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert names >= set(package_files().values())


Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of the wheel, installed in an environment of its own, in an empty folder; returns what it says.

    The packages we depend on are those of the running environment, by path; its editable installation of ours is not
    seen there, since ``.pth`` files count only in an environment's own folder.
    """
    home = tmp_path_factory.mktemp("installed")
    venv, notes = home / "venv", home / "notes"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    how = ["--python", python, "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *how, str(built[1])], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    elsewhere = (f"{ROOT}/.venv", *dependencies)
    (site / "guard.py").write_text(GUARD.format(ours=f"{ROOT}/", elsewhere=elsewhere, notes=str(notes)))
    (site / "own.pth").write_text("\n".join([*dependencies, "import guard"]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": f"{venv}/bin:{os.environ['PATH']}"}

    def run(folder: Path, *command: str) -> str:
        notes.unlink(missing_ok=True)
        program = [str(venv / "bin" / command[0]), *command[1:]]
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not notes.exists(), f"{command} reads {notes.read_text()}"
        return done.stdout

    with pytest.raises(AssertionError, match=r"reads .*pyproject\.toml"):  # the guard sees what it is there for
        run(home, "python", "-c", f"open({str(ROOT / 'pyproject.toml')!r})")
    assert str(site) in run(home, "python", "-c", "import neureasoner.training as t; print(t.__file__)")
    return run


def test_doctor(installed: Run, tmp_path: Path) -> None:
    assert "transformers" in installed(tmp_path, "neureasoner", "doctor")
    assert "Qwen3ForCausalLM" in installed(tmp_path, "neureasoner", "doctor", "--model", "tiny")


def test_generate(installed: Run, tmp_path: Path) -> None:
    ask = ["--prompt", "Calculate 37 + 8 * 14 - 25.", "--max_new_tokens", "24", "--temperature", "0"]
    told = installed(tmp_path, "neureasoner", "generate", "--model", "tiny-steered", *ask)
    assert "24 tokens" in told


def test_the_quickstart_at_a_small_size(installed: Run, tmp_path: Path) -> None:
    """All ten stages; 32 rollouts are the fewest that fit a probe. Nothing is learned, nothing is measured."""
    small = [
        *("data problems.n=32", "test problems.n=2", "data rollouts.samples=1", "data rollouts.max_new_tokens=300"),
        *("data reconstruct.corpus=40", "training sft.max_steps=4", "probes locate.max_traces=8"),
        *("probes fit.candidates=[spectral]", "probes fit.bootstrap=20"),
        *("evaluate.arms=[vanilla, full]", "evaluate.max_new_tokens=48", "evaluate.resamples=50"),
    ]
    installed(tmp_path, "neureasoner", "run", "quickstart", "--set", *small)
    done = tmp_path / "runs" / "quickstart"
    assert (done / "evaluation" / "report.html").is_file() and (done / "steered" / "neureasoner.json").is_file()
    ask = ["--prompt", "Calculate 3 + 4.", "--max_new_tokens", "8"]
    installed(tmp_path, "neureasoner", "generate", "--model", "runs/quickstart/steered", *ask)


def test_shipped_recipes_by_name(installed: Run, tmp_path: Path) -> None:
    load = "for name in ('quickstart', 'full', 'reproduce_table2', 'combination'): run.load_recipe(RunConfig(name))"
    imports = "import neureasoner.run as run; from neureasoner.floor_config import RunConfig"
    installed(tmp_path, "python", "-c", f"{imports}\n{load}")
    small = ["data problems.n=3", "generated problems.samples=1", "generated problems.max_new_tokens=8"]
    told = installed(tmp_path, "neureasoner", "reproduce", "table2", "--set", *small, "generated problems.resamples=20")
    assert "# Table 2" in told and (tmp_path / "runs" / "reproduce_table2" / "table2.md").is_file()
