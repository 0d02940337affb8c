"""Labels at separators, and a split that never puts one problem on two sides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neureasoner.errors import UserError
from neureasoner.probes.labels import (
    DROPPED,
    Closing,
    bounds_of,
    closings_of,
    hopeless_problems,
    instance_labels,
    onset,
    read_closings,
    samples,
    split_problems,
)
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Step, Trace, write_rows


def make(n=6, wrong=None, loop=None, correct=True, problem="p", last_open=False):
    steps = [Step(i, i + 1, 20 * i, 20 * (i + 1), closed=not (last_open and i == n - 1)) for i in range(n)]
    labels = Labels(
        correct,
        "1",
        IntraLabel(has_error=wrong is not None, step=wrong),
        InterLabel(is_stagnant=loop is not None, steps=loop),
    )
    return Trace(f"{problem}#0", Problem(problem, "f", 1, "q", "a"), [1], [1] * 20 * n, "x" * n, steps, True, labels)


def label_list(trace, level):
    return [s.label for s in samples([trace], level, 4)]


def test_intra_marks_the_first_wrong_step_and_drops_the_rest():
    assert label_list(make(), "intra") == [0] * 6
    assert label_list(make(wrong=2), "intra") == [0, 0, 1, DROPPED, DROPPED, DROPPED]
    assert onset(make(wrong=2), "intra") == 2 and onset(make(), "intra") is None
    unplaced = make(wrong=2)
    unplaced.labels.intra.step = None
    assert set(label_list(unplaced, "intra")) == {DROPPED}


def test_inter_begins_at_the_third_paragraph_of_the_loop():
    assert label_list(make(loop=(1, 5)), "inter") == [0, DROPPED, DROPPED, 1, 1, DROPPED]
    assert onset(make(loop=(1, 5)), "inter") == 3
    assert label_list(make(wrong=1), "inter") == [0] * 6


def test_an_unclosed_paragraph_is_no_decision():
    trace = make(wrong=5, last_open=True)
    assert label_list(trace, "intra") == [0] * 5
    assert bounds_of(trace) == [0, 20, 40, 60, 80, 100]
    assert samples([trace], "intra", 4)[1].bounds == (0, 20, 40)


def test_instance_labels_by_solving_rate_and_nothinking():
    def group(problem, right, n=8):
        return [make(correct=i < right, problem=problem) for i in range(n)]

    traces = group("easy", 7) + group("hard", 3) + group("mid", 5) + group("few", 2, 2)
    assert instance_labels(traces) == {"easy": 1, "hard": 0, "mid": DROPPED, "few": 1}
    without = [make(correct=False, problem="easy"), make(correct=True, problem="few")]
    assert instance_labels(traces, without)["easy"] == DROPPED and instance_labels(traces, without)["few"] == 1
    found = samples([make(problem="easy"), make(n=2, problem="easy")], "instance", 4, {"easy": 1})
    assert [(s.trace, s.step, s.label, s.bounds) for s in found] == [(0, 3, 1, (0, 20, 40, 60, 80))]


def test_unjudged_traces_are_refused():
    trace = make()
    trace.labels = None
    with pytest.raises(UserError, match="data judge"):
        samples([trace], "intra", 4)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 60), st.integers(1, 4), st.integers(0, 99))
def test_promise_12_split_by_problem_never_mixes(n, per, seed):
    traces = [make(1, problem=f"q{i}") for i in range(n) for _ in range(per)]
    split = split_problems(traces, 0.2, 0.2, seed)
    assert split == split_problems(traces[::-1], 0.2, 0.2, seed) and set(split.values()) == {
        "train",
        "validation",
        "test",
    }
    sides = {name: {t.problem.id for t in traces if split[t.problem.id] == name} for name in split.values()}
    assert not (sides["train"] & sides["test"] or sides["train"] & sides["validation"])
    assert not sides["validation"] & sides["test"]
    assert sum(map(len, sides.values())) == n


def test_too_few_problems():
    with pytest.raises(UserError, match="too few"):
        split_problems([make(problem="a"), make(problem="b")], 0.2, 0.2, 0)


def closing(trace="p#0", step=1, closed=2, left=2, problem="p", **more):
    base = {
        "trace": trace,
        "problem": problem,
        "family": "f",
        "difficulty": 1,
        "first": 2,
        "step": step,
        "n": 6,
        "n_left": 6,
    }
    rest = {"token": 20 * (step + 1), "tokens_closed": 5.0, "tokens_left": 50.0, "answered": False}
    return Closing(**(base | rest | {"right_closed": closed, "right_left": left} | more))


def test_an_exit_is_labelled_by_what_closing_costs():
    assert [closing(closed=c, left=w).label for c, w in ((0, 0), (2, 3), (3, 3), (6, 5), (0, 1))] == [1, 0, 1, 1, 0]
    traces = [make(problem="a"), make(problem="p"), make(n=1, problem="b")]
    found = closings_of([closing(step=4, left=3), closing(step=1)], traces)
    assert [[c.step for c in of] for of in found] == [[], [1, 4], []]
    got = samples(traces, "instance", 4, {"p": 1}, found)
    assert [(s.trace, s.step, s.label, s.bounds) for s in got] == [
        (1, 1, 1, (0, 20, 40)),
        (1, 4, 0, (0, 20, 40, 60, 80, 100)),
    ]
    assert hopeless_problems([closing(closed=0, left=0)], [make(correct=False)]) == {"p"}
    assert not hopeless_problems([closing(closed=1, left=0)], [make(correct=False)])
    assert not hopeless_problems([closing(closed=0, left=0)], [make(correct=True), make(correct=False)])


def test_forecasts_of_other_traces_are_refused(tmp_path):
    for row, traces, message in (
        (closing("q#0"), [make()], "'q#0'"),
        (closing(step=6), [make()], "step 6"),
        (closing(token=41), [make()], "token 41"),
        (closing(), [make(), make()], "id twice"),
    ):
        with pytest.raises(UserError, match=message):
            closings_of([row], traces)
    path = tmp_path / "closings.jsonl"
    write_rows(path, [closing(), closing(step=2)])
    assert read_closings(path) == [closing(), closing(step=2)]
    write_rows(path, [closing(), closing()])
    with pytest.raises(UserError, match=r"step 1 of trace 'p#0'"):
        read_closings(path)
    write_rows(path, [{"trace": "p#0"}])
    with pytest.raises(UserError, match="line 1"):
        read_closings(path)
