"""Training stops at the first number that is none, before it is in the weights and hidden from the log.

Transformers would replace a loss that is NaN by the mean of those before it, and go on.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from neureasoner.errors import UserError

HINT = "lower learning_rate, or train in float32"


class Guard(TrainerCallback):
    """Stops at the first gradient that is not finite, before it reaches the parameters.

    DeepSpeed keeps gradients elsewhere; under it only the loss is watched.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                raise UserError(f"step {state.global_step + 1}: the gradient of {name} is NaN or infinite; {HINT}")


class FiniteLoss:
    """Mixed into a Trainer: a loss that is NaN or infinite is an error."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if not bool(torch.isfinite(loss)):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise UserError(f"step {step}: the loss is {float(loss)}; {HINT}")
        return loss
