"""Plans: what to watch, when to act, what to do (core.md §1.10; related.md §G). A plan is a value, written as YAML.

A rule is a trigger and an action. Rules are ordered and order is priority: when several fire in one step, the first
wins and the others are logged as suppressed. Controls (random trigger, oracle, another probe) are the same plan with
the sources of its triggers replaced, so they share its budgets, cooldowns and texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from neureasoner.artifacts import write_text
from neureasoner.errors import UserError

PLAN_FILE = "plan.yaml"
SOURCES = ("probe", "random", "oracle", "always")
TRIGGER_TOKEN = re.compile(r"<[A-Z][A-Z0-9_]*>")

T = TypeVar("T")


@dataclass(frozen=True)
class Trigger:
    """When a rule fires. Exactly one source: ``probe``, ``random``, ``oracle`` or ``always``.

    probe       folder of a probe, relative to the plan file; fires at score > threshold
    threshold   replaces the probe's own calibrated threshold
    random      probability of firing each time the rule is evaluated (the random_trigger control)
    oracle      name of a function given at generation, ``fn(RowState) -> bool``
    always      fires whenever it is evaluated
    at_step     evaluated once, when this many thinking steps have closed (1 = after the first); takes no cooldown
    immediate   evaluated after every thinking token; otherwise only when a step closes
    min_steps   not evaluated before this many thinking steps have closed
    cooldown    full steps that must close after the last intervention's block, whichever rule made it (at least one
                in effect: the window is empty at the block's end)
    max         interventions per response
    consecutive evaluations in a row that must be positive before the rule fires
    """

    probe: str | None = None
    threshold: float | None = None
    random: float | None = None
    oracle: str | None = None
    always: bool = False
    at_step: int | None = None
    immediate: bool = False
    min_steps: int = 0
    cooldown: int = 1
    max: int = 1
    consecutive: int = 1

    def __post_init__(self) -> None:
        named = [k for k in SOURCES if _given(getattr(self, k))]
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise UserError(f"a trigger needs exactly one of {', '.join(SOURCES)}; got {got}")
        if self.threshold is not None and self.probe is None:
            raise UserError("threshold belongs to a probe trigger; name a probe or remove it")
        if self.random is not None and not 0 <= self.random <= 1:
            raise UserError(f"random must be a probability between 0 and 1, got {self.random}")
        low = {"at_step": 1, "min_steps": 0, "cooldown": 0, "max": 0, "consecutive": 1}
        for key, least in low.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"{key} must be at least {least}, got {value}")
        if self.at_step is not None and (self.immediate or self.consecutive > 1):
            raise UserError("at_step is evaluated once; remove immediate and consecutive")

    @property
    def source(self) -> str:
        """Which of probe, random, oracle, always this trigger reads."""
        return next(k for k in SOURCES if _given(getattr(self, k)))


@dataclass(frozen=True)
class Action:
    """What a rule does: force a text, token by token.

    A trigger token such as ``<INTRA>`` must be one token of the tokenizer, unless ``pieces`` allows it to be spelled.
    """

    force: str
    pieces: bool = False

    def __post_init__(self) -> None:
        if not self.force:
            raise UserError("force needs a text")

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids of the text. Raises UserError for a trigger token that the tokenizer lacks."""
        vocab = tokenizer.get_vocab()
        for token in dict.fromkeys(TRIGGER_TOKEN.findall(self.force)):
            if token not in vocab and not self.pieces:
                raise UserError(
                    f"plan names trigger token {token} that the tokenizer lacks; train with training/sft.py first, "
                    "or set `pieces: true` in the action to force it as several tokens"
                )
        ids = [int(i) for i in tokenizer.encode(self.force, add_special_tokens=False)]
        if not ids or tokenizer.decode(ids, skip_special_tokens=False) != self.force:
            raise UserError(f"the tokenizer cannot spell the plan's text {self.force!r}; use text it can encode")
        return ids


@dataclass(frozen=True)
class Rule:
    """One line of a plan."""

    name: str
    trigger: Trigger
    action: Action


@dataclass(frozen=True)
class Plan:
    """Ordered rules. ``folder`` is where relative probe paths start; it is not part of the value."""

    name: str
    rules: tuple[Rule, ...] = ()
    folder: Path = field(default=Path("."), compare=False)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for rule in self.rules:
            if rule.name in seen:
                raise UserError(f"plan {self.name}: two rules are named {rule.name}; names must be unique")
            seen.add(rule.name)

    @property
    def names(self) -> list[str]:
        """The rules' names, in order of priority."""
        return [r.name for r in self.rules]

    @property
    def probe_paths(self) -> list[str]:
        """Probe folders as written, each once."""
        return list(dict.fromkeys(r.trigger.probe for r in self.rules if r.trigger.probe is not None))

    def rule(self, name: str) -> Rule:
        """The rule of that name. Raises UserError."""
        self._known([name])
        return next(r for r in self.rules if r.name == name)

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.names:
                raise UserError(f"plan {self.name} has no rule {name!r}; it has {', '.join(self.names) or 'none'}")

    def select(self, names: Iterable[str]) -> Plan:
        """The same plan with only these rules, in the plan's order."""
        keep = list(names)
        self._known(keep)
        return replace(self, rules=tuple(r for r in self.rules if r.name in keep))

    def replace_triggers(self, changes: Mapping[str, Mapping[str, Any]]) -> Plan:
        """Change triggers by rule name, e.g. ``{"intra": {"random": 0.05}}`` or ``{"intra": {"probe": "other"}}``.

        Naming another source drops the old one (and its threshold); everything not named stays, so that a control keeps
        the rule's budget and cooldown.
        """
        self._known(changes)
        rules = []
        for rule in self.rules:
            change = dict(changes.get(rule.name, {}))
            if any(k in SOURCES for k in change):
                change = {"probe": None, "threshold": None, "random": None, "oracle": None, "always": False, **change}
            _check_keys(Trigger, change, f"plan {self.name}, rule {rule.name}")
            rules.append(replace(rule, trigger=replace(rule.trigger, **change)))
        return replace(self, rules=tuple(rules))

    def fit_windows(self, probes: Mapping[str, Any]) -> Plan:
        """Set ``at_step`` of every instance rule to the number of steps its probe was fitted on."""
        changes = {}
        for rule in self.rules:
            probe = probes.get(rule.trigger.probe or "")
            if probe is not None and rule.trigger.at_step is not None:
                changes[rule.name] = {"at_step": int(probe.features.window)}
        return self.replace_triggers(changes)

    def forced_ids(self, tokenizer: Any) -> dict[str, list[int]]:
        """Token ids each rule forces, by rule name. Raises UserError for text the tokenizer lacks."""
        return {r.name: r.action.ids(tokenizer) for r in self.rules}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults left out."""
        return {
            "name": self.name,
            "rules": [
                {"name": r.name, "trigger": _non_default(r.trigger), "action": _non_default(r.action)}
                for r in self.rules
            ],
        }

    @classmethod
    def from_dict(cls, value: Any, where: str = "plan", folder: str | Path = ".") -> Plan:
        """Inverse of ``to_dict``. Raises UserError naming the place and an unknown or missing key."""
        _check_keys(cls, value, where, hidden={"folder"})
        rules = value.get("rules")
        rules = [] if rules is None else rules
        if not isinstance(rules, list):
            raise UserError(f"{where}: rules must be a list")
        built = []
        for i, row in enumerate(rules):
            at = f"{where}, rules[{i}]"
            _check_keys(Rule, row, at)
            trigger = _build(Trigger, row["trigger"], f"{at}.trigger")
            action = _build(Action, row["action"], f"{at}.action")
            built.append(Rule(str(row["name"]), trigger, action))
        return cls(str(value["name"]), tuple(built), Path(folder))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file (or the ``plan.yaml`` of a folder)."""
        path = Path(path)
        if path.is_dir():
            path = path / PLAN_FILE
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such plan file") from None
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            at = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"{path}{at}: not YAML ({getattr(e, 'problem', None) or e})") from None
        return cls.from_dict(value, str(path), path.parent)

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, atomically."""
        write_text(path, yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """Writes text with line breaks on one line, quoted."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def _given(source: Any) -> bool:
    return source is not None and source is not False


def _non_default(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}


def _check_keys(cls: type, value: Any, where: str, hidden: set[str] | None = None) -> None:
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


def _build(cls: type[T], value: Any, where: str) -> T:
    """Build a flat dataclass from a mapping, checking keys and types."""
    _check_keys(cls, value, where)
    checked: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in value:
            continue
        v, kinds = value[f.name], str(f.type)
        ok = v is None and "None" in kinds
        ok = ok or ("bool" in kinds and isinstance(v, bool))
        ok = ok or ("str" in kinds and isinstance(v, str))
        ok = ok or ("int" in kinds and isinstance(v, int) and not isinstance(v, bool))
        ok = ok or ("float" in kinds and isinstance(v, int | float) and not isinstance(v, bool))
        if not ok:
            raise UserError(f"{where}: {f.name} must be {kinds.replace(' | None', '')}, got {v!r}")
        checked[f.name] = v
    try:
        return cls(**checked)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
