"""What steering costs: plain ``generate``, AdaRAS-style steering, and the same edit as a loop over rows and neurons.

    .venv/bin/python benchmarks/steering.py --model tiny --batch 1 --tokens 96 --rounds 7

50 neurons over all blocks are nudged at the last position of every forward (core.md §3.4), by so little that all three
kinds write the same responses, which is checked. The loop is the straightforward one: for every row and neuron, one
assignment. In each round the kinds run one after the other, in changing order, so that a busy machine slows all; a
ratio is the median over rounds. On a CPU: one thread, CPU time. Prints a table and, with ``--out``, writes JSON.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch

from neureasoner.artifacts import write_json
from neureasoner.directions import Direction
from neureasoner.inference.controller import Controller
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger
from neureasoner.inference.steered import encode_prompt, generate_batch
from neureasoner.models import load
from neureasoner.sites import Layout

KINDS = ("plain", "watched", "steered", "loop")
STRENGTH, SIZE = 0.3, 1e-7


def neurons_of(layout: Layout, count: int) -> dict[int, list[int]]:
    """``count`` neurons spread evenly over the blocks."""
    blocks = [i % layout.n_layers for i in range(count)]
    rng = torch.Generator().manual_seed(0)
    return {
        b: torch.randperm(layout.intermediate_size, generator=rng)[: blocks.count(b)].tolist()
        for b in sorted(set(blocks))
    }


def loop_hooks(layout: Layout, neurons: dict[int, list[int]], stack: ExitStack) -> None:
    """The straightforward implementation: row by row, neuron by neuron."""
    for block, indices in neurons.items():

        def hook(_: Any, args: tuple[torch.Tensor, ...], indices: list[int] = indices) -> tuple[torch.Tensor]:
            x = args[0].clone()
            for row in range(x.shape[0]):
                for n in indices:
                    x[row, -1, n] = x[row, -1, n] + STRENGTH * SIZE
            return (x,)

        layer: Any = layout.layers[block]
        stack.callback(layer.mlp.down_proj.register_forward_pre_hook(hook).remove)


def main() -> None:
    """Time the kinds in turn and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens a row at most")
    parser.add_argument("--neurons", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="", help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model)
    layout = Layout.of(model)
    neurons = neurons_of(layout, args.neurons)
    values = {f"neuron:{b}[{','.join(map(str, i))}]": torch.full((len(i),), SIZE) for b, i in neurons.items()}
    rule = Rule("adaras", Trigger(decode=True), Action(add=True), direction="d", strength=Strength(STRENGTH))
    made = {"d": Direction(values, "positive = nothing in particular")}
    controllers = {
        "watched": Controller(model, tokenizer, Plan("none")),
        "steered": Controller(model, tokenizer, Plan("adaras", (rule,)), directions=made),
    }
    prompts = [encode_prompt(tokenizer, f"What is {17 + i} + {25 + i} * 3 - 4?") for i in range(args.batch)]

    # on a CPU the process's own time, which a busy machine changes little; on a GPU the wall's
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def once(kind: str) -> tuple[float, list[list[int]]]:
        with ExitStack() as stack:
            if kind == "loop":
                loop_hooks(layout, neurons, stack)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = clock()
            settings: dict[str, Any] = {"max_new_tokens": args.tokens, "temperature": 0.0}
            done = generate_batch(model, tokenizer, prompts, controller=controllers.get(kind), **settings)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return clock() - begin, [g.response_ids for g in done]

    texts = {kind: once(kind)[1] for kind in KINDS}  # warm up
    identical = all(text == texts["plain"] for text in texts.values())
    steps = max(map(len, texts["plain"]))
    seconds: dict[str, list[float]] = defaultdict(list)
    for r in range(args.rounds):
        for kind in KINDS if r % 2 == 0 else KINDS[::-1]:
            seconds[kind].append(once(kind)[0])
    table = {
        kind: {
            "ms_per_step": 1000 * statistics.median(s) / steps,
            "over_plain": statistics.median(a / b for a, b in zip(s, seconds["plain"], strict=True)),
        }
        for kind, s in seconds.items()
    }
    print(f"batch {args.batch}, {steps} steps, {args.neurons} neurons in {len(neurons)} blocks, {args.rounds} rounds")
    print(f"responses identical: {identical}\n\n| | ms a step | times plain |\n|---|---|---|")
    for kind, row in table.items():
        print(f"| {kind} | {row['ms_per_step']:.2f} | {row['over_plain']:.3f} |")
    if args.out:
        machine: dict[str, Any] = {
            "device": str(model.device),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        result = {"table": table, "seconds": seconds, "identical": identical, "settings": vars(args), **machine}
        write_json(args.out, result | {"torch": torch.__version__})


if __name__ == "__main__":
    main()
