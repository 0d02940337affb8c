"""Plans: what to watch, when to act, what to do (core.md §1.10; related.md §G). A plan is a value, written as YAML.

Rules are ordered and order is priority: when several forced texts are due in one step, the first wins and the others
are logged as suppressed, but a text that closes the thinking comes after all that do not; tensor rules that write one
site act in this order, if ``conflicts`` says so. Controls (``controls.py``) are the same plan with the sources of its
triggers, its signs or its directions replaced, so they share its budgets, cooldowns and texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from neureasoner.artifacts import write_text
from neureasoner.errors import UserError
from neureasoner.inference.plan_yaml import Dumper, check_keys, rule_from_dict, rule_to_dict
from neureasoner.inference.rules import SOURCES, TRIGGER_TOKEN, Action, Rule, Strength, Trigger, wild_kind
from neureasoner.run import HOMES, shipped
from neureasoner.sites import Site

__all__ = ["PLAN_FILE", "SOURCES", "TRIGGER_TOKEN", "Action", "Plan", "Rule", "Strength", "Trigger"]

PLAN_FILE = "plan.yaml"
POLICIES = ("order", "refuse")
_NO_SOURCE = {"threshold": None} | {k: None if k in ("probe", "random", "oracle", "tokens") else False for k in SOURCES}


@dataclass(frozen=True)
class Plan:
    """Ordered rules.

    folder     where relative probe, direction and gate paths start; it is not part of the value
    conflicts  what two rules that write one tensor site, or bias one token's logit, mean: ``order`` (one after the
               other, as they stand here) or ``refuse``; without it they are refused too
    """

    name: str
    rules: tuple[Rule, ...] = ()
    folder: Path = field(default=Path("."), compare=False)
    conflicts: str | None = None

    def __post_init__(self) -> None:
        if self.conflicts not in (None, *POLICIES):
            raise UserError(f"plan {self.name}: conflicts must be {' or '.join(POLICIES)}, got {self.conflicts!r}")
        seen: set[str] = set()
        for rule in self.rules:
            if rule.name in seen:
                raise UserError(f"plan {self.name}: two rules are named {rule.name}; names must be unique")
            seen.add(rule.name)

    @property
    def names(self) -> list[str]:
        """The rules' names, in the plan's order."""
        return [r.name for r in self.rules]

    @property
    def priority(self) -> list[str]:
        """The rules' names as they win against each other at one boundary: texts that close the thinking come last."""
        return [r.name for r in sorted(self.rules, key=lambda r: r.closes)]

    @property
    def probe_paths(self) -> list[str]:
        """Probe folders as written, each once."""
        return list(dict.fromkeys(r.trigger.probe for r in self.rules if r.trigger.probe is not None))

    @property
    def direction_paths(self) -> list[str]:
        """Direction folders as written, each once."""
        return list(dict.fromkeys(r.direction for r in self.rules if r.direction is not None))

    @property
    def gate_paths(self) -> list[str]:
        """Gate folders as written, each once."""
        return list(dict.fromkeys(r.trigger.gate for r in self.rules if isinstance(r.trigger.gate, str)))

    @property
    def files(self) -> list[Path]:
        """The files of its directions and gates, where they lie."""
        found = [self.folder / n / f"direction.{end}" for n in self.direction_paths for end in ("json", "safetensors")]
        return found + [self.folder / n / f"gate.{end}" for n in self.gate_paths for end in ("json", "safetensors")]

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
        the rule's budget and cooldown (and a ``gate``, unless that is named too).
        """
        self._known(changes)
        rules = []
        for rule in self.rules:
            change = dict(changes.get(rule.name, {}))
            if any(k in SOURCES for k in change):
                change = _NO_SOURCE | change
            if "gate" in change:
                change = {"threshold": None} | change
            check_keys(Trigger, change, f"plan {self.name}, rule {rule.name}")
            rules.append(replace(rule, trigger=replace(rule.trigger, **change)))
        return replace(self, rules=tuple(rules))

    def fit_windows(self, probes: Mapping[str, Any]) -> Plan:
        """Every instance rule as its probe is to be read: the paper's kind once, ``at_step`` the number of steps it was
        fitted on; an exit at every step, ``min_steps`` the first it was fitted on (or later, if the rule says so)."""
        changes: dict[str, dict[str, Any]] = {}
        for rule in self.rules:
            probe, t = probes.get(rule.trigger.probe or ""), rule.trigger
            if probe is None or probe.features.level != "instance":
                continue
            if probe.features.exit_from:
                changes[rule.name] = {"at_step": None, "min_steps": max(int(probe.features.exit_from), t.min_steps)}
            else:
                once = {"min_steps": 0, "min_tokens": 0, "immediate": False, "every": None, "consecutive": 1}
                changes[rule.name] = {"at_step": int(probe.features.window)} | (once if t.at_step is None else {})
        return self.replace_triggers(changes)

    def forced_ids(self, tokenizer: Any) -> dict[str, list[int]]:
        """Token ids each rule forces, by rule name. Raises UserError for text the tokenizer lacks."""
        return {r.name: r.action.ids(tokenizer) for r in self.rules if r.forces}

    def opened_ids(self, tokenizer: Any) -> dict[str, list[int]]:
        """The same of texts that close a thinking, for where nothing has opened it."""
        return {r.name: replace(r.action, force=r.opened).ids(tokenizer) for r in self.rules if r.opened}

    def check_conflicts(self, written: Mapping[str, Iterable[str | Site]]) -> None:
        """Raises UserError if two rules write one site without the policy ``order``, or one rule does so twice.

        ``written``: sites by rule.
        """
        for name, sites in written.items():
            for a, b in combinations(map(Site.parse, sites), 2):
                if (a.kind, a.layer) == (b.kind, b.layer) and _share(a.indices, b.indices):
                    raise UserError(f"plan {self.name}: rule {name} writes {a} and {b}, which overlap; join them")
        if self.conflicts == "order":
            return
        for (one, first), (two, second) in combinations(written.items(), 2):
            for a in map(Site.parse, first):
                for b in map(Site.parse, second):
                    if (a.kind, a.layer) == (b.kind, b.layer) and _share(a.indices, b.indices):
                        raise UserError(
                            f"plan {self.name}: rules {one} and {two} both write {a}, and the plan {self._says}; set "
                            "`conflicts: order` to have them act one after the other, or drop one"
                        )

    def check_logit_conflicts(self, biased: Mapping[str, Iterable[Any]]) -> None:
        """Raises UserError if two rules bias one token's logit without the policy ``order`` (they add up).

        ``biased``: tokens by rule, as texts or as ids.
        """
        for (one, first), (two, second) in combinations(biased.items(), 2):
            both = set(first) & set(second)
            if both and self.conflicts != "order":
                raise UserError(
                    f"plan {self.name}: rules {one} and {two} both bias the logit of {min(map(repr, both))}, and the "
                    f"plan {self._says}; set `conflicts: order` to have their biases add up, or drop one"
                )

    @property
    def _says(self) -> str:
        return "says `conflicts: refuse`" if self.conflicts else "has no policy"

    def check_alive(self) -> None:
        """Raises UserError naming a rule that can never fire, as far as the plan alone tells."""
        for rule in self.rules:
            reason = _dead(rule, self.rules)
            if reason:
                raise UserError(f"plan {self.name}, rule {rule.name} can never fire: {reason}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults left out."""
        policy = {} if self.conflicts is None else {"conflicts": self.conflicts}
        return {"name": self.name, **policy, "rules": [rule_to_dict(r) for r in self.rules]}

    @classmethod
    def from_dict(cls, value: Any, where: str = "plan", folder: str | Path = ".") -> Plan:
        """Inverse of ``to_dict``. Raises UserError naming the place and an unknown or missing key.

        What is decided without a model is decided here: two rules at one site, a rule that can never fire.
        """
        check_keys(cls, value, where, hidden={"folder"})
        rules = value.get("rules")
        rules = [] if rules is None else rules
        if not isinstance(rules, list):
            raise UserError(f"{where}: rules must be a list")
        built = tuple(rule_from_dict(row, f"{where}, rules[{i}]") for i, row in enumerate(rules))
        plan = cls(str(value["name"]), built, Path(folder), value.get("conflicts"))
        try:
            plan.check_conflicts({r.name: [s for s in r.site if wild_kind(s) is None] for r in built})
            plan.check_logit_conflicts({r.name: r.action.add_logits or () for r in built})
            plan.check_alive()
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        return plan

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file, the ``plan.yaml`` of a folder, or a shipped plan by its name."""
        path = find_plan(path)
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = sorted(p.stem for home in HOMES for p in (home / "configs" / "plans").glob("*.yaml"))
            raise UserError(f"{path}: no such plan file, nor is it one of {', '.join(dict.fromkeys(known))}") from None
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            at = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"{path}{at}: not YAML ({getattr(e, 'problem', None) or e})") from None
        return cls.from_dict(value, str(path), path.parent)

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML, atomically."""
        write_text(path, yaml.dump(self.to_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True))


def find_plan(name: str | Path) -> Path:
    """The file that ``name`` means: a path, a folder with a plan in it, or a shipped plan."""
    path = Path(shipped(str(name)))
    if path.is_dir():
        return path / PLAN_FILE
    by_name = Path(shipped(f"configs/plans/{name}.yaml"))
    return by_name if not path.exists() and path.name == str(name) and by_name.is_file() else path


def _share(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
    """Whether two sites of one kind and block have a channel in common; None means all of them."""
    return a is None or b is None or not set(a).isdisjoint(b)


def _first(rule: Rule) -> int | None:
    """After how many steps a rule that forces its text whatever happens does so first; None if it may not."""
    t = rule.trigger
    if not rule.forces or t.gate is not None or t.max == 0 or t.consecutive > 1 or t.min_tokens or t.max_tokens:
        return None
    if rule.source == "start":
        return 0
    return (t.at_step or max(1, t.min_steps)) if rule.source == "always" and not t.every else None


def _closed_by(rule: Rule) -> tuple[float, float]:
    """After how many steps, and response tokens, a rule left alone has closed the thinking; infinite: it may not."""
    t, steps, tokens = rule.trigger, math.inf, math.inf
    if rule.closes:
        first = _first(rule)
        steps = math.inf if first is None else first
        always = rule.source == "always" and t.immediate and t.max_tokens is None
        if always and not (t.gate is not None or t.max == 0 or t.consecutive > 1 or t.min_steps):
            tokens = max(1, t.min_tokens)
    return steps, tokens


def _shadows(first: Rule, rule: Rule) -> bool:
    """Whether ``first``, evaluated before, forces its text at every step at which ``rule`` could."""
    a, b = first.trigger, rule.trigger
    if not (first.forces and rule.forces and rule.evaluated and first.source == "always"):
        return False
    if a.gate is not None or a.max is not None or a.consecutive > 1 or a.at_step is not None or b.at_step is not None:
        return False
    if a.every or a.max_tokens is not None:
        return False
    least = all(getattr(a, key) <= getattr(b, key) for key in ("min_steps", "min_tokens", "cooldown"))
    return least and (a.immediate or not (b.immediate or b.every))


def _count(n: float, noun: str) -> str:
    return f"{n:.0f} {noun}{'s' * (n != 1)}"


def _dead(rule: Rule, rules: tuple[Rule, ...]) -> str:
    """Why a rule can never fire; empty if it may."""
    t = rule.trigger
    if t.max == 0:
        return "max is 0; raise it or remove the rule"
    if t.random == 0 or t.gate == 0:
        return f"{'random' if t.random == 0 else 'gate'} is a coin of probability 0; raise it or remove the rule"
    if t.threshold is not None and t.threshold >= 1 and t.probe is None:
        return f"a gate's score is at most 1 and never above threshold {t.threshold}; lower it"
    if t.at_step is not None and t.min_steps > t.at_step:
        return f"at_step is {t.at_step}, before min_steps {t.min_steps}; remove min_steps"
    if t.max_tokens is not None and t.max_tokens < max(t.min_tokens, t.every or 0):
        return f"max_tokens is {t.max_tokens}, before it is first evaluated; raise it"
    for other in rules:
        steps, tokens = _closed_by(other)
        alone = not any(r.forces for r in rules if r is not other and r is not rule)  # else one may come in between
        if other is not rule and rule.evaluated and alone:
            if max(t.min_steps, t.at_step or 0) > steps:
                return f"rule {other.name} closes the thinking after {_count(steps, 'step')}, and it waits for more"
            if t.min_tokens > tokens:
                return f"rule {other.name} closes the thinking after {_count(tokens, 'token')}, and it waits for more"
        first = _first(other)
        if other is rule or first is None:
            continue
        before = rules.index(other) < rules.index(rule)
        earlier = before if other.closes == rule.closes else rule.closes  # at one boundary a closing text comes last
        if rule.forces and t.at_step is not None and (first < t.at_step or (first == t.at_step and earlier)):
            return f"rule {other.name} always comes first, and at_step is not evaluated after an intervention"
        if rule.source == "start" and first == 0 and before:
            return f"rule {other.name} always comes first, and start is evaluated once"
        if earlier and _shadows(other, rule):
            return f"rule {other.name} forces its text wherever this one is evaluated, and comes first"
        if first == 0 and other.closes and (rule.evaluated or rule.source == "boundary" or t.phase == "think"):
            return f"rule {other.name} closes the thinking before the first token"
    return ""
