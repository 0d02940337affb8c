"""Settings of ``reproduce`` and ``evaluation runtime``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.config import check_numbers
from neureasoner.errors import UserError
from neureasoner.evaluation.config import CAP_HELP

# Table: the command of a recipe whose results it shows.
READS = {
    "table1": "evaluate",
    "table2": "combine",
    "table4": "probes report",
    "table5": "evaluate",
    "table6": "evaluation runtime",
    "table7": "combine",
    "figure5": "evaluate",
}


@dataclass
class ReproduceConfig:
    """Run a recipe and print its figures beside the paper's. The same command goes on after an interruption."""

    table: str = field(metadata={"help": f"one of {', '.join(READS)}", "positional": True})
    recipe: str = field(
        default="", metadata={"help": "recipe that measures it; empty = reproduce_TABLE, of the tiny reasoner"}
    )
    out: str = field(default="", metadata={"help": "run directory; empty = the one the recipe names"})
    paper: str = field(
        default="", metadata={"help": "the paper's model to print beside ours; empty = ours if it is one of them"}
    )
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "override settings of the recipe, each STAGE.KEY=VALUE (value in YAML)", "split": False},
    )

    def __post_init__(self) -> None:
        if self.table not in READS:
            raise UserError(f"'{self.table}' is not reproduced here; known: {', '.join(READS)}")


@dataclass
class RuntimeConfig:
    """Wall time with the probes watching and nobody intervening, and running free. For an idle machine.

    The first two arms write the same tokens, so that what differs is the watching; the third is the plan as it stands.
    """

    model: str = field(metadata={"help": "steered checkpoint (a folder that `assemble` wrote, or 'tiny-steered')"})
    problems: str = field(metadata={"help": "problem file"})
    out: str = field(metadata={"help": "folder for results.json and results.md"})
    batch_size: int = field(default=32, metadata={"help": "responses decoded together"})
    repeats: int = field(default=3, metadata={"help": "times every batch is timed in each arm, the arms in turn"})
    max_new_tokens: int = field(default=0, metadata={"help": CAP_HELP})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature (0 = greedy)"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems; 0 = all"})
    resamples: int = field(default=10_000, metadata={"help": "draws behind each interval"})
    seed: int = field(default=0, metadata={"help": "seed of the sampling, one a batch, the same in every arm"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})

    def __post_init__(self) -> None:
        for key in ("model", "problems", "out"):
            if not getattr(self, key):
                raise UserError(f"key '{key}' is empty")
        check_numbers(
            self,
            positive=("batch_size", "repeats", "resamples"),
            not_negative=("max_new_tokens", "temperature", "limit", "seed"),
        )
