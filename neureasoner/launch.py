"""Run a training script in a process of its own under ``accelerate launch``, and never leave it behind."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from neureasoner.errors import UserError


def training_script(name: str) -> Path:
    """Path of ``training/<name>`` wherever the package is installed. Raises UserError if it is not there."""
    spec = importlib.util.find_spec("neureasoner.training")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UserError(f"training/{name} is not in this installation; install neureasoner again")


def has_gpu() -> bool:
    """Whether PyTorch can use a GPU here. Imports torch, not transformers."""
    import torch

    return torch.cuda.is_available()


def command_line(script: Path, args: Sequence[str], launch_config: str = "") -> list[str]:
    """The ``accelerate launch`` command. Without ``launch_config``: one process, on the GPU if there is one."""
    if launch_config:
        if not Path(launch_config).is_file():
            raise UserError(f"{launch_config}: no such file (an accelerate configuration)")
        options = ["--config_file", launch_config]
    else:
        # every choice said, so that accelerate neither warns nor reads a configuration from the home folder
        options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        options += [] if has_gpu() else ["--cpu"]
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options, str(script), *args]


def accelerate(script: Path, args: Sequence[str], launch_config: str = "") -> None:
    """Run ``script`` under ``accelerate launch``; its output goes where ours goes.

    The script runs in a process group of its own: an interrupt (Ctrl-C, SIGTERM) is passed on to all of the group, and
    we leave only when it is gone. Raises KeyboardInterrupt then, and UserError if the script failed.
    """
    sys.stdout.flush()
    process = subprocess.Popen(command_line(script, args, launch_config), start_new_session=True)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = _on_sigterm(interrupted)
    try:
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        _on_sigterm(before)
    if code in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{script.parent.name}/{script.name} failed with exit code {code}; its message stands above")


def _on_sigterm(handler: object) -> object:
    try:
        return signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    except (ValueError, TypeError):  # not the main thread, or a handler that Python did not set
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the group, then insist."""
    for number, seconds in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@cache
def training_keys() -> frozenset[str]:
    """Names of TRL's ``SFTConfig`` fields, read from the sources: importing TRL takes seconds. Empty if not found."""
    keys: set[str] = set()
    for package, files in {
        "trl": ["trainer/base_config.py", "trainer/sft_config.py"],
        "transformers": ["training_args.py"],
    }.items():
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else Path()
        for file in files:
            if not (folder / file).is_file():
                return frozenset()
            for node in ast.walk(ast.parse((folder / file).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    named = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
                    keys.update(t.id for t in named if isinstance(t, ast.Name))
    return frozenset(keys)
