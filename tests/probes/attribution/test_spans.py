"""Spans of each level: the steps the judge named, as many clean ones, and labels that do not fit their trace."""

from __future__ import annotations

import pytest

from neureasoner.errors import UserError
from neureasoner.probes.attribution.spans import loop_openings, spans
from neureasoner.probes.config import LocateConfig
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Step, Trace

WIDTH = 5  # tokens a step, the last one its separator


def make(name, texts=("aaaa",) * 6, wrong=None, loop=None, attempts=(), closed=True):
    starts = [sum(len(t) for t in texts[:i]) for i in range(len(texts))]
    steps = [
        Step(begin, begin + len(t), WIDTH * i, WIDTH * (i + 1), closed)
        for i, (begin, t) in enumerate(zip(starts, texts, strict=True))
    ]
    labels = Labels(
        True,
        "1",
        IntraLabel(wrong is not None, step=wrong),
        InterLabel(loop is not None, steps=loop, attempts=list(attempts)),
    )
    ids = [1] * (WIDTH * len(texts))
    return Trace(f"{name}#0", Problem(name, "f", 1, "q", "a"), [1], ids, "".join(texts), steps, True, labels)


def config(**more):
    return LocateConfig(model="tiny", traces="t", out="o", **more)


def steps_of(span):
    """Which steps a span's tokens belong to; a step is whole or without its separator."""
    _, targets = span
    found = sorted({t // WIDTH for t in targets})
    whole = [WIDTH * s + i for s in found for i in range(WIDTH)]
    assert targets in (whole, [t for t in whole if t % WIDTH != WIDTH - 1])
    return found


def test_intra_spans_are_the_wrong_steps_and_as_many_clean_ones():
    traces = [make(f"w{i}", wrong=i % 6) for i in range(5)] + [make(f"c{i}") for i in range(4)]
    failing, clean = spans(traces, "intra", config(), {})
    assert {t.id: steps_of((t, at)) for t, at in failing} == {f"w{i}#0": [i % 6] for i in range(5)}
    assert {t.id for t, _ in clean} == {f"c{i}#0" for i in range(4)}
    assert all(len(steps_of(s)) == 1 and len(s[1]) == WIDTH - 1 for s in failing + clean)
    kept, _ = spans(traces, "intra", config(exclude_separators=False), {})
    assert all(len(at) == WIDTH for _, at in kept)
    few, fewer = spans(traces, "intra", config(max_traces=2), {})
    assert len(few) == 2 and len(fewer) == 2
    assert [t.id for t, _ in few] == [t.id for t, _ in failing[:2]]  # seeded, so fewer are the first of them


def test_inter_spans_are_the_openings_and_clean_ones_have_as_many_steps():
    traces = [make(f"l{i}", loop=(1, 6), attempts=[1, 3, 4]) for i in range(3)] + [make(f"c{i}") for i in range(3)]
    traces.append(make("short", texts=("a", "b")))
    failing, clean = spans(traces, "inter", config(), {})
    assert all(steps_of(s) == [1, 3, 4] for s in failing) and len(failing) == 3
    assert {t.id: len(steps_of((t, at))) for t, at in clean} == {"c0#0": 3, "c1#0": 3, "c2#0": 3, "short#0": 2}


def test_instance_spans_are_first_steps_of_easy_and_hard_problems():
    traces = [make(n) for n in ("easy", "hard", "between")] + [make("brief", texts=("a",) * 3)]
    easy = {"easy": 1, "hard": 0, "between": -1, "brief": 1}
    failing, clean = spans(traces, "instance", config(first_steps=4), easy)
    assert [(t.id, steps_of((t, at))) for t, at in failing] == [("easy#0", [0, 1, 2, 3])]
    assert [(t.id, steps_of((t, at))) for t, at in clean] == [("hard#0", [0, 1, 2, 3])]


def test_openings_without_a_segmenting_judge_are_those_like_an_earlier_paragraph():
    texts = (
        "Start here.",
        "Let me try 3 * 8 first.",
        "That is 24.",
        "Let  me try 3 * 9 first.",
        "No.",
        "LET ME TRY 3 * 8!",
    )
    assert loop_openings(make("p", texts, loop=(1, 6))) == [1, 3, 5]
    assert loop_openings(make("p", texts, loop=(1, 6), attempts=[2, 4])) == [2, 4]
    assert loop_openings(make("p", texts)) == []


def test_a_trace_without_a_closed_step_gives_no_span():
    open_ = make("open", closed=False)
    empty = make("empty", texts=())
    traces = [make("w", wrong=1), make("c"), open_, empty]
    for level in ("intra", "inter"):
        _, clean = spans(traces, level, config(), {})
        assert {t.id for t, _ in clean} <= {"c#0", "w#0"}
    assert spans([open_, empty], "instance", config(first_steps=1), {"open": 1, "empty": 1}) == ([], [])
    unclosed = make("cut", wrong=0, closed=False)  # the wrong step itself may be the one that was cut off
    failing, _ = spans([unclosed], "intra", config(), {})
    assert [at for _, at in failing] == [list(range(WIDTH))]
    blank = make("blank", wrong=0)
    blank.steps[0].token_end = 0
    assert spans([blank], "intra", config(), {}) == ([], [])


def test_labels_that_name_steps_a_trace_lacks_are_refused():
    with pytest.raises(
        UserError, match=r"trace 'p#0': its intra label names step 9, but its thinking has 6 steps; run"
    ):
        spans([make("p", wrong=9)], "intra", config(), {})
    for more in ({"loop": (4, 8)}, {"loop": (0, 2), "attempts": [0, 7]}):
        with pytest.raises(UserError, match=r"its inter label names step [67], but its thinking has 6 steps"):
            spans([make("p", **more)], "inter", config(), {})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"selection": "best"}, "key 'selection' must be one of worst_rank, fixed_k, quantile, got 'best'"),
        ({"quantile": 0.0}, "key 'quantile' must lie in"),
        ({"quantile": 0.9}, "selection 'worst_rank' does not go with quantile 0.9; set selection: quantile"),
        ({"selection": "quantile"}, "selection 'quantile' does not go with quantile 1.0"),
        ({"selection": "fixed_k", "k_neurons": 3}, "needs keys 'k_neurons' and 'k_heads' of at least 1"),
        ({"k_heads": 3}, "keys 'k_neurons' and 'k_heads' are of selection fixed_k, not of 'worst_rank'"),
        ({"blocks": [0, -2]}, "key 'blocks' counts blocks from 0, or is all, got 0, -2"),
        ({"bootstrap": 0}, "key 'bootstrap' must be at least 1"),
        ({"layer": -2}, "key 'layer' counts from 0"),
    ],
)
def test_settings_that_contradict_each_other_name_their_keys(more, message):
    with pytest.raises(UserError, match=message):
        config(**more)
