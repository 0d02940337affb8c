"""The paper's token samples: labels, windows and draws, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from neureasoner.errors import UserError
from neureasoner.probes.detectors.token_samples import (
    TokenSamples,
    draw_trajectories,
    sample_tokens,
    table_4,
    token_features,
    token_labels,
)
from neureasoner.probes.labels import bounds_of
from neureasoner.probes.spectrum import spectral_features
from neureasoner.steps import segment
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace


def trace(tokenizer, problem, intra=None, inter=None, steps=8):
    text = (
        "".join(f"Step {i} of many, with words enough to fill a line.\n\n" for i in range(steps)) + "</think>\n\nDone."
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, thinking = segment(ids, tokenizer)
    labels = Labels(True, "1", IntraLabel(intra is not None, step=intra), InterLabel(inter is not None, steps=inter))
    prompt = tokenizer("<think>\nQuestion", add_special_tokens=False)["input_ids"]
    return Trace(
        f"{problem}#0", Problem(problem, "f", 1, "q", "a"), prompt, ids, tokenizer.decode(ids), found, True, labels,
        meta={"thinking_tokens": thinking},
    )  # fmt: skip


def test_labels_follow_the_steps(tiny_tokenizer):
    t = trace(tiny_tokenizer, "p", intra=3)
    b, y = bounds_of(t), token_labels(t, "intra", 2, -1)
    assert (
        (y[:15] == -1).all() and (y[15 : b[3]] == 0).all() and (y[b[3] : b[4]] == 1).all() and (y[b[4] :] == -1).all()
    )
    t = trace(tiny_tokenizer, "p", inter=(2, 7))
    b, y = bounds_of(t), token_labels(t, "inter", 4, -1)
    assert (y[15 : b[2]] == 0).all() and (y[b[2] : b[4]] == -1).all() and (y[b[4] : b[7]] == 1).all()
    y = token_labels(t, "instance", 3, 1)
    assert (y[15 : b[3]] == 1).all() and (y[b[3] :] == -1).all()
    assert (token_labels(t, "instance", 9, 1) == -1).all()  # never gets to the K-th separator


@pytest.mark.parametrize(("level", "window"), [("intra", 2), ("inter", 4), ("instance", 3)])
def test_windows_end_with_the_token(level, window):
    x, bounds = np.random.default_rng(0).normal(size=(50, 3)), [0, 8, 20, 31, 50]
    got = token_features(x, bounds, level, window, np.array([17, 19, 20, 45]))
    for token, row in zip((17, 19, 20, 45), got, strict=True):
        closed = [b for b in bounds if b <= token]  # the open step starts at the last of these
        start = 0 if level == "instance" else closed[max(0, len(closed) - window)]
        np.testing.assert_array_equal(row, spectral_features(x[start : token + 1], level)[0])


def test_draws_take_failing_trajectories_of_different_problems(tiny_tokenizer):
    traces = [trace(tiny_tokenizer, f"p{i // 2}", intra=3 if i % 3 else None) for i in range(40)]
    easy = {f"p{i}": i % 2 for i in range(20)}
    got = draw_trajectories(traces, "intra", easy, 12, np.random.default_rng(0))
    assert len(got) == 12 == len({traces[i].problem.id for i in got})
    assert all(traces[i].labels.intra.has_error for i in got)
    got = draw_trajectories(traces, "instance", easy, 12, np.random.default_rng(0))
    assert sorted(easy[traces[i].problem.id] for i in got) == [0] * 6 + [1] * 6


def test_near_copies_make_the_random_split_look_good():
    """Tokens that carry nothing but their trajectory's name, labelled by trajectory half: learned only at random."""
    rng = np.random.default_rng(0)
    trajectory = np.repeat(np.arange(30), 20)
    x = rng.normal(size=(30, 12))[trajectory] + 0.05 * rng.normal(size=(600, 12))
    samples = TokenSamples(x, rng.permutation(np.arange(30) % 2)[trajectory], trajectory)
    assert table_4(samples, "tokens", 0)["auroc"] > 0.95
    apart = [table_4(samples, "trajectories", s).get("auroc", np.nan) for s in range(3)]
    assert np.nanmean(apart) < 0.75


def test_samples_of_real_recordings_and_one_class(make_model, tiny_tokenizer):
    model, traces = make_model(), [trace(tiny_tokenizer, f"p{i}", intra=3) for i in range(3)]
    got = sample_tokens(model, tiny_tokenizer, traces, "intra", 2, "neuron:1[0,3]", {}, 2)
    assert got.x.shape == (len(got.y), 6) and set(got.y) == {0, 1} and set(got.trajectory) == {0, 1, 2}
    clean = [trace(tiny_tokenizer, "q")]
    with pytest.raises(UserError, match="one class"):
        sample_tokens(model, tiny_tokenizer, clean, "intra", 2, "neuron:1[0,3]", {}, 2)
