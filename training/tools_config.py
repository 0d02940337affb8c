"""Settings of ``training merge`` and ``training sizing``. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError

LAYOUTS = ("ddp", "zero2", "zero3", "fsdp2", "zero3_offload")
# The paper's models, by the shapes their config.json holds, so that the table needs no network.
PAPER_MODELS = (
    "DeepSeek-R1-Distill-Qwen-7B",
    "DeepSeek-R1-Distill-Llama-8B",
    "Qwen3-8B",
    "DeepSeek-R1-Distill-Qwen-32B",
    "Qwen3-32B",
    "DeepSeek-R1-Distill-Llama-70B",
)


@dataclass
class MergeConfig:
    """An adapter put into its base: a plain checkpoint."""

    adapter: str = field(default="", metadata={"help": "folder of 'training sft' with lora", "positional": True})
    out: str = field(default="", metadata={"help": "folder for the merged model"})
    model: str = field(default="", metadata={"help": "the base; default: what the adapter names"})
    dtype: str = field(default="", metadata={"help": "of the merged weights; default: as the base is stored"})

    def __post_init__(self) -> None:
        if not self.adapter or not self.out:
            raise UserError("--adapter (folder with adapter_config.json) and --out are needed")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r} is unknown; use float32, bfloat16 or float16")


@dataclass
class SizingConfig:
    """Which runs to compute the memory of."""

    models: list[str] = field(
        default_factory=lambda: list(PAPER_MODELS),
        metadata={"help": "the paper's models by name, model folders or hub ids", "positional": True},
    )
    layouts: list[str] = field(default_factory=lambda: list(LAYOUTS), metadata={"help": "launch layouts"})
    devices: int = field(default=8, metadata={"help": "GPUs over all machines"})
    length: int = field(default=16_384, metadata={"help": "longest row in tokens"})
    rows: int = field(default=1, metadata={"help": "rows per GPU and forward pass"})
    lora: int = field(default=0, metadata={"help": "rank of LoRA; 0: all parameters"})
    checkpointing: bool = field(default=True, metadata={"help": "gradient checkpointing: one block's activations"})
    device_memory: float = field(default=80.0, metadata={"help": "GiB of one GPU; what does not fit is marked"})

    def __post_init__(self) -> None:
        for layout in self.layouts:
            if layout not in LAYOUTS:
                raise UserError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
        for key in ("devices", "length", "rows"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be positive, got {getattr(self, key)}")
        if self.lora < 0 or self.device_memory <= 0:
            raise UserError("lora must not be negative and device_memory must be positive")
