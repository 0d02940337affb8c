"""Which of TRL's options ``training/sft.py`` does not simply pass on: those it refuses, and those without effect here.

Nothing that a user wrote is replaced without a word. ``REFUSED`` names options that would not do what their name says;
``IDLE`` those that do nothing in this run, which is said once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from neureasoner.config import closest
from neureasoner.errors import UserError
from neureasoner.training import arguments
from neureasoner.training.arguments import launched_with
from neureasoner.training.sft_config import SftArguments

_LABELS = "labels are fixed: prompt and trigger never train, the rest of the response does (mask_failure)"
_ROWS = "the rows are those of 'data', encoded here"
# option: (values that say what is done anyway, what holds instead)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_init_kwargs": ((None,), "the model is loaded with 'dtype' and 'attention'"),
    "trust_remote_code": ((False,), "no code that comes with a model is run"),
    "dataset_text_field": ((), _ROWS),
    "dataset_kwargs": ((None,), _ROWS),
    "truncation_mode": ((), "rows are never cut; too_long says what becomes of one over max_length"),
    "completion_only_loss": ((None, True), _LABELS),
    "assistant_only_loss": ((False,), _LABELS),
    "label_names": ((None, ["labels"]), _LABELS),
    "auto_find_batch_size": ((False,), "batch_size would no longer hold; lower per_device_train_batch_size"),
    "save_only_model": ((False,), "such a checkpoint cannot be resumed; save_strategy: 'no' writes none"),
    "push_to_hub": ((False,), "checkpoints hold torch files; upload the finished folder instead"),
}


def _no_set(script: SftArguments, args: Any) -> bool:
    return not script.eval_share


def _no_packing(script: SftArguments, args: Any) -> bool:
    return not args.packing


def _always(script: SftArguments, args: Any) -> bool:
    return True


# option: (when it does nothing, why)
IDLE: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    **dict.fromkeys(("packing_strategy", "eval_packing", "dataset_num_proc"), (_no_packing, "packing is off")),
    "shuffle_dataset": (lambda s, a: a.shuffle_dataset and not a.packing, "train_sampling_strategy orders the rows"),
    **dict.fromkeys(
        ("eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_accumulation_steps"),
        (_no_set, "no rows are held out (eval_share)"),
    ),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), (_always, "the loss is followed while training runs")),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics"), (_always, "there are no metrics but the loss")),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"),
        (lambda s, a: a.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy"), "the last update is saved"),
    ),
    "disable_tqdm": (lambda s, a: not a.disable_tqdm, "progress is one line per log"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), (_always, "this script trains; eval_share holds rows out")),
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        (_always, "nothing is uploaded"),
    ),
    "length_column_name": (_always, "lengths are counted"),
    "liger_kernel_config": (lambda s, a: not a.use_liger_kernel, "use_liger_kernel is off"),
    **dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        (lambda s, a: not a.gradient_checkpointing, "checkpointing is off"),
    ),
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (lambda s, a: not s.lora, "lora is 0")),
    "trigger_init": (lambda s, a: not s.add_triggers, "add_triggers is false"),
    "trigger_descriptions": (
        lambda s, a: not s.add_triggers or s.trigger_init != "description",
        "trigger_init is not 'description'",
    ),
}


def check(script: SftArguments, args: Any, written: Mapping[str, Any]) -> list[str]:
    """Refuse what would be replaced; returns a line for each option that the user wrote and that has no effect.

    ``written``: what stands on the command line and in the file. Raises UserError.
    """
    arguments.check_refused(args, written, REFUSED)
    if {"output_dir", "out"} <= set(written) and args.output_dir != script.out:
        raise UserError(f"out {script.out!r} and output_dir {args.output_dir!r}: checkpoints go to out/checkpoints")
    if args.chat_template_path and not os.path.isfile(args.chat_template_path):
        raise UserError(f"chat_template_path: {args.chat_template_path} is no file; give a .jinja file")
    for end in ("", "_kwargs"):
        names = [f"gradient_checkpointing{end}", f"activation_checkpointing{end}"]
        if len({str(written.get(name)).lower() for name in names}) == 2 and set(names) <= set(written):
            raise UserError(f"{names[0]} and {names[1]} are one option and differ; give the second alone")
    _check_batch(script, args, written)
    _check_evaluation(script, args, written)
    idle = [(name, why) for name, (is_idle, why) in IDLE.items() if name in written and is_idle(script, args)]
    return [f"{name} has no effect: {why}" for name, why in idle]


def _check_batch(script: SftArguments, args: Any, written: Mapping[str, Any]) -> None:
    per_update = args.per_device_train_batch_size * args.world_size
    if script.batch_size % per_update:
        raise UserError(
            f"batch_size {script.batch_size} is no multiple of per_device_train_batch_size × devices = {per_update}"
        )
    accumulation = script.batch_size // per_update
    if "gradient_accumulation_steps" in written and args.gradient_accumulation_steps != accumulation:
        raise UserError(
            f"gradient_accumulation_steps {args.gradient_accumulation_steps}: batch_size {script.batch_size} in passes "
            f"of {per_update} rows makes it {accumulation}; leave it out, or set batch_size to "
            f"{per_update * args.gradient_accumulation_steps}"
        )


def _check_evaluation(script: SftArguments, args: Any, written: Mapping[str, Any]) -> None:
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy != "no" and not script.eval_share:
        raise UserError(
            f"eval_strategy '{strategy}' has no rows to evaluate on; hold some out with eval_share, such as 0.05"
        )
    if args.eval_on_start and not script.eval_share:
        raise UserError("eval_on_start has no rows to evaluate on; hold some out with eval_share, such as 0.05")
    if script.eval_share and strategy == "no" and "eval_strategy" in written:
        raise UserError(
            "eval_share holds rows out to follow the loss on, and eval_strategy is 'no'; leave one of them out"
        )
    if script.eval_share and strategy != "steps" and "eval_steps" in written:
        raise UserError(f"eval_steps {args.eval_steps:g} needs eval_strategy: steps")
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
        raise UserError(
            "save_strategy 'best' is not supported: the last update is what is saved; use steps, epoch or no"
        )


def check_machine(script: SftArguments, args: Any) -> None:
    """Refuse what this machine or this script cannot do, before any long work. Raises UserError."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    arguments.check_machine(args)
    arguments.check_loggers(args)
    if args.fp16 and script.dtype == "float16":
        raise UserError("fp16 scales gradients of float32 weights; set dtype: float32")
    if args.packing and args.packing_strategy != "bfd":
        raise UserError(
            f"packing_strategy {args.packing_strategy!r} cuts rows or lets them see each other; set it to 'bfd'"
        )
    if args.packing and not args.max_length:
        raise UserError("packing needs max_length, the size of a pack")
    if (args.max_length or 0) < 0:
        raise UserError(f"max_length must be positive (null: the model's own), got {args.max_length}")
    if args.accelerator_config.split_batches:
        raise UserError("accelerator_config: split_batches would change what batch_size counts; leave it out")
    if launched_with("PARALLELISM_CONFIG"):
        raise UserError("parallelism_config: its processes share rows, so batch_size would not hold; leave it out")
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if "/" not in script.attention and script.attention not in known:  # kernels of the hub have a slash
        raise UserError(
            f"attention {script.attention!r} is unknown{closest(script.attention, known)}; use sdpa or eager"
        )
    if torch.cuda.is_available() and not args.use_cpu:
        return
    if args.use_liger_kernel:
        raise UserError("use_liger_kernel needs a GPU, and there is none; set it to false")
    if args.activation_offloading:
        raise UserError("activation_offloading needs a GPU, and there is none; set it to false")
    if script.attention not in ("sdpa", "eager"):
        raise UserError(f"attention {script.attention!r} needs a GPU, and there is none; set it to 'sdpa'")
    # In both cases Accelerate would run plain DDP without a word.
    if launched_with("FSDP") or args.fsdp:
        raise UserError("Accelerate has FSDP on GPUs only, and there is none; use configs/accelerate/ddp.yaml")
    if launched_with("DEEPSPEED") and (args.use_cpu or os.environ.get("ACCELERATE_USE_CPU") == "true"):
        raise UserError("DeepSpeed is skipped where the CPU is asked for; leave use_cpu and ACCELERATE_USE_CPU out")
