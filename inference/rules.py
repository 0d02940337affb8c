"""What a rule is made of: Trigger (when), Action (how), Strength (how much), and the Rule itself (related.md §G).

Values only. ``plan.py`` puts rules into a plan; ``steering.py`` and ``controller.py`` carry them out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.sites import BARE, LAYERED, Site
from neureasoner.traces import OPENED, THINK_CLOSE, THINK_OPEN

EVENTS = ("probe", "random", "oracle")  # evaluated again and again while the response is written
PLACES = ("always", "decode", "boundary", "tokens")  # where a tensor rule acts without being asked
PHASES = ("think", "answer")
SOURCES = (*EVENTS, *PLACES, "start")
ACTIONS = ("force", "add", "add_keep_norm", "scale", "set", "add_logits")
DIRECTED = ("add", "add_keep_norm", "scale")
UNITS = ("raw", "sigma")
TRIGGER_TOKEN = re.compile(r"<[A-Z][A-Z0-9_]*>")
REPAIR_STEPS = 2  # full steps after a block in which no rule closes the thinking: the correction is being written
_WILD = re.compile(r"([a-z_]+):\*")


@dataclass(frozen=True)
class Trigger:
    """When a rule fires. One source, a ``gate`` beside it or alone.

    probe       folder of a probe, relative to the plan file; fires at score > threshold
    threshold   replaces the probe's own calibrated threshold (of a rule without probe: the gate's); infinite: the probe
                is read and never acts
    random      probability of firing each time the rule is evaluated (the random_trigger control)
    oracle      name of a function given at generation, ``fn(RowState) -> bool``
    always      a forced text: whenever it is evaluated; a tensor action: at every position, the prompt's included
    decode      tensor actions: the last position of each forward (the last prompt token, then every response token)
    boundary    tensor actions: only tokens that close a thinking step
    tokens      tensor actions: only these response tokens, each a single one of the tokenizer
    phase       decode and tokens: only while the thinking (``think``) or the answer (``answer``) is being written
    start       forced texts: once, before the first response token
    gate        folder of a failure gate, relative to the plan file: only rows whose question it predicts to fail, asked
                once before the first token; a number is a coin instead. Alone it means ``decode`` (forced: ``start``)
    duration    tensor actions of probe, random, oracle: tokens it lasts, from the next one on; none: to the end
    at_step     evaluated once, when this many thinking steps have closed (1 = after the first); takes no cooldown
    immediate   evaluated after every thinking token; otherwise only when a step closes
    every       evaluated after every so many response tokens instead, while thinking
    min_steps   not evaluated before this many thinking steps have closed
    min_tokens  not evaluated before this many response tokens (a budget, with always and immediate)
    max_tokens  not evaluated after this many response tokens
    cooldown    forced texts: full steps that must close after the last intervention's block, whichever rule made it (at
                least one in effect: the window is empty at the block's end; at least 2 for a text that closes the
                thinking, which would cut the correction off); others: steps after its own effect ended
    max         interventions per response; null: no limit
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
    max: int | None = 1
    consecutive: int = 1
    decode: bool = False
    boundary: bool = False
    start: bool = False
    gate: str | float | None = None
    duration: int | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    every: int | None = None
    tokens: tuple[str, ...] | None = None
    phase: str | None = None

    def __post_init__(self) -> None:
        named = [k for k in SOURCES if _given(getattr(self, k))]
        if len(named) > 1 or not (named or _given(self.gate)):
            got = " and ".join(named) or "none"
            raise UserError(f"a trigger needs exactly one of {', '.join(SOURCES)}; got {got}")
        if self.threshold is not None and self.probe is None and not isinstance(self.gate, str):
            raise UserError("threshold belongs to a probe or gate trigger; name a probe or remove it")
        if self.threshold is not None and np.isnan(self.threshold):
            raise UserError("threshold is not a number, and no score is above it")
        if self.random is not None and not 0 <= self.random <= 1:
            raise UserError(f"random must be a probability between 0 and 1, got {self.random}")
        if isinstance(self.gate, int | float) and not 0 <= self.gate <= 1:
            raise UserError(f"gate must be a folder or a probability between 0 and 1, got {self.gate}")
        low = {"at_step": 1, "min_steps": 0, "min_tokens": 0, "cooldown": 0, "max": 0, "consecutive": 1, "duration": 1}
        low |= {"max_tokens": 1, "every": 1}
        for key, least in low.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"{key} must be at least {least}, got {value}")
        if self.at_step is not None and (self.immediate or self.every or self.consecutive > 1 or self.min_tokens):
            raise UserError("at_step is evaluated once; remove immediate, every, consecutive and min_tokens")
        if self.immediate and self.every:
            raise UserError("immediate is every token; remove it, or every")
        if self.tokens is not None and not self.tokens:
            raise UserError("tokens needs at least one token, such as [Wait]")
        if self.phase not in (None, *PHASES):
            raise UserError(f"phase must be {' or '.join(PHASES)}, got {self.phase!r}")

    def places(self, tokenizer: Any) -> list[int]:
        """Ids of ``tokens``. Raises UserError for a text that is not one token."""
        return [_single(tokenizer, text, "tokens") for text in self.tokens or ()]

    @cached_property
    def source(self) -> str:
        """Which of the sources this trigger reads; ``gate`` if it has only that."""
        return next((k for k in SOURCES if _given(getattr(self, k))), "gate")


@dataclass(frozen=True)
class Action:
    """What a rule does: exactly one of ``force``, ``add``, ``add_keep_norm``, ``scale``, ``set``, ``add_logits``.

    force          a text, token by token. A trigger token such as ``<INTRA>`` must be one token of the tokenizer,
                   unless ``pieces`` allows it to be spelled
    add            ``x + s v``, v the direction, s the strength
    add_keep_norm  the same, then scaled back to the norm of x
    scale          the component of x along v times ``1 - s`` (1 projects it out, negative amplifies it). At ``head``
                   sites with a direction of hidden size: the component of what those heads write
    set            ``x + s (VALUE - x)`` at every channel the site names: 1 sets, 0 leaves
    add_logits     ``{token: bias}``, times s, before sampling
    """

    force: str | None = None
    pieces: bool = False
    add: bool = False
    add_keep_norm: bool = False
    scale: bool = False
    set: float | None = None
    add_logits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        named = [k for k in ACTIONS if _given(getattr(self, k))]
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise UserError(f"an action needs exactly one of {', '.join(ACTIONS)}; got {got}")
        if self.force == "":
            raise UserError("force needs a text")
        if self.pieces and self.force is None:
            raise UserError("pieces belongs to a forced text; remove it")
        if self.add_logits is not None and not self.add_logits:
            raise UserError("add_logits needs tokens and their biases, such as {Wait: -3}")
        if not np.isfinite([self.set or 0.0, *(self.add_logits or {}).values()]).all():
            raise UserError("set and add_logits need finite numbers")

    @cached_property
    def kind(self) -> str:
        """Which of the actions this is."""
        return next(k for k in ACTIONS if _given(getattr(self, k)))

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids of the forced text. Raises UserError for a trigger token that the tokenizer lacks."""
        text, vocab = self.force or "", tokenizer.get_vocab()
        for token in dict.fromkeys(TRIGGER_TOKEN.findall(text)):
            if token not in vocab and not self.pieces:
                raise UserError(
                    f"plan names trigger token {token} that the tokenizer lacks; train with training/sft.py first, "
                    "or set `pieces: true` in the action to force it as several tokens"
                )
        ids = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
        if not ids or tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise UserError(f"the tokenizer cannot spell the plan's text {text!r}; use text it can encode")
        return ids

    def biases(self, tokenizer: Any) -> dict[int, float]:
        """Bias by token id of ``add_logits``. Raises UserError for a text that is not one token."""
        return {_single(tokenizer, t, "add_logits"): float(bias) for t, bias in (self.add_logits or {}).items()}


@dataclass(frozen=True)
class Strength:
    """How much: ``value``, times what else is asked for.

    value     the number itself
    relative  times the norm of what is edited, position by position (a direction of norm 1 then adds that share)
    schedule  ``(response token, factor)`` points, joined by lines, constant outside; the prompt counts as token 0
    per_row   times a number for each prompt, given at generation
    draw      times a number drawn evenly between two for each response, by the seed
    by_score  times the score of the probe (when it fired) or gate that the rule waits for
    unit      ``sigma`` (only ``neuron`` sites): in standard deviations; the direction, whose ``std`` are kept in it, is
              scaled to move its neurons by one of them (root mean square)
    """

    value: float = 1.0
    relative: bool = False
    schedule: tuple[tuple[int, float], ...] = ()
    per_row: bool = False
    unit: str = "raw"
    draw: tuple[float, float] | None = None
    by_score: bool = False

    def __post_init__(self) -> None:
        if not np.isfinite([self.value, *(f for _, f in self.schedule), *(self.draw or ())]).all():
            raise UserError("a strength must be finite")
        if any(a >= b for (a, _), (b, _) in pairwise(self.schedule)) or any(t < 0 for t, _ in self.schedule):
            raise UserError("the schedule's response tokens must rise from 0, such as [[0, 1.0], [100, 0.0]]")
        if self.draw is not None and self.draw[0] >= self.draw[1]:
            raise UserError(f"draw must be [low, high], got {list(self.draw)}")
        if self.unit not in UNITS:
            raise UserError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")

    @property
    def zero(self) -> bool:
        """Whether it is 0 whatever comes: such a rule sets no hook."""
        return not self.value or (bool(self.schedule) and not any(f for _, f in self.schedule))

    def at(self, token: int) -> float:
        """``value`` times the schedule at a response token."""
        if not self.schedule:
            return self.value
        at, factor = zip(*self.schedule, strict=True)
        return self.value * float(np.interp(token, at, factor))


@dataclass(frozen=True)
class Rule:
    """One line of a plan.

    site       where a tensor action writes: site strings, or ``residual:*`` for every block (of the direction); none:
               the direction's own sites
    direction  folder of a Direction, relative to the plan file
    """

    name: str
    trigger: Trigger
    action: Action
    site: tuple[str, ...] = ()
    direction: str | None = None
    strength: Strength = field(default_factory=Strength)

    def __post_init__(self) -> None:
        for text in self.site:
            if wild_kind(text) is None and Site.parse(text).kind in BARE:
                raise UserError(f"site '{text}' cannot be written; use force for tokens and add_logits for logits")
        self._check_action()
        self._check_trigger()

    def _check_action(self) -> None:
        kind = self.action.kind
        if kind in DIRECTED and self.direction is None:
            raise UserError(f"{kind} needs a direction: name its folder")
        if kind not in DIRECTED and self.direction is not None:
            raise UserError(f"{kind} takes no direction; remove it")
        if kind == "set" and not self.site:
            raise UserError("set needs a site, such as neuron:3[1,5,9]")
        if not self.edits and self.site:
            raise UserError(f"{kind} takes no site; remove it")
        if kind == "force" and self.strength != Strength():
            raise UserError("a forced text has no strength; remove it")
        if self.strength.relative and kind in ("scale", "set", "add_logits"):
            raise UserError(f"{kind} takes no relative strength; remove it")
        if self.strength.unit != "raw" and kind not in DIRECTED:
            raise UserError(f"{kind} takes no unit; remove it")
        if self.strength.by_score and self.source != "probe" and not isinstance(self.trigger.gate, str):
            raise UserError("by_score needs the score of a probe or gate; name one in the trigger, or remove it")

    def _check_trigger(self) -> None:
        t, source = self.trigger, self.source
        if t.phase is not None and source not in ("decode", "tokens"):
            raise UserError(f"phase belongs to decode and tokens; remove it beside {source}")
        if self.action.kind == "force":
            if source in ("decode", "boundary", "tokens") or t.duration is not None:
                what = "duration" if t.duration is not None else source
                raise UserError(f"{what} belongs to tensor actions; a forced text takes always, start or an alarm")
            return
        if source == "start":
            raise UserError("start belongs to forced texts; a tensor action takes always, decode, boundary or an alarm")
        if source in PLACES:
            changed = [k for k in _EVENT_KEYS if getattr(t, k) != getattr(Trigger(always=True), k)]
            if changed:
                raise UserError(f"{changed[0]} belongs to probe, random and oracle; remove it beside {source}")

    @cached_property
    def source(self) -> str:
        """The trigger's source; a gate alone is ``start`` for a forced text and ``decode`` otherwise."""
        source = self.trigger.source
        if source != "gate":
            return source
        return "start" if self.action.kind == "force" else "decode"

    @cached_property
    def forces(self) -> bool:
        """Whether it forces a text."""
        return self.action.kind == "force"

    @cached_property
    def closes(self) -> bool:
        """Whether its text ends the thinking."""
        return THINK_CLOSE in (self.action.force or "")

    @cached_property
    def rest(self) -> int:
        """Its cooldown as it is kept: a text that closes the thinking leaves a repair its ``REPAIR_STEPS``."""
        return max(self.trigger.cooldown, REPAIR_STEPS) if self.closes else self.trigger.cooldown

    @cached_property
    def opened(self) -> str | None:
        """Its text behind an opening ``<think>``, if it closes a thinking that it does not open itself."""
        text = self.action.force or ""
        return OPENED + text if self.closes and THINK_OPEN not in text.partition(THINK_CLOSE)[0] else None

    @cached_property
    def edits(self) -> bool:
        """Whether it writes a tensor in the model (not tokens, not logits)."""
        return self.action.kind not in ("force", "add_logits")

    @cached_property
    def evaluated(self) -> bool:
        """Whether it is asked again and again while the response is written."""
        return self.source in EVENTS or (self.forces and self.source == "always")


_EVENT_KEYS = (
    *("at_step", "immediate", "every", "min_steps", "min_tokens", "max_tokens", "cooldown", "max", "consecutive"),
    "duration",
)


def wild_kind(text: str) -> str | None:
    """``residual`` of ``residual:*``; None for a plain site. Raises UserError for a kind without blocks."""
    match = _WILD.fullmatch(text.replace(" ", ""))
    if match is None:
        return None
    if match[1] not in LAYERED:
        raise UserError(f"site '{text}': {match[1]} has no blocks; use one of {', '.join(LAYERED)}")
    return match[1]


def _single(tokenizer: Any, text: str, key: str) -> int:
    vocab = tokenizer.get_vocab()
    ids = [vocab[text]] if text in vocab else tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"{key}: {text!r} is {len(ids)} tokens of this tokenizer; name single tokens")
    return int(ids[0])


def _given(source: Any) -> bool:
    return source is not None and source is not False
