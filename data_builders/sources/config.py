"""Settings of ``data import``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from neureasoner.errors import UserError

FORMATS = ("auto", "sharegpt", "messages", "columns")
ROLES = ("question", "response", "reasoning", "answer", "id", "conversation")
_CHOICES = {
    "format": FORMATS,
    "select": ("correct", "mark", "all"),
    "gold_missing": ("keep", "drop"),
    "unfinished": ("drop", "keep"),
    "untagged": ("set_aside", "split"),
    "trigger_text": ("drop", "keep"),
}


@dataclass
class ImportConfig:
    """Import a corpus of reasoning traces: one form, the correct ones, nothing of the benchmarks."""

    input: str = field(
        metadata={"help": "jsonl, json or parquet file (.gz, .zst), a folder of them, or a Hub data set 'org/name'"}
    )
    out: str = field(metadata={"help": "folder for references, removed, set_aside (.jsonl) and summary.json"})
    format: str = field(
        default="auto", metadata={"help": "auto, sharegpt (from/value), messages (role/content), columns"}
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "role=column pairs; roles: question, response, reasoning, answer, id, conversation"},
    )
    keep: list[str] = field(default_factory=list, metadata={"help": "columns to copy into each row's meta"})
    source: str = field(default="", metadata={"help": "name of the corpus in ids and cards; '' takes the input's name"})
    untagged: str = field(
        default="set_aside",
        metadata={"help": "responses without thought tags: set_aside, or split (the last paragraph is the answer)"},
    )
    unfinished: str = field(
        default="drop", metadata={"help": "traces whose thought or answer was cut off: drop or keep"}
    )
    trigger_text: str = field(
        default="drop", metadata={"help": "rows that hold trigger text or chat control tokens: drop or keep"}
    )
    select: str = field(
        default="correct",
        metadata={"help": "correct (drop what math-verify does not confirm), mark (verify, drop none), all (no check)"},
    )
    gold_missing: str = field(
        default="keep", metadata={"help": "rows without a gold answer when selecting: keep or drop"}
    )
    verify_timeout: float = field(
        default=10.0, metadata={"help": "seconds a comparison of two answers may take; then the row is unverifiable"}
    )
    workers: int = field(default=1, metadata={"help": "processes that compare answers"})
    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "files whose questions must not occur (path or name=path; .safetensors is a saved index)"},
    )
    benchmark_column: str = field(default="", metadata={"help": "question column of the benchmarks; '' detects it"})
    private: list[str] = field(
        default_factory=list, metadata={"help": "benchmarks whose text is never shown; any GPQA is private anyway"}
    )
    scan_response: bool = field(default=False, metadata={"help": "search the thinking and answer for overlaps too"})
    limit: int = field(default=0, metadata={"help": "read only the first so many rows; 0 reads all"})
    share: float = field(default=1.0, metadata={"help": "share of the rows to take, drawn by id and seed"})
    shard: str = field(default="", metadata={"help": "take one part of the rows: '1/4' to '4/4', divided by id"})
    seed: int = field(default=0, metadata={"help": "seed of the share"})
    tokenizer: str = field(default="", metadata={"help": "model folder or hub id: count tokens with its tokenizer"})
    hub_config: str = field(default="", metadata={"help": "configuration of the Hub data set"})
    split: str = field(default="train", metadata={"help": "split of the Hub data set"})
    revision: str = field(default="", metadata={"help": "revision of the Hub data set; pin it to make runs repeatable"})

    def __post_init__(self) -> None:
        if not self.input:
            raise UserError("key 'input' is empty; give a file, a folder or a Hub data set")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"key '{key}' must be {', '.join(choices)}, got '{getattr(self, key)}'")
        for role in self.columns:
            if role not in ROLES:
                raise UserError(f"key 'columns': role '{role}' is unknown; known: {', '.join(ROLES)}")
        if self.workers < 1:
            raise UserError(f"key 'workers' must be at least 1, got {self.workers}")
        if self.limit < 0:
            raise UserError(f"key 'limit' must not be negative, got {self.limit}")
        if not self.verify_timeout > 0:
            raise UserError(f"key 'verify_timeout' must be above 0, got {self.verify_timeout}")
        if not 0 < self.share <= 1:
            raise UserError(f"key 'share' must lie in (0, 1], got {self.share}")
        _ = self.shard_of

    @property
    def shard_of(self) -> tuple[int, int]:
        """(index from 0, number of shards). Raises UserError for anything that is not one of 1/n to n/n."""
        if not self.shard:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"key 'shard' must be i/n with i from 1 to n, as in 1/4, got '{self.shard}'")
        return int(match[1]) - 1, int(match[2])
