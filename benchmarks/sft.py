"""Throughput of trigger SFT against plain TRL on the same rows, in paired, interleaved runs.

    .venv/bin/python benchmarks/sft.py --data runs/full/reconstructed/train.jsonl

Every arm trains the same model on the same rows once, with the same labels and the same rows per update:

plain       TRL's SFTTrainer on ``input_ids`` and ``labels``, its own order and padding
ours        training/sft.py in the same random order: what our trainer costs or saves
length      the recipes' order: batches of like length, so less padding
packing     documents packed into rows of ``--pack`` tokens, blind to each other

A round runs all arms, each starting one place later than in the round before. Prints a Markdown table: real tokens per
second of wall clock and of CPU time (medians over rounds), and the ratio to ``plain`` in the same round, median and
range, by CPU time, which other jobs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from neureasoner.training import sft

ARMS = {
    "plain": {},
    "ours": {},
    "length": {"train_sampling_strategy": "group_by_length"},
    "packing": {"packing": True},
}


def build(arm: str, data: Path, out: Path, args: argparse.Namespace) -> Any:
    """The trainer of an arm. ``plain`` takes model, rows and settings of ours, and nothing else."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    options = {"model": args.model, "data": data, "out": out, "batch_size": args.batch, "learning_rate": 1e-4}
    options |= {"per_device_train_batch_size": args.batch, "save_strategy": "no", "logging_strategy": "no"}
    options |= {"max_length": args.pack, "warmup_steps": 0} | ARMS[arm]
    if arm == "packing":  # a pack of ``pack`` tokens stands for several rows; one at a time is one forward pass
        options |= {"per_device_train_batch_size": 1, "batch_size": 1}
    trainer, _ = sft.build(*sft.parse([str(x) for k, v in options.items() for x in (f"--{k}", v)]))
    if arm != "plain":
        return trainer
    settings = trainer.args
    settings.max_length = args.pack
    settings.dataset_kwargs = None
    rows = trainer.train_dataset.select_columns(["input_ids", "labels"])
    plain = SFTTrainer(trainer.model, settings, train_dataset=rows, processing_class=trainer.processing_class)
    plain.remove_callback(PrinterCallback)
    return plain


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """(wall clock, CPU time) in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", type=Path, required=True, help="train.jsonl of 'data reconstruct'")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="rows per update")
    parser.add_argument("--pack", type=int, default=2048, help="tokens of a pack; no row may be longer")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    tokens, names = 0, list(ARMS)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        with args.data.open(encoding="utf-8") as lines:
            data.write_text("".join(line for _, line in zip(range(args.rows), lines, strict=False)), encoding="utf-8")
        for number in range(-1, args.rounds):  # the first round warms up and is not counted
            shift = number % len(names)
            for arm in names[shift:] + names[:shift]:
                trainer = build(arm, data, Path(folder) / arm, args)
                if arm == "plain":
                    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
                result = timed(trainer.train)
                if number >= 0:
                    found[arm].append(result)
    print(f"{args.rows} rows, {tokens:,} tokens, {args.batch} rows an update, {args.threads} thread(s), "
          f"{args.rounds} rounds\n")  # fmt: skip
    print("| arm | tokens/s, wall | tokens/s, CPU | against plain, CPU: median (range) |")
    print("|---|---|---|---|")
    for arm, times in found.items():
        wall, cpu = (tokens / median(t[i] for t in times) for i in (0, 1))
        ratios = sorted(p[1] / t[1] for p, t in zip(found["plain"], times, strict=True))
        print(f"| {arm} | {wall:,.0f} | {cpu:,.0f} | {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |")


if __name__ == "__main__":
    main()
