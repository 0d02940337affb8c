"""Settings of ``data inspect``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError


@dataclass
class InspectConfig:
    """Show a sample of problems, traces or reconstructed rows."""

    path: str = field(metadata={"help": "problems.jsonl, traces.jsonl or train.jsonl", "positional": True})
    n: int = field(default=3, metadata={"help": "how many to show"})
    seed: int = field(default=0, metadata={"help": "seed of the sample"})
    id: str = field(default="", metadata={"help": "show the record of this id only"})
    kind: str = field(
        default="",
        metadata={"help": "only this kind: intra, inter, plain (rows), intra, inter, clean (traces), a family"},
    )
    model: str = field(default="tiny", metadata={"help": "whose tokens the masks of training rows show; '' shows none"})
    html: str = field(default="", metadata={"help": "write all of them into this page, to browse, filter and search"})
    mask_failure: bool = field(default=False, metadata={"help": "show the masks that training with mask_failure has"})

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"key 'n' must be at least 1, got {self.n}")
