"""Run a recipe: the stages of a YAML file in order, in one run directory, resumable.

::

    name: quickstart
    out: runs/quickstart
    stages:
      - data problems: {n: 300, out: "run:problems"}
      - data problems: {n: 100, split: test, out: "run:test"}
        as: test problems                   # a label, needed where a command occurs twice
      - training sft: {config: configs/recipes/tiny/sft.yaml, data: "run:reconstruct/train.jsonl", out: "run:sft"}
        launch: configs/accelerate/cpu.yaml # optional, for training only

``run:x`` is ``x`` in the run directory; other paths count from the current one, and a ``configs/…`` that is not there
is the file of that name that comes with the package. Everything is checked before the first stage starts. ``run.json``
notes what each finished stage read and wrote, so a second run skips it without importing it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, fingerprint, read_json, write_json, write_text
from neureasoner.commands import COMMANDS, Command
from neureasoner.config import closest, from_dict, read_mapping
from neureasoner.errors import UserError
from neureasoner.floor_config import RunConfig
from neureasoner.model_files import SHIPPED, model_files
from neureasoner.stages import MARK

FOLDERS = ("configs/recipes/tiny", "configs/recipes")
HOMES = (Path(__file__).parent, Path(__file__).parents[1])  # of configs/: installed beside this file; a checkout
RECORD = "run.json"


@dataclass
class Stage:
    """One checked stage. ``config`` is an instance of the command's settings, for a script the settings as they are."""

    label: str
    command: Command
    settings: dict[str, Any]
    config: Any
    launch: str = ""

    @property
    def out(self) -> Path | None:
        """The stage's folder, or None for a stage that only shows something."""
        return Path(self.settings["out"]) if self.settings.get("out") else None


def shipped(path: str) -> str:
    """``path``, but for a ``configs/…`` that is not in the current folder the package's own, if it has that file."""
    if not path.startswith("configs/") or Path(path).exists():
        return path
    return next((str(home / path) for home in HOMES if (home / path).is_file()), path)


def find_recipe(name: str) -> Path:
    """The recipe file ``name`` means: a path, or a shipped recipe. Raises UserError listing the shipped ones."""
    path = Path(shipped(name))
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"{name}: no such recipe file")
        return path
    for path in (Path(shipped(f"{folder}/{name}.yaml")) for folder in FOLDERS):
        if path.is_file():
            return path
    known = sorted({p.stem for home in (Path(), *HOMES) for f in FOLDERS for p in (home / f).glob("*.yaml")})
    raise UserError(f"recipe '{name}' is not shipped{closest(name, known)}; give a YAML file")


def _at(value: Any, run_dir: Path) -> Any:
    """``run:`` and shipped paths resolved, also inside lists and mappings."""
    if isinstance(value, str):
        return str(run_dir / value.removeprefix("run:")) if value.startswith("run:") else shipped(value)
    if isinstance(value, list):
        return [_at(v, run_dir) for v in value]
    if isinstance(value, dict):
        return {k: _at(v, run_dir) for k, v in value.items()}
    return value


def _overrides(items: list[str]) -> dict[str, dict[str, Any]]:
    """``STAGE.KEY=VALUE`` → {stage: {key: value}}; values are YAML."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for item in items:
        target, equals, text = item.partition("=")
        stage, dot, key = target.rpartition(".")
        if not (equals and dot and stage and key):
            raise UserError(f"--set '{item}': write it as STAGE.KEY=VALUE, for example \"data problems.n=50\"")
        try:
            found.setdefault(stage, {})[key.replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError:
            found.setdefault(stage, {})[key.replace("-", "_")] = text
    return found


def _parse_item(item: Any, where: str) -> tuple[str, dict[str, Any], str, str]:
    """``(command name, settings, label, launch)`` of one entry of ``stages``."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected 'command: {{settings}}', got {item!r}")
    rest = dict(item)
    label, launch = rest.pop("as", None), rest.pop("launch", "")
    if len(rest) != 1:
        raise UserError(
            f"{where}: expected one command (and 'as', 'launch'), got {', '.join(map(str, rest)) or 'none'}"
        )
    name, settings = next(iter(rest.items()))
    if name not in COMMANDS or name == "run":
        raise UserError(
            f"{where}: command '{name}' is unknown{closest(str(name), [c for c in COMMANDS if c != 'run'])}"
        )
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{where}, '{name}': expected key: value pairs, got {settings!r}")
    if launch and not COMMANDS[name].script:
        raise UserError(f"{where}, '{name}': 'launch' belongs to training only")
    return name, dict(settings or {}), str(label or name), shipped(str(launch))


def _script_settings(settings: dict[str, Any], command: Command, where: str) -> dict[str, Any]:
    """Settings of a training script: its own, checked like every stage's, and the training library's, by name."""
    from dataclasses import fields

    from neureasoner.launch import training_keys

    file = settings.pop("config", None)
    settings = {**(read_mapping(file) if file else {}), **settings}
    cls = command.config_class()
    own = {f.name for f in fields(cls)}
    for key in settings:
        if key not in own and training_keys() and key not in training_keys():
            raise UserError(f"{where}: key '{key}' is unknown{closest(key, own | training_keys())}")
    checked = from_dict(cls, {k: v for k, v in settings.items() if k in own}, where)
    settings |= {k: v for k, v in asdict(checked).items() if k in settings}
    for key in ("data", "out"):
        if not settings.get(key):
            raise UserError(f"{where}: key '{key}' is required")
    return settings


def load_recipe(config: RunConfig) -> tuple[str, Path, list[Stage]]:
    """``(name, run directory, stages)``, everything checked. Raises UserError naming file, stage and key."""
    path = find_recipe(config.recipe)
    recipe = read_mapping(path)
    for key in recipe:
        if key not in ("name", "out", "stages"):
            raise UserError(f"{path}: key '{key}' is unknown{closest(str(key), ['name', 'out', 'stages'])}")
    if not isinstance(recipe.get("stages"), list) or not recipe["stages"]:
        raise UserError(f"{path}: key 'stages' must be a list of 'command: {{settings}}'")
    name = str(recipe.get("name") or path.stem)
    run_dir = Path(config.out or recipe.get("out") or f"runs/{name}")
    overrides = _overrides(config.set)
    stages: dict[str, Stage] = {}
    for number, item in enumerate(recipe["stages"], 1):
        where = f"{path}, stage {number}"
        command_name, settings, label, launch = _parse_item(item, where)
        where += f" ({label})"
        if label in stages:
            raise UserError(f"{where}: the label occurs twice; give one of them another with 'as'")
        settings = _at({**settings, **overrides.pop(label, {})}, run_dir)
        command = COMMANDS[command_name]
        if command.script:
            settings = _script_settings(settings, command, where)
            stages[label] = Stage(label, command, settings, settings, launch)
        else:
            checked = from_dict(command.config_class(), settings, where)
            stages[label] = Stage(label, command, asdict(checked), checked)
    for label in overrides:
        raise UserError(f"--set: stage '{label}' is not in {path}{closest(label, stages)}")
    return name, run_dir, list(stages.values())


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [s for v in value for s in _strings(v)] if isinstance(value, (list, tuple)) else []


def _state(stage: Stage) -> str:
    """Hash of what a finished stage read and wrote: its settings, the files these name, its mark if it leaves one."""
    mark = stage.out / MARK if stage.out else None
    files = [s for s in _strings(stage.settings) if len(s) < 1024 and "\n" not in s and Path(s).is_file()]
    marks = [str(mark)] if mark and mark.is_file() else []
    model = stage.settings.get("model")
    if isinstance(model, str) and (model in SHIPPED or (Path(model) / "config.json").is_file()):
        marks += [str(f) for f in model_files(model)]
    return fingerprint(__version__, stage.launch, stage.settings, marks, file_fingerprint([*files, *marks]))


def _run_stage(stage: Stage, run_dir: Path) -> None:
    if not stage.command.script:
        stage.command.load()(stage.config)
        return
    import yaml

    from neureasoner import launch

    file = run_dir / f"{stage.label.replace(' ', '_').replace('/', '_')}.yaml"
    write_text(file, yaml.safe_dump(stage.settings, sort_keys=False, allow_unicode=True))
    launch.accelerate(launch.training_script(stage.command.script), ["--config", str(file)], stage.launch)


def _results(stages: list[Stage], run_dir: Path) -> Path:
    """The file a reader wants first."""
    outs = [s.out for s in reversed(stages) if s.out]
    for name in ("report.html", "results.json"):
        for out in outs:
            if (out / name).is_file():
                return out / name
    return run_dir


def run_recipe(config: RunConfig) -> dict[str, Any]:
    """Run every stage that is not finished. Returns ``{name, out, ran: labels, skipped: labels, results, seconds}``.

    Raises UserError before the first stage starts if any stage is misspelt, and from a stage as the stage does.
    """
    name, run_dir, stages = load_recipe(config)
    from rich.console import Console

    console = Console(highlight=False)
    begin = time.time()
    record = run_dir / RECORD
    done: dict[str, str] = read_json(record) if record.is_file() else {}
    ran: list[str] = []
    skipped: list[str] = []
    for number, stage in enumerate(stages, 1):
        if not ran and done.get(stage.label) == _state(stage):
            skipped.append(stage.label)
            continue
        title = f"[bold]{name} {number}/{len(stages)} · {stage.label}[/bold]"
        console.rule(title, align="left")
        started = time.time()
        _run_stage(stage, run_dir)
        done[stage.label] = _state(stage)
        write_json(record, done)
        ran.append(stage.label)
        console.print(f"[dim]{stage.label}: {time.time() - started:.1f} s[/dim]")
    results = _results(stages, run_dir)
    seconds = round(time.time() - begin, 1)
    if ran:
        console.rule(f"[bold green]{name}: done in {seconds} s[/bold green] · {results}", align="left")
    else:
        console.print(f"{name}: everything is done. Results: {results}", soft_wrap=True)
    return {
        "name": name,
        "out": str(run_dir),
        "ran": ran,
        "skipped": skipped,
        "results": str(results),
        "seconds": seconds,
    }
