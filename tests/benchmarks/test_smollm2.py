"""What the probes on SmolLM2 rest on: the judge of its sums, the recorder, chosen channels, figures counted by strata.

Oracles: verdicts written by hand, one full pass for each response alone, loops over pairs.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch


def load(name):
    """A module of benchmarks/, which is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sums, recording, fitting = (load(f"smollm2_{name}") for name in ("chains", "recording", "fitting"))
CHAIN = sums.Chain(7, (("add", 5), ("multiply by", 3), ("subtract", 6)))


def kinds(*lines):
    return [v.kind for v in sums.judge(CHAIN, lines)]


@pytest.mark.parametrize("seed", range(20))
def test_solved_chains_are_right_line_by_line(seed):
    chain = sums.draw(random.Random(seed), 5, 40)
    lines = sums.solved(chain).split("\n")[1:-2]
    verdicts = sums.judge(chain, lines)
    assert [v.kind for v in verdicts] == [sums.RIGHT] * 5
    assert sums.first_wrong(verdicts) is None
    assert all(1 <= v.value <= 40 for v in verdicts)


def test_a_solved_chain_reads_as_the_page_shows_it():
    assert sums.solved(CHAIN) == (
        "Start with 7.\nAdd 5: 7 + 5 = 12.\nMultiply by 3: 12 * 3 = 36.\nSubtract 6: 36 - 6 = 30.\n\n"
    )


def test_a_wrong_result_is_wrong_once_and_the_next_line_continues_from_it():
    assert kinds("Add 5: 7 + 5 = 13.", "Multiply by 3: 13 * 3 = 39.", "Subtract 6: 39 - 6 = 33.") == [
        sums.ARITHMETIC,
        sums.RIGHT,
        sums.RIGHT,
    ]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Multiply by 3: 12 * 3 = 36.\n", sums.RIGHT),
        ("Multiply by 3: 12 * 3 = 35.", sums.ARITHMETIC),
        ("Multiply by 3: 5 * 3 = 15.", sums.BROKEN),  # goes on from the operand, calculates right
        ("Multiply by 3: 12 + 3 = 15.", sums.OTHER),
        ("Multiply by 3: 12 * 2 = 24.", sums.OTHER),
        ("Multiply by 2: 12 * 2 = 24.", sums.OTHER),
        ("Multiply by 3: 12 * 3 = .", sums.UNREADABLE),
        ("Multiply by 3: 12 * 3 = 36. Add 5", sums.UNREADABLE),
        ("", sums.UNREADABLE),
    ],
)
def test_one_line_of_every_kind(line, kind):
    verdicts = sums.judge(CHAIN, ["Add 5: 7 + 5 = 12.", line])
    assert [v.kind for v in verdicts] == [sums.RIGHT, kind]
    assert sums.first_wrong(verdicts) == (None if kind == sums.RIGHT else 1)


def test_nothing_continues_from_an_unreadable_line_and_lines_beyond_the_last_step_do_not_count():
    assert kinds("?", "Multiply by 3: 12 * 3 = 36.", "Subtract 6: 36 - 6 = 30.", "Add 1: 30 + 1 = 31.") == [
        sums.UNREADABLE,
        sums.BROKEN,
        sums.RIGHT,
    ]


def test_a_line_ends_with_the_token_that_holds_its_newline():
    pieces = ["a b", ".\n", "\n", "c", "\n\nd", " e", "\n", "rest"]
    offsets = np.cumsum([0, *map(len, pieces)]).tolist()
    assert recording.line_starts(offsets, "".join(pieces)) == [0, 2, 5, 7]


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_reading_with_a_shared_prompt_equals_one_pass_for_each_response(make_model, arch):
    model = make_model(arch, num_hidden_layers=4)
    recorder = recording.Recorder(model)
    rng = np.random.default_rng(0)
    prompt, *responses = (rng.integers(5, 300, n).tolist() for n in (7, 12, 3, 200))
    for response, series in zip(responses, recorder.read(prompt, responses), strict=True):
        check(model, recorder.layer, prompt, response, series)


def check(model, layer, prompt, response, series):
    """Against plain hidden states of one full pass, and a loop over the tokens drawn."""
    seen = {}
    hook = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.update(a=a[0][0]))
    with torch.no_grad():
        out = model(torch.tensor([[*prompt, *response]]), output_hidden_states=True)
    hook.remove()
    p = len(prompt)
    np.testing.assert_allclose(series["neuron"], seen["a"][p:], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(series["residual"], out.hidden_states[layer + 1][0, p:], atol=2e-5, rtol=1e-4)
    np.testing.assert_allclose(series["question"][0], out.hidden_states[layer + 1][0, p - 1], atol=2e-5, rtol=1e-4)
    for t, token in enumerate(response):
        q = torch.softmax(out.logits[0, p + t - 1].double(), -1)
        expected = [float(-(q * q.log()).sum()), float(-q[token].log())]
        np.testing.assert_allclose(series["logits"][t], expected, atol=1e-5, rtol=1e-4)


def test_writing_forces_what_is_dictated_stops_when_told_and_records_what_a_full_pass_shows(make_model):
    model = make_model("llama", num_hidden_layers=4)
    recorder = recording.Recorder(model)
    shared, prompts = [9, 8, 7, 6], [[11], [12, 13, 14]]

    def after(i, ids):
        if not ids:
            return [20 + i, 30]
        return None if len(ids) == 6 + 3 * i else [40, 41] if len(ids) == 4 else []

    made = recorder.write(shared, prompts, 1.0, 50, after, seed=0)
    assert [len(ids) for ids, _ in made] == [6, 9]
    for i, (ids, series) in enumerate(made):
        assert ids[:2] == [20 + i, 30]
        assert ids[4:6] == [40, 41]
        check(model, recorder.layer, [*shared, *prompts[i]], ids, series)
    again = recorder.write(shared, prompts, 1.0, 50, after, seed=0)
    other = recorder.write(shared, prompts, 1.0, 50, after, seed=1)
    assert [a for a, _ in again] == [a for a, _ in made] != [a for a, _ in other]
    assert [len(ids) for ids, _ in recorder.write(shared, prompts, 1.0, 5, after, seed=0)] == [5, 5]


def won(y, score, group, weight=None):
    """Share of pairs (failing, clean) of one group that the score wins, by the definition."""
    weight = np.ones(len(y)) if weight is None else weight
    total = won_ = 0.0
    for i, j in product(np.flatnonzero(y == 1), np.flatnonzero(y == 0)):
        if group[i] == group[j]:
            w = weight[i] * weight[j]
            total += w
            won_ += w * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
    return won_ / total


@pytest.fixture
def table():
    rng = np.random.default_rng(1)
    n = 120
    y = rng.integers(0, 2, n)
    problem = np.arange(n) // 4
    level = rng.normal(size=(n, 40)) + 3.0 * (np.arange(n) % 3 == 0)[:, None]  # all channels tell the strata apart
    level[:, 5] += 2.0 * y
    spectra = np.repeat(level[:, None], 5, axis=1)
    arrays = {"level": level, "spectra": spectra, "uncertainty": rng.normal(size=(n, 16))}
    stratum = np.array(["a" if i % 3 == 0 else "b" for i in range(n)])
    return fitting.Table(arrays, {"length": rng.normal(size=(n, 2))}, y, problem, problem % 5, stratum)


def test_figures_count_pairs_within_their_strata(table):
    score = np.random.default_rng(2).integers(0, 6, len(table.y)) + table.y  # many ties
    read = fitting.measures(table, ("pooled", "within", "problem", "a"), 20, seed=3)
    draws = fitting.bootstrap_draws(30, 20, 3)
    groups = {
        "pooled": table.fold,
        "within": [*zip(table.fold, table.stratum, strict=True)],
        "problem": table.problem,
        "a": [(f, s) if s == "a" else i for i, (f, s) in enumerate(zip(table.fold, table.stratum, strict=True))],
    }
    for name, group in groups.items():
        values = read[name](score.astype(float))
        assert values[0] == pytest.approx(won(table.y, score, group))
        if name != "problem":
            assert values[7] == pytest.approx(won(table.y, score, group, draws[7][table.problem]))
    once = sum(draws[7][p] * won_pairs(table, score, p)[0] for p in range(30))
    assert read["problem"](score.astype(float))[7] == pytest.approx(
        once / sum(draws[7][p] * won_pairs(table, score, p)[1] for p in range(30))
    )


def won_pairs(table, score, problem):
    a, b = (score[(table.problem == problem) & (table.y == c)] for c in (1, 0))
    return sum((x > z) + 0.5 * (x == z) for x in a for z in b), len(a) * len(b)


def test_channels_are_those_that_tell_labels_apart_not_strata(table, monkeypatch):
    monkeypatch.setattr(fitting, "CHANNELS", 1)
    train = table.fold < 3
    assert fitting.channels(table, train, "chosen", 0).tolist() == [5]
    assert 5 not in np.concatenate([fitting.channels(table, train, "random", s) for s in range(30)])
    assert fitting.channels(table, train, "all", 0).tolist() == list(range(40))
    shifted = table.arrays["level"].copy()
    shifted[~train, 7] += 100.0 * table.y[~train]  # a channel that only test problems would choose
    table.arrays["level"] = shifted
    assert fitting.channels(table, train, "chosen", 0).tolist() == [5]


def test_every_problem_is_tested_once_by_probes_that_never_saw_it(table, monkeypatch):
    monkeypatch.setattr(fitting, "CHANNELS", 4)
    for test in range(5):
        masks = table.roles(test)
        assert np.sum(masks, axis=0).tolist() == [1] * len(table.y)
        assert len({*table.problem[masks[0]]} & ({*table.problem[masks[1]]} | {*table.problem[masks[2]]})) == 0
        assert len({*table.problem[masks[1]]} & {*table.problem[masks[2]]}) == 0
    scores = fitting.out_of_fold(table, ("spectral",), "logistic", 0)
    assert won(table.y, scores, table.fold) > 0.75
    flipped = fitting.Table(**{**vars(table), "y": np.where(table.fold == 0, 1 - table.y, table.y)})
    fixed = fitting.out_of_fold(flipped, ("spectral",), "logistic", 0)
    np.testing.assert_array_equal(fixed[table.fold == 0], scores[table.fold == 0])  # its own labels reach no probe


def test_compare_finds_the_channel_and_nothing_on_shuffled_labels(table, monkeypatch):
    monkeypatch.setattr(fitting, "CHANNELS", 4)
    sets = {
        "chosen": (("spectral",), "logistic"),
        "length": (("length",), "logistic"),
        "shuffled labels": (("spectral",), "logistic"),
    }
    found = fitting.compare(table, sets, ("within", "pooled"), [("chosen", "length")], bootstrap=100, seed=0)
    value = {r["label"]: r["within"] for r in found["rows"]}
    assert (found["n"], found["failing"], found["problems"]) == (120, int(table.y.sum()), 30)
    assert value["chosen"]["low"] > 0.6
    assert value["length"]["low"] < 0.5 < value["length"]["high"]
    assert value["shuffled labels"]["low"] < 0.5
    assert found["differences"][0]["low"] > 0
    expected = value["chosen"]["value"] - value["length"]["value"]
    assert found["differences"][0]["value"] == pytest.approx(expected, abs=2e-4)
