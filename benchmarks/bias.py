"""Where the time of a training step goes: drawing responses and the backward passes, ours against the stock way.

    .venv/bin/python benchmarks/bias.py --model tiny --prompts 6 --samples 8 --repeats 3

Sampling: ``training.policy.sample`` against ``generate``, seconds per token up to each response's end; both draw from
the whole distribution at temperature 1. Backward: parts of like length without the responses whose advantage is 0,
against one padded batch of all, for the vectors and for all weights. Runs of the two kinds alternate, on one thread and
in processor seconds, so that a busy machine counts little. Writes ``benchmarks/bias.json``.
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
from neureasoner.sampling import eos_ids, generation_config, left_padded
from neureasoner.training.policy import Samples, sample
from neureasoner.training.policy_measure import encode, prompt_of, text_of
from neureasoner.training.policy_trainer import split
from neureasoner.training.rewards import verified
from neureasoner.training.vectors import BiasVectors


def seconds(work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    begin = time.process_time()
    result = work(*args, **kwargs)
    return time.process_time() - begin, result


def stock(model: Any, tokenizer: Any, prompts: list[list[int]], cap: int) -> int:
    """Tokens that ``generate`` drew, up to and with each response's end."""
    config = generation_config(model, tokenizer, cap, 1.0, 1.0)
    ids, mask = left_padded(prompts, config.pad_token_id, model.device)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    ends = set(config.eos_token_id)
    return sum(next((t + 1 for t, i in enumerate(row) if i in ends), len(row)) for row in out.tolist())


def batch_of(prompts: list[list[int]], drawn: Samples, advantages: list[float], pad: int) -> dict[str, torch.Tensor]:
    ids, mask = left_padded(prompts, pad, "cpu")
    width = max(map(len, drawn.ids))
    done = torch.tensor([r + [pad] * (width - len(r)) for r in drawn.ids])
    kept = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in drawn.ids])
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
    prompts = [encode(tokenizer, prompt_of(tokenizer, p)) for p in jobs]
    pad, ends = tokenizer.pad_token_id, eos_ids(model, tokenizer)
    spent: dict[str, list[float]] = {}
    for repeat in range(args.repeats):
        torch.manual_seed(repeat)
        spent_stock, tokens = seconds(stock, model, tokenizer, prompts, args.cap)
        spent.setdefault("generate, s per 1,000 tokens", []).append(1000 * spent_stock / tokens)
        how: dict[str, Any] = {"max_new_tokens": args.cap, "eos_ids": ends, "pad_id": pad, "seed": repeat}
        spent_ours, drawn = seconds(sample, model, prompts, **how)
        spent.setdefault("sample, s per 1,000 tokens", []).append(1000 * spent_ours / sum(map(len, drawn.ids)))
        rewards = [
            verified()(p, text_of(tokenizer, ids), ended)
            for p, ids, ended in zip(jobs, drawn.ids, drawn.finished, strict=True)
        ]
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
