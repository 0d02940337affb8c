"""Settings of ``combine``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from neureasoner.config import check_numbers
from neureasoner.errors import UserError
from neureasoner.evaluation.config import CAP_HELP

ARMS = ("whole", "minus", "factorial")
NONE, ALL, WITHOUT = "none", "all", "without_"
MOST_PARTS = 6  # 64 arms


@dataclass
class CombineConfig:
    """Switch the rules of a checkpoint, and others, on together and apart: does one explain what another brings?

    Every arm answers the same problems with the same seeds. Paths inside rules count from the current folder.
    """

    model: str = field(metadata={"help": "steered checkpoint (a folder that `assemble` wrote, or 'tiny-steered')"})
    problems: str = field(metadata={"help": "problem file on which the arms are measured"})
    out: str = field(metadata={"help": "folder for results.json, results.md, plans/ and traces/"})
    rules: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "rules besides the checkpoint's: NAME: a rule as in a plan (YAML only)"}
    )
    probes: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "RULE=FOLDER: probes that rules of the checkpoint take instead"},
    )
    parts: dict[str, list[str]] = field(
        default_factory=dict,
        metadata={"help": "what is switched together: PART: [rules]; other rules stay off; none = every rule alone"},
    )
    arms: str = field(
        default="minus",
        metadata={
            "help": "'whole': nothing and everything; 'minus': also each part alone and everything without it; "
            "'factorial': every subset"
        },
    )
    variants: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further arms, everything with other probes: ARM: {RULE: probe folder} (YAML only)"},
    )
    strengths: dict[str, list[float]] = field(
        default_factory=dict,
        metadata={"help": "PART: [strengths] tried with that part alone on validation problems; the best is kept"},
    )
    validation: str = field(default="", metadata={"help": "problem file for the strengths; shares none with problems"})
    validation_samples: int = field(default=4, metadata={"help": "responses per validation problem and strength"})
    samples: int = field(default=4, metadata={"help": "responses (seeds) per problem and arm"})
    seed: int = field(default=0, metadata={"help": "first seed; sample s of batch b has the same seed in every arm"})
    max_new_tokens: int = field(default=0, metadata={"help": CAP_HELP})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature (0 = greedy)"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    batch_size: int = field(default=32, metadata={"help": "responses decoded together (also the unit of resuming)"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems of each file; 0 = all"})
    resamples: int = field(default=10_000, metadata={"help": "draws behind each interval and each p-value"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})

    def __post_init__(self) -> None:
        for key in ("model", "problems", "out"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty")
        if self.arms not in ARMS:
            raise UserError(f"key 'arms' must be one of {', '.join(ARMS)}, got '{self.arms}'")
        check_numbers(
            self,
            positive=("samples", "validation_samples", "batch_size", "resamples"),
            not_negative=("max_new_tokens", "limit", "temperature", "seed"),
        )
        self._check_names()
        if self.strengths and not self.validation:
            raise UserError("key 'strengths' needs 'validation', the problem file on which they are chosen")
        for part, tried in self.strengths.items():
            if not tried or min(tried) <= 0 or len(set(tried)) < len(tried):
                raise UserError(f"key 'strengths', {part}: needs different numbers above 0, such as [0.1, 0.3]")

    def _check_names(self) -> None:
        if len(self.parts) > MOST_PARTS:
            raise UserError(f"key 'parts' has {len(self.parts)} parts; at most {MOST_PARTS}")
        for name in (*self.parts, *self.variants):
            plain = name.replace("_", "").isalnum()
            if not plain or name in (NONE, ALL) or name.startswith(WITHOUT):
                raise UserError(f"'{name}' is no name for a part or variant; use letters and _, and none of ours")
        taken = [rule for rules in self.parts.values() for rule in rules]
        twice = sorted({r for r in taken if taken.count(r) > 1})
        if twice or any(not rules for rules in self.parts.values()):
            raise UserError(
                f"key 'parts': rule {twice[0]} is in two parts" if twice else "key 'parts': a part names no rule"
            )
        if clash := sorted(set(self.parts) & set(self.variants)):
            raise UserError(f"'{clash[0]}' names a part and a variant; rename one")
