"""SFTTrainer with four things of ours: batches of like length that survive a resume, checkpoints that are whole or
absent, an error at the first number that is none, and one short line per log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTTrainer

from neureasoner.progress import duration
from neureasoner.training.checkpoints import WholeCheckpoints
from neureasoner.training.finite import FiniteLoss, Guard

POOL = 32  # batches whose rows are sorted by length together


class LikeLengths(Sampler[int]):
    """Every row once an epoch, neighbours of like length, batches in random order.

    The order depends on seed and epoch alone. (Transformers' own sampler draws it from the global generator, so that a
    resumed epoch gets another order: some rows would come twice and others never.)
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = np.asarray(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        pools = [order[i : i + POOL * self.batch] for i in range(0, len(order), POOL * self.batch)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        batches = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        short = [b for b in batches if len(b) < self.batch]
        full = [b for b in batches if len(b) == self.batch]
        shuffled = [full[i] for i in rng.permutation(len(full))] + short
        return iter(np.concatenate(shuffled).tolist())


class Lines(TrainerCallback):
    """``step 10/120  loss 1.23  lr 3.0e-04  0:31 left``."""

    def __init__(self) -> None:
        self.began, self.first = time.time(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.first = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        shown = self.shown(logs or {})
        if not state.is_world_process_zero or not shown:
            return
        done = state.global_step - self.first
        left = (time.time() - self.began) / max(done, 1) * (state.max_steps - state.global_step)
        step = f"step {state.global_step}/{state.max_steps}"
        print("  ".join([step, *shown, f"{duration(left)} left"]), flush=True)

    def shown(self, logs: Mapping[str, float]) -> list[str]:
        """What of a log is printed; nothing of one without a loss."""
        found = [f"{k} {float(logs[k]):.3f}" for k in ("loss", "eval_loss") if k in logs]
        if found and "learning_rate" in logs:
            found.append(f"lr {float(logs['learning_rate']):.1e}")
        return found


class TriggerTrainer(FiniteLoss, WholeCheckpoints, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; ``train_sampling_strategy: group_by_length`` uses ``LikeLengths``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        model: Any = self.model
        for module in model.modules():  # TRL's fused head reads the bias of whatever stands for the head
            if type(module).__name__ == "TrainableTokensWrapper":
                module.bias = None
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(Lines())
        self.add_callback(Guard())

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LikeLengths([len(ids) for ids in rows["input_ids"]], self.args.train_batch_size, seed)
