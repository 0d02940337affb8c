"""Rules as plain values and back, with errors that name the place. Used by ``plan.py`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar

import yaml

from neureasoner.errors import UserError
from neureasoner.inference.rules import Action, Rule, Strength, Trigger

T = TypeVar("T")
FORMS = {"Mapping": "{token: number}", "tuple[str": "a list of texts", "tuple[float": "[number, number]"}


class Dumper(yaml.SafeDumper):
    """Writes text with line breaks on one line, quoted."""


Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Plain values, defaults left out."""
    out: dict[str, Any] = {"name": rule.name, "trigger": non_default(rule.trigger), "action": non_default(rule.action)}
    if rule.site:
        out["site"] = rule.site[0] if len(rule.site) == 1 else list(rule.site)
    if rule.direction is not None:
        out["direction"] = rule.direction
    if rule.strength != Strength():
        strength = non_default(rule.strength)
        if "schedule" in strength:
            strength["schedule"] = [list(point) for point in strength["schedule"]]
        out["strength"] = strength["value"] if set(strength) == {"value"} else strength
    return out


def rule_from_dict(row: Any, at: str) -> Rule:
    """Inverse of ``rule_to_dict``. Raises UserError naming the place."""
    check_keys(Rule, row, at)
    trigger = build(Trigger, row["trigger"], f"{at}.trigger")
    action = build(Action, row["action"], f"{at}.action")
    strength = _strength(row.get("strength", 1.0), f"{at}.strength")
    direction = row.get("direction")
    if direction is not None and not isinstance(direction, str):
        raise UserError(f"{at}: direction must be a folder, got {direction!r}")
    try:
        return Rule(str(row["name"]), trigger, action, _sites(row.get("site"), at), direction, strength)
    except UserError as e:
        raise UserError(f"{at} ({row['name']}): {e}") from None


def _sites(value: Any, at: str) -> tuple[str, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(s, str) for s in listed):
        raise UserError(f"{at}: site must be a site such as residual:3 or a list of them, got {value!r}")
    return tuple(s.replace(" ", "") for s in listed)


def _strength(value: Any, where: str) -> Strength:
    """A number, or a mapping of the fields of ``Strength``."""
    row = value if isinstance(value, Mapping) else {"value": value}
    points = row.get("schedule", [])
    for point in points if isinstance(points, list) else [None]:
        if not (isinstance(point, list) and len(point) == 2 and _is_number(point[1]) and _is_int(point[0])):
            raise UserError(f"{where}: schedule must be [[token, factor], ...], got {points!r}")
    try:
        built = build(Strength, {k: v for k, v in row.items() if k != "schedule"}, where)
        return replace(built, schedule=tuple((t, float(f)) for t, f in points))
    except UserError as e:
        raise UserError(str(e) if str(e).startswith(where) else f"{where}: {e}") from None


def non_default(value: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    given = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}


def check_keys(cls: type, value: Any, where: str, hidden: set[str] | None = None) -> None:
    """Check that a mapping names fields of a dataclass only, and every one without a default."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected keys and values, got {type(value).__name__}")
    known = [f for f in fields(cls) if f.name not in (hidden or set())]
    for key in value:
        if key not in {f.name for f in known}:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(f.name for f in known)}")
    for f in known:
        if f.default is MISSING and f.default_factory is MISSING and f.name not in value:
            raise UserError(f"{where}: key {f.name!r} is missing")


def build(cls: type[T], value: Any, where: str) -> T:
    """Build a flat dataclass from a mapping, checking keys and types."""
    check_keys(cls, value, where)
    checked: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in value:
            continue
        v, kinds = value[f.name], str(f.type)
        ok = v is None and "None" in kinds
        ok = ok or ("bool" in kinds and isinstance(v, bool))
        ok = ok or ("str" in kinds.split("[")[0] and isinstance(v, str))
        ok = ok or ("int" in kinds and _is_int(v))
        ok = ok or ("float" in kinds.split("[")[0] and _is_number(v))
        ok = ok or ("Mapping" in kinds and _is_bias(v))
        ok = ok or ("tuple[str" in kinds and isinstance(v, list) and all(isinstance(x, str) for x in v))
        ok = ok or ("tuple[float, float]" in kinds and isinstance(v, list) and [*map(_is_number, v)] == [True, True])
        if not ok:
            form = next((form for kind, form in FORMS.items() if kind in kinds), "")
            form = form or kinds.replace(" | None", "").replace(" | ", " or ")
            raise UserError(f"{where}: {f.name} must be {form}, got {v!r}")
        checked[f.name] = tuple(v) if isinstance(v, list) else v
    try:
        return cls(**checked)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _is_int(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _is_number(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool)


def _is_bias(v: Any) -> bool:
    return isinstance(v, Mapping) and all(isinstance(k, str) and _is_number(x) for k, x in v.items())
