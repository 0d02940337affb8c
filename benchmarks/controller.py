"""What watching costs: plain ``generate`` against the controller with real probes that never fire.

    .venv/bin/python benchmarks/controller.py --model tiny --batch 1 --tokens 256 --repeats 5

Runs of the two kinds alternate, so that a busy machine slows both; the ratio is the median over pairs. Responses are
checked to be identical (promise 1). Writes ``benchmarks/controller.json``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner.artifacts import write_json
from neureasoner.inference.controller import Controller
from neureasoner.inference.plan import Action, Plan, Rule, Trigger
from neureasoner.inference.steered import encode_prompt, generate_batch
from neureasoner.models import fingerprint, load
from neureasoner.probes.detectors.probe import Probe
from neureasoner.probes.features import FeatureSet
from neureasoner.sites import Layout


def never_firing(model: Any, tokenizer: Any) -> Controller:
    """The paper's three levels at their default sizes (core.md §1.1), fitted on noise, with thresholds out of reach."""
    layout, print_ = Layout.of(model), fingerprint(model)
    middle, rng = layout.n_layers // 2, np.random.default_rng(0)
    neurons = ",".join(map(str, rng.choice(layout.intermediate_size, 32, replace=False)))
    heads = ",".join(map(str, range(min(8, layout.n_heads))))
    sets = {
        "instance": ("spectral", f"neuron:{middle}[{neurons}]"),
        "inter": ("spectral+entropy", f"head:{middle}[{heads}]"),
        "intra": ("spectral+entropy+residual", f"neuron:{middle}[{neurons}]"),
    }
    rules, probes = [], {}
    for level, (name, channels) in sets.items():
        features = FeatureSet.named(name, level, 4, channels, f"residual:{middle}")
        x = rng.normal(size=(32, features.dim(layout.hidden_size)))
        probe = Probe(features, model_fingerprint=print_, epochs=1).fit(x, np.arange(32) % 2)
        probe.threshold = 2.0
        probes[level] = probe
        trigger = Trigger(probe=level, at_step=4 if level == "instance" else None)
        rules.append(Rule(level, trigger, Action("Wait")))
    return Controller(model, tokenizer, Plan("never", tuple(rules)), probes)


def main() -> None:
    """Time both kinds in turn and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens a row at most")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    controller = never_firing(model, tokenizer)
    prompts = [encode_prompt(tokenizer, f"What is {17 + i} + {25 + i} * 3 - 4?") for i in range(args.batch)]

    def once(watch: Controller | None, seed: int) -> tuple[float, list[list[int]], int]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        done = generate_batch(model, tokenizer, prompts, max_new_tokens=args.tokens, seed=seed, controller=watch)
        seconds, ids = time.perf_counter() - begin, [g.response_ids for g in done]
        return sum(map(len, ids)) / seconds, ids, sum(len(g.scores) for g in done)

    once(None, 0), once(controller, 0)
    pairs, scores, identical = [], 0, True
    for r in range(args.repeats):
        kinds = [None, controller] if r % 2 == 0 else [controller, None]
        runs = {kind is not None: once(kind, args.seed + r) for kind in kinds}
        identical &= runs[True][1] == runs[False][1]
        scores += runs[True][2]
        pairs.append((runs[False][0], runs[True][0]))
        print(f"pair {r + 1}: plain {pairs[-1][0]:.1f} tok/s, watched {pairs[-1][1]:.1f} tok/s")
    ratio = statistics.median(watched / plain for plain, watched in pairs)
    result = {
        "plain_tokens_per_s": round(statistics.median(p for p, _ in pairs), 1),
        "watched_tokens_per_s": round(statistics.median(w for _, w in pairs), 1),
        "ratio": round(ratio, 4),
        "identical": identical,
        "scores": scores,
        "pairs": pairs,
        "settings": vars(args),
        "device": str(model.device),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(args.out, result)
    print(f"watched / plain = {ratio:.3f}, {scores} scores, responses identical: {identical}; wrote {args.out}")


if __name__ == "__main__":
    main()
