"""Settings of ``training/sft.py``: our own arguments, and the paper's values for TRL's. Standard library only."""

from __future__ import annotations

import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from neureasoner.errors import UserError
from neureasoner.traces import INTER, INTRA

# Table of core.md §1.9, in TRL's words. ``max_length`` is not in the paper; TRL's own default of 1,024 would cut rows.
PAPER: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "max_length": 16_384,
    "per_device_train_batch_size": 1,
    "train_sampling_strategy": "group_by_length",  # rows of like length in a batch, still in random order: less padding
    "seed": 0,
    "logging_steps": 0.02,  # a share of all steps
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,  # every trained parameter is used
}

INITS = ("mean", "description", "keep")
DTYPES = ("float32", "bfloat16", "float16")

# What the description rows of new trigger tokens are made from (``trigger_init: description``).
DESCRIPTIONS = {
    INTRA: "wait, a step above is wrong: find the error and correct it",
    INTER: "I am going in circles: stop and try another approach",
}

# Fields of TrainingArguments that do not change the weights that come out.
_NEUTRAL = re.compile(
    r"output_dir|logging|log_|save_|eval|per_device_eval|report_to|disable_tqdm|hub_|push_|resume_|use_cpu|dataloader_|run_name"
    r"|project|trackio|ddp_|do_|local_rank|gradient_checkpointing|activation_|torch_|include_|accelerator|skip_memory|dataset_"
)


@dataclass
class SftArguments:
    """What is trained on what; every other option is a field of TRL's ``SFTConfig``."""

    model: str = field(default="tiny", metadata={"help": "model folder, hub id, or 'tiny', the shipped reasoner"})
    data: str = field(default="", metadata={"help": "train.jsonl of 'neureasoner data reconstruct'"})
    out: str = field(default="", metadata={"help": "folder for the model; checkpoints go to out/checkpoints"})
    mask_failure: bool = field(
        default=False, metadata={"help": "do not train on the injected failure (the paper trains on it)"}
    )
    batch_size: int = field(
        default=64, metadata={"help": "rows per update over all devices; gradient accumulation follows from it"}
    )
    add_triggers: bool = field(
        default=True, metadata={"help": "make each trigger one token; otherwise it stays several pieces"}
    )
    triggers: list[str] = field(default_factory=lambda: [INTRA, INTER], metadata={"help": "the trigger texts"})
    trigger_init: str = field(
        default="mean",
        metadata={"help": "rows of new tokens: 'mean' of all others, of their 'description', or 'keep' what is there"},
    )
    trigger_descriptions: list[str] = field(
        default_factory=lambda: list(DESCRIPTIONS.values()), metadata={"help": "one for each trigger, in their order"}
    )
    redraw_rows: bool = field(
        default=True,
        metadata={
            "help": "draw the rows of taught tokens anew that the base never trained and cannot tell apart; "
            "false leaves them, and says so"
        },
    )
    too_long: str = field(
        default="error", metadata={"help": "rows over max_length: 'error', or 'drop' them and say how many"}
    )
    eval_share: float = field(default=0.0, metadata={"help": "share of problems held out to follow the loss on"})
    dtype: str = field(default="float32", metadata={"help": "weights while training; bf16 autocast is a field of TRL"})
    attention: str = field(
        default="sdpa",
        metadata={"help": "attention code: sdpa, eager, or on a GPU flash_attention_2, flash_attention_3"},
    )
    lora: int = field(
        default=0, metadata={"help": "rank of LoRA on every linear layer; 0, the paper's, trains all parameters"}
    )
    lora_alpha: int = field(default=0, metadata={"help": "LoRA's scale is lora_alpha / lora; 0 means twice the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before LoRA"})

    def __post_init__(self) -> None:
        if not 0 <= self.eval_share < 1:
            raise UserError(f"eval_share must be in [0, 1), got {self.eval_share}")
        if self.too_long not in ("error", "drop"):
            raise UserError(f"too_long must be 'error' or 'drop', got {self.too_long!r}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if self.trigger_init not in INITS:
            raise UserError(f"trigger_init {self.trigger_init!r} is not one of {', '.join(INITS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be positive, got {self.batch_size}")
        if self.lora < 0 or self.lora_alpha < 0 or not 0 <= self.lora_dropout < 1:
            raise UserError("lora and lora_alpha must not be negative, lora_dropout must be in [0, 1)")
        if not self.triggers or not all(self.triggers) or len(set(self.triggers)) < len(self.triggers):
            raise UserError(f"triggers must be different texts, none of them empty, got {self.triggers}")
        if self.trigger_init == "description" and len(self.trigger_descriptions) != len(self.triggers):
            raise UserError(
                f"trigger_descriptions has {len(self.trigger_descriptions)} texts for {len(self.triggers)} triggers"
            )


@dataclass
class SftSettings:
    """What identifies a run: our arguments, and those of TRL that differ from its defaults and change the result."""

    out: str
    script: dict[str, Any]
    training: dict[str, Any]


def settings_of(script: SftArguments, args: Any) -> SftSettings:
    """``args``: TRL's SFTConfig."""
    defaults, ours = {f.name: f.default for f in fields(args)}, asdict(script)
    out = ours.pop("out")
    chosen = {
        key: value
        for key, value in args.to_dict().items()
        if value != defaults.get(key) and not _NEUTRAL.match(key) and getattr(args, key, None) not in (None, [])
    }
    return SftSettings(out, ours, chosen)


def usage() -> str:
    """Our arguments as text, without importing TRL (which takes seconds)."""
    lines = ["usage: accelerate launch training/sft.py --config CONFIG.yaml [--KEY VALUE ...]", ""]
    for f in fields(SftArguments):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        lines.append(f"  --{f.name:<14} {f.metadata['help']} (default: {default!r})")
    lines += ["", "and every field of TRL's SFTConfig (--help_all lists them); preset here to the paper's values:"]
    lines += [f"  --{k:<28} {v}" for k, v in PAPER.items()]
    return "\n".join(lines)
