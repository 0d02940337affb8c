"""What the controller remembers of one response while it is being written (core.md §1.10).

Words: a step is a paragraph of the thinking, closed by its separator. A block is what an intervention starts: the
forced text up to the next separator. Steps before the end of a block leave the probes' window, because the block is not
reasoning and would trigger again; a cooldown counts the full steps closed after it.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neureasoner.inference.rules import Rule
from neureasoner.probes.features import MIN_TOKENS
from neureasoner.thinking import OPEN


@dataclass
class RowState:
    """One row of a batch. Oracles get it as their argument: read it, do not change it.

    index    place of the prompt in the caller's list
    problem  the Problem, when the caller gave one
    begins   how its prompt leaves the thinking (``neureasoner.thinking``)
    tokens   response ids so far; ``forced[t]`` says that token t was forced
    bounds   [0, end of step 0, ..., end of the last closed step], in response tokens
    asked    (score, threshold) of each rule's gate
    acting   evaluated tensor rules whose effect lasts; ``rested``: steps closed when it last ended
    probe_tokens  tokens read beside the response, by a baseline that asks for the answer (``baselines/``)
    """

    index: int
    segmenter: Any
    tokenizer: Any = None
    problem: Any = None
    seed: int = 0
    begins: str = OPEN
    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    streak: Counter[str] = field(default_factory=Counter)
    running: dict[str, Any] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    done: bool = False
    base: int = 0
    in_block: bool = False
    full_steps: int | None = None
    closed: bool = False
    closed_block: bool = False
    asked: dict[str, tuple[float, float]] = field(default_factory=dict)
    acting: set[str] = field(default_factory=set)
    rested: dict[str, int] = field(default_factory=dict)
    probe_tokens: int = 0
    _coins: dict[str, np.random.Generator] = field(default_factory=dict)

    @property
    def bounds(self) -> list[int]:
        """Ends of the closed steps, with a leading 0."""
        return list(self.segmenter.bounds)

    @property
    def steps(self) -> int:
        """Thinking steps closed so far."""
        return len(self.segmenter.bounds) - 1

    @property
    def thinking(self) -> bool:
        """Whether the last token belongs to the thinking."""
        return bool(self.segmenter.in_thinking)

    @property
    def text(self) -> str:
        """The response so far."""
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def push(self, token: int, eos: set[int]) -> None:
        """Take in the token that was just read. ``forced`` was set when it was queued."""
        self.tokens.append(token)
        if len(self.forced) < len(self.tokens):
            self.forced.append(False)
        if token in eos:
            self.done, self.closed, self.closed_block = True, False, False
            self.queue.clear()
            return
        self.closed = bool(self.segmenter.push(token)) and self.thinking
        self.closed_block = self.closed and self.in_block and not self.queue
        if self.closed_block:
            self.in_block, self.base, self.full_steps = False, len(self.tokens), 0
        elif self.closed and not self.in_block and self.full_steps is not None:
            self.full_steps += 1

    def pop(self) -> int | None:
        """The id to force next, if any."""
        if self.done or not self.queue:
            return None
        self.forced.append(True)
        return self.queue.popleft()

    def due(self, rule: Rule) -> bool:
        """Whether a rule is to be evaluated after the last token."""
        t = rule.trigger
        if self.done or self.queue or not self.tokens or not self.thinking or not rule.evaluated:
            return False
        if self.barred(rule) or rule.name in self.acting:
            return False
        if t.max is not None and self.fired[rule.name] >= t.max:
            return False
        if t.random is not None and self.silent(rule):
            return False  # a probe would be silent here, and the coin takes its place
        if t.at_step is not None:
            # After an intervention the first steps hold its block: nothing the probe was fitted on.
            return self.closed and self.steps == t.at_step and not self._interrupted
        ready = len(self.tokens) % t.every == 0 if t.every else self.closed or t.immediate
        if not ready or self.in_block or self.closed_block:
            return False
        if t.max_tokens is not None and len(self.tokens) > t.max_tokens:
            return False
        since = self.full_steps if rule.forces else self.steps - self.rested.get(rule.name, self.steps - rule.rest)
        if since is not None and since < rule.rest:
            return False
        return self.steps >= t.min_steps and len(self.tokens) > self.base and len(self.tokens) >= t.min_tokens

    def window(self, rule: Rule) -> tuple[int, list[int]]:
        """First token a probe may see, and the bounds from there (leading 0, last = now).

        A rule with ``at_step`` sees everything from the first token.
        """
        base = self._begin(rule)
        bounds = [b - base for b in self.segmenter.bounds if b >= base]
        now = len(self.tokens) - base
        return base, bounds if bounds and bounds[-1] == now else [*bounds, now]

    def silent(self, rule: Rule) -> bool:
        """Whether a probe in this rule would have too few tokens to say anything."""
        return len(self.tokens) - self._begin(rule) < MIN_TOKENS

    def _begin(self, rule: Rule) -> int:
        return 0 if rule.trigger.at_step is not None else self.base

    def coin(self, rule: Rule) -> float:
        """A uniform number for a random trigger; depends on seed, row and rule alone, not on the batch."""
        if rule.name not in self._coins:
            key = [self._entropy, self.index, zlib.crc32(rule.name.encode())]
            self._coins[rule.name] = np.random.default_rng(key)
        return float(self._coins[rule.name].random())

    @property
    def _entropy(self) -> int:
        """The seed as NumPy takes it: negative ones in two's complement."""
        return self.seed % 2**64

    def drawn(self, rule: Rule, low: float, high: float) -> float:
        """A number between two for this response and rule; depends on seed, row and rule alone, and on no coin."""
        key = [self._entropy, self.index, zlib.crc32(f"{rule.name} strength".encode())]
        return float(np.random.default_rng(key).uniform(low, high))

    def statistic(self, rule: Rule, sequential: Any, score: float) -> float:
        """The score itself, or what the probe's decision rule makes of it and those before it since an intervention."""
        if sequential is None:
            return score
        if rule.name not in self.running:
            self.running[rule.name] = sequential.start()
        return float(self.running[rule.name].update(score))

    def judge(self, rule: Rule, score: float, threshold: float) -> bool:
        """Record a score; True when the rule fires (score above the threshold, often enough in a row)."""
        self.scores.append({"step": self._step, "token": len(self.tokens), "rule": rule.name, "score": score})
        self.streak[rule.name] = self.streak[rule.name] + 1 if score > threshold else 0
        return self.streak[rule.name] >= rule.trigger.consecutive

    @property
    def _step(self) -> int:
        return self.steps - 1 if self.closed else self.steps

    @property
    def _interrupted(self) -> bool:
        """Whether a text was forced."""
        return self.in_block or self.full_steps is not None

    def log(
        self, rule: Rule, score: float, threshold: float, suppressed: bool, strength: float | None = None
    ) -> dict[str, Any]:
        """Write an event and return it.

        ``step`` is the step just closed (or the open one), ``token`` the response tokens so far: where forced text
        starts, or an effect begins. An effect has ``strength`` and ``tokens``, filled in when it ends.
        """
        event: dict[str, Any] = {
            "step": self._step,
            "token": len(self.tokens),
            "rule": rule.name,
            "score": score,
            "threshold": threshold,
            "action": rule.action.force if rule.forces else rule.action.kind,
            "suppressed": suppressed,
        }
        if strength is not None:
            event |= {"row": self.index, "strength": strength, "tokens": 0}
        self.events.append(event)
        return event

    def ask_gate(self, rule: Rule, score: float, threshold: float) -> None:
        """Record what a rule's gate says of this row, before the first token."""
        self.scores.append({"step": 0, "token": 0, "rule": rule.name, "score": score})
        self.asked[rule.name] = score, threshold

    def barred(self, rule: Rule) -> bool:
        """Whether a rule's gate keeps it from this row."""
        score, threshold = self.asked.get(rule.name, (1.0, 0.0))
        return score <= threshold

    def start_effect(self, rule: Rule) -> None:
        """A tensor rule that is evaluated begins to act."""
        self.fired[rule.name] += 1
        self.acting.add(rule.name)
        self.streak.pop(rule.name, None)
        self.running.pop(rule.name, None)

    def rest(self, rule: Rule) -> None:
        """An effect has ended."""
        self.acting.discard(rule.name)
        self.rested[rule.name] = self.steps

    def fire(self, rule: Rule, ids: list[int]) -> None:
        """Queue a rule's text and open its block."""
        self.fired[rule.name] += 1
        self.queue.extend(ids)
        self.in_block = True
        self.streak.clear()
        self.running.clear()
