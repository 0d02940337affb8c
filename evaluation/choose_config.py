"""Settings of ``choose``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from neureasoner.config import check_numbers
from neureasoner.errors import UserError
from neureasoner.evaluation.config import CAP_HELP

OWN = "own"
PARTS = ("train", "validation")  # of the split of `probes fit`: those on which probes were fitted and chosen


@dataclass
class ChooseConfig:
    """Choose the rules of a checkpoint's plan, and their thresholds, by what they are worth on validation problems.

    Worth is accuracy in points less a price on tokens, in per cent of those that the same model takes without a plan.
    """

    model: str = field(metadata={"help": "steered checkpoint (a folder that `assemble` wrote, or 'tiny-steered')"})
    problems: str = field(
        metadata={"help": "validation problems: none that the probes saw, and none that is reported on"}
    )
    out: str = field(metadata={"help": "folder for plan.yaml (with its probes), choice.json, choice.md, frontier.png"})
    price: float = field(default=0.1, metadata={"help": "points of accuracy that one per cent of the tokens is worth"})
    grid: list[str] = field(
        default_factory=lambda: [OWN, "10%", "25%", "50%", "75%"],
        metadata={
            "help": "thresholds tried of each rule: a number, 'own' (the plan's or else the probe's), or 25%: the one "
            "at which it acts in 25% of the responses"
        },
    )
    thresholds: dict[str, list[str]] = field(
        default_factory=dict, metadata={"help": "RULE: [thresholds], instead of the grid, for some rules (YAML)"}
    )
    min_steps: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={"help": "RULE: [steps], each tried with each threshold: not read before so many steps (YAML)"},
    )
    allow: list[str] = field(
        default_factory=list,
        metadata={"help": f"take problems of these parts of the probes' split all the same: {', '.join(PARTS)}"},
    )
    samples: int = field(default=2, metadata={"help": "responses per problem and plan"})
    seed: int = field(default=0, metadata={"help": "first seed; sample s of batch b has the same seed in every plan"})
    max_new_tokens: int = field(default=0, metadata={"help": CAP_HELP})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature (0 = greedy)"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    batch_size: int = field(default=32, metadata={"help": "responses decoded together (also the unit of resuming)"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems; 0 = all"})
    resamples: int = field(default=10_000, metadata={"help": "bootstrap resamples behind each interval"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})

    def __post_init__(self) -> None:
        for key in ("model", "problems", "out", "grid"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty")
        if not 0 <= self.price < math.inf:
            raise UserError(f"key 'price' must be a number from 0 on, got {self.price}")
        for key, tried in (("grid", self.grid), *((f"thresholds', '{r}", t) for r, t in self.thresholds.items())):
            if not tried:
                raise UserError(f"key '{key}' names no threshold")
            for text in tried:
                _check_threshold(text, key)
        for rule, steps in self.min_steps.items():
            if not steps or min(steps) < 0:
                raise UserError(f"key 'min_steps', '{rule}': needs whole numbers from 0 on, got {steps}")
        for part in self.allow:
            if part not in PARTS:
                raise UserError(f"key 'allow' knows {' and '.join(PARTS)}, got '{part}'")
        check_numbers(
            self,
            positive=("samples", "batch_size", "resamples"),
            not_negative=("max_new_tokens", "limit", "temperature", "seed"),
        )


def share_of(text: str) -> float | None:
    """0.25 of ``25%``, None of anything else."""
    return float(text[:-1]) / 100 if text.endswith("%") else None


def _check_threshold(text: str, key: str) -> None:
    try:
        share = share_of(text)
        good = text == OWN or (0 < share <= 1 if share is not None else math.isfinite(float(text)))
    except ValueError:
        good = False
    if not good:
        raise UserError(f"key '{key}': a threshold is a number, 'own' or a share such as 25%, got '{text}'")
