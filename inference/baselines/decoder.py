"""What the baselines share that decide token by token: a ``SteeredModel`` whose ``Watch`` acts by code of its own.

The plan of such a baseline names the texts it may force, so they are checked, logged and counted as every plan's are;
when they are forced is the matter of its ``DecoderWatch`` (``_start``, ``_act``, ``_force``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.controller import Controller, Oracle
from neureasoner.inference.plan import Plan
from neureasoner.inference.rows import RowState
from neureasoner.inference.steered import SteeredModel, unknown_oracles
from neureasoner.inference.steering import SteeringRun
from neureasoner.inference.watch import Watch
from neureasoner.sampler import Run


class DecoderWatch(Watch):
    """One generation under a baseline. ``decoder`` holds the settings; all that changes is here."""

    def __init__(self, controller: DecoderController, rows: list[RowState], eos: set[int], run: SteeringRun | None):
        super().__init__(controller, rows, eos, run)
        self.decoder: Any = controller.decoder
        self.sampler: Run

    def begin(self, run: Run) -> None:
        """Keep the run: baselines look at its cache and at what it is about to draw."""
        self.sampler = run

    def open_rows(self) -> list[tuple[int, RowState]]:
        """Place and state of the rows still inside their thinking, nothing queued."""
        return [(i, r) for i, r in enumerate(self.rows) if not r.done and not r.queue and r.thinking]


class DecoderController(Controller):
    """A decoder's plan made ready; its generations are ``DecoderWatch``es of the decoder's kind."""

    def __init__(self, decoder: Decoder, record: Sequence[str] = ()):
        self.decoder = decoder
        oracles = unknown_oracles(decoder.plan)
        super().__init__(decoder.model, decoder.tokenizer, decoder.plan, oracles=oracles, record=record)

    def _watch(self, rows: list[RowState], eos: set[int], run: SteeringRun | None) -> Watch:
        return self.decoder.kind(self, rows, eos, run)


class Decoder(SteeredModel):
    """A baseline as a ``SteeredModel``: ``generate`` takes and gives the same. ``kind`` is its DecoderWatch."""

    kind: ClassVar[type[DecoderWatch]]

    def __init__(self, model: Any, tokenizer: Any, plan: Plan):
        super().__init__(model, tokenizer, plan)

    def with_plan(self, plan: Plan, directions: Mapping[str, Direction] | None = None) -> SteeredModel:
        """Refused: a baseline is more than its plan. Raises UserError."""
        raise UserError(
            f"baseline {self.plan.name} decides by code of its own, so plan {plan.name} cannot take its place; use "
            "SteeredModel(model, tokenizer, plan)"
        )

    def controller(self, oracles: Mapping[str, Oracle] | None = None, record: Sequence[str] = ()) -> Controller:
        """A controller for this baseline; it asks no oracles."""
        return DecoderController(self, record)
