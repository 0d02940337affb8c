"""Settings of ``probes gate``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError
from neureasoner.probes.config import check_shares


@dataclass
class GateConfig:
    """Predict from the question alone, before any response token, whether the model will fail (core.md §3.5)."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    traces: str = field(metadata={"help": "judged traces.jsonl, several a problem"})
    out: str = field(metadata={"help": "folder to write the gate, results.json, report.md and roc.png into"})
    channels: int = field(
        default=256, metadata={"help": "neurons kept, over all blocks together, by their F statistic"}
    )
    fails_below: float = field(default=0.5, metadata={"help": "a problem counts as failing below this solving rate"})
    solved_from: float = field(
        default=0.0,
        metadata={"help": "and as solved from this one on, between them it is left out; 0 leaves none out"},
    )
    hidden: int = field(default=256, metadata={"help": "width of the hidden layer after the pooling"})
    dropout: float = field(default=0.3, metadata={"help": "dropout after the hidden layer"})
    lr: float = field(default=1e-4, metadata={"help": "learning rate of Adam"})
    weight_decay: float = field(default=1e-5, metadata={"help": "weight decay of Adam"})
    train_batch: int = field(default=8, metadata={"help": "questions per update (the released code takes 1)"})
    epochs: int = field(default=100, metadata={"help": "most epochs; stops early on validation AUROC"})
    patience: int = field(default=10, metadata={"help": "epochs without a better validation AUROC before stopping"})
    validation: float = field(default=0.2, metadata={"help": "share of problems for early stopping and the threshold"})
    test: float = field(default=0.2, metadata={"help": "share of problems for the reported numbers"})
    batch_size: int = field(default=16, metadata={"help": "questions read at once"})
    permutations: int = field(default=5, metadata={"help": "gates fitted on shuffled labels, which must be at chance"})
    bootstrap: int = field(default=1000, metadata={"help": "draws of problems behind each interval"})
    seed: int = field(default=0, metadata={"help": "seed of split, weights, shuffled labels and intervals"})

    def __post_init__(self) -> None:
        for key in (
            "channels",
            "hidden",
            "train_batch",
            "epochs",
            "patience",
            "batch_size",
            "permutations",
            "bootstrap",
        ):
            if getattr(self, key) < 1:
                raise UserError(f"key '{key}' must be at least 1, got {getattr(self, key)}")
        if not 0 < self.fails_below <= 1:
            raise UserError(f"key 'fails_below' must lie in (0, 1], got {self.fails_below}")
        if self.solved_from and not self.fails_below <= self.solved_from <= 1:
            raise UserError(
                f"key 'solved_from' must lie between fails_below ({self.fails_below}) and 1, or be 0, "
                f"got {self.solved_from}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"key 'dropout' must lie in [0, 1), got {self.dropout}")
        if self.lr <= 0 or self.weight_decay < 0:
            raise UserError(f"keys 'lr' and 'weight_decay' must be positive, got {self.lr}, {self.weight_decay}")
        check_shares(self.validation, self.test)
