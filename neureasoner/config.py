"""The one configuration dialect: a dataclass, a YAML file, command line overrides.

A field becomes ``--name value``; its ``metadata`` may hold ``help``, ``positional`` (it may be given without its flag)
and ``split`` (False: commas do not separate the values of a list). Precedence: command line, then ``--config FILE``,
then the dataclass's default. Unknown keys are refused by name; a key's type is checked and named. Light on purpose:
this is all that ``--help`` imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from neureasoner.errors import UserError

C = TypeVar("C")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_BOOL = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def check_numbers(config: Any, positive: Sequence[str], not_negative: Sequence[str]) -> None:
    """Raises UserError naming a key whose number cannot be, ``top_p`` included; for stages that sample answers."""
    for key in positive:
        if getattr(config, key) < 1:
            raise UserError(f"key '{key}' must be at least 1, got {getattr(config, key)}")
    for key in not_negative:
        if getattr(config, key) < 0:
            raise UserError(f"key '{key}' must not be negative, got {getattr(config, key)}")
    if not 0 < config.top_p <= 1:
        raise UserError(f"key 'top_p' must lie in (0, 1], got {config.top_p}")


def closest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def _describe(kind: Any) -> str:
    if kind in _NAMES:
        return _NAMES[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe(a) for a in args)
    if origin is dict or kind is dict:
        return "key=value pairs"
    if origin in (list, tuple):
        return f"a list ({_describe(args[0]) if args else 'text'} each)"
    return getattr(kind, "__name__", str(kind))


def _split(values: list[Any]) -> list[Any]:
    """Split texts at commas, but not inside brackets: ``neuron:3[1,5]`` is one site."""
    split: list[Any] = []
    for value in values:
        split.extend(p for p in re.split(r",(?![^\[]*\])", value) if p) if isinstance(value, str) else split.append(
            value
        )
    return split


def coerce(value: Any, kind: Any, split: bool = True) -> Any:
    """``value`` (from YAML or the command line) as type ``kind``. Raises ValueError saying what was expected."""
    wrong = ValueError(f"expected {_describe(kind)}, got {value!r}")
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if type(None) in args and (value is None or value in ("none", "null", "None")):
            return None
        for arm in (a for a in args if a is not type(None)):
            try:
                return coerce(value, arm, split)
            except ValueError:
                continue
        raise wrong
    if origin is Literal:
        for choice in args:
            if value == choice or (isinstance(value, str) and value == str(choice)):
                return choice
        raise wrong
    if kind is dict or origin is dict:
        return _dict(value, args or (str, Any), wrong)
    if origin in (list, tuple) or kind in (list, tuple):
        if value is None or isinstance(value, dict):
            raise wrong
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        values = _split(values) if split else values
        each = args[0] if args else Any
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(values) != len(args):
                raise ValueError(f"expected {len(args)} values, got {len(values)}")
            return tuple(coerce(v, a) for v, a in zip(values, args, strict=True))
        items = [coerce(v, each) for v in values]
        return tuple(items) if tuple in (origin, kind) else items
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise wrong
        value = value[0]
    return _scalar(value, kind, wrong)


def _dict(value: Any, args: tuple[Any, ...], wrong: ValueError) -> dict[Any, Any]:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        if not all(isinstance(v, str) and "=" in v for v in value):
            raise wrong
        value = dict(v.split("=", 1) for v in _split(value))
    if not isinstance(value, Mapping):
        raise wrong
    return {coerce(k, args[0]): coerce(v, args[1]) for k, v in value.items()}


def _scalar(value: Any, kind: Any, wrong: ValueError) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _BOOL:
            return _BOOL[value.lower()]
        raise wrong
    if isinstance(value, bool) or value is None or isinstance(value, Mapping):
        raise wrong
    if kind in (str, Path):
        return kind(str(value))
    if kind in (int, float):
        try:
            # YAML reads 1e-4 as text and 1e3 is a whole number to everybody else
            number = float(value)
            return kind(value) if kind is float or isinstance(value, int) else _whole(value, number)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
    return value


def _whole(value: Any, number: float) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d[\d_]*", value.strip()):
        return int(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build ``cls`` from a mapping. ``where`` begins every message (a file, a stage).

    Raises UserError naming an unknown key (and the closest known one), a missing key, a wrong type, or what
    ``__post_init__`` refused.
    """
    return _build(cls, values, f"{where}: " if where else "", lambda name: f"key '{name}'")


def _build(cls: type[C], values: Mapping[str, Any], where: str, name_of: Any) -> C:
    known, hints = _fields(cls), get_type_hints(cls)
    settled = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{where}{name_of(key)} is unknown{closest(name, known)}")
        try:
            settled[name] = coerce(value, hints[name], known[name].metadata.get("split", True))
        except ValueError as e:
            raise UserError(f"{where}{name_of(name)}: {e}") from None
        if name == "seed" and isinstance(settled[name], int) and settled[name] < 0:
            raise UserError(f"{where}{name_of(name)} must be 0 or more, got {settled[name]}")
    missing = [name_of(n) for n, f in known.items() if _required(f) and n not in settled]
    if missing:
        raise UserError(f"{where}{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required")
    try:
        return cls(**settled)
    except ValueError as e:
        raise UserError(f"{where}{e}") from None


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file. Raises UserError naming the file and line."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML ({getattr(e, 'problem', None) or e})") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Parse a YAML file that holds a mapping (an empty file is an empty one). Raises UserError."""
    value = read_yaml(path)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: expected key: value pairs, got {type(value).__name__}")
    return value or {}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('neureasoner ')}: {message}")


def _default_text(f: dataclasses.Field[Any]) -> str:
    if _required(f):
        return "(required)"
    value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    if value in (None, "", [], (), {}):
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f"(default: {text})"


def build_parser(cls: type, prog: str, description: str | None = None) -> argparse.ArgumentParser:
    """The argument parser of a configuration class; values stay text until ``parse`` checks them."""
    parser = _Parser(prog, description=description or (cls.__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below")
    hints = get_type_hints(cls)
    for name, f in _fields(cls).items():
        flags = list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))
        bare = "; the flag may be left out" if f.metadata.get("positional") else ""
        text = f"{f.metadata.get('help', '')}{bare} {_default_text(f)}".strip().replace("%", "%%")
        expected = _describe(hints[name])
        many = "a list" in expected or "pairs" in expected
        action, nargs = ("extend", "*") if many else ("store", "?" if hints[name] is bool else None)
        options: dict[str, Any] = {"const": "true"} if nargs == "?" else {}
        if not many:
            options["metavar"] = {int: "N", float: "X", bool: "true|false"}.get(hints[name], "VALUE")
        else:
            options["metavar"] = "VALUE"
        parser.add_argument(
            *flags, dest=name, action=action, nargs=nargs, default=argparse.SUPPRESS, help=text, **options
        )
    return parser


def _positionals(cls: type, rest: Sequence[str], prog: str, known: Iterable[str]) -> dict[str, str]:
    """Assign what is left of the command line to the positional fields. Raises UserError for anything else."""
    names = [n for n, f in _fields(cls).items() if f.metadata.get("positional")]
    flags = [r for r in rest if r.startswith("--")]
    if flags:
        flag = flags[0].split("=")[0]
        hint = closest(flag.replace("_", "-"), [f"--{k.replace('_', '-')}" for k in known])
        raise UserError(f"{prog}: option '{flag}' is unknown{hint}")
    if len(rest) > len(names):
        raise UserError(f"{prog}: argument '{rest[len(names)]}' was not expected; settings are given as --name value")
    return dict(zip(names, rest, strict=False))


def parse(cls: type[C], argv: Sequence[str], prog: str, description: str | None = None) -> C:
    """Read the command line (and ``--config``) into ``cls``. ``--help`` prints and exits. Raises UserError."""
    parser = build_parser(cls, prog, description)
    short = prog.removeprefix("neureasoner ")
    space, rest = parser.parse_known_args(list(argv))
    given = vars(space)
    path = given.pop("config", None)
    given = {**_positionals(cls, rest, short, [*_fields(cls), "config"]), **given}
    values: dict[str, Any] = {}
    if path is not None:
        values = read_mapping(path)
        for key, value in values.items():  # named as the file's, before the command line is mixed in
            _check_key(cls, str(key), value, str(path))
        values = {str(k).replace("-", "_"): v for k, v in values.items()}
    return _build(cls, {**values, **given}, f"{short}: ", lambda name: f"--{name.replace('_', '-')}")


def _check_key(cls: type, key: str, value: Any, where: str) -> None:
    known, name = _fields(cls), key.replace("-", "_")
    if name not in known:
        raise UserError(f"{where}: key '{key}' is unknown{closest(name, known)}")
    try:
        coerce(value, get_type_hints(cls)[name], known[name].metadata.get("split", True))
    except ValueError as e:
        raise UserError(f"{where}: key '{key}': {e}") from None
