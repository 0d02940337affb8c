"""The package as declared is the package as it lies there."""

from __future__ import annotations

import importlib
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ROOMS = ("data_builders", "probes", "training", "inference", "evaluation")
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


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
