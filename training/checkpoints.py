"""Checkpoints that are whole or absent, and the last model put in place whole.

``WholeCheckpoints`` lets the Trainer write into ``.writing`` and then renames the folder, when every process has
finished its part: a run killed at any moment leaves no half ``checkpoint-N``. ``whole.json`` in it lists the files and
their sizes, whatever layout they have (safetensors, an adapter, ZeRO's or FSDP's shards). Old checkpoints are renamed
before they are removed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from neureasoner.artifacts import read_json, write_json
from neureasoner.errors import UserError

WRITING, REMOVED, MANIFEST, STATE = ".writing", ".removed", "whole.json", "trainer_state.json"


def is_whole(folder: Path) -> bool:
    """Was this ``checkpoint-N`` written to its end, and is all of it still there?

    One without ``whole.json`` is a plain Trainer's: it writes weights, optimizer, scheduler, random states and last
    ``trainer_state.json``; a run killed while writing, or while removing an old checkpoint, leaves some of them out or
    the last one cut off.
    """
    try:
        state = read_json(folder / STATE)
        files = read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else None
    except (UserError, KeyError, TypeError):
        return False
    if state.get("global_step") != _step(folder):
        return False
    if files is not None:
        return all((folder / f).is_file() and (folder / f).stat().st_size == size for f, size in files.items())
    weights = any(folder.glob("*.safetensors")) and all(_is_safetensors(p) for p in folder.glob("*.safetensors"))
    rest = all((folder / name).is_file() for name in ("optimizer.pt", "scheduler.pt"))
    return weights and rest and any(folder.glob("rng_state*.pth"))


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


def _checkpoints(folder: str | Path) -> list[Path]:
    """Every ``checkpoint-N``, the newest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.is_dir() and _step(p) >= 0]
    return sorted(found, key=_step, reverse=True)


def any_checkpoint(folder: str | Path) -> bool:
    """Whether there is a ``checkpoint-N`` in ``folder``, whole or not."""
    return bool(_checkpoints(folder))


def last_whole(folder: str | Path) -> str | None:
    """Path of the newest whole ``checkpoint-N`` in ``folder``; incomplete ones are passed over."""
    return next((str(path) for path in _checkpoints(folder) if is_whole(path)), None)


NEWEST, NEVER = ("true", "yes", "1", "latest", "last"), ("false", "no", "0", "none")


def resume_point(asked: Any, folder: str | Path) -> str | None:
    """The checkpoint a run goes on from, or None for the start. ``asked``: ``resume_from_checkpoint`` as it was given.

    Nothing given, true or ``latest``: the newest whole checkpoint in ``folder``, if there is one. False: the start, and
    an error where there are checkpoints, which would be mixed with the new ones. Anything else is the path of a whole
    ``checkpoint-N``. Raises UserError.
    """
    word = "latest" if asked is None or asked == "" else str(asked)
    if word.lower() in NEWEST:
        return last_whole(folder)
    if word.lower() in NEVER:
        if any_checkpoint(folder):
            raise UserError(
                f"resume_from_checkpoint {asked}: {folder} holds {_checkpoints(folder)[0].name}; delete the folder, or "
                "choose another, to begin anew"
            )
        return None
    path = Path(word).expanduser()
    if not path.is_dir():
        raise UserError(f"resume_from_checkpoint: {word} is no folder; name a checkpoint-N, or 'latest' for the newest")
    if not is_whole(path):
        inside = last_whole(path)
        hint = f"; the newest in it is {inside}" if inside else ", written to its end and unchanged since"
        raise UserError(f"resume_from_checkpoint: {word} is no whole checkpoint-N{hint}")
    return str(path)


def check_resumable(checkpoint: str, folder: str | Path, updates: int, adapter: bool) -> None:
    """Refuse a checkpoint of another kind of run, or of another folder with nothing left to do. Raises UserError."""
    if (Path(checkpoint) / "adapter_config.json").is_file() != adapter:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is of a run {'without' if adapter else 'with'} LoRA and this one is "
            f"{'with' if adapter else 'without'} it; set lora as it was"
        )
    if Path(checkpoint).resolve().parent != Path(folder).resolve() and _step(Path(checkpoint)) >= updates:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} holds {_step(Path(checkpoint))} updates and this run makes "
            f"{updates}, so nothing would be trained; raise max_steps or num_train_epochs"
        )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Make ``folder`` absent at once, then free its space."""
    if folder.is_dir():
        aside = folder.parent / REMOVED
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def publish(written: Path, place: Path) -> None:
    """Put the finished folder ``written`` in its place: on the disk, listed in ``whole.json``, and by one rename."""
    files = [p for p in sorted(written.rglob("*")) if p.is_file() and p.name != MANIFEST]
    for path in files:
        _sync(path)
    sizes = {str(p.relative_to(written)): p.stat().st_size for p in files if p != written / STATE}
    write_json(written / MANIFEST, {"files": sizes})
    _remove(place)
    os.replace(written, place)
    _sync(place.parent)


def keep_last(folder: Path, limit: int | None) -> None:
    """Remove all but the newest ``limit`` checkpoints, and those that are not whole; None keeps every whole one."""
    whole = [p for p in _checkpoints(folder) if is_whole(p)]
    kept = whole if limit is None else whole[: max(1, limit)]
    for path in _checkpoints(folder):
        if path not in kept:
            _remove(path)


class WholeCheckpoints:
    """Mixin before a Trainer: see the module. It also ends a run resumed from its last step where it is: left to
    itself, a Trainer that was killed between its last checkpoint and the end takes one step too many.
    """

    _writing = ""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing or str(super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        run = Path(super()._get_output_dir(trial))  # type: ignore[misc]
        if trainer.args.should_save:
            for name in (WRITING, REMOVED):  # what a killed run left
                shutil.rmtree(run / name, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        self._writing = str(run / WRITING)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._writing = ""
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            name = f"checkpoint-{trainer.state.global_step}"
            publish(run / WRITING / name, run / name)
            keep_last(run, trainer.args.save_total_limit)
            shutil.rmtree(run / WRITING, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()


def put_whole(temporary: Path, out: Path) -> None:
    """Move the files of ``temporary`` into ``out``, each whole; ``training_args.bin`` (a pickle) is left out."""
    for path in sorted(temporary.iterdir()):
        if path.name != "training_args.bin":
            os.replace(path, out / path.name)
    shutil.rmtree(temporary)


def save_whole(trainer: Any, out: Path) -> None:
    """Write model and tokenizer into ``out``, each file whole.

    All processes call this. Whoever reads ``out`` waits for ``stage.json``, which is written after it.
    """
    temporary = out / ".model.tmp"
    if trainer.is_world_process_zero():
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        put_whole(temporary, out)
