"""Settings of ``data pairs``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.config import check_numbers
from neureasoner.errors import UserError


@dataclass
class PairsConfig:
    """Write step by step, go back before a failure, and draw until the continuation is clean."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    problems: str = field(metadata={"help": "problem file (jsonl)"})
    out: str = field(metadata={"help": "folder to write pairs.jsonl (and records/) into"})
    levels: list[str] = field(default_factory=lambda: ["intra", "inter"], metadata={"help": "failures to look for"})
    every: int = field(default=0, metadata={"help": "judge after so many new steps; 0 judges once, at the end"})
    tries: int = field(default=8, metadata={"help": "continuations drawn from before a failure"})
    samples: int = field(default=1, metadata={"help": "responses per problem"})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature; 0 would draw the same again"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    max_new_tokens: int = field(default=512, metadata={"help": "cap on the tokens of a response"})
    batch_size: int = field(default=32, metadata={"help": "responses written at once (also the unit of resuming)"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems; 0 means all"})
    instance_traces: str = field(
        default="", metadata={"help": "judged traces, several a problem: also pair easy with hard problems"}
    )
    instance_nothinking: str = field(default="", metadata={"help": "judged NoThinking traces of the same problems"})
    first_steps: int = field(default=4, metadata={"help": "steps K of an instance pair"})
    record: list[str] = field(
        default_factory=list, metadata={"help": "sites to record on both continuations, as 'neuron:3[1,5]'"}
    )
    seed: int = field(default=0, metadata={"help": "sampling seed"})

    def __post_init__(self) -> None:
        check_numbers(self, ("tries", "samples", "max_new_tokens", "batch_size", "first_steps"), ("every", "limit"))
        if self.temperature <= 0:
            raise UserError("key 'temperature' must be above 0: greedy decoding draws the same failure again")
        unknown = set(self.levels) - {"intra", "inter"}
        if unknown or not self.levels:
            raise UserError(f"key 'levels' names {sorted(unknown)}; known: intra, inter")
