"""Settings of ``evaluation compare``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError


@dataclass
class CompareConfig:
    """Compare an arm of one evaluation with an arm of another: flipped problems, paired difference, interval, p."""

    a: str = field(metadata={"help": "folder that `evaluate` wrote", "positional": True})
    b: str = field(metadata={"help": "the folder to compare with it (may be the same)", "positional": True})
    arm_a: str = field(default="", metadata={"help": "arm of the first; empty = its only one, or vanilla"})
    arm_b: str = field(default="", metadata={"help": "arm of the second; empty = the same as arm_a"})
    out: str = field(default="", metadata={"help": "folder for compare.json; empty = print only"})
    flips: int = field(default=20, metadata={"help": "most flipped problems printed each way"})
    resamples: int = field(default=10_000, metadata={"help": "bootstrap resamples and sign flips"})
    seed: int = field(default=0, metadata={"help": "seed of both"})

    def __post_init__(self) -> None:
        for key in ("a", "b"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty; name two folders that `evaluate` wrote")
        if self.resamples < 1:
            raise UserError(f"key 'resamples' must be at least 1, got {self.resamples}")
        if self.flips < 0 or self.seed < 0:
            raise UserError("keys 'flips' and 'seed' must not be negative")
