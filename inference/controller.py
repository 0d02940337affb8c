"""The controller: watch sites while ``generate`` runs, force text when a rule fires, and steer (core.md §1.10).

It lives in three places: writing hooks where the plan's tensor rules act (``steering.py``), read hooks on the sites
that the plan's probes declare (they see what the model goes on with, after the writing), and one logits processor,
which runs before temperature and top-p. In the processor call that chooses token ``t+1`` the activations of token ``t``
are known, so there is no lag. When no rule fires, scores come back untouched.

Legend: B rows, T response tokens so far, C channels, V vocabulary, d features of a probe.

``inference.decode`` runs it in our sampler; it also runs in a stock Transformers ``generate`` with a key-value cache::

    controller = Controller(model, tokenizer, plan, probes)
    with controller.watch([[...prompt ids...], ...], eos_ids=eos_ids(model, tokenizer)) as watch:
        model.generate(..., logits_processor=LogitsProcessorList([watch]))
    watch.rows[0].events
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from neureasoner.errors import UserError
from neureasoner.inference.plan import Plan, Rule
from neureasoner.inference.rows import RowState
from neureasoner.inference.steering import Steering, SteeringRun
from neureasoner.inference.watch import LOGITS, Watch
from neureasoner.sampling import eos_ids as default_eos_ids
from neureasoner.sites import Layout, Site, read_sites
from neureasoner.steps import Separators, StepSegmenter
from neureasoner.thinking import CLOSED, thinking_state

Oracle = Callable[[RowState], bool]


class Controller:
    """A plan made ready for one model: forced ids, probes, directions, gates, sites. Holds no state of a generation.

    probes   by the folder name the plan uses: objects with the interface of ``Probe``
    oracles  by the name the plan uses, ``fn(RowState) -> bool``
    record   sites to keep besides those the probes need
    accept   fingerprints of other models whose probes, directions and gates are welcome (the base it was trained from)
    directions, gates  like the probes: ``Direction`` and ``FailureGate``

    Raises UserError for whatever the plan names and does not get.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan,
        probes: Mapping[str, Any] | None = None,
        *,
        oracles: Mapping[str, Oracle] | None = None,
        record: Sequence[str] = (),
        accept: Sequence[str] = (),
        directions: Mapping[str, Any] | None = None,
        gates: Mapping[str, Any] | None = None,
    ):
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.probes, self.oracles, self.gates = dict(probes or {}), dict(oracles or {}), dict(gates or {})
        self.forced_ids = plan.forced_ids(tokenizer)
        self.opened_ids = plan.opened_ids(tokenizer)
        self.steering = Steering(model, tokenizer, plan, directions, accept)
        for name, ids in [*self.forced_ids.items(), *self.opened_ids.items()]:
            if max(ids) >= self.steering.vocabulary:
                raise UserError(
                    f"plan {plan.name}, rule {name}: its text has token {max(ids)}, but the model knows "
                    f"{self.steering.vocabulary}; model and tokenizer do not belong together"
                )
        self.separators = Separators.of(tokenizer)
        self.record = [str(Site.parse(s)) for s in ([record] if isinstance(record, str) else record)]
        sites = list(self.record)
        for rule in plan.rules:
            sites += self._check(rule, accept)
        layout = Layout.of(model)
        self.sites = list(dict.fromkeys(str(layout.check(Site.parse(s))) for s in sites))

    def _check(self, rule: Rule, accept: Sequence[str]) -> list[str]:
        """Sites of a rule's probe; raises UserError if the rule cannot run."""
        t = rule.trigger
        if t.oracle is not None and t.oracle not in self.oracles:
            raise UserError(f"plan {self.plan.name}, rule {rule.name}: oracle {t.oracle!r} was not given at generation")
        if isinstance(t.gate, str):
            gate = self.gates.get(t.gate)
            if gate is None:
                raise UserError(f"plan {self.plan.name}, rule {rule.name}: gate {t.gate} was not loaded")
            if gate.model_fingerprint not in accept:
                gate.check(self.model)
        if t.probe is None:
            return []
        probe = self.probes.get(t.probe)
        if probe is None:
            raise UserError(f"plan {self.plan.name}, rule {rule.name}: probe {t.probe} was not loaded")
        if probe.model_fingerprint not in accept:
            probe.check(self.model)
        features = probe.features
        at = f"plan {self.plan.name}, rule {rule.name}"
        if features.once != (t.at_step is not None):
            raise UserError(
                f"{at}: an instance probe of easy questions is read once, at at_step, any other at every step; "
                f"{t.probe} is of level {features.level}{', an exit' if features.exit_from else ''}; "
                f"{'remove' if t.at_step else 'set'} at_step"
            )
        if t.min_steps < features.exit_from:
            raise UserError(
                f"{at}: min_steps is {t.min_steps}, but {t.probe} was fitted from step {features.exit_from} on; "
                f"set min_steps: {features.exit_from} or fit the probe again"
            )
        if t.at_step is not None and t.at_step != features.window:
            raise UserError(
                f"{at}: at_step is {t.at_step}, but {t.probe} was fitted on the "
                f"first {features.window} steps; set at_step: {features.window} or fit the probe again"
            )
        return list(features.sites())

    @contextmanager
    def watch(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        indices: Sequence[int] | None = None,
        problems: Sequence[Any] | None = None,
        eos_ids: Sequence[int] = (),
        seed: int = 0,
        strengths: Mapping[str, Sequence[float]] | None = None,
    ) -> Iterator[Watch]:
        """Install the hooks for one ``generate`` call over these prompts; yields its fresh state.

        ``strengths``: for rules of strength ``per_row``, a factor for each prompt. Gates are asked here.
        """
        self.steering.check_strengths(strengths, len(prompt_ids))
        eos = set(eos_ids or default_eos_ids(self.model, self.tokenizer))
        rows = []
        for i, ids in enumerate(prompt_ids):
            begins = thinking_state(ids, self.tokenizer)
            rows.append(
                RowState(
                    index=indices[i] if indices is not None else i,
                    segmenter=StepSegmenter(self.separators, in_thinking=begins != CLOSED, ends=eos),
                    tokenizer=self.tokenizer,
                    problem=problems[i] if problems is not None else None,
                    seed=seed,
                    begins=begins,
                )
            )
        self._ask_gates(rows, prompt_ids)
        run = SteeringRun(self.steering, rows, strengths) if self.steering.rules else None
        watch = self._watch(rows, eos, run)
        hooked = [s for s in self.sites if s != LOGITS]
        with run.hooks() if run is not None else nullcontext():
            if not hooked:
                yield watch
                return
            with read_sites(self.model, hooked, watch.see):
                yield watch

    def _watch(self, rows: list[RowState], eos: set[int], run: SteeringRun | None) -> Watch:
        """The state of one generation; baselines have their own kind."""
        return Watch(self, rows, eos, run)

    def _ask_gates(self, rows: Sequence[RowState], prompt_ids: Sequence[Sequence[int]]) -> None:
        """Tell every row what each rule's gate says of its question; a number is a coin."""
        from neureasoner.probes.detectors.gate import question_scores

        said: dict[str, np.ndarray] = {}
        for rule in self.plan.rules:
            t = rule.trigger
            if t.gate is None:
                continue
            if not isinstance(t.gate, str):
                for row in rows:
                    row.ask_gate(rule, 1.0 - row.coin(rule), 1.0 - t.gate)
                continue
            gate = self.gates[t.gate]
            if t.gate not in said:
                said[t.gate] = question_scores(gate, self.model, prompt_ids)  # checked when the controller was made
            threshold = float(gate.threshold if t.threshold is None or t.probe is not None else t.threshold)
            for row, score in zip(rows, said[t.gate].tolist(), strict=True):
                row.ask_gate(rule, score, threshold)
