"""Where the time of a training step's backward passes goes, ours against the stock way (drawing: ``sampler.py``).

    .venv/bin/python benchmarks/bias.py --model tiny --prompts 6 --samples 8 --repeats 3

Parts of like length without the responses whose advantage is 0, against one padded batch of all, for the vectors and
for all weights. Runs of the two kinds alternate, on one thread and in processor seconds, so that a busy machine counts
little. Writes ``benchmarks/bias.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from neureasoner.artifacts import write_json
from neureasoner.data_builders.problem_file import make_problems
from neureasoner.models import load
from neureasoner.prompts import encode_prompt
from neureasoner.sampler import Drawn, sample
from neureasoner.sampling import Sampling, eos_ids, left_padded
from neureasoner.training.policy_measure import text_of
from neureasoner.training.policy_trainer import split
from neureasoner.training.rewards import verified
from neureasoner.training.vectors import BiasVectors


def seconds(work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    begin = time.process_time()
    result = work(*args, **kwargs)
    return time.process_time() - begin, result


def batch_of(prompts: list[list[int]], rows: list[Drawn], advantages: list[float], pad: int) -> dict[str, torch.Tensor]:
    ids, mask = left_padded(prompts, pad, "cpu")
    drawn = [row.ids for row in rows]
    width = max(map(len, drawn))
    done = torch.tensor([r + [pad] * (width - len(r)) for r in drawn])
    kept = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in drawn])
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return dict(zip(names, (ids, mask, done, kept), strict=True)) | {"advantages": torch.tensor(advantages)}


def backward(model: Any, parts: list[dict[str, torch.Tensor]]) -> None:
    for part in parts:
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
        mask = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
        n = part["completion_ids"].shape[1]
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=n + 1).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, -n:, None])[..., 0]
        (part["advantages"] * (logprobs * part["completion_mask"]).sum(1)).sum().backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--cap", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/bias.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model, device="cpu")
    problems = make_problems(["arithmetic", "countdown", "words"], args.prompts, "train", 5)
    jobs = [p for p in problems for _ in range(args.samples)]
    prompts = [encode_prompt(tokenizer, p) for p in jobs]
    pad, ends = tokenizer.pad_token_id, eos_ids(model, tokenizer)
    spent: dict[str, list[float]] = {}
    for repeat in range(args.repeats):
        drawn = sample(model, prompts, Sampling(args.cap, 1.0, 1.0), ends=ends, pad=pad, seed=repeat).rows
        rewards = [verified()(p, text_of(tokenizer, row.ids), row.finished) for p, row in zip(jobs, drawn, strict=True)]
        groups = torch.tensor(rewards).view(-1, args.samples)
        advantages = (groups - (groups.sum(1, keepdim=True) - groups) / (args.samples - 1)).flatten().tolist()
        batch = batch_of(prompts, drawn, advantages, pad)
        for name in ("vectors", "full"):
            vectors = BiasVectors(model)
            if name == "vectors":
                vectors.freeze_rest()
            else:
                model.requires_grad_(True)
            whole, _ = seconds(backward, model, [batch])
            parts, _ = seconds(backward, model, split(batch, len(jobs) // 8, drop=True))
            vectors.detach()
            spent.setdefault(f"backward of {name}, one padded batch, s", []).append(whole)
            spent.setdefault(f"backward of {name}, split, s", []).append(parts)
    result = {key: round(statistics.median(values), 3) for key, values in spent.items()}
    write_json(args.out, {"arguments": vars(args), "torch": torch.__version__, "medians": result, "all": spent})
    for key, value in result.items():
        print(f"{key:<45} {value}")


if __name__ == "__main__":
    main()
