"""What DePass costs: all neurons of a middle block by its adjoint, against pushing each through the blocks above.

    .venv/bin/python benchmarks/attribution.py --tokens 128 512 2048 --targets 32 --sample 64

Both ways give the same scores, which is checked: the adjoint takes one pass per target and any number of neurons, the
other one pass per neuron and any number of targets, so the ratio falls as 1 / targets. Pushing neurons is timed on a
random sample of them and extrapolated linearly to the block, as the output says (16 are carried at once, so the sample
should be a multiple of 16, or it looks too slow). Without ``--model``, the model is a
random Llama of the shape of SmolLM2-135M, in float32. Every measurement runs in a process of its own; peak memory is
that process's resident size (on a GPU: allocated on the GPU), model included. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neureasoner.models import default_device, load
from neureasoner.probes.attribution.depass import depass_scores
from neureasoner.probes.attribution.depass_forward import propagate
from neureasoner.probes.attribution.frozen import Recording
from neureasoner.sites import Layout

SMOLLM2_135M = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
TOLERANCE = 1e-5  # of the largest score


@dataclass
class Job:
    """One measurement, as the process that runs it gets it."""

    way: str  # adjoint or forward
    model: str
    tokens: int
    targets: int
    sample: int
    repeats: int
    seed: int


def build(name: str, seed: int) -> Any:
    """The model of a folder, or a random one, in float32 on the default device."""
    if name:
        return load(name, dtype="float32")[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).to(default_device()).eval()


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds of ``call`` and its last value."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        value = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), value


def peak_mib() -> float:
    """Most memory this process has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure(job: Job) -> dict[str, Any]:
    """Seconds for all neurons, the scores of the sampled ones ``[targets, sample]``, and memory."""
    model = build(job.model, job.seed)
    layout, rng = Layout.of(model), np.random.default_rng(job.seed)
    layer, n_neurons = layout.n_layers // 2, layout.intermediate_size
    ids = rng.integers(0, model.config.vocab_size, job.tokens).tolist()
    targets = list(range(job.tokens - job.targets, job.tokens))
    sample = np.sort(rng.choice(n_neurons, min(job.sample, n_neurons), replace=False)).tolist()
    site = f"neuron:{layer}[{','.join(map(str, sample))}]"
    loaded = peak_mib()
    depass_scores(model, ids[:8], [4], layer)  # the first call of everything is slow
    if job.way == "adjoint":
        seconds, value = timed(lambda: depass_scores(model, ids, targets, layer)[0][:, sample], job.repeats)
    else:
        with torch.no_grad():
            recording = timed(lambda: Recording(model, ids, layer), job.repeats)[0]
        one = timed(lambda: propagate(model, ids, targets, f"neuron:{layer}[{sample[0]}]"), job.repeats)[0]
        seconds, value = timed(lambda: propagate(model, ids, targets, site)[0], job.repeats)
        fixed = (recording + one) / 2  # the forward pass and the rest; `one` pushes a neuron and the rest, apart
        seconds = fixed + max(0.0, seconds - fixed) * n_neurons / len(sample)
    return {
        "seconds": seconds,
        "scores": value.cpu().numpy(),
        "loaded": loaded,
        "peak": peak_mib(),
        "layer": layer,
        "neurons": n_neurons,
        "sample": len(sample),
    }


def main() -> None:
    """Measure both ways at every length, check that they agree, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="model folder, hub id or 'tiny'; default: random, 135M parameters")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048], help="lengths of the trace")
    parser.add_argument("--targets", type=int, default=32, help="tokens attributed, the last ones of the trace")
    parser.add_argument("--sample", type=int, default=64, help="neurons pushed forwards; all if a block has fewer")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each way; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.targets < 1 or args.sample < 1 or args.repeats < 1 or min(args.tokens) < 8:
        parser.error("--targets, --sample and --repeats are at least 1, --tokens at least 8")
    lines = []
    for tokens in args.tokens:
        done = {}
        n = min(args.targets, tokens - 1)
        for way in ("adjoint", "forward"):
            job = Job(way, args.model, tokens, n, args.sample, args.repeats, args.seed)
            # a process of its own, for its own peak memory
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                done[way] = pool.submit(measure, job).result()
            print(f"{tokens} tokens, {way}: {done[way]['seconds']:.2f} s", file=sys.stderr, flush=True)
        adjoint, forward = done["adjoint"], done["forward"]
        apart = np.abs(adjoint["scores"] - forward["scores"]).max() / np.abs(forward["scores"]).max()
        if not apart <= TOLERANCE:
            raise SystemExit(f"{tokens} tokens: the two ways disagree by {apart:.1e} of the largest score")
        lines.append(
            f"| {tokens:,} | {n} | {adjoint['seconds']:.2f} | {forward['seconds']:.1f} | "
            f"{forward['seconds'] / adjoint['seconds']:.1f} | {apart:.0e} | {adjoint['peak']:,.0f} | "
            f"{forward['peak']:,.0f} | {adjoint['loaded']:,.0f} |"
        )
    extrapolated = forward["sample"] < forward["neurons"]
    print(
        f"All {forward['neurons']:,} neurons of block {forward['layer']}, {args.model or 'random SmolLM2-135M shape'}, "
        f"float32, {default_device().type}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.machine()}."
    )
    if extrapolated:
        print(
            f"Forward seconds are extrapolated linearly from {forward['sample']} neurons picked at random; scores are "
            "compared on these."
        )
    else:
        print("Forward seconds are measured on all neurons; nothing is extrapolated.")
    print(
        "\n| tokens | targets | adjoint s | forward s | ratio | difference | adjoint MiB | forward MiB | model MiB |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    main()
