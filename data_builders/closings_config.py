"""Settings of ``data closings``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.config import check_numbers
from neureasoner.errors import UserError
from neureasoner.traces import FINISHED, THINK_CLOSE


@dataclass
class ClosingsConfig:
    """Forecast what closing the thinking costs at separators of traces, by sampling both continuations of each."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny': the one that wrote the traces"})
    traces: str = field(metadata={"help": "judged traces.jsonl"})
    out: str = field(metadata={"help": "folder to write closings.jsonl and summary.json into"})
    samples: int = field(default=6, metadata={"help": "continuations closed at each separator"})
    left: int = field(
        default=6, metadata={"help": "continuations left alone at each; 0: the trace itself is the one, at no cost"}
    )
    first: int = field(default=2, metadata={"help": "step K: the first separator considered closes it"})
    every: int = field(default=1, metadata={"help": "from K on, consider the separator of every so many steps"})
    most: int = field(
        default=4, metadata={"help": "separators forecast a trace, spread over it by chance (seeded); 0 means all"}
    )
    text: str = field(default=FINISHED, metadata={"help": "text that closes the thinking, as the plan forces it"})
    temperature: float = field(default=0.6, metadata={"help": "sampling temperature; 0 is greedy"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus of the sampling"})
    max_new_tokens: int = field(
        default=512, metadata={"help": "cap on a response's tokens, those before the separator included"}
    )
    batch_size: int = field(default=64, metadata={"help": "sequences sampled at once"})
    limit: int = field(default=0, metadata={"help": "use only the first so many traces; 0 means all"})
    seed: int = field(default=0, metadata={"help": "seed of the separators chosen and of the sampling"})

    def __post_init__(self) -> None:
        check_numbers(
            self,
            positive=("samples", "first", "every", "max_new_tokens", "batch_size"),
            not_negative=("left", "most", "limit", "temperature"),
        )
        if self.temperature == 0 and max(self.samples, self.left) > 1:
            raise UserError(
                "key 'temperature' is 0 and draws the same continuation each time; set samples: 1 and left: 1 or 0"
            )
        if THINK_CLOSE not in self.text:
            raise UserError(f"key 'text' must hold {THINK_CLOSE}, got {self.text!r}")
