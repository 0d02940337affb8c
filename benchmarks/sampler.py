"""Our sampler against stock ``generate``, on the same seeds: rows that have ended leave, the cache has room to grow.

    .venv/bin/python benchmarks/sampler.py --model tiny --problems runs/test/problems.jsonl --batch 64

The two run one after the other in every round, in changing order, with the sampling of the evaluation (T 0.6, top-p
0.95, cap 512). Tokens have to be equal, which is checked. On a CPU: one thread, CPU time. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import GenerationConfig

from neureasoner.inference.steered import encode_prompt, generate_batch
from neureasoner.models import load
from neureasoner.sampling import eos_ids, left_padded, pad_id
from neureasoner.traces import read_problems


def main() -> None:
    """Time both in turn and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--problems", required=True, help="problem file; its first ones are taken")
    parser.add_argument("--batch", type=int, default=64, help="rows decoded together")
    parser.add_argument("--tokens", type=int, default=512, help="cap on new tokens")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with another seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    prompts = [encode_prompt(tokenizer, p) for p in read_problems(args.problems)[: args.batch]]
    ends = eos_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=args.tokens,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=0,
        eos_token_id=ends,
        pad_token_id=pad_id(tokenizer, ends),
    )
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time

    def stock(seed: int) -> list[list[int]]:
        ids, mask = left_padded(prompts, config.pad_token_id, model.device)
        torch.manual_seed(seed)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        rows = out[:, ids.shape[1] :].tolist()
        return [row[: next((t + 1 for t, i in enumerate(row) if i in ends), len(row))] for row in rows]

    def ours(seed: int) -> list[list[int]]:
        done = generate_batch(model, tokenizer, prompts, max_new_tokens=args.tokens, seed=seed)
        return [g.response_ids for g in done]

    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    equal, lengths = 0, []
    for r in range(args.rounds + 1):
        rows = {}
        for name, run in [("stock", stock), ("ours", ours)][:: 1 if r % 2 else -1]:
            begin = clock()
            rows[name] = run(r)
            if r:  # round 0 warms up
                seconds[name].append(clock() - begin)
        equal += sum(a == b for a, b in zip(rows["stock"], rows["ours"], strict=True))
        lengths += [len(row) for row in rows["stock"]]
    mean = statistics.mean(lengths)
    print(
        f"batch {args.batch}, {args.rounds} rounds; mean answer {mean:.0f} tokens ({mean / args.tokens:.0%} of the cap)"
    )
    print(f"equal answers: {equal} of {len(lengths)}")
    ratio = statistics.median(a / b for a, b in zip(seconds["stock"], seconds["ours"], strict=True))
    times = (f"{name} {statistics.median(values):.2f} s" for name, values in seconds.items())
    print(f"{', '.join(times)}: {ratio:.2f} times")


if __name__ == "__main__":
    main()
