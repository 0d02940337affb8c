"""A real process, killed with SIGKILL at random moments and started again: no sample lost, none twice, none other."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neureasoner.artifacts import read_json
from neureasoner.errors import UserError
from neureasoner.evaluation.config import EvaluateConfig, shard_of_launch
from neureasoner.evaluation.evaluate import evaluate
from neureasoner.evaluation.runner import ArmRun
from neureasoner.evaluation.store import Key, key_of
from neureasoner.traces import Trace, read_traces

ARMS = ["vanilla", "full", "random_trigger"]
NUMBERS = ("accuracy", "accuracy_ci", "tokens_mean", "tokens_ci", "truncated", "triggers_per_trace", "forced_mean")
# Each process is forked from a clean one that has imported what takes long, so that kills fall into the work itself.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "neureasoner.evaluation.evaluate",
        "neureasoner.evaluation.report",
        "neureasoner.evaluation.show",
        "neureasoner.inference.steered",
        "neureasoner.probes.detectors.probe",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.generation.utils",
    ]
)


def start(config: EvaluateConfig) -> Any:
    process = FORKS.Process(target=evaluate, args=(config,), daemon=True)
    process.start()
    return process


def samples(out: Path) -> dict[Key, Trace]:
    """Every sample of a finished run; fails if one is there twice."""
    found = [t for name in ARMS for t in read_traces(out / "traces" / f"{name}.jsonl")]
    assert max(Counter(map(key_of, found)).values()) == 1, "a sample is there twice"
    return {key_of(t): t for t in found}


def kept(out: Path) -> dict[Path, tuple[int, int]]:
    """Finished files of samples: any that is written anew has another inode or time."""
    files = [*(out / "parts").glob("*/*.jsonl"), *(out / "traces").glob("*.jsonl")]
    return {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def kill_and_resume(config: EvaluateConfig, folder: Path, parts: int, kills: int, seed: int) -> int:
    """Returns how many of the kills hit a process that was still at work."""
    straight, out = folder / "straight", folder / "killed"
    warm = FORKS.Process(target=time.sleep, args=(0,))  # the clean process's imports are no part of the work
    warm.start()
    warm.join()
    first = start(replace(config, out=str(straight)))
    begin = time.monotonic()
    first.join(200)
    assert first.exitcode == 0
    whole = time.monotonic() - begin

    config, rng, killed = replace(config, out=str(out)), random.Random(seed), 0
    before: dict[Path, tuple[int, int]] = {}
    for _ in range(kills):
        process = start(config)
        # By what is done, not by the clock: a machine that grew faster or slower meanwhile is killed at work as well.
        until = len(before) + rng.randint(0, parts // kills - 1)
        while process.is_alive() and len(kept(out).keys() | before.keys()) < until:
            time.sleep(0.01)
        process.join(rng.uniform(0, 1.5) * whole / parts)
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        now = kept(out)
        # what was there is untouched, or has gone into its arm's file
        for file, stamp in before.items():
            merged = (out / "traces" / file.parent.name).with_suffix(".jsonl")
            assert now.get(file) == stamp or (file not in now and merged in now), f"{file} was made again"
        before = now
    last = start(config)
    last.join(200)
    assert last.exitcode == 0

    expected, found = samples(straight), samples(out)
    assert found.keys() == expected.keys(), "a sample is lost, or of another seed"
    for key, t in found.items():
        other = expected[key]
        assert (t.response_ids, t.events, t.labels) == (other.response_ids, other.events, other.labels)
    a, b = (read_json(d / "results.json") for d in (straight, out))
    assert [[arm[k] for k in NUMBERS] for arm in a["arms"]] == [[arm[k] for k in NUMBERS] for arm in b["arms"]]
    assert a["comparisons"] == b["comparisons"]
    assert not list(out.glob("parts/*/*")), "parts, or temporary files of a dead process, are left"
    return killed


@pytest.fixture
def work(settings: Callable[..., EvaluateConfig]) -> EvaluateConfig:
    """Three arms, three batches, one sample: 9 parts; the last arm needs all of another's."""
    return settings(arms=ARMS, batch_size=2, max_new_tokens=12, show_examples=0)


@pytest.mark.slow
def test_killed_three_times(work: EvaluateConfig, tmp_path: Path) -> None:
    assert kill_and_resume(work, tmp_path, parts=9, kills=3, seed=1) >= 2


def launched(config: EvaluateConfig, rank: int, log: Path) -> None:
    """What ``accelerate launch`` starts: one process of two. Notes in ``log`` what it generates."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    generate = ArmRun._generate

    def noted(self: ArmRun, *job: int) -> list[Trace]:
        with log.open("a") as f:
            f.write(f"{self.arm.name} {job}\n")
        return generate(self, *job)

    ArmRun._generate = noted  # type: ignore[method-assign]
    evaluate(config)


@pytest.mark.slow
def test_processes_of_one_launch_share_the_work(work: EvaluateConfig, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "shared"
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    two = [
        FORKS.Process(target=launched, args=(replace(work, out=str(out)), rank, log)) for rank, log in enumerate(logs)
    ]
    for process in two:
        process.start()
    evaluate(replace(work, out=str(straight)))
    for process in two:
        process.join(100)
        assert process.exitcode == 0
    first, second = (log.read_text().splitlines() for log in logs)
    wanted = [f"{arm} {(0, batch, 0)}" for arm in ("vanilla", "full") for batch in range(3)]
    assert first and second and sorted(first + second) == sorted(wanted), "each part once, by one of the two"
    assert not (out / "results.json").exists(), "random_trigger waits for all of full"
    evaluate(replace(work, out=str(out)))
    expected, found = samples(straight), samples(out)
    assert found.keys() == expected.keys()
    assert all((found[k].response_ids, found[k].events) == (t.response_ids, t.events) for k, t in expected.items())
    a, b = (read_json(d / "results.json") for d in (straight, out))
    assert [[arm[k] for k in NUMBERS] for arm in a["arms"]] == [[arm[k] for k in NUMBERS] for arm in b["arms"]]


@pytest.mark.parametrize(
    ("environ", "shard"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ""),
        ({"WORLD_SIZE": "4", "RANK": "3"}, "3/4"),
        ({"RANK": "3"}, ""),
        ({"WORLD_SIZE": "4"}, None),
        ({"WORLD_SIZE": "4", "RANK": "4"}, None),
    ],
)
def test_the_share_of_a_process(environ: dict[str, str], shard: str | None) -> None:
    if shard is not None:
        assert shard_of_launch(environ) == shard
    else:
        with pytest.raises(UserError, match=r"WORLD_SIZE=4, but RANK is .*give --shard, or unset WORLD_SIZE"):
            shard_of_launch(environ)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_twenty_times(work: EvaluateConfig, tmp_path: Path) -> None:
    # long enough that every kill finds the run at work
    assert kill_and_resume(replace(work, samples=8), tmp_path, parts=72, kills=20, seed=2) == 20
