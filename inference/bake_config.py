"""Settings of ``inference bake``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError


@dataclass
class BakeConfig:
    """Write always-on rules of a plan into the weights: a plain model folder that needs nothing of ours to run."""

    model: str = field(
        metadata={"help": "model folder (a steered checkpoint has a plan of its own), hub id, or 'tiny'"}
    )
    out: str = field(metadata={"help": "folder of the baked model"})
    plan: str = field(default="", metadata={"help": "plan file; empty = the checkpoint's own"})
    rules: list[str] = field(
        default_factory=list, metadata={"help": "bake only these rules; by default all, or none if one cannot be baked"}
    )
    as_llama: bool = field(
        default=False,
        metadata={"help": "write a Qwen2 as a Llama, whose MLP and attention may have the biases that adding needs"},
    )

    def __post_init__(self) -> None:
        for key in ("model", "out"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty")
