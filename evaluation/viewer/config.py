"""Settings of the viewer's commands. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from neureasoner.errors import UserError

Kind = Literal[
    "", "to_right", "to_wrong", "false_alarm", "missed", "right", "wrong", "acted", "error", "circle", "cut"
]  # fmt: skip


def _given(run: str) -> None:
    if not run:
        raise UserError("key 'run' is empty; name the folder that `evaluate` wrote")


@dataclass
class ShowConfig:
    """Look at an evaluation in the terminal: the table of arms, then traces of two arms side by side."""

    run: str = field(metadata={"help": "folder that `evaluate` wrote", "positional": True})
    arm: str = field(default="", metadata={"help": "arm to look at; empty = full"})
    beside: str = field(default="", metadata={"help": "arm beside it; empty = vanilla; none = nothing"})
    only: Kind = field(default="", metadata={"help": "to_right and to_wrong: flipped against the arm beside; ..."})
    family: str = field(default="", metadata={"help": "only problems of this family"})
    search: str = field(default="", metadata={"help": "only traces whose question, id or text holds these words"})
    sample: int = field(default=0, metadata={"help": "which sample of each problem"})
    traces: int = field(default=3, metadata={"help": "traces to print; 0 = only the table"})
    width: int = field(default=0, metadata={"help": "columns to use; 0 = the terminal's, or 80 when piped"})

    def __post_init__(self) -> None:
        _given(self.run)
        if self.traces < 0 or self.sample < 0 or self.width < 0:
            raise UserError("keys 'traces', 'sample' and 'width' must not be negative")


@dataclass
class ReportConfig:
    """Write report.html of an evaluation again, for instance with more traces."""

    run: str = field(metadata={"help": "folder that `evaluate` wrote", "positional": True})
    traces: int = field(default=600, metadata={"help": "most traces embedded"})
    probes_results: str = field(default="", metadata={"help": "results.json of `probes fit`, for the ROC curves"})

    def __post_init__(self) -> None:
        _given(self.run)
        if self.traces < 0:
            raise UserError(f"key 'traces' must not be negative, got {self.traces}")


@dataclass
class DetailsConfig:
    """Record the neurons of an evaluation's traces for the report: spectrograms, spectra, scores of unwatched arms."""

    run: str = field(metadata={"help": "folder that `evaluate` wrote", "positional": True})
    traces: int = field(default=200, metadata={"help": "most traces recorded (and then embedded) over all arms"})
    batch_size: int = field(default=8, metadata={"help": "traces read together by the model"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})

    def __post_init__(self) -> None:
        _given(self.run)
        for key in ("traces", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"key '{key}' must be at least 1, got {getattr(self, key)}")
