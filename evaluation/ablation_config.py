"""Settings of ``ablate``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.config import check_numbers
from neureasoner.errors import UserError

TRIGGERS = ("decode", "always", "boundary")
ACTIONS = ("add", "add_keep_norm")
RESERVED = ("vanilla", "full", "no_gate", "random_gate", "flipped")


@dataclass
class AblateConfig:
    """Steer along a direction, and along what is left of it without each of its parts.

    The strength is chosen on validation problems; every arm then answers the same test problems with the same seeds.
    """

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    direction: str = field(
        metadata={"help": "direction folder (of probes directions, or directions/full of probes rcn)"}
    )
    validation: str = field(metadata={"help": "problem file on which the strength is chosen"})
    problems: str = field(metadata={"help": "problem file on which the arms are measured; shares none with the other"})
    out: str = field(metadata={"help": "folder for results.json, results.md, plans/ and traces/"})
    gate: str = field(default="", metadata={"help": "gate folder of probes gate; empty steers every question"})
    variants: dict[str, str] = field(
        default_factory=dict, metadata={"help": "further arms, NAME=FOLDER: the same rule with another direction"}
    )
    trigger: str = field(
        default="decode", metadata={"help": f"where the rule acts on the questions it steers: {', '.join(TRIGGERS)}"}
    )
    action: str = field(default="add", metadata={"help": f"what it does there: {' or '.join(ACTIONS)}"})
    strengths: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.3, 0.5, 1.0], metadata={"help": "strengths tried on validation problems"}
    )
    unit: str = field(
        default="raw", metadata={"help": "what strengths count: raw activation, or sigma, neurons' standard deviations"}
    )
    tune: str = field(
        default="full",
        metadata={"help": "'full': its strength is chosen and all arms take it; 'each': every arm's own is chosen"},
    )
    validation_samples: int = field(default=4, metadata={"help": "responses per validation problem and strength"})
    samples: int = field(default=8, metadata={"help": "responses (seeds) per test problem and arm"})
    seed: int = field(default=0, metadata={"help": "first seed; sample s of batch b has the same seed in every arm"})
    max_new_tokens: int = field(default=512, metadata={"help": "cap; a response that reaches it is wrong and costs it"})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature (0 = greedy)"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    batch_size: int = field(default=32, metadata={"help": "responses decoded together (also the unit of resuming)"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems of each file; 0 = all"})
    resamples: int = field(default=10_000, metadata={"help": "draws behind each interval and each p-value"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})

    def __post_init__(self) -> None:
        for key in ("model", "direction", "validation", "problems", "out"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty")
        for key, known in (
            ("trigger", TRIGGERS),
            ("action", ACTIONS),
            ("unit", ("raw", "sigma")),
            ("tune", ("full", "each")),
        ):
            if getattr(self, key) not in known:
                raise UserError(f"key '{key}' must be one of {', '.join(known)}, got '{getattr(self, key)}'")
        if not self.strengths or min(self.strengths) <= 0 or len(set(self.strengths)) < len(self.strengths):
            raise UserError("key 'strengths' needs different numbers above 0, such as [0.1, 0.3]")
        for name in self.variants:
            if name in RESERVED or not name.replace("_", "").isalnum():
                raise UserError(f"key 'variants': '{name}' is no name for an arm; use letters and _, and none of ours")
        check_numbers(
            self,
            positive=("validation_samples", "samples", "max_new_tokens", "batch_size", "resamples"),
            not_negative=("limit", "temperature", "seed"),
        )
