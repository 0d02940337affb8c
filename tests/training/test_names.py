"""What our trainers put in the place of Transformers' and TRL's own methods is still called by them.

An override whose name went away upstream would never run, without a word: checkpoints half written, labels replaced.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from neureasoner.training import batches, effect, finite, policy_trainer

TRAINERS = [batches.TriggerTrainer, policy_trainer.RlooTrainer, policy_trainer.GrpoTrainer, policy_trainer.PlainTrainer]
# Methods that only our own code calls.
OURS = {
    "reward_of", "_draw", "_note_gap", "_note", "shown", "_parts",
}  # fmt: skip


def methods(cls: type) -> set[str]:
    return {n for n, v in vars(cls).items() if inspect.isfunction(v) and not n.startswith("__")}


def stock(cls: type) -> list[type]:
    return [c for c in cls.__mro__ if c.__module__.split(".")[0] in ("transformers", "trl")]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_trainer_replaces_is_there_and_is_called(trainer: Any) -> None:
    parents = stock(trainer)
    assert Trainer in parents
    source = "\n".join(inspect.getsource(inspect.getmodule(c)) for c in parents)  # type: ignore[arg-type]
    for ours in (c for c in trainer.__mro__ if c.__module__.startswith("neureasoner")):
        for name in methods(ours) - OURS:
            assert any(hasattr(p, name) for p in parents), f"{ours.__name__}.{name} replaces nothing of {parents[0]}"
            assert re.search(rf"self\.{name}\b", source), f"nothing upstream calls {name}"


@pytest.mark.parametrize("callback", [batches.Lines, policy_trainer.PolicyLines, finite.Guard, effect.Moved])
def test_what_a_callback_listens_to_is_an_event(callback: Any) -> None:
    for name in methods(callback):
        if name.startswith("on_"):
            assert hasattr(TrainerCallback, name), name
