"""What watching spectra costs per token: both windows, an rFFT at each token, and the paper's formula as printed.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/spectra.py --channels 32 256 1024 --batch 1 8 64

Prints a Markdown table, times in microseconds for the whole batch, medians over ``--repeats``:

push       one token into all rows; for the streaming window its share of the sums is in it (made every 64 tokens)
read-out   ``pop`` of the oldest step, then ``features``: what a separator costs
per token  (step * push + read-out) / step: all in, when features are read at separators only

Beside them, both with features after every token: ``spectral_features`` of the window recomputed, and Algorithm 2 in
complex128 with recursive phases, token by token (core.md §1.6.2; its pop of one token a token is included). Windows
hold ``--steps`` steps of ``--step`` tokens.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from neureasoner.probes.sliding import FFTWindow, SlidingWindow, StreamingWindow
from neureasoner.probes.spectrum import EPS, spectral_features


class Printed:
    """Algorithm 2 as core.md §1.6.2 prints it, over rows and channels at once; all rows are equally long."""

    def __init__(self, rows: int, channels: int, frequencies: int):
        self.q = np.exp(-1j * np.pi * np.arange(1, frequencies + 1) / frequencies)  # [K]
        self.eta, self.length = 1.0 / (1.0 - self.q), 0
        self.alpha, self.beta, self.rho = np.ones_like(self.q), self.q.copy(), np.ones_like(self.q)
        self.u, self.v = np.zeros((rows, channels)), np.zeros((rows, channels))
        self.a = np.zeros((rows, channels, frequencies), dtype=complex)
        self.queue: list[np.ndarray] = []

    def push(self, y: np.ndarray) -> None:
        """Add one token. y [B, N]."""
        y = np.abs(y)
        self.length += 1
        self.u += y
        self.v += y * y
        self.alpha *= self.q
        self.rho *= self.q
        self.a += y[:, :, None] * self.alpha
        self.queue.append(y)

    def pop(self) -> None:
        """Take the oldest token away."""
        y = self.queue.pop(0)
        self.length -= 1
        self.u -= y
        self.v -= y * y
        self.a -= y[:, :, None] * self.beta
        self.beta *= self.q
        self.rho /= self.q

    def features(self) -> np.ndarray:
        """r_HF, H and e, ``[B, N, 3]``."""
        b = self.beta * (1.0 - self.rho) * self.eta
        power = np.abs(self.a - (self.u / self.length)[:, :, None] * b) ** 2
        share = power / (power.sum(axis=-1, keepdims=True) + EPS)
        k = share.shape[-1]
        entropy = -(share * np.log(share + 1e-300)).sum(axis=-1) / np.log(k)
        energy = np.log(np.maximum(self.v - self.u**2 / self.length, 0.0) + EPS)
        return np.stack([share[:, :, k // 2 :].sum(axis=-1), entropy, energy], axis=-1)


def median_us(action: Callable[[], object], repeats: int, each: int = 1) -> float:
    """Median time of ``action`` over ``repeats``, divided by ``each``, in microseconds; a first run is not counted."""
    action()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6 / each


def measure(batch: int, channels: int, args: argparse.Namespace) -> list[float]:
    """One row of the table, in the order of its columns."""
    length = args.step * args.steps
    rng = np.random.default_rng(0)
    tokens = np.abs(rng.normal(size=(args.step, batch, channels)))
    row: list[float] = []
    windows: list[SlidingWindow] = [
        FFTWindow(batch, channels),
        StreamingWindow(batch, channels, frequencies=args.frequencies),
    ]
    for window in windows:
        for t in range(length):
            window.push(tokens[t % args.step])
        pushes, readouts = [], []
        for _ in range(args.repeats + 1):  # the first is not counted
            begin = time.perf_counter()
            for y in tokens:
                window.push(y)
            middle = time.perf_counter()
            window.pop(args.step)
            window.features("intra")
            pushes.append((middle - begin) * 1e6 / args.step)
            readouts.append((time.perf_counter() - middle) * 1e6)
        push, readout = statistics.median(pushes[1:]), statistics.median(readouts[1:])
        row += [push, readout, push + readout / args.step]
    series = np.abs(rng.normal(size=(batch, length, channels)))
    row.append(median_us(lambda: [spectral_features(x, "intra") for x in series], args.repeats))
    printed = Printed(batch, channels, args.frequencies)
    for t in range(length):
        printed.push(tokens[t % args.step])

    def slide() -> None:
        printed.push(tokens[0])
        printed.pop()

    updates = median_us(slide, 8 * args.repeats)
    return [*row, updates, updates + median_us(printed.features, args.repeats)]


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 128, 256, 1024], help="N")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="B")
    parser.add_argument("--frequencies", type=int, default=16, help="K")
    parser.add_argument("--step", type=int, default=64, help="tokens in a step")
    parser.add_argument("--steps", type=int, default=4, help="steps in the window")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(
        f"{args.steps} steps of {args.step} tokens, K = {args.frequencies}; microseconds for the whole batch, median "
        f"of {args.repeats}; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"load average before the run {os.getloadavg()[0]:.1f}\n"
    )
    columns = ["FFT push", "FFT read-out", "FFT per token", "streaming push", "streaming read-out"]
    columns += ["streaming per token", "rFFT at each token", "as printed, update", "as printed, update + features"]
    print("| N | B | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for channels in args.channels:
        for batch in args.batch:
            cells = " | ".join(f"{x:,.1f}" for x in measure(batch, channels, args))
            print(f"| {channels:,} | {batch} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
