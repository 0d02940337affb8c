"""Settings of ``evaluation benchmark``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError

ROLES = ("question", "answer", "options", "id", "difficulty", "starter", "tests", "hidden", "function")
KINDS = ("math", "option", "code")


@dataclass
class BenchmarkConfig:
    """Write the problems of a benchmark, for `evaluate` and `data rollouts`."""

    name: str = field(
        metadata={
            "help": "gsm8k, math500, aime24, aime25, gpqa_diamond, livecodebench, or any name with 'kind' and 'input'",
            "positional": True,
        }
    )
    out: str = field(metadata={"help": "folder to write problems.jsonl into"})
    input: str = field(
        default="",
        metadata={"help": "local jsonl, json or parquet (.gz, .zst), or a Hub set; '' = the benchmark's own"},
    )
    kind: str = field(default="", metadata={"help": "for a benchmark of your own: math, option or code"})
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "role=column pairs (a+b joins columns); roles: " + ", ".join(ROLES), "split": True},
    )
    template: str = field(default="", metadata={"help": "file with {question} (and {options}, {starter}) to ask with"})
    split: str = field(default="", metadata={"help": "split of a Hub set; '' = the benchmark's own"})
    revision: str = field(default="", metadata={"help": "revision of a Hub set"})
    release: str = field(
        default="",
        metadata={"help": "LiveCodeBench: release_v1 … release_v6; '' = release_v5 (Hub) or unstated (local)"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the options' order, fixed for each item"})
    limit: int = field(default=0, metadata={"help": "use only the first so many items; 0 = all"})

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("key 'name' is empty; name a benchmark, such as gsm8k")
        if self.kind and self.kind not in KINDS:
            raise UserError(f"key 'kind' must be one of {', '.join(KINDS)}, got '{self.kind}'")
        for role in self.columns:
            if role not in ROLES:
                raise UserError(f"key 'columns': unknown role '{role}'; known: {', '.join(ROLES)}")
        for key in ("seed", "limit"):
            if getattr(self, key) < 0:
                raise UserError(f"key '{key}' must not be negative, got {getattr(self, key)}")
