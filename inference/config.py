"""Settings of the inference stages. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from neureasoner.errors import UserError


@dataclass
class AssembleConfig:
    """Put a model, a plan and the probes, directions and gates it names together into one steered checkpoint."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'; trained on the plan's trigger tokens"})
    probes: str = field(
        default="",
        metadata={
            "help": "folder that `probes fit` wrote (intra/, inter/, instance/, paper/), if the plan names any; "
            "empty = beside the plan, as `choose` leaves them"
        },
    )
    out: str = field(default="", metadata={"help": "folder of the steered checkpoint (required)"})
    plan: str = field(
        default="configs/plans/neureasoner.yaml", metadata={"help": "plan file, or a shipped plan by name"}
    )
    base: str = field(
        default="", metadata={"help": "model this one was trained from; what was fitted on it is accepted too"}
    )
    directions: str = field(
        default="",
        metadata={"help": "where the plan's directions lie: their folder, or the one itself; empty = beside the plan"},
    )
    gates: str = field(
        default="", metadata={"help": "where the plan's gates lie: their folder, or the one itself; empty = likewise"}
    )

    def __post_init__(self) -> None:
        for key in ("model", "out", "plan"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty")


@dataclass
class GenerateConfig:
    """Generate with a steered checkpoint and show where it stepped in."""

    model: str = field(metadata={"help": "steered checkpoint (a folder that `assemble` wrote)"})
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "questions to answer", "positional": True, "split": False}
    )
    problems: str = field(default="", metadata={"help": "problem file (jsonl) to answer instead of prompts"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems; 0 means all"})
    plan: str = field(default="", metadata={"help": "plan (file, or shipped name) to use instead of its own"})
    rules: list[str] = field(
        default_factory=list, metadata={"help": "keep only these rules of the plan; 'none' watches nothing"}
    )
    samples: int = field(default=1, metadata={"help": "responses per question"})
    max_new_tokens: int = field(default=512, metadata={"help": "cap on tokens, forced ones included"})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature; 0 is greedy"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    top_k: int = field(default=0, metadata={"help": "draw from the so many likeliest tokens only; 0 means all"})
    min_p: float = field(
        default=0.0,
        metadata={"help": "draw from tokens of at least this share of the likeliest one's probability"},
    )
    system: str = field(default="", metadata={"help": "system message before every question"})
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the chat template, such as enable_thinking=false"}
    )
    seed: int = field(default=0, metadata={"help": "sampling seed"})
    batch_size: int = field(default=32, metadata={"help": "responses decoded together"})
    stream: bool = field(default=True, metadata={"help": "show a single response while it is written"})
    nothinking: bool = field(default=False, metadata={"help": "prefill the closed thinking block (NoThinking)"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})
    dtype: str = field(default="", metadata={"help": "float32, bfloat16 or float16; empty = as fits the device"})
    device_map: str = field(
        default="", metadata={"help": "instead of device: auto, balanced or sequential over all GPUs"}
    )
    out: str = field(default="", metadata={"help": "folder to write traces.jsonl into; empty = only show"})

    def __post_init__(self) -> None:
        if bool(self.prompt) == bool(self.problems):
            raise UserError("give either 'prompt' (questions) or 'problems' (a file), not both or neither")
        for key in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"key '{key}' must be at least 1, got {getattr(self, key)}")
        if self.limit < 0:
            raise UserError(f"key 'limit' must not be negative, got {self.limit}")
        self.chat_template_kwargs = {k: _value(v) for k, v in self.chat_template_kwargs.items()}


def _value(text: Any) -> Any:
    """What a template's setting means that was written as text: ``false``, ``3``, ``["a"]``, or the text itself."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError:
        return {"True": True, "False": False}.get(text, text)
