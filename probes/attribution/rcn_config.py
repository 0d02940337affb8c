"""Settings of ``probes rcn``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError
from neureasoner.probes.config import check_shares

SPANS = ("response", "all")
POOLINGS = ("question", "pooled")
RANKINGS = ("filter", "released")
UNITS = ("raw", "sigma")
RELEASED = 200  # the released code lists so many and uses the first of them


@dataclass
class RcnConfig:
    """Find the neurons whose mean activation differs in sign between right and wrong traces (core.md §3.2, §3.3)."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    traces: str = field(metadata={"help": "judged traces.jsonl, several a problem"})
    out: str = field(
        metadata={"help": "folder to write neurons.safetensors, neurons.json, directions/ and figures into"}
    )
    neurons: int = field(default=50, metadata={"help": "neurons kept, over all blocks together"})
    span: str = field(default="response", metadata={"help": "tokens of the means: 'response', or 'all' of the trace"})
    pooling: str = field(
        default="question",
        metadata={"help": "'question': per question, then averaged, as the paper; 'pooled': all traces alike"},
    )
    ranking: str = field(
        default="filter",
        metadata={"help": "'filter': opposite signs, then |S|; 'released': the sort of the released code"},
    )
    filter_sign: bool = field(default=True, metadata={"help": "keep only neurons whose two means have opposite signs"})
    unit: str = field(
        default="raw", metadata={"help": "unit of S: 'raw' activation, or 'sigma', a neuron's own deviations"}
    )
    retokenise: bool = field(
        default=False,
        metadata={"help": "read problem and response as text, with this model's tokenizer (traces of another model)"},
    )
    template: bool = field(
        default=True, metadata={"help": "with retokenise: the model's chat template, or else plain text with headings"}
    )
    source_model: str = field(
        default="", metadata={"help": "the model that wrote the traces, for the record; empty is the model itself"}
    )
    problems: int = field(default=0, metadata={"help": "use at most so many contrast problems; 0 means all"})
    least_problems: int = field(default=8, metadata={"help": "fewest contrast problems to go on with"})
    batch_size: int = field(default=8, metadata={"help": "sequences read at once"})
    bootstrap: int = field(default=500, metadata={"help": "draws of problems behind the stability figures"})
    permutations: int = field(
        default=100, metadata={"help": "shuffles of right and wrong within each problem (the control)"}
    )
    validation: float = field(default=0.2, metadata={"help": "share of problems kept for validation, as in probes fit"})
    test: float = field(default=0.2, metadata={"help": "share of problems kept for the test, as in probes fit"})
    seed: int = field(default=0, metadata={"help": "seed of the split (as in probes fit), draws and random neurons"})

    def __post_init__(self) -> None:
        for key, least in (("neurons", 1), ("batch_size", 1), ("bootstrap", 1), ("permutations", 1), ("problems", 0)):
            if getattr(self, key) < least:
                raise UserError(f"key '{key}' must be at least {least}, got {getattr(self, key)}")
        if self.least_problems < 2:
            raise UserError(f"key 'least_problems' must be at least 2, got {self.least_problems}")
        for key, known in (("span", SPANS), ("pooling", POOLINGS), ("ranking", RANKINGS), ("unit", UNITS)):
            if getattr(self, key) not in known:
                raise UserError(f"key '{key}' must be one of {', '.join(known)}, got '{getattr(self, key)}'")
        if self.ranking == "released" and not self.filter_sign:
            raise UserError("key 'filter_sign' has no effect on the released ranking; use ranking 'filter' with it")
        if self.ranking == "released" and self.neurons > RELEASED:
            raise UserError(f"key 'neurons' must be at most {RELEASED} with the released ranking, got {self.neurons}")
        if not self.template and not self.retokenise:
            raise UserError("key 'template' has an effect only with retokenise; otherwise the traces' prompts decide")
        check_shares(self.validation, self.test)
