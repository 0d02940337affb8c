"""Settings of the data stages. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.data_builders.inspect_config import InspectConfig
from neureasoner.errors import UserError

__all__ = ["InspectConfig", "JudgeConfig", "ProblemsConfig", "ReconstructConfig", "RolloutsConfig"]


@dataclass
class ProblemsConfig:
    """Write a problem file."""

    out: str = field(metadata={"help": "folder to write problems.jsonl into"})
    family: list[str] = field(
        default_factory=lambda: ["arithmetic", "countdown", "words"], metadata={"help": "problem families"}
    )
    n: int = field(default=300, metadata={"help": "how many problems in all; families and difficulties in turn"})
    split: str = field(default="train", metadata={"help": "train, validation or test; splits share no question"})
    seed: int = field(default=0, metadata={"help": "seed of the problems"})

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"key 'n' must be at least 1, got {self.n}")
        if self.split not in ("train", "validation", "test"):
            raise UserError(f"key 'split' must be train, validation or test, got '{self.split}'")


@dataclass
class RolloutsConfig:
    """Sample responses to problems."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    problems: str = field(metadata={"help": "problem file (jsonl)"})
    out: str = field(metadata={"help": "folder to write traces.jsonl into"})
    samples: int = field(default=1, metadata={"help": "responses per problem"})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature; 0 is greedy"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    max_new_tokens: int = field(default=512, metadata={"help": "cap on generated tokens; a capped trace is unfinished"})
    batch_size: int = field(default=64, metadata={"help": "sequences sampled at once"})
    no_thinking: bool = field(default=False, metadata={"help": "prefill the closed thinking block (NoThinking)"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems; 0 means all"})
    seed: int = field(default=0, metadata={"help": "sampling seed"})
    record: list[str] = field(
        default_factory=list, metadata={"help": "sites to record by teacher forcing, as 'neuron:3[1,5]' or 'logits'"}
    )

    def __post_init__(self) -> None:
        for key in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"key '{key}' must be at least 1, got {getattr(self, key)}")
        if self.limit < 0:
            raise UserError(f"key 'limit' must not be negative, got {self.limit}")
        if self.temperature < 0:
            raise UserError(f"key 'temperature' must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"key 'top_p' must lie in (0, 1], got {self.top_p}")


@dataclass
class JudgeConfig:
    """Label traces: first wrong step, loop, answer position, correctness."""

    traces: str = field(metadata={"help": "traces.jsonl to judge"})
    out: str = field(metadata={"help": "folder to write the judged traces.jsonl and summary.json into"})
    judge: str = field(default="exact", metadata={"help": "which judge; 'exact' recomputes every claim"})

    def __post_init__(self) -> None:
        if self.judge != "exact":
            raise UserError(f"key 'judge': unknown judge '{self.judge}'; known: exact")


@dataclass
class ReconstructConfig:
    """Build trigger-training rows: correct traces with one failure, a trigger block and a repair."""

    out: str = field(metadata={"help": "folder to write train.jsonl, rejected.jsonl and summary.json into"})
    traces: str = field(default="", metadata={"help": "judged traces; the faultless, correct ones become references"})
    corpus: int = field(default=0, metadata={"help": "also use so many traces of the tiny reasoner's corpus"})
    intra: float = field(default=0.6, metadata={"help": "share of references given an intra variant"})
    inter: float = field(default=0.3, metadata={"help": "share of references given an inter variant"})
    plain: float = field(default=0.2, metadata={"help": "share of references kept untouched as rows of their own"})
    control_arm: bool = field(
        default=False, metadata={"help": "write the same rows without failure and block (tests distillation)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the choice of failures"})

    def __post_init__(self) -> None:
        if not self.traces and not self.corpus:
            raise UserError("reconstruct needs references: give 'traces' (judged) or 'corpus' (a number)")
        for key in ("intra", "inter", "plain"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"key '{key}' is a share and must lie in [0, 1], got {getattr(self, key)}")
