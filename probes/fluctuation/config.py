"""Settings of ``probes fluctuation``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError

MIN_TOKENS = 16  # below it neither the spectrum nor an autocorrelation at 8 tokens says anything


@dataclass
class FluctuationConfig:
    """Do failures fluctuate as the paper draws them: spikes, cycles, collapse? (its Observation 2)"""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    neurons: str = field(metadata={"help": "neurons.json written by probes locate"})
    out: str = field(metadata={"help": "folder to write fluctuation.json, fluctuation.md and figures into"})
    pairs: str = field(default="", metadata={"help": "pairs.jsonl written by data pairs"})
    traces: str = field(
        default="",
        metadata={
            "help": "instead of pairs: judged traces, several a problem; a failure meets a clean trace's same steps"
        },
    )
    nothinking: str = field(
        default="", metadata={"help": "with traces: judged NoThinking traces of the same problems (easy labels)"}
    )
    first_steps: int = field(default=4, metadata={"help": "with traces: steps K of an instance pair"})
    unseen: bool = field(default=False, metadata={"help": "leave out problems that the channels were selected on"})
    min_tokens: int = field(default=MIN_TOKENS, metadata={"help": "pairs with a shorter side are left out"})
    examples: int = field(default=3, metadata={"help": "single pairs drawn as they are"})
    batch_size: int = field(default=16, metadata={"help": "sequences recorded at once"})
    bootstrap: int = field(default=1000, metadata={"help": "draws of problems behind each interval"})
    permutations: int = field(default=9999, metadata={"help": "sign flips behind each p"})
    seed: int = field(default=0, metadata={"help": "seed of draws, sign flips and examples"})

    def __post_init__(self) -> None:
        if bool(self.pairs) == bool(self.traces):
            raise UserError("name either 'pairs' (written by data pairs) or 'traces' (judged), one of the two")
        if self.nothinking and not self.traces:
            raise UserError("key 'nothinking' has an effect only with traces; data pairs reads its own")
        least = {"first_steps": 1, "min_tokens": MIN_TOKENS, "examples": 1, "batch_size": 1, "bootstrap": 100}
        for key, value in {**least, "permutations": 99}.items():
            if getattr(self, key) < value:
                raise UserError(f"key '{key}' must be at least {value}, got {getattr(self, key)}")
