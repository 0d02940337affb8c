"""Tensor rules carried out: one hook for each place that is written, filled from outside it once a forward pass.

A rule's **dose** says how much each row gets in the coming forward; the controller sets it between forwards, so a hook
holds no loop over rows or neurons, only one indexed add (or its like) a rule. Doses that stay the same keep their
deltas. Which tokens close a step is found on the device, from the ids as they enter the model.

Legend: ``B`` rows, ``T`` tokens of this forward pass (the prompt's, then 1), ``C`` channels, ``R`` rules that write
tensors or logits, ``V`` vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.plan import Plan
from neureasoner.inference.rows import RowState
from neureasoner.inference.rules import EVENTS, Rule
from neureasoner.inference.writes import Dose, Write, apply_write, writes_of, written_places
from neureasoner.models import input_device
from neureasoner.sites import Layout, edit_site, own
from neureasoner.steps import BLANK, CLOSED, WHOLE, Separators

IDS = "ids"


class Steering:
    """A plan's tensor and logit rules made ready for one model. Holds no state of a generation.

    ``directions``: by the name the plan uses. Rules of strength 0 are left out: they set no hook. Raises UserError for
    a direction of another model, a site it lacks, two rules at one site without a policy, or a rule that cannot fire.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan,
        directions: Mapping[str, Direction] | None = None,
        accept: Sequence[str] = (),
    ):
        self.model, self.layout, self.separators = model, Layout.of(model), Separators.of(tokenizer)
        self.device = input_device(model)
        self.rules = [r for r in plan.rules if not r.forces and not r.strength.zero]
        self.writes: dict[str, list[Write]] = {}
        self.biases: dict[str, torch.Tensor] = {}
        self.listed: dict[str, list[int]] = {}  # ids that a rule of source ``tokens`` acts at
        given, written = dict(directions or {}), {}
        checked: set[str] = set()
        for rule in plan.rules:
            where = f"plan {plan.name}, rule {rule.name}"
            direction = given.get(rule.direction or "")
            if rule.direction is not None and direction is None:
                raise UserError(f"{where}: direction {rule.direction} was not loaded")
            try:
                if direction is not None and rule.direction not in checked:
                    _check(direction, model, accept)
                    checked.add(str(rule.direction))
                written[rule.name] = list(dict.fromkeys(written_places(rule, direction, self.layout)))
                if rule in self.rules:
                    self._compile(rule, direction, tokenizer)
            except UserError as e:
                raise UserError(f"{where}: {e}") from None
        plan.check_conflicts({k: v for k, v in written.items() if v})
        plan.check_logit_conflicts({k: bias.nonzero().flatten().tolist() for k, bias in self.biases.items()})

    def _compile(self, rule: Rule, direction: Direction | None, tokenizer: Any) -> None:
        if rule.source == "boundary" and CLOSED not in self.separators.table[1]:
            raise UserError("it can never fire: no token of this tokenizer closes a step after text")
        if rule.trigger.phase == "answer" and not self.separators.spells_close:
            raise UserError(
                "it can never fire: this tokenizer cannot spell </think>, so an answer is never told from thinking"
            )
        if rule.source == "tokens":
            self.listed[rule.name] = rule.trigger.places(tokenizer)
        for write in writes_of(rule, direction, self.layout) if rule.edits else []:
            self.writes.setdefault(str(write.place), []).append(write)
        if not rule.edits:
            bias = torch.zeros(self.vocabulary)
            for token, value in rule.action.biases(tokenizer).items():
                if token >= len(bias):
                    raise UserError(f"token {token} is not in this model's vocabulary; it is another tokenizer's")
                bias[token] = value
            self.biases[rule.name] = bias.to(self.device)

    @property
    def vocabulary(self) -> int:
        """Rows of the LM head."""
        head: Any = self.layout.lm_head
        return int(head.weight.shape[0])

    @cached_property
    def places(self) -> list[str]:
        """Places with a hook: heads that are only looked at, and those written."""
        looked = [str(w.read_place) for ws in self.writes.values() for w in ws if w.read_place is not None]
        return list(dict.fromkeys([*looked, *self.writes]))

    @property
    def per_row(self) -> list[str]:
        """Rules whose strengths have to be given at generation, row by row."""
        return [r.name for r in self.rules if r.strength.per_row]

    def check_strengths(self, strengths: Mapping[str, Sequence[float]] | None, rows: int) -> None:
        """Raises UserError unless ``strengths`` holds one finite number a row for exactly the rules that want them."""
        given = dict(strengths or {})
        for name in self.per_row:
            if name not in given:
                raise UserError(f"rule {name} takes its strength row by row; give strengths={{'{name}': [...]}}")
        for name, values in given.items():
            if name not in self.per_row:
                raise UserError(
                    f"strengths name rule {name!r}, which takes none; those that do: {self.per_row or 'none'}"
                )
            try:
                found = np.asarray(values, dtype=np.float64)
            except (TypeError, ValueError):
                found = np.zeros(0)
            if found.shape != (rows,) or not np.isfinite(found).all():
                raise UserError(f"rule {name}: {rows} finite strengths are needed, one a row, got {str(values)[:60]}")


def _check(direction: Direction, model: Any, accept: Sequence[str]) -> None:
    """Sizes always; the weights unless the direction comes from a model that is accepted (hashing takes a while)."""
    if direction.fingerprint and direction.fingerprint in accept:
        direction = Direction(direction.values, direction.meaning, direction.model)
    direction.check(model)


class SteeringRun:
    """The state of one generation: doses, what acts in which row, and what was done. Rows have asked their gates.

    ``acting [R, B]``: forwards an effect still lasts (rules that are not evaluated: 1 for ever). A forward acts on the
    position it reads last; ``always`` on all it reads.
    """

    def __init__(
        self,
        steering: Steering,
        rows: Sequence[RowState],
        strengths: Mapping[str, Sequence[float]] | None = None,
    ):
        self.steering, self.rules, self.rows = steering, steering.rules, rows
        size, given = len(rows), strengths or {}
        self.factors = [np.array(given.get(r.name, np.ones(size)), dtype=np.float64) for r in self.rules]
        for r, rule in enumerate(self.rules):
            if rule.strength.draw is not None:
                self.factors[r] *= [row.drawn(rule, *rule.strength.draw) for row in rows]
            if rule.strength.by_score and rule.source != "probe":
                self.factors[r] *= [row.asked[rule.name][0] for row in rows]
        self._constant = [f.copy() for f in self.factors]
        static = [(r, r.source not in EVENTS) for r in self.rules]
        self.acting = [np.array([int(on and not row.barred(r)) for row in rows]) for r, on in static]
        self.count = np.zeros((len(self.rules), size), dtype=np.int64)
        self.calls: Counter[str] = Counter()
        self.prefill = True
        self._events: dict[tuple[int, int], dict[str, Any]] = {}
        self._amounts: dict[int, np.ndarray] = {}
        self._whole: dict[int, Dose] = {}
        self._doses: dict[str, Dose] = {}
        self._seen: dict[str, torch.Tensor] = {}
        self._live: torch.Tensor | None = None  # rows the model still reads; None: all
        self._device = steering.device
        self._chosen = [r for r, rule in enumerate(self.rules) if rule.edits and _choosy(rule)]
        if self._chosen:
            self._ids = {k: torch.tensor(ids, device=self._device) for k, ids in steering.listed.items()}
            self._table, self._tags = (t.to(self._device) for t in _tables(steering.separators, steering.vocabulary))
            self._ends = torch.tensor(sorted(rows[0].segmenter.ends), dtype=torch.long, device=self._device)
            self._state = torch.full((size,), BLANK, device=self._device)
            self._tag = torch.zeros((size,), dtype=torch.long, device=self._device)
            self._thinking = torch.tensor([row.thinking for row in rows], device=self._device)
        self.plan(0, edits=True)

    def begin(self, rule: Rule, row: int, score: float, threshold: float) -> None:
        """An evaluated rule fired in a row: its effect starts with the next token."""
        r = self.rules.index(rule)
        self.acting[r][row] = rule.trigger.duration or np.iinfo(np.int64).max
        self.count[r, row] = 0
        if rule.strength.by_score and rule.source == "probe":
            self.factors[r][row] = self._constant[r][row] * score
        self._events[r, row] = self.rows[row].log(rule, score, threshold, False, self.strength(rule, row))
        self.rows[row].start_effect(rule)

    def plan(self, token: int, edits: bool) -> None:
        """Set the doses of the coming forward (without ``edits``: of the coming choice) of response token ``token``.

        The forward that reads the prompt is that of token 0: the choice of token 0 rests on it.
        """
        for r, rule in enumerate(self.rules):
            if rule.edits != edits:
                continue
            amount = rule.strength.at(token) * self.factors[r] * (self.acting[r] > 0)
            if r not in self._amounts or not np.array_equal(self._amounts[r], amount):
                self._amounts[r] = amount
                self._measure(r)
        if edits:
            self._serve()

    def _measure(self, r: int) -> None:
        """Make a rule's dose of its amounts: for rows the model reads, or, of a choice, for all."""
        held = torch.from_numpy(self._amounts[r]).float().to(self._device)
        if self._live is not None and self.rules[r].edits:
            held = held[self._live]
        self._whole[r] = Dose(held, held != 0)

    def _serve(self) -> None:
        # a rule that chooses its tokens waits until it is known which ones the forward reads
        self._doses = {
            self.rules[r].name: dose
            for r, dose in self._whole.items()
            if self._amounts[r].any() and r not in self._chosen
        }

    def narrow(self, kept: torch.Tensor, live: torch.Tensor) -> None:
        """From the coming forward on the model reads the rows ``live [L]`` only, ``kept`` of those it read last."""
        self._live = live
        for r, rule in enumerate(self.rules):
            if rule.edits:
                self._measure(r)
        self._serve()
        if self._chosen:
            self._state, self._tag, self._thinking = self._state[kept], self._tag[kept], self._thinking[kept]

    def tick(self, edits: bool, alive: np.ndarray, closed: np.ndarray) -> None:
        """After a forward (without ``edits``: a choice): count and log what acted. ``alive``, ``closed`` ``[B]``."""
        for r, rule in enumerate(self.rules):
            if rule.edits != edits:
                continue
            acted = (self._amounts[r] != 0) & alive & self._here(rule, closed)
            self.count[r] += acted
            if rule.source not in EVENTS:
                for row in np.flatnonzero(acted & (self.count[r] == 1)).tolist():
                    score, threshold = self.rows[row].asked.get(rule.name, (1.0, 0.0))
                    strength = self.strength(rule, row)
                    self._events[r, row] = self.rows[row].log(rule, score, threshold, False, strength)
                continue
            lasting = self.acting[r] > 0
            self.acting[r] = self.acting[r] - lasting
            for row in np.flatnonzero(lasting & (self.acting[r] == 0)).tolist():
                self._events.pop((r, row))["tokens"] = int(self.count[r, row])
                self.rows[row].rest(rule)

    def strength(self, rule: Rule, row: int) -> float:
        """Strength of a rule in a row at the token about to be read or chosen."""
        r = self.rules.index(rule)
        return rule.strength.at(len(self.rows[row].tokens)) * float(self.factors[r][row])

    def finish(self) -> None:
        """Write how many tokens each effect that still lasts has acted on."""
        for (r, row), event in self._events.items():
            event["tokens"] = int(self.count[r, row])

    def read_ids(self, ids: torch.Tensor) -> None:
        """Before a forward: which rows read a token that a rule chooses. ids ``[B, T]``; a prompt only has a phase."""
        self.calls[IDS] += 1
        token, closing = ids[:, -1], torch.zeros_like(self._thinking)
        if not self.prefill:
            after, self._tag = self._table[self._state, token].long(), self._tags[self._tag, token].long()
            self._thinking = self._thinking & ~torch.isin(token, self._ends) & (self._tag < WHOLE)
            self._tag = self._tag % WHOLE
            closing = self._thinking & (after == CLOSED)
            self._state = torch.where(after == CLOSED, BLANK, after)
        for r in self._chosen:
            rule, on = self.rules[r], self._whole[r].on
            if rule.source == "boundary":
                on = on & closing
            elif rule.source == "tokens":
                on = on & torch.isin(token, self._ids[rule.name]) & (not self.prefill)
            if rule.trigger.phase is not None:
                on = on & (self._thinking == (rule.trigger.phase == "think"))
            self._doses[rule.name] = Dose(self._whole[r].amount, on)

    def _here(self, rule: Rule, closed: np.ndarray) -> np.ndarray:
        """Rows ``[B]`` whose last token is one that the rule acts at; ``closed``: rows where it closed a step."""
        here = closed if rule.source == "boundary" else np.ones(len(self.rows), dtype=bool)
        if rule.source == "tokens":
            ids = self.steering.listed[rule.name]
            here = np.array([bool(row.tokens) and row.tokens[-1] in ids for row in self.rows])
        if rule.trigger.phase is not None:
            here = here & np.array([row.thinking == (rule.trigger.phase == "think") for row in self.rows])
        return here

    def edit(self, place: str, value: torch.Tensor) -> torch.Tensor:
        """The hook: every rule that writes here, in the plan's order. value ``[B, T, C]``."""
        self.calls[place] += 1
        if not self.prefill and value.shape[1] > 1:
            raise RuntimeError(
                f"site {place}: {value.shape[1]} tokens are read again for a new one, so a rule would act on some "
                "of them twice; a steered model needs use_cache=True"
            )
        for write in self.steering.writes.get(place, ()):
            dose = self._doses.get(write.rule.name)
            if dose is None:
                continue
            seen = None if write.read_place is None else self._seen[str(write.read_place)]
            if value.shape[1] == 1 or write.rule.source == "always":
                value = apply_write(write, value, dose, seen)
            else:
                last = apply_write(write, value[:, -1:], dose, None if seen is None else seen[:, -1:])
                value = torch.cat([value[:, :-1], last], dim=1)
        self._seen[place] = value
        return value

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Install the hooks for one generation; what acted is written into the events at its end."""
        model = self.steering.model
        with ExitStack() as stack:
            stack.callback(self.finish)
            for place in self.steering.places:
                stack.enter_context(edit_site(model, place, partial(self.edit, place)))
            if self._chosen:
                embeddings = model.get_input_embeddings()
                stack.callback(embeddings.register_forward_pre_hook(own(lambda _, args: self.read_ids(args[0]))).remove)
            yield

    def verify(self, token: int) -> None:
        """Promise 4, for writing: every hook fired once in the forward just done. Raises RuntimeError."""
        for place in [*self.steering.places, *([IDS] if self._chosen else [])]:
            n, writes = self.calls[place], self.steering.writes.get(place, ())
            if n > 1 and not token and any(w.rule.source != "always" for w in writes):
                raise RuntimeError(
                    f"site {place}: the prompt was read in {n} pieces, and a rule would act at the end of each; "
                    "a steered model needs prefill_chunk_size=None"
                )
            if n != 1 and (token or n == 0):  # under other rules a long prompt may be read in pieces
                raise RuntimeError(
                    f"site {place}: its writing hook fired {n} times for response token {token - 1} instead of once "
                    "(was a hook removed, or the model compiled?)"
                )
        self.calls.clear()

    def bias(self, scores: torch.Tensor, closed: np.ndarray) -> torch.Tensor:
        """Scores ``[B, V]`` with the logit rules' biases; the same tensor if none acts. ``closed``: rows at a bound."""
        for r, rule in enumerate(self.rules):
            if rule.edits or not self._amounts[r].any():
                continue
            dose, bias = self._whole[r], self.steering.biases[rule.name]
            here = torch.from_numpy(self._here(rule, closed)).to(self._device) if _choosy(rule) else None
            on = dose.on if here is None else dose.on & here
            delta = torch.where(on[:, None], dose.amount[:, None] * bias, -0.0)
            scores = scores + delta.to(scores.dtype)
        return scores


def _choosy(rule: Rule) -> bool:
    """Whether a rule acts at some tokens only, by what they are."""
    return rule.source in ("boundary", "tokens") or rule.trigger.phase is not None


def _tables(separators: Separators, size: int) -> list[torch.Tensor]:
    """The segmenter's automaton as tensors: steps ``[3, V]`` and the tag ``[8, V]``; ids without text leave both."""
    tables = []
    for rows in (separators.table, separators.tags):
        table = torch.arange(len(rows), dtype=torch.uint8)[:, None].repeat(1, max(size, separators.size))
        known = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1)
        table[:, : separators.size] = torch.tensor(known)
        tables.append(table)
    return tables
