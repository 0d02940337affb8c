"""Checkpoints that were written to the end, and the last model put in place whole."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json
from neureasoner.errors import UserError


def is_whole(folder: Path) -> bool:
    """Was this ``checkpoint-N`` written to its end?

    The Trainer writes weights, optimizer, scheduler, random states and last ``trainer_state.json``; a run killed while
    writing, or while removing an old checkpoint, leaves some of them out or the last one cut off.
    """
    try:
        state = read_json(folder / "trainer_state.json")
    except UserError:
        return False
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("global_step*"))
    optimizer = any((folder / name).is_file() for name in ("optimizer.pt", "optimizer.bin")) or any(
        folder.glob("global_step*")
    )
    rest = (folder / "scheduler.pt").is_file() and any(folder.glob("rng_state*.pth"))
    whole_weights = all(_is_safetensors(p) for p in folder.glob("*.safetensors"))
    return state.get("global_step") == _step(folder) and weights and whole_weights and optimizer and rest


def _step(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match.group(1)) if match else -1


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def last_whole(folder: str | Path) -> str | None:
    """Path of the newest whole ``checkpoint-N`` in ``folder``; incomplete ones are passed over."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.is_dir() and _step(p) >= 0]
    for path in sorted(found, key=_step, reverse=True):
        if is_whole(path):
            return str(path)
    return None


def save_whole(trainer: Any, out: Path) -> None:
    """Write model and tokenizer into ``out``, each file whole; ``training_args.bin`` (a pickle) is left out.

    All processes call this. Whoever reads ``out`` waits for ``stage.json``, which is written after it.
    """
    temporary = out / ".model.tmp"
    trainer.save_model(str(temporary))
    if not trainer.is_world_process_zero():
        return
    for path in sorted(temporary.iterdir()):
        if path.name != "training_args.bin":
            os.replace(path, out / path.name)
    shutil.rmtree(temporary)
