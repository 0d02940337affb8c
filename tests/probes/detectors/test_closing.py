"""What closing by a score brings, against sums written out; and probes fit on forecasts."""

from __future__ import annotations

import numpy as np
import pytest

from neureasoner.probes.detectors.closing import Outcomes, exit_figures, family_scores, within_family
from neureasoner.probes.detectors.metrics import auroc
from neureasoner.probes.detectors.scoring import Decisions, Evaluation
from neureasoner.probes.labels import Closing
from neureasoner.traces import InterLabel, IntraLabel, Labels, Problem, Trace


def world(seed=0, problems=40, samples=2):
    """Traces of two families with up to 3 forecasts each, and the decisions they are; half are never solved in 'b'."""
    rng = np.random.default_rng(seed)
    traces, closings = [], []
    for p in range(problems):
        family = "ab"[p % 2]
        for s in range(samples):
            tokens = int(rng.integers(100, 200))
            labels = Labels(bool(rng.random() < 0.5 and p % 4 != 3), None, IntraLabel(), InterLabel())
            problem = Problem(f"p{p}", family, 1, "q", "a")
            trace = Trace(f"p{p}#{s}", problem, [1], [1] * tokens, "", [], True, labels, meta={"thinking_tokens": 90})
            rows = []
            for step in range(int(rng.integers(0, 4))):
                left = 0 if p % 4 == 3 else int(rng.integers(0, 7))
                closed = 0 if p % 4 == 3 else max(0, min(6, left + int(rng.integers(-3, 3)) + 2 * (family == "a")))
                costs = float(rng.integers(5, 15)), float(rng.integers(20, 90))
                rows.append(
                    Closing(
                        trace.id,
                        f"p{p}",
                        family,
                        1,
                        2,
                        2 * step + 1,
                        30 * (step + 1),
                        6,
                        6,
                        closed,
                        left,
                        *costs,
                        False,
                    )
                )
            traces.append(trace)
            closings.append(rows)
    flat = [(i, r) for i, rows in enumerate(closings) for r in rows]
    m = len(traces)
    split = np.array(["train", "validation", "test"])[(np.arange(m) // samples) % 3]
    d = Decisions(
        "instance",
        y=np.array([r.label for _, r in flat]),
        trace=np.array([i for i, _ in flat]),
        step=np.array([r.step for _, r in flat]),
        token=np.array([r.token for _, r in flat]),
        problems=[f"p{p}" for p in range(problems)],
        problem=np.arange(m) // samples,
        family=np.array([t.problem.family for t in traces]),
        split=split,
        clean=np.zeros(m, bool),
        onset=np.full(m, -1),
        tokens=np.full(m, 90.0),
    )
    return traces, closings, d, rng.random(len(flat))


def by_hand(traces, closings, scores, threshold, chosen):
    """Trace by trace: share right, tokens and baseline tokens summed, of the traces ``chosen``."""
    last = max(i for i, rows in enumerate(closings) if rows)
    right, before, tokens, whole, n, at = 0.0, 0.0, 0.0, 0.0, 0, 0
    for i, (trace, rows) in enumerate(zip(traces, closings, strict=True)):
        mine, at = scores[at : at + len(rows)], at + len(rows)
        if i > last or not chosen[i]:
            continue
        n += 1
        if rows:
            left = rows[-1].right_left / 6, rows[-1].token + rows[-1].tokens_left
        else:
            left = float(trace.labels.correct), len(trace.response_ids)
        fired = [r for r, s in zip(rows, mine, strict=True) if s > threshold]
        got = (fired[0].right_closed / 6, fired[0].token + fired[0].tokens_closed) if fired else left
        right, before, tokens, whole = right + got[0], before + left[0], tokens + got[1], whole + left[1]
    return right / n, before / n, tokens, whole


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.0])
def test_closing_by_a_score_is_the_sum_over_traces(threshold):
    traces, closings, d, scores = world()
    outcomes, evaluation = Outcomes.of(closings, traces), Evaluation(d, 20, 0)
    found = exit_figures(d, outcomes, scores, threshold, evaluation, 0.2)
    test = d.split == "test"
    right, before, tokens, whole = by_hand(traces, closings, scores, threshold, test)
    assert found["accuracy"]["value"] == pytest.approx(right, abs=1e-4)
    assert found["points"]["value"] == pytest.approx(100 * (right - before), abs=1e-4)
    assert found["tokens_saved"]["value"] == pytest.approx(100 * (1 - tokens / whole), abs=1e-4)
    hopeless = np.array([t.problem.id in {f"p{p}" for p in range(3, 40, 4)} for t in traces])
    for name, group in (("hopeless", hopeless), ("solved", ~hopeless)):
        _, _, tokens, whole = by_hand(traces, closings, scores, threshold, test & group)
        assert found[name]["tokens_saved"]["value"] == pytest.approx(100 * (1 - tokens / whole), abs=1e-4)
    assert found["hopeless"]["points"]["value"] == 0
    right, before, tokens, whole = by_hand(traces, closings, scores, threshold, d.split == "validation")
    assert found["validation_utility"] == pytest.approx(100 * right - 0.2 * 100 * tokens / whole, abs=1e-3)
    assert found["auroc"]["value"] == pytest.approx(auroc(d.y[test[d.trace]], scores[test[d.trace]]), abs=1e-4)
    if threshold == 1.0:
        assert found["closed"]["value"] == found["tokens_saved"]["value"] == 0


@pytest.mark.parametrize("price", [0.0, 0.1, 5.0])
def test_the_threshold_is_the_best_of_all_by_the_stated_utility(price):
    traces, closings, d, scores = world(3)
    outcomes, held = Outcomes.of(closings, traces), d.split == "validation"

    def worth(threshold):
        right, _, tokens, whole = by_hand(traces, closings, scores, threshold, held)
        return 100 * right - price * 100 * tokens / whole

    chosen, best, never = outcomes.choose(scores, held, price)
    tried = [0.0, *sorted(scores[held[d.trace]])[:-1]]
    assert best == pytest.approx(max(map(worth, tried))) and worth(chosen) == pytest.approx(best)
    assert never == pytest.approx(worth(1.0))
    if price == 5.0:
        assert chosen == max(t for t in tried if worth(t) == pytest.approx(best)), "tokens are all: close early"
        assert outcomes.close(scores > chosen)[2][held].mean() > 0.6


def test_the_curve_goes_from_closing_all_to_closing_none():
    traces, closings, d, scores = world(5)
    parts = {name: d.split == name for name in ("validation", "test")}
    curve = Outcomes.of(closings, traces).curve(scores, parts, 0.1)
    assert curve[0]["threshold"] == 0 and curve[-1]["threshold"] == 1 and len(curve) <= 41
    for name in parts:
        closed = [row[name]["closed"] for row in curve]
        assert closed == sorted(closed, reverse=True) and closed[0] >= 0.5 and closed[-1] == 0
        assert curve[-1][name]["points"] == curve[-1][name]["tokens_saved"] == 0
        right, before, tokens, whole = by_hand(traces, closings, scores, curve[7]["threshold"], parts[name])
        assert curve[7][name]["points"] == pytest.approx(100 * (right - before), abs=1e-3)
        assert curve[7][name]["tokens_saved"] == pytest.approx(100 * (1 - tokens / whole), abs=1e-3)


def test_within_a_family_the_family_says_nothing():
    _, _, d, scores = world(1, problems=90)
    evaluation = Evaluation(d, 50, 0)
    family = family_scores(d)
    train = d.split[d.trace] == "train"
    for name in "ab":
        of = d.family[d.trace] == name
        assert set(family[of]) == {d.y[train & of].mean()}
    rows = d.split[d.trace] == "test"
    assert auroc(d.y[rows], family[rows]) > 0.55, "over all it seems to know something"
    control = within_family(d, family, evaluation)["within_family"]
    assert [control[k] for k in ("value", "low", "high")] == [0.5, 0.5, 0.5]
    found = within_family(d, scores, evaluation)
    want, n = 0.0, 0
    for name in "ab":
        of = rows & (d.family[d.trace] == name)
        area = auroc(d.y[of], scores[of])
        assert found["families"][name] == found["families"][name] | {"n": int(of.sum())}
        assert found["families"][name]["auroc"]["value"] == pytest.approx(area, abs=1e-4)
        want, n = want + of.sum() * area, n + of.sum()
    assert found["within_family"]["value"] == pytest.approx(want / n, abs=1e-4)
    one_sided = d.y.copy()
    one_sided[d.family[d.trace] == "b"] = 1
    d.y = one_sided
    assert set(within_family(d, scores, evaluation)["families"]) == {"a"}, "a family of one label has no AUROC"


def test_traces_behind_the_last_forecast_do_not_count():
    """A limit takes the first traces; those after it were never looked at."""
    traces, closings, _, scores = world(2)
    cut = len(traces) // 2
    kept = [rows if i < cut else [] for i, rows in enumerate(closings)]
    outcomes = Outcomes.of(kept, traces)
    assert outcomes.counted.sum() == 1 + max(i for i, rows in enumerate(kept) if rows) <= cut
    n = len(outcomes.right)
    everyone = np.ones(len(traces), bool)
    right, _, tokens, whole = by_hand(traces, kept, scores[:n], 0.5, everyone)
    assert outcomes.utility(scores[:n] > 0.5, everyone, 0.3) == pytest.approx(100 * right - 30 * tokens / whole)
