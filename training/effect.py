"""Does a training run train anything? Before it: some update has a learning rate above 0. After it: weights moved.

With one update of warmup a run of one update is all warmup: its learning rate is 0, and everything looks like success.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from neureasoner.errors import UserError
from neureasoner.training.arguments import launched_with, one_line


def updates_of(args: Any, rows: int) -> int:
    """Updates that the Trainer will make of so many rows. ``args``: TrainingArguments."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = rows / args.per_device_train_batch_size
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    if not batches:
        return 0
    per_epoch = math.ceil(math.ceil(batches / args.world_size) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * per_epoch)


def check_rates(
    args: Any,
    rows: int,
    batch: str = "per_device_train_batch_size",
    size: int = 0,
    say: Callable[[str], None] = print,
) -> int:
    """Refuse a run none of whose updates has a learning rate above 0; say so if it is warming up to its end.

    A warmup that is a share of the updates is rounded down where the Trainer, rounding up, would leave it nothing else.

    Returns the number of updates. ``batch``, ``size``: name and value of the option that says how many rows an update
    has.
    """
    from transformers import get_scheduler

    total, size = updates_of(args, rows), size or args.per_device_train_batch_size
    if not total or not rows:
        why = "dataloader_drop_last leaves no batch" if rows else "there is no row"
        raise UserError(f"{rows} rows make no update ({why}); give more rows, or lower {batch}")
    if 0 < args.warmup_steps < 1 and args.get_warmup_steps(total) >= total:
        share, args.warmup_steps = args.warmup_steps, math.floor(args.warmup_steps * total)
        many = "1 update" if total == 1 else f"{total} updates"
        say(f"warmup_steps {share:g} of {many}: {args.warmup_steps}, so that one has a learning_rate above 0")
    warmup = args.get_warmup_steps(total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        scheduler: Any = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as e:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise UserError(f"lr_scheduler_type '{name}' does not go with lr_scheduler_kwargs ({one_line(e)})") from None
    for _ in range(total):
        if optimizer.param_groups[0]["lr"] > 0:
            if 1 < warmup >= total:
                say(f"warmup_steps {args.warmup_steps:g}: all {total} updates warm up, learning_rate is never reached")
            return total
        optimizer.step()
        scheduler.step()
    source = f"max_steps {total} is" if args.max_steps > 0 else f"{rows} rows at {batch} {size} are"
    updates = "1 update, and its" if total == 1 else f"{total} updates, and their"
    more = "raise max_steps" if args.max_steps > 0 else f"lower {batch}, or give more rows or epochs"
    raise UserError(
        f"{source} {updates} learning_rate is 0 (warmup_steps {args.warmup_steps:g}): nothing would be trained; set "
        f"warmup_steps to 0, or {more}"
    )


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """The parameters that train; of one split over processes, this process's part."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part: Any = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3
            found[name] = part.to_local() if hasattr(part, "to_local") else part  # FSDP2
    return found


def digests(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A number for each tensor that any changed value changes: the sum of its values' bits."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        int(t.detach().contiguous().reshape(-1).view(whole[t.element_size()]).sum(dtype=torch.int64)) for t in tensors
    ]


class NothingMoved(UserError):
    """A run after which every trained parameter is what it was."""


class Moved(TrainerCallback):
    """Notes the trained parameters at the start, and says at the end which of them moved.

    Build it on the trainer's model before training: a resumed run, too, is compared with what it began from. Where
    DeepSpeed or FSDP casts and splits the parameters, they are noted again when training begins.
    """

    def __init__(self, model: Any):
        self._note(model)
        if not self.names:
            raise UserError("every parameter is frozen, so nothing would be trained")
        self.noted_at = 0

    def _note(self, model: Any) -> None:
        tensors = trainable(model)
        self.names, self.before = list(tensors), digests(tensors.values())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if launched_with("DEEPSPEED") or launched_with("FSDP") or args.deepspeed or args.fsdp:
            self._note(model)
            self.noted_at = state.global_step

    def unmoved(self, trainer: Any) -> list[str]:
        """Names of the trained parameters that are what they were. All processes call this."""
        after = digests(trainable(trainer.model).values())
        moved = torch.tensor([a != b for a, b in zip(self.before, after, strict=True)], dtype=torch.int32)
        moved = trainer.accelerator.reduce(moved.to(trainer.accelerator.device), "sum")
        return [name for name, count in zip(self.names, moved.tolist(), strict=True) if not count]

    def check(self, trainer: Any, hint: str) -> str:
        """Raise UserError if nothing moved; otherwise a line on what did not, or nothing. ``hint``: why it may be."""
        if trainer.state.global_step == self.noted_at > 0:
            return ""  # resumed from its last update, and noted only then
        still = self.unmoved(trainer)
        if len(still) == len(self.names):
            raise NothingMoved(f"{trainer.state.global_step} updates changed no weight, so nothing was trained: {hint}")
        return f"{len(still)} of {len(self.names)} trained tensors did not move ({still[0]}): {hint}" if still else ""
