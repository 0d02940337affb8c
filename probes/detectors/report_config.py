"""Settings of ``probes report``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError

KINDS = ("logistic", "mlp", "boosting")


@dataclass
class ReportConfig:
    """Examine the detectors: feature sets, controls, splits, learning curves, decision rules; Markdown, JSON, figures.

    Reads the settings of probes fit from its folder and refits on the same split: it takes many times as long.
    """

    fit: str = field(metadata={"help": "folder written by probes fit"})
    out: str = field(metadata={"help": "folder to write report.md, report.json and the figures into"})
    model: str = field(default="", metadata={"help": "the model, if it is no longer where probes fit read it"})
    traces: str = field(default="", metadata={"help": "the judged traces, likewise"})
    neurons: str = field(default="", metadata={"help": "neurons.json of probes locate, likewise"})
    nothinking: str = field(default="", metadata={"help": "the judged NoThinking traces, likewise"})
    closings: str = field(default="", metadata={"help": "closings.jsonl of data closings, likewise"})
    more_neurons: list[str] = field(
        default_factory=list,
        metadata={"help": "neurons.json of other blocks (probes locate --layer), to examine several blocks together"},
    )
    levels: list[str] = field(
        default_factory=lambda: ["intra", "inter", "instance"], metadata={"help": "levels to examine"}
    )
    estimators: list[str] = field(
        default_factory=lambda: ["logistic", "mlp"], metadata={"help": f"tried for each set, of {', '.join(KINDS)}"}
    )
    compared: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": "estimators set beside each other on the main sets"}
    )
    curve: list[int] = field(
        default_factory=lambda: [6, 12, 20, 40, 80, 160, 320, 640],
        metadata={"help": "numbers of labelled trajectories on the learning curve"},
    )
    repeats: int = field(default=10, metadata={"help": "draws of trajectories, of permutations and of random splits"})
    trajectories: int = field(
        default=20, metadata={"help": "trajectories of the paper's protocol (its Table 4), one sample a token"}
    )
    false_alarm_rate: float = field(default=0.1, metadata={"help": "share of clean traces that may be alarmed"})
    bootstrap: int = field(default=1000, metadata={"help": "draws of problems behind each interval"})
    batch_size: int = field(default=16, metadata={"help": "sequences recorded at once"})
    seed: int = field(
        default=0, metadata={"help": "seed of fits, draws and intervals; the split is that of probes fit"}
    )

    def __post_init__(self) -> None:
        for key, least in (("repeats", 1), ("trajectories", 4), ("bootstrap", 1), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise UserError(f"key '{key}' must be at least {least}, got {getattr(self, key)}")
        if not 0 <= self.false_alarm_rate < 1:
            raise UserError(f"key 'false_alarm_rate' must lie in [0, 1), got {self.false_alarm_rate}")
        for key, known in (("levels", ("intra", "inter", "instance")), ("estimators", KINDS), ("compared", KINDS)):
            wrong = set(getattr(self, key)) - set(known)
            if wrong or not getattr(self, key):
                raise UserError(f"key '{key}' names {sorted(wrong)}; known: {', '.join(known)}")
        if any(size < 2 for size in self.curve):
            raise UserError(f"key 'curve' needs numbers of at least 2 trajectories, got {self.curve}")
