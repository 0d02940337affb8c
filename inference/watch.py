"""One generation under the controller: what was read, what was decided, and the logits processor that carries it out.

Legend: B rows, T response tokens so far, C channels, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from transformers import LogitsProcessor

from neureasoner.inference.plan import Rule
from neureasoner.inference.rows import RowState
from neureasoner.inference.series import LogitSeries, SeriesBuffer
from neureasoner.inference.steering import SteeringRun
from neureasoner.sampler import Run
from neureasoner.sites import Site
from neureasoner.thinking import UNOPENED

if TYPE_CHECKING:
    from neureasoner.inference.controller import Controller

LOGITS = "logits"


class Watch(LogitsProcessor):
    """The state of one generation: rows, recorded series, what is steered, and the processor that lets sampling be,
    forces a token, or biases the scores (see ``sampler.Watcher``)."""

    narrows: ClassVar[bool] = True

    def __init__(self, controller: Controller, rows: list[RowState], eos: set[int], run: SteeringRun | None = None):
        self.controller, self.rows, self.eos, self.run = controller, rows, eos, run
        self.length = 0
        self._prompt: int | None = None
        self._buffers = {s: SeriesBuffer() for s in controller.sites if s != LOGITS}
        self._logits = LogitSeries() if LOGITS in controller.sites else None
        self._latest: dict[str, torch.Tensor] = {}
        self._count: Counter[str] = Counter()
        self._live: torch.Tensor | None = None  # rows the model still reads; None: all

    def begin(self, run: Run) -> None:
        """The sampler is about to read the prompts."""

    def narrow(self, kept: torch.Tensor, live: torch.Tensor) -> None:
        """From the coming forward on the model reads the rows ``live [L]`` only, ``kept`` of those it read last."""
        self._live = live
        if self.run is not None:
            self.run.narrow(kept, live)

    def see(self, site: str, value: torch.Tensor) -> None:
        """Read hook: keep the last position. value [B, T or 1, C], or [L, 1, C]."""
        self._latest[site] = value[:, -1]
        self._count[site] += 1

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Take in the token just read, judge it, and force or let through. input_ids [B, T'], scores [B, V]."""
        self._verify(input_ids)
        if self.length:
            drawn = input_ids[:, -1]
            for site, buffer in self._buffers.items():
                buffer.append(self._latest[site], self._live, len(self.rows))
            if self._logits is not None:
                self._logits.draw(drawn)
            for row, token in zip(self.rows, drawn.tolist(), strict=True):
                if not row.done:
                    row.push(token, self.eos)
        alive, closed = self._masks()
        if self.run is not None:
            self.run.tick(True, alive, closed)
        if self.length:
            self._act()
        else:
            self._start()
        if self._logits is not None:
            self._logits.look(scores)
        if self.run is not None:
            scores = self._steer(scores, alive, closed)
        self.length += 1
        return self._force(scores)

    def _masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows still writing, and rows whose last token closed a step, ``[B]`` each."""
        return np.array([not row.done for row in self.rows]), np.array([row.closed for row in self.rows])

    def _steer(self, scores: torch.FloatTensor, alive: np.ndarray, closed: np.ndarray) -> torch.FloatTensor:
        """The logit rules act on this choice; the tensor rules' doses for the next forward are set."""
        assert self.run is not None
        self.run.plan(self.length, edits=False)
        biased = self.run.bias(scores, closed)
        self.run.tick(False, alive, closed)
        self.run.plan(self.length + 1, edits=True)
        self.run.prefill = False
        return biased  # type: ignore[return-value]

    def _start(self) -> None:
        """Before the first token: per row the first rule that forces its text there wins, the others are logged. So is
        one that would close a thinking which the prompt has closed."""
        rules = [r for r in self.controller.plan.rules if r.source == "start" and r.trigger.max != 0]
        for row in self.rows:
            due = [r for r in rules if not row.barred(r)]
            winner = next((r for r in due if row.thinking or not r.closes), None)
            for rule in due:
                score, threshold = row.asked.get(rule.name, (1.0, 0.0))
                if rule is winner:
                    self.force(row, rule, score, threshold)
                else:
                    row.log(rule, score, threshold, suppressed=True)

    def force(self, row: RowState, rule: Rule, score: float = 1.0, threshold: float = 0.0) -> None:
        """Queue a rule's text and log it. One that closes the thinking before the first token opens it where the prompt
        has not."""
        event = row.log(rule, score, threshold, suppressed=False)
        ids = self.controller.forced_ids[rule.name]
        if row.begins == UNOPENED and not row.tokens and rule.name in self.controller.opened_ids:
            event["action"], ids = rule.opened, self.controller.opened_ids[rule.name]
        row.fire(rule, ids)

    def _verify(self, input_ids: torch.Tensor) -> None:
        """Promise 4: every generated token was read once at every site."""
        batch, total = input_ids.shape
        if self._prompt is None:
            self._prompt = total
            if batch != len(self.rows):
                raise RuntimeError(f"controller watches {len(self.rows)} rows, generate has {batch}")
        if total != self._prompt + self.length:
            raise RuntimeError(
                f"generate has {total - self._prompt} response tokens, the controller has seen {self.length}; "
                "beam search and assisted decoding cannot be watched"
            )
        if self.run is not None:
            self.run.verify(self.length)
        for site in self._buffers:
            n = self._count[site]
            if n != 1 and (self.length or n == 0):  # a long prompt may be read in pieces
                raise RuntimeError(
                    f"site {site}: its hook fired {n} times for response token {self.length - 1} instead of once; "
                    "monitored tokens must be generated tokens (was a hook removed, or the model compiled?)"
                )
        self._count.clear()

    def _act(self) -> None:
        """Evaluate every due rule on every row. Of the forced texts, per row the first that fires wins, the others are
        logged; one that closes the thinking comes last, as no repair follows it. Tensor rules that fire begin to act.
        """
        triggers = [rule.trigger for rule in self.controller.plan.rules]
        if not any(row.closed for row in self.rows) and not any(t.immediate or t.every for t in triggers):
            return
        fired: dict[int, list[tuple[Rule, float, float]]] = {}
        for rule in self.controller.plan.rules:
            due = [i for i, row in enumerate(self.rows) if row.due(rule)]
            if not due:
                continue
            for i, score, threshold in self._scores(rule, due):
                if not self.rows[i].judge(rule, score, threshold):
                    continue
                if not rule.forces:
                    self._begin(rule, i, score, threshold)
                else:
                    fired.setdefault(i, []).append((rule, score, threshold))
        for i, hits in fired.items():
            row = self.rows[i]
            hits.sort(key=lambda hit: hit[0].closes)
            for rank, (rule, score, threshold) in enumerate(hits):
                row.log(rule, score, threshold, suppressed=rank > 0)
            winner = hits[0][0]
            row.fire(winner, self.controller.forced_ids[winner.name])

    def _begin(self, rule: Rule, row: int, score: float, threshold: float) -> None:
        """A tensor rule fired in a row. One of strength 0 has no run and is only logged."""
        run, state = self.run, self.rows[row]
        acts = run is not None and rule in run.rules
        if run is not None and acts:
            run.begin(rule, row, score, threshold)
        else:
            state.log(rule, score, threshold, False, 0.0)
            state.fired[rule.name] += 1

    def _scores(self, rule: Rule, due: list[int]) -> list[tuple[int, float, float]]:
        """(row, score, threshold) of one rule; rows whose window is not valid yet are left out."""
        t = rule.trigger
        if t.always:
            return [(i, 1.0, 0.0) for i in due]
        if t.random is not None:
            return [(i, 1.0 - self.rows[i].coin(rule), 1.0 - t.random) for i in due]
        if t.oracle is not None:
            oracle = self.controller.oracles[t.oracle]
            return [(i, float(bool(oracle(self.rows[i]))), 0.5) for i in due]
        assert t.probe is not None
        probe = self.controller.probes[t.probe]
        ready, features = [], []
        for i in due:
            base, bounds = self.rows[i].window(rule)
            x, valid = probe.features.compute(self.series(i, probe.features.sites(), base), bounds)
            if valid:
                ready.append(i)
                features.append(x)
        if not ready:
            return []
        threshold = float(probe.threshold if t.threshold is None else t.threshold)
        scores = zip(ready, probe.predict_proba(np.stack(features)), strict=True)
        told = [(i, self.rows[i].statistic(rule, probe.rule, float(s)), threshold) for i, s in scores]
        return [t for t in told if np.isfinite(t[1])]  # a rule may want more scores before it says anything

    def series(self, row: int, sites: Sequence[str] | None = None, base: int = 0) -> dict[str, np.ndarray]:
        """What was read for a row, by site string, float32 [T - base, C]. A view: copy what has to last.

        The token that ends a response is not read on.
        """
        names = self.controller.sites if sites is None else [str(Site.parse(s)) for s in sites]
        stop = len(self.rows[row].tokens) - self.rows[row].done
        out = {}
        for name in names:
            buffer = self._logits.buffer if name == LOGITS and self._logits is not None else self._buffers[name]
            host = buffer.host()
            out[name] = host[row, base:stop] if host.size else np.zeros((0, 0), np.float32)
        return out

    def recorded(self, row: int) -> dict[str, np.ndarray]:
        """Series of the sites the controller was asked to record."""
        return self.series(row, self.controller.record)

    def _force(self, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Leave ``scores`` alone, or make the queued ids certain in the rows that have some."""
        rows, ids = [], []
        for i, row in enumerate(self.rows):
            token = row.pop()
            if token is not None:
                rows.append(i)
                ids.append(token)
        if not rows:
            return scores
        scores = scores.clone()  # type: ignore[assignment]
        scores[rows] = float("-inf")
        scores[rows, ids] = 0.0
        return scores
