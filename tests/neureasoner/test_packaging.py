"""The package as declared is the package as it lies there."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ROOMS = ("data_builders", "probes", "training", "inference", "evaluation")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS, PROJECT = PYPROJECT["tool"], PYPROJECT["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def sources() -> list[Path]:
    return sorted(p for room in ("neureasoner", *ROOMS) for p in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "neureasoner" else ("neureasoner", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_declared_packages_are_the_folders_with_init() -> None:
    found = {module_name(p): str(p.parent.relative_to(ROOT)) for p in sources() if p.name == "__init__.py"}
    found |= {"neureasoner.configs": "configs"}  # files alone: plans, recipes, launch layouts
    assert set(TOOLS["setuptools"]["packages"]) == set(found)
    assert TOOLS["setuptools"]["package-dir"] == found


def test_every_file_that_is_read_is_declared() -> None:
    """Whatever lies in a package and is no Python is package data; patterns that match nothing are gone."""
    tool = TOOLS["setuptools"]
    folders = {name: ROOT / folder for name, folder in tool["package-dir"].items()}
    declared = set[Path]()
    for name, patterns in tool["package-data"].items():
        for pattern in patterns:
            matched = {p for base in ([folders[name]] if name != "*" else folders.values()) for p in base.glob(pattern)}
            assert matched, (name, pattern)
            declared |= {p for p in matched if p.is_file()}
    lying = {p for base in folders.values() for p in base.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {p for p in lying if p.suffix not in (".py", ".pyc")} == declared


def requirements(extra: str = "") -> list[Requirement]:
    """Of the core or an extra, with those of the extras it names."""
    found = []
    for one in map(Requirement, PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]):
        found += [r for e in one.extras for r in requirements(e)] if one.name == "neureasoner" else [one]
    return found


def locked() -> dict[str, Requirement]:
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    found = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    assert len(found) == len(lines)  # one version for everyone
    return found


def exact(requirement: Requirement) -> str:
    (version,) = requirement.specifier
    assert version.operator == "==" and "*" not in version.version
    return version.version


@pytest.mark.parametrize("extra", ["", "dev"])
def test_the_lock_lies_within_the_ranges(extra: str) -> None:
    pins = locked()
    assert requirements(extra)
    for one in requirements(extra):
        pin = pins[canonicalize_name(one.name)]
        assert pin.marker is None and one.specifier.contains(exact(pin)), (str(one), str(pin))


def test_the_lock_names_no_place_and_no_build() -> None:
    """No index, file or local version; the CUDA packages come with torch where its build wants them."""
    assert "/" not in "".join(line for line in LOCK.splitlines() if not line.startswith("#"))
    assert not re.search(r"://|file:|--|@", LOCK)
    for name, pin in locked().items():
        assert "+" not in exact(pin) and not pin.url
        assert not re.match(r"nvidia|cuda|triton", name)


def test_the_lock_is_closed() -> None:
    """What each locked package says it needs is locked too, at a version it takes."""
    pins, checked = locked(), 0
    for name, pin in pins.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for other platforms
        if installed.version != exact(pin):
            continue  # `make test-latest`
        for need in map(Requirement, installed.requires or []):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            needed = canonicalize_name(need.name)
            if name == "torch" and needed not in pins:
                assert re.match(r"nvidia|cuda|triton", needed)
            else:
                assert need.specifier.contains(exact(pins[needed]), prereleases=True), (name, str(need))
                checked += 1
    assert checked > 100


def test_the_lock_is_made_from_these_dependencies() -> None:
    """The script's own comparison, which `make` does before it installs (`make lock` writes it anew)."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / ".ci" / "environment.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.HASH + script.dependency_hash() in LOCK.splitlines(), "run `make lock`"


def test_every_range_has_both_ends() -> None:
    for extra in ("", *PROJECT["optional-dependencies"]):
        for one in requirements(extra):
            operators = sorted(s.operator for s in one.specifier)
            assert operators == ["<", ">="], f"{extra}: {one}"
    assert re.match(r">=3\.11\b", PROJECT["requires-python"])


def test_continuous_integration_is_make_check_from_the_lock() -> None:
    """That `make check` installs the lock, and nothing else, stands in ``tests/ci``."""
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec make check"]


def test_every_import_is_installed_by_a_requirement() -> None:
    """Imported packages are required, or required by one that is: nothing is found by luck."""
    named = {
        canonicalize_name(r.name) for extra in ("", *PROJECT["optional-dependencies"]) for r in requirements(extra)
    }
    brought = set(named)
    for name in named:
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        brought |= {canonicalize_name(r.name) for r in map(Requirement, needs) if not r.marker or r.marker.evaluate()}
    owners = importlib.metadata.packages_distributions()
    tests = sorted((ROOT / "tests").rglob("*.py"))
    for path in [*sources(), *tests]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in {m.partition(".")[0] for m in modules} - sys.stdlib_module_names - {"neureasoner"}:
                if not (path.parent / f"{module}.py").is_file():
                    assert brought & {canonicalize_name(d) for d in owners.get(module, [module])}, (path.name, module)


@pytest.mark.parametrize("name", [module_name(p) for p in sources()])
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_recipes_hold_only_known_settings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from neureasoner.floor_config import RunConfig
    from neureasoner.run import load_recipe

    monkeypatch.chdir(ROOT)
    if "stages" in yaml.safe_load(path.read_text(encoding="utf-8")):
        assert load_recipe(RunConfig(str(path)))[2]


def test_type_checkers_see_every_module() -> None:
    """``.typecheck`` holds relative links to the rooms and to each file of the floor, and no others."""
    folder = ROOT / ".typecheck" / "neureasoner"
    links = {p.name: os.readlink(p) for p in folder.iterdir() if p.is_symlink()}
    floor = {p.name: f"../../neureasoner/{p.name}" for p in (ROOT / "neureasoner").glob("*.py")}
    assert {k: v for k, v in links.items() if k != "py.typed"} == floor | {room: f"../../{room}" for room in ROOMS}


def test_modules_stay_small_and_name_no_machine_path() -> None:
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 400, f"{path} is too long"
        assert not re.search(r"/(?:home|root|work|Users)/\w", text), f"{path} names a machine's path"


def test_no_pickle_and_no_remote_code() -> None:
    """Promise 10. ``trust_remote_code`` may be written only to refuse it."""
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(?:import|from) (?:pickle|joblib|dill)\b|torch\.load\(", text, re.M), path
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
