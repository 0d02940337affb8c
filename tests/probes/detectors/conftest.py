"""Decisions of made-up traces."""

from __future__ import annotations

import numpy as np
import pytest

from neureasoner.probes.detectors.scoring import Decisions


@pytest.fixture(scope="session")
def made_up():
    """A maker of decisions with known answers."""
    return make


def make(seed=0, problems=30, samples=3, steps=6):
    """Decisions of made-up traces of the level intra: one wrong step in about half of them."""
    rng = np.random.default_rng(seed)
    m = problems * samples
    onset = np.where(rng.random(m) < 0.5, rng.integers(0, steps, m), -1)
    trace, step = np.repeat(np.arange(m), steps), np.tile(np.arange(steps), m)
    begin = onset[trace]
    y = np.where(begin < 0, 0, np.where(step < begin, 0, np.where(step == begin, 1, -1)))
    split = np.array(["train", "validation", "test"])[np.arange(problems) % 3]
    problem = np.repeat(np.arange(problems), samples)
    token = (step + 1) * 10 + rng.integers(0, 5, len(step))
    return Decisions(
        "intra",
        y,
        trace,
        step,
        token,
        [f"p{i}" for i in range(problems)],
        problem,
        np.array(["a", "b"])[problem % 2],
        split[problem],
        onset < 0,
        onset,
        np.full(m, 70.0),
    )
