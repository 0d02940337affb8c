"""Settings of the data stages. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from neureasoner.config import check_numbers
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
        check_numbers(self, ("samples", "max_new_tokens", "batch_size"), ("limit", "temperature"))


def check_judge(name: str, endpoint: dict[str, Any], key: str, known: tuple[str, ...] = ("exact", "llm")) -> None:
    """``exact`` needs nothing; ``llm`` needs an endpoint with a model. Raises UserError."""
    if name not in known:
        raise UserError(f"key '{key}': unknown {key} '{name}'; known: {', '.join(known)}")
    if name == "llm" and not endpoint.get("model"):
        raise UserError(f"key 'endpoint' must name the model of the {key}, as in --endpoint model=NAME,base_url=URL")
    if name == "exact" and endpoint:
        raise UserError(f"key 'endpoint' is for {key} llm; the exact {key} asks nobody")


@dataclass
class JudgeConfig:
    """Label traces: first wrong step, loop, answer position, correctness."""

    out: str = field(metadata={"help": "folder to write the judged traces.jsonl and summary.json into"})
    traces: str = field(default="", metadata={"help": "traces.jsonl to judge"})
    references: str = field(default="", metadata={"help": "or references.jsonl of data import, read as traces"})
    tokenizer: str = field(
        default="", metadata={"help": "for references: model whose tokens the labels count ('tiny', folder, hub id)"}
    )
    judge: str = field(
        default="exact", metadata={"help": "exact recomputes every claim (embedded families); llm asks a model"}
    )
    endpoint: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "for judge llm: model=…,base_url=…,max_cost=…,ledger=… (docs/data.md)"}
    )
    dry_run: bool = field(default=False, metadata={"help": "say what the judge llm will cost, and stop"})
    probe: int = field(default=0, metadata={"help": "with dry_run: ask so many questions for real, to measure"})
    batch: bool = field(default=False, metadata={"help": "use the Batch API (half the price, within a day)"})
    compare: str = field(default="", metadata={"help": "the same traces judged by another: say how far they agree"})

    def __post_init__(self) -> None:
        if bool(self.traces) == bool(self.references):
            raise UserError("data judge needs either 'traces' or 'references'")
        if self.references and not self.tokenizer:
            raise UserError("key 'tokenizer' is missing: judged references count tokens; name the model they are for")
        check_judge(self.judge, self.endpoint, "judge")
        if self.probe < 0:
            raise UserError(f"key 'probe' must not be negative, got {self.probe}")


@dataclass
class ReconstructConfig:
    """Build trigger-training rows: correct traces with one failure, a trigger block and a repair."""

    out: str = field(metadata={"help": "folder to write train.jsonl, rejected.jsonl and summary.json into"})
    traces: str = field(default="", metadata={"help": "judged traces; the faultless, correct ones become references"})
    shortest: int = field(
        default=0, metadata={"help": "use only so many references of each problem in 'traces', the shortest (0: all)"}
    )
    corpus: int = field(default=0, metadata={"help": "also use so many traces of the tiny reasoner's corpus"})
    intra: float = field(default=0.6, metadata={"help": "share of references given an intra variant"})
    inter: float = field(default=0.3, metadata={"help": "share of references given an inter variant"})
    instance: float = field(
        default=0.0, metadata={"help": "share of references whose thinking is closed early; for models that need it"}
    )
    plain: float = field(default=0.2, metadata={"help": "share of references kept untouched as rows of their own"})
    control_arm: bool = field(
        default=False, metadata={"help": "write the same rows without failure and block (tests distillation)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the choice of failures"})
    tokenizer: str = field(
        default="", metadata={"help": "count tokens with this model's tokenizer, for the card ('tiny', folder, hub id)"}
    )
    references: str = field(default="", metadata={"help": "references.jsonl of data import"})
    rewriter: str = field(default="exact", metadata={"help": "exact computes (embedded families); llm asks a model"})
    endpoint: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "for rewriter llm: model=…,base_url=…,max_cost=… (docs/data.md)"}
    )
    dry_run: bool = field(default=False, metadata={"help": "say what the rewriter llm will cost, and stop"})
    probe: int = field(default=0, metadata={"help": "with dry_run: ask so many questions for real, to measure"})
    batch: bool = field(default=False, metadata={"help": "use the Batch API (half the price, within a day)"})

    def __post_init__(self) -> None:
        if not self.traces and not self.corpus and not self.references:
            raise UserError(
                "reconstruct needs references: give 'traces' (judged), 'references' (imported) or 'corpus' (a number)"
            )
        check_judge(self.rewriter, self.endpoint, "rewriter")
        if self.shortest < 0:
            raise UserError(f"shortest must be 0 (all) or a number of references, got {self.shortest}")
        for key in ("intra", "inter", "instance", "plain"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"key '{key}' is a share and must lie in [0, 1], got {getattr(self, key)}")
