"""SIGKILL at any moment, also while saving: checkpoints are whole or absent, and the run ends with the same weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from neureasoner.errors import UserError
from neureasoner.training import sft
from neureasoner.training.checkpoints import is_whole, last_whole, resume_point

# A fresh process that imports everything, forks for every moment, and lets the child kill itself there with SIGKILL.
# Moments: (what is patched, whether it is killed before or after that, at which call counted from the start).
DRIVER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import datasets, matplotlib.backends.backend_agg, matplotlib.figure, peft  # once, not in every child
from transformers import AutoTokenizer, Qwen3ForCausalLM, Trainer
from neureasoner.stages import StageFolder
from neureasoner.training import batches, checkpoints, masks, sft, templates, triggers

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at(owner, name, call, after=False):
    real, seen = getattr(owner, name), []
    def patched(*args, **kwargs):
        seen.append(1)
        if len(seen) == call and not after:
            die()
        result = real(*args, **kwargs)
        if len(seen) == call:
            die()
        return result
    setattr(owner, name, patched)

def half_a_file(call):
    real, seen = torch.save, []
    def patched(value, path, *args, **kwargs):
        seen.append(1)
        real(value, path, *args, **kwargs)
        if len(seen) == call:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    torch.save = patched

MOMENTS = {
    "before the first step": lambda: at(Trainer, "training_step", 1),
    "before any checkpoint": lambda: at(Trainer, "training_step", 3),
    "weights written, nothing else": lambda: at(Trainer, "_save_optimizer_and_scheduler", 1),
    "half of a torch file written": lambda: half_a_file(5),
    "all written, not in place": lambda: at(checkpoints, "publish", 2),
    "listed, not in place": lambda: at(checkpoints, "write_json", 2, after=True),
    "in place, old one still there": lambda: at(checkpoints, "keep_last", 2),
    "old one put aside": lambda: at(checkpoints.os, "replace", 4, after=True),
    "half of the final model moved": lambda: at_put_whole(),
    "final model moved, no mark": lambda: at(StageFolder, "finish", 1),
}

def at_put_whole():
    real = checkpoints.put_whole
    def patched(temporary, out):
        at(checkpoints.os, "replace", 2, after=True)
        real(temporary, out)
    checkpoints.put_whole = patched

def child(argv, patch):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            patch()
            sft.main(*sft.parse(argv))
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]

out, wanted, argv = Path(sys.argv[1]), sys.argv[2].split("|"), sys.argv[3:]
found = {}
assert child([*argv, "--out", str(out / "whole")], lambda: None) == 0
for name in wanted:
    status = child([*argv, "--out", str(out / "killed")], MOMENTS[name])
    folders = sorted((out / "killed" / "checkpoints").glob("checkpoint-*"))
    found[name] = {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "checkpoints": {p.name: checkpoints.is_whole(p) for p in folders},
        "done": (out / "killed" / "stage.json").exists(),
    }
assert child([*argv, "--out", str(out / "killed")], lambda: None) == 0
(out / "found.json").write_text(json.dumps(found))
"""


def same_weights(one: Path, two: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LAST = ["half of the final model moved", "final model moved, no mark"]
SOME = ["half of a torch file written", "all written, not in place", LAST[1]]
ALL = [
    "before the first step",
    "before any checkpoint",
    "weights written, nothing else",
    "half of a torch file written",
    "all written, not in place",
    "listed, not in place",
    "in place, old one still there",
    "old one put aside",
    *LAST,
]


@pytest.mark.slow
@pytest.mark.parametrize("moments", [SOME, ALL], ids=["some", "all"])
def test_killed_while_saving(model_folder: Path, train_file: Path, tmp_path: Path, moments: list[str]) -> None:
    steps = 7 if moments is ALL else 4  # in the middle of an epoch: a Trainer would go on to its end
    options = {"model": model_folder, "data": train_file, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"max_steps": steps, "save_steps": 1, "save_total_limit": 1, "warmup_steps": 0}
    argv = [str(x) for k, v in options.items() for x in (f"--{k}", v)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, str(tmp_path), "|".join(moments), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == moments
    for moment, state in found.items():
        assert state["signal"] == signal.SIGKILL and not state["done"], (moment, state)
        assert all(state["checkpoints"].values()), (moment, state, "a checkpoint is whole or absent")
    newest = [max((int(c.split("-")[1]) for c in s["checkpoints"]), default=0) for s in found.values()]
    assert newest == sorted(newest) and newest[-1] == steps, newest
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    log = json.loads((tmp_path / "killed" / "log.json").read_text())
    assert [h["step"] for h in log if "loss" in h] == list(range(1, steps + 1)), "every update once"
    losses = [json.loads((tmp_path / o / "stage.json").read_text())["summary"]["loss"] for o in ("whole", "killed")]
    assert losses[0] == losses[1]
    assert not [p.name for p in (tmp_path / "killed").rglob(".*")], "nothing half-written is left"


# ---- resume_from_checkpoint


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = {"model": model, "data": data, "out": out, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"max_steps": 4, "save_steps": 2, "warmup_steps": 0}
    return [str(x) for k, v in options.items() for x in (f"--{k}", v)] + list(more)


def killed_after(step: int) -> TrainerCallback:
    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    return Kill()


@pytest.mark.parametrize("word", ["True", "latest"])
def test_true_and_latest_mean_the_newest_whole_checkpoint(
    model_folder: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    sft.main(*sft.parse(arguments(model_folder, train_file, whole, "--resume_from_checkpoint", word)))
    assert f"from the start: no whole checkpoint in {whole / 'checkpoints'}" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        sft.main(*sft.parse(arguments(model_folder, train_file, out)), [killed_after(3)])
    shutil.copytree(
        out / "checkpoints" / "checkpoint-2", out / "checkpoints" / "checkpoint-3"
    )  # not whole: its step is 2
    sft.main(*sft.parse(arguments(model_folder, train_file, out, "--resume_from_checkpoint", word)))
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert same_weights(whole, out)


def test_words_of_resume_from_checkpoint(tmp_path: Path) -> None:
    for word in (None, "", True, "true", "YES", "1", "Latest", "last", False, "false", "no", "0", "None"):
        assert resume_point(word, tmp_path / "nothing") is None
    for word in ("lastest", "checkpoint-2", tmp_path / "nothing"):
        with pytest.raises(UserError, match="resume_from_checkpoint"):
            resume_point(word, tmp_path / "nothing")


def test_false_begins_anew_and_refuses_to_mix(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sft.main(*sft.parse(arguments(model_folder, train_file, out)), [killed_after(3)])
    argv = arguments(model_folder, train_file, out, "--resume_from_checkpoint", "False")
    with pytest.raises(UserError, match="holds checkpoint-2"):
        sft.main(*sft.parse(argv))
    shutil.rmtree(out)
    assert sft.main(*sft.parse(argv))["steps"] == 4


def test_a_path_is_whole_and_of_this_kind_of_run_or_refused(
    model_folder: Path, train_file: Path, tmp_path: Path, make_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    first = tmp_path / "first"
    sft.main(*sft.parse(arguments(model_folder, train_file, first)))
    whole = first / "checkpoints" / "checkpoint-4"
    half = shutil.copytree(whole, tmp_path / "checkpoint-4")
    (half / "optimizer.pt").unlink()

    def run(out: str, checkpoint: object, *more: str, model: Path = model_folder) -> Any:
        argv = arguments(model, train_file, tmp_path / out, "--resume_from_checkpoint", str(checkpoint), *more)
        return sft.main(*sft.parse(argv))

    for checkpoint, match in {
        tmp_path / "checkpoint-9": "checkpoint-9 is no folder",
        half: "is no whole checkpoint-N",
        first / "checkpoints": r"is no whole checkpoint-N; the newest in it is .*checkpoint-4",
        model_folder: "is no whole checkpoint-N",
    }.items():
        with pytest.raises(UserError, match=match):
            run("out", checkpoint)
    with pytest.raises(UserError, match=r"holds 4 updates and this run makes 4.*max_steps"):
        run("out", whole)
    with pytest.raises(UserError, match="without LoRA"):
        run("out", whole, "--max_steps", "6", "--lora", "2")
    make_model(hidden_size=24).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another model"):
        run("out", whole, "--max_steps", "6", model=tmp_path / "other")
    assert not list((tmp_path / "out").glob("*.json")), "corrected settings may use the folder"
    assert run("out", whole, "--max_steps", "6")["steps"] == 6
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert [h["step"] for h in log if "loss" in h] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_killed_at_random_moments_under_two_processes(model_folder: Path, train_file: Path, tmp_path: Path) -> None:
    """Two processes under a real launcher, both killed at random moments, eight times."""
    root = Path(__file__).parents[2]
    options = {"model": model_folder, "data": train_file, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"max_steps": 60, "save_steps": 1, "save_total_limit": 2, "lora": 0, "use_cpu": "true"}
    argv = [str(x) for k, v in options.items() for x in (f"--{k}", v)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", root / "configs/accelerate/ddp.yaml"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command = [str(c) for c in [*launch, root / "training" / "sft.py", *argv, "--out"]]
    whole = subprocess.run([*command, str(tmp_path / "whole")], env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    rng, kills, folder = random.Random(0), 0, tmp_path / "killed" / "checkpoints"
    while kills < 8:
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        before = last_whole(folder)
        while process.poll() is None and last_whole(folder) == before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4))
        if process.poll() is None:
            workers = psutil.Process(process.pid).children(recursive=True)  # each in a session of its own
            for worker in workers:
                worker.kill()
            process.kill()
            psutil.wait_procs(workers, timeout=10)
            kills += 1
        process.wait()
        assert all(is_whole(p) for p in folder.glob("checkpoint-*"))
        assert not (tmp_path / "killed" / "stage.json").exists(), "too fast: give it more steps"
    last = subprocess.run([*command, str(tmp_path / "killed")], env=environment, capture_output=True, text=True)
    assert last.returncode == 0 and "resuming from" in last.stdout, last.stdout + last.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
