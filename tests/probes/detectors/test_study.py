"""The experiments say what is so: on made-up features of which it is known what they hold."""

from __future__ import annotations

import numpy as np
import pytest

from neureasoner.probes.detectors import study
from neureasoner.probes.detectors.examine import fit_best, fit_one
from neureasoner.probes.detectors.study import LevelStudy
from neureasoner.probes.detectors.tables import Table


def level(d, tmp_path, features, sets, seed=0):
    as_table = lambda x: Table(  # noqa: E731
        x.astype(np.float32), np.ones(len(d.y), bool), d.y, d.trace, d.step, d.token
    )
    tables = {k: as_table(x) for k, x in features(d, np.random.default_rng(seed + 1)).items()}
    return LevelStudy(d, tables, sets, ["logistic"], 0.1, 100, 0, tmp_path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, made_up):
    """'entropy' tells half of the failures, 'spectral' the other half, 'random' nothing; 'residual' is a copy."""

    def features(d, rng):
        failing, half = d.y == 1, rng.random(len(d.y)) < 0.5
        noise = lambda: rng.normal(size=(len(d.y), 3))  # noqa: E731
        entropy, spectral = noise(), noise()
        entropy[:, 0] += 3 * (failing & half)
        spectral[:, 0] += 3 * (failing & ~half)
        copy = np.concatenate([entropy, noise()[:, :1]], axis=1)
        return {"entropy": entropy, "spectral": spectral, "random": noise(), "residual": copy, "length": noise()}

    sets = ["spectral", "entropy", "entropy+spectral", "entropy+residual", "residual", "random", "length"]
    return level(made_up(0, 150), tmp_path_factory.mktemp("study"), features, sets)


def test_the_set_with_both_halves_is_chosen_and_controls_are_at_chance(planted):
    assert planted.chosen == "entropy+spectral"
    found = {e["set"]: e["test"]["auroc"] for e in study.feature_sets(planted)}
    assert found["entropy+spectral"]["low"] > max(found["entropy"]["value"], found["spectral"]["value"])
    for control in ("random", "length"):
        assert abs(found[control]["value"] - 0.5) < 0.12


def test_the_threshold_keeps_the_budget_on_clean_validation_traces(planted):
    d, p = planted.decisions, planted.fit("entropy").p
    maxima = d.maxima(p)[d.clean & (d.split == "validation")]
    share = (maxima > planted.threshold(p)).mean()
    assert share <= 0.1 < share + 2 / len(maxima)


def test_shuffled_labels_are_at_chance(planted):
    got = study.shuffled(planted, "entropy+spectral", 12)
    assert abs(got["mean"] - 0.5) < 0.06 and got["low"] < 0.5 < got["high"]


def test_nested_models_tell_what_is_new_from_what_is_known(planted):
    got = {(e["smaller"], e["larger"]): e for e in study.nested(planted, "logistic")}
    new, known, nothing = (
        got["entropy", "entropy+spectral"],
        got["entropy", "entropy+residual"],
        got["entropy", "entropy+random"],
    )
    assert new["auroc_difference"]["low"] > 0.05 and new["log_loss_difference"]["high"] < 0
    assert new["confident"]["auroc_difference"]["low"] > 0.05 and set(new["by_family"]) == {"a", "b"}
    for entry in (known, nothing):
        assert abs(entry["auroc_difference"]["value"]) < 0.03 and entry["auroc_difference"]["low"] <= 0.01
    told = study.redundancy(planted)
    assert told["entropy -> spectral"]["max_r2"] < 0.1 and told["spectral -> entropy"]["max_r2"] < 0.1


def test_a_random_split_flatters_features_that_name_the_problem(tmp_path, made_up):
    """Features that are a fingerprint of the problem and say nothing else: perfect at random, chance by problem."""

    def features(d, rng):
        name = rng.normal(size=(len(d.problems), 60))[d.problem[d.trace]]
        return {"spectral": name + 0.01 * rng.normal(size=name.shape)}

    s = level(made_up(0, 60), tmp_path, features, ["spectral"])
    d = s.decisions
    d.y[:] = np.where(d.y >= 0, (d.problem[d.trace] % 5 < 2).astype(int), -1)  # a property of the problem
    got = study.splits(s, "spectral", 3)
    assert got["random decisions"]["value"] > 0.95
    assert got["by problem"]["low"] < 0.6


def test_a_family_with_one_class_elsewhere_cannot_be_held_out(tmp_path, made_up):
    features = lambda d, rng: {"spectral": rng.normal(size=(len(d.y), 2)) + (d.y == 1)[:, None]}  # noqa: E731
    s = level(made_up(0, 150), tmp_path, features, ["spectral"])
    d = s.decisions
    d.y[(d.y == 1) & (d.family[d.trace] == "b")] = -1
    got = study.splits(s, "spectral", 2)["by family"]
    assert got["a"]["held out"] is None and got["a"]["seen"]["value"] > 0.6
    assert got["b"]["held out"]["value"] is None  # no failing decision to test on


def test_the_learning_curve_rises_and_ends_with_all(planted):
    curve = study.learning_curve(planted, "entropy+spectral", [4, 40, 10_000], 6)
    assert [c["trajectories"] for c in curve][:2] == [4, 40] and len(curve) == 3
    assert curve[0]["mean"] < curve[1]["mean"] <= curve[2]["mean"] + 0.02
    assert curve[1]["failing"] == 20 and curve[2]["repeats"] == 1
    assert all(c["low"] <= c["mean"] <= c["high"] for c in curve)


def test_rules_are_compared_at_one_budget(planted):
    got = study.decision_rules(planted, "entropy+spectral")
    assert got[0]["rule"] == {"name": "none"} and {e["rule"]["name"] for e in got} >= {"consecutive", "ewma", "cusum"}
    assert all(e["test"]["clean_traces_alarmed"]["value"] < 0.3 for e in got)
    one, two = (next(e for e in got if e["rule"] == r) for r in ({"name": "none"}, {"name": "consecutive", "m": 2}))
    # a failure of a single decision is not seen by a rule that wants two in a row
    assert two["test"]["failing_traces_detected"]["value"] < one["test"]["failing_traces_detected"]["value"] - 0.2


def test_calibration_and_errors_cover_all_decisions(planted):
    bins = study.calibration(planted, "entropy+spectral")
    assert sum(bins["share"]) == pytest.approx(1, abs=1e-3) and bins["error"]["value"] < 0.1
    groups = study.errors(planted, "entropy+spectral")["by"]
    rows = planted.evaluation.rows(planted.fit("entropy+spectral").p)
    for kind in ("family", "depth"):
        assert sum(g["failing"] + g["clean"] for k, g in groups.items() if k.startswith(kind)) == rows.sum()


def test_fits_are_kept_and_read_again(planted, monkeypatch):
    before = planted.fit("entropy")
    again = LevelStudy(planted.decisions, planted.tables, planted.sets, ["logistic"], 0.1, 10, 0, planted.cache)
    monkeypatch.setattr(study, "fit_best", lambda *a: pytest.fail("fitted again"))
    after = again.fit("entropy")
    np.testing.assert_array_equal(after.p, before.p)
    assert (after.kind, after.settings, after.validation_auroc) == (
        before.kind,
        before.settings,
        before.validation_auroc,
    )


def test_the_best_estimator_is_chosen_on_validation_alone(planted):
    d, table = planted.decisions, planted.table("entropy")
    best = fit_best(table, d.y, planted.train, planted.held, ["logistic"], 0)
    each = [fit_one(table, d.y, planted.train, planted.held, "logistic", {"C": c}, 0) for c in (0.01, 0.1, 1.0)]
    assert best.validation_auroc == max(f.validation_auroc for f in each)
    flipped = d.y.copy()
    test = d.split[d.trace] == "test"
    flipped[test] = 1 - flipped[test]
    np.testing.assert_array_equal(best.p, fit_best(table, flipped, planted.train, planted.held, ["logistic"], 0).p)
