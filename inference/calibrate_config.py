"""Settings of ``inference calibrate``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from neureasoner.errors import UserError


@dataclass
class CalibrateConfig:
    """Choose a rule's strength by how far it moves the model: the largest whose KL stays within a budget."""

    model: str = field(metadata={"help": "model folder, steered checkpoint, hub id, or 'tiny'"})
    problems: str = field(metadata={"help": "problem file of held-out prompts (never those that are reported on)"})
    out: str = field(metadata={"help": "folder for stage.json: the chosen strength, and the KL of each"})
    strengths: list[float] = field(metadata={"help": "strengths to try, such as 0.1,0.3,1,3"})
    plan: str = field(default="", metadata={"help": "plan file; empty = the checkpoint's own"})
    rule: str = field(default="", metadata={"help": "the rule; empty = the plan's only one that steers"})
    budget: float = field(default=0.1, metadata={"help": "largest mean KL(plain || steered), nats a response token"})
    max_new_tokens: int = field(default=256, metadata={"help": "of the plain model's greedy responses"})
    limit: int = field(default=32, metadata={"help": "use only the first so many problems; 0 = all"})
    batch_size: int = field(default=8, metadata={"help": "responses together; each keeps its logits in memory"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})

    def __post_init__(self) -> None:
        for key, least in (("max_new_tokens", 1), ("batch_size", 1), ("limit", 0)):
            if getattr(self, key) < least:
                raise UserError(f"key '{key}' must be at least {least}, got {getattr(self, key)}")
        if not self.strengths or not all(math.isfinite(s) and s for s in self.strengths):
            raise UserError(f"key 'strengths' needs finite numbers other than 0, got {self.strengths}")
        if len({s > 0 for s in self.strengths}) > 1:
            raise UserError("key 'strengths' holds both signs; one direction of the two is calibrated at a time")
        if not 0 < self.budget < math.inf:
            raise UserError(f"key 'budget' must be above 0, got {self.budget}")
