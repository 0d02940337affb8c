"""Pairs on the shipped reasoner with the exact judge: real failures, real rewinding."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from neureasoner.data_builders.config import ProblemsConfig
from neureasoner.data_builders.judges import ExactJudge
from neureasoner.data_builders.pairs import Row, Writer, make_pairs, pairs_of
from neureasoner.data_builders.pairs_config import PairsConfig
from neureasoner.data_builders.problem_file import build_problems
from neureasoner.errors import UserError
from neureasoner.models import load
from neureasoner.pairs import read_pairs
from neureasoner.probes.labels import failure, instance_pairs
from neureasoner.traces import read_problems


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    build_problems(ProblemsConfig(out=str(root), n=12, split="validation", seed=5))
    return root


def config(root, **more):
    base = {"model": "tiny", "problems": str(root / "problems.jsonl"), "out": str(root / "out"), "max_new_tokens": 300}
    return PairsConfig(**(base | {"tries": 4, "batch_size": 12} | more))


@pytest.mark.parametrize("every", [0, 2])
def test_a_pair_shares_its_prefix_and_only_one_side_fails(work, every):
    out = work / f"every{every}"
    done = make_pairs(config(work, every=every, out=str(out), record=["neuron:3[0,5]"]))
    pairs = read_pairs(out / "pairs.jsonl")
    assert done["pairs"] == len(pairs) > 0
    for p in pairs:
        assert p.failing.response_ids[: p.prefix] == p.clean.response_ids[: p.prefix]
        assert p.failing.response_ids != p.clean.response_ids and p.failing.prompt_ids == p.clean.prompt_ids
        assert len(p.failing.steps) == len(p.clean.steps) and p.failing.steps[-1].closed
        # judged again from the text alone, by the judge who has never seen the other side
        assert failure(p.clean, p.level) is None or p.level not in ("intra", "inter")
        again = ExactJudge().judge(p.clean)
        assert not (again.intra.has_error if p.level == "intra" else again.inter.is_stagnant)
        wrong = ExactJudge().judge(p.failing)
        assert wrong.intra.step == len(p.failing.steps) - 1 if p.level == "intra" else wrong.inter.is_stagnant
    assert list((out / "records").glob("*.safetensors"))
    assert make_pairs(config(work, every=every, out=str(out), record=["neuron:3[0,5]"]))["pairs"] == len(pairs)


@pytest.mark.slow
def test_judging_at_the_end_asks_far_less_often(work):
    counts = {}
    for every in (0, 1):
        counts[every] = make_pairs(config(work, every=every, out=str(work / f"asked{every}"), levels=["intra"]))[
            "judged"
        ]
    assert counts[0] < counts[1]


def test_going_back_in_the_cache_equals_reading_the_prefix_again(work):
    model, tokenizer = load("tiny", device="cpu", dtype=torch.float64)
    writer = Writer(model, tokenizer, config(work))
    problems = list(read_problems(work / "problems.jsonl"))[:3]
    encode = lambda q: tokenizer(q, add_special_tokens=False)["input_ids"]  # noqa: E731
    rows = [Row(p, p.id, encode(p.question) + encode("\n")) for p in problems]
    new, run = writer.write(rows, 3, seed=1)
    assert len({len(n) for n in new}) > 1 and int(run.pads.max()) > 0  # rows of different lengths, and padding
    for i, row in enumerate(rows):
        begin = len(new[i]) // 2
        prefix = Row(row.problem, row.name, row.prompt, new[i][:begin])
        kept = writer.back(run, i, len(row.prompt) + begin - 1, 2)
        rewound, _ = writer.write([prefix] * 2, 2, 7, kept)
        read_again, _ = writer.write([prefix] * 2, 2, 7, None)
        assert rewound == read_again and rewound[0]


@pytest.mark.slow
def test_writing_in_rounds_reads_the_whole_trace(work):
    """Whatever the rounds, a sequence ends with EOS or at the cap, and no step is lost between rounds."""
    model, tokenizer = load("tiny")
    writer = Writer(model, tokenizer, config(work, every=2))

    class Never(ExactJudge):
        def judge(self, trace):
            labels = super().judge(trace)
            labels.intra.has_error = labels.inter.is_stagnant = False
            return labels

    problems = list(read_problems(work / "problems.jsonl"))[:4]
    encode = lambda p: tokenizer(p.question, add_special_tokens=False)["input_ids"]  # noqa: E731
    rows = [Row(p, p.id, encode(p)) for p in problems]
    assert not list(pairs_of(writer, Never(), rows, 3, Counter()))
    for row in rows:
        trace = writer.trace(row, row.response)
        assert trace.finished or not trace.steps or trace.thinking_end < len(row.response) or len(row.response) == 300


def test_instance_pairs_put_an_easy_beside_a_hard_problem(work, tmp_path):
    from neureasoner.data_builders.config import JudgeConfig, RolloutsConfig
    from neureasoner.data_builders.judging import judge_traces
    from neureasoner.data_builders.rollouts import sample_rollouts
    from neureasoner.traces import read_traces

    sample_rollouts(
        RolloutsConfig(model="tiny", problems=str(work / "problems.jsonl"), out=str(tmp_path / "r"), max_new_tokens=200)
    )
    judge_traces(JudgeConfig(traces=str(tmp_path / "r" / "traces.jsonl"), out=str(tmp_path / "j")))
    traces = read_traces(tmp_path / "j" / "traces.jsonl")
    for i, t in enumerate(traces):
        t.labels.correct = i % 2 == 0
    for p in instance_pairs(traces, [], 2):
        assert p.clean.labels.correct and not p.failing.labels.correct
        assert p.clean.problem.family == p.failing.problem.family and p.steps == 2


def test_bad_settings_are_refused_by_name(work):
    with pytest.raises(UserError, match="'temperature' must be above 0"):
        config(work, temperature=0)
    with pytest.raises(UserError, match="known: intra, inter"):
        config(work, levels=["instance"])
    with pytest.raises(UserError, match="'tries'"):
        config(work, tries=0)
