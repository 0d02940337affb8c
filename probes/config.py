"""Settings of the probe stages. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from neureasoner.errors import UserError

ATTRIBUTIONS = ("depass", "direct")
SELECTIONS = ("worst_rank", "fixed_k", "quantile")
CANDIDATES = ["spectral", "entropy", "residual", "entropy+residual", "entropy+residual+spectral"]


def _at_least(config: object, key: str, least: int) -> None:
    if getattr(config, key) < least:
        raise UserError(f"key '{key}' must be at least {least}, got {getattr(config, key)}")


def check_shares(validation: float, test: float) -> None:
    """Raises UserError unless validation and test leave something of the problems for training."""
    if validation <= 0 or test <= 0 or validation + test >= 1:
        raise UserError(f"keys 'validation' and 'test' are shares above 0 and below 1 in sum, got {validation}, {test}")


@dataclass
class LocateConfig:
    """Find the neurons and heads that show each failure (core.md §1.2). Uses training problems only."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    traces: str = field(metadata={"help": "judged traces.jsonl"})
    out: str = field(metadata={"help": "folder to write neurons.json and figures into"})
    nothinking: str = field(
        default="", metadata={"help": "judged NoThinking traces of the same problems (easy labels)"}
    )
    mode: str = field(
        default="depass",
        metadata={
            "help": "attribution: 'depass' follows writes through all blocks above, one backward pass per token of a "
            "span; 'direct' takes the write at the token itself, one forward pass per span"
        },
    )
    layer: int = field(default=-1, metadata={"help": "block to look at, from 0; -1 is the middle one, L // 2"})
    neurons: int = field(default=32, metadata={"help": "neurons kept for intra and for instance"})
    heads: int = field(default=8, metadata={"help": "heads kept for inter (at most as many as a block has)"})
    selection: str = field(
        default="worst_rank",
        metadata={
            "help": "what a span selects: 'worst_rank' the components with the best worst rank over its tokens, "
            "'fixed_k' the intersection of its tokens' TopK sets as it is, 'quantile' as worst_rank, forgiving the "
            "tokens a component does worst at"
        },
    )
    quantile: float = field(
        default=1.0, metadata={"help": "share of a span's tokens that must rank a component high (selection quantile)"}
    )
    k_neurons: int = field(default=0, metadata={"help": "K of selection fixed_k among the neurons of a block"})
    k_heads: int = field(default=0, metadata={"help": "K of selection fixed_k among the heads of a block"})
    blocks: list[int | Literal["all"]] = field(
        default_factory=list,
        metadata={
            "help": "blocks to scan for where along depth the experts lie, or 'all'; direct takes the same forward "
            "pass for all of them, depass about what the lowest one takes"
        },
    )
    contrast: bool = field(default=True, metadata={"help": "prefer components that clean spans do not select"})
    exclude_separators: bool = field(default=True, metadata={"help": "leave a step's closing token out of its span"})
    first_steps: int = field(default=4, metadata={"help": "steps K that an instance span holds"})
    max_traces: int = field(default=200, metadata={"help": "failing and clean traces per level"})
    bootstrap: int = field(default=200, metadata={"help": "draws of problems behind stability and intervals"})
    batch_size: int = field(default=8, metadata={"help": "sequences recorded at once (for the example figure)"})
    validation: float = field(default=0.2, metadata={"help": "share of problems kept for validation, as in probes fit"})
    test: float = field(default=0.2, metadata={"help": "share of problems kept for the test, as in probes fit"})
    seed: int = field(default=0, metadata={"help": "seed of the split by problem, as in probes fit"})

    def __post_init__(self) -> None:
        for key in ("neurons", "heads", "first_steps", "max_traces", "bootstrap", "batch_size"):
            _at_least(self, key, 1)
        for key, known in (("mode", ATTRIBUTIONS), ("selection", SELECTIONS)):
            if getattr(self, key) not in known:
                raise UserError(f"key '{key}' must be one of {', '.join(known)}, got '{getattr(self, key)}'")
        self._check_selection()
        if any(b != "all" and b < 0 for b in self.blocks):
            raise UserError(f"key 'blocks' counts blocks from 0, or is all, got {', '.join(map(str, self.blocks))}")
        if self.layer < -1:
            raise UserError(f"key 'layer' counts from 0, or is -1 for the middle block, got {self.layer}")
        check_shares(self.validation, self.test)

    def _check_selection(self) -> None:
        """Keys of one selection that would go unused by another are refused, so that none is forgotten silently."""
        if not 0 < self.quantile <= 1:
            raise UserError(f"key 'quantile' must lie in (0, 1], got {self.quantile}")
        if (self.quantile < 1) != (self.selection == "quantile"):
            raise UserError(
                f"selection '{self.selection}' does not go with quantile {self.quantile}; set selection: quantile and "
                "a quantile below 1, such as 0.9, or neither"
            )
        given = self.k_neurons, self.k_heads
        if self.selection == "fixed_k" and min(given) < 1:
            raise UserError(f"selection 'fixed_k' needs keys 'k_neurons' and 'k_heads' of at least 1, got {given}")
        if self.selection != "fixed_k" and given != (0, 0):
            raise UserError(f"keys 'k_neurons' and 'k_heads' are of selection fixed_k, not of '{self.selection}'")


@dataclass
class FitConfig:
    """Fit, choose, calibrate and test one probe per level, with controls (core.md §1.7)."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    traces: str = field(metadata={"help": "judged traces.jsonl"})
    neurons: str = field(metadata={"help": "neurons.json written by probes locate"})
    out: str = field(metadata={"help": "folder to write the probes and results.json into"})
    nothinking: str = field(
        default="", metadata={"help": "judged NoThinking traces of the same problems (easy labels)"}
    )
    candidates: list[str] = field(
        default_factory=lambda: list(CANDIDATES), metadata={"help": "feature sets to choose among on validation"}
    )
    intra: list[int] = field(default_factory=lambda: [2, 4], metadata={"help": "windows k to try for intra"})
    inter: list[int] = field(default_factory=lambda: [4, 8], metadata={"help": "windows k to try for inter"})
    instance: list[int] = field(
        default_factory=lambda: [2, 4],
        metadata={"help": "steps K to try for instance; with closings, also windows k of the exit"},
    )
    closings: str = field(
        default="",
        metadata={
            "help": "closings.jsonl of data closings on these traces: the instance probe is an exit, read at every "
            "step from K on, of where closing costs nothing; without it, easy against hard questions, read once"
        },
    )
    price: float = field(
        default=0.1,
        metadata={
            "help": "points of accuracy that one per cent of the tokens is worth: the exit's threshold is the best on "
            "validation by points minus price times tokens in per cent"
        },
    )
    false_alarm_rate: float = field(
        default=0.1, metadata={"help": "share of clean traces that may be alarmed, per level (an exit has a price)"}
    )
    epochs: int = field(default=40, metadata={"help": "most epochs; stops early on validation AUROC"})
    hidden: int = field(default=128, metadata={"help": "width of the two hidden layers"})
    dropout: float = field(default=0.1, metadata={"help": "dropout after each hidden layer"})
    weight_decay: list[float] = field(
        default_factory=lambda: [0.01, 3.0],
        metadata={"help": "AdamW weight decays to choose among; wide feature sets need the larger one"},
    )
    validation: float = field(default=0.2, metadata={"help": "share of problems for choosing and calibrating"})
    test: float = field(default=0.2, metadata={"help": "share of problems for the reported numbers"})
    batch_size: int = field(default=16, metadata={"help": "sequences recorded at once"})
    bootstrap: int = field(default=1000, metadata={"help": "draws of problems behind each interval"})
    seed: int = field(default=0, metadata={"help": "seed of split, weights, control channels and intervals"})

    def __post_init__(self) -> None:
        for key in ("epochs", "hidden", "batch_size", "bootstrap"):
            _at_least(self, key, 1)
        if not 0 <= self.false_alarm_rate < 1:
            raise UserError(f"key 'false_alarm_rate' must lie in [0, 1), got {self.false_alarm_rate}")
        for level, least in (("intra", 2), ("inter", 2), ("instance", 1)):
            windows = getattr(self, level)
            least = 2 if self.closings else least  # an exit reads a trailing window, as intra does
            if not windows or min(windows) < least:
                raise UserError(f"key '{level}' needs windows of at least {least} steps, got {windows}")
        if not 0 <= self.price < float("inf"):
            raise UserError(f"key 'price' must be 0 or more points a per cent, got {self.price}")
        if not self.weight_decay:
            raise UserError("key 'weight_decay' is empty; name at least one value, for example 0.01")
        if not self.candidates:
            raise UserError("key 'candidates' is empty; name at least one feature set, for example 'entropy'")
        check_shares(self.validation, self.test)
