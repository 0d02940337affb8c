"""Settings of ``doctor`` and ``run``. Standard library only, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DoctorConfig:
    """Say what is installed, which devices, dtypes and attention back ends there are, and check a model."""

    model: str = field(
        default="", metadata={"help": "model folder, hub id or 'tiny' to check hooks on", "positional": True}
    )
    device: str = field(default="", metadata={"help": "torch device of the check; empty = GPU if there is one"})
    dtype: str = field(default="", metadata={"help": "float32, bfloat16 or float16; empty = as fits the device"})
    device_map: str = field(
        default="", metadata={"help": "instead of device: auto, balanced or sequential over all GPUs"}
    )


@dataclass
class RunConfig:
    """Run a recipe's stages in order. The same command goes on after an interruption."""

    recipe: str = field(metadata={"help": "recipe YAML, or a shipped one such as 'quickstart'", "positional": True})
    out: str = field(default="", metadata={"help": "run directory; empty = the one the recipe names"})
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "override settings, each STAGE.KEY=VALUE (value in YAML)", "split": False},
    )
