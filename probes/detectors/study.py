"""The experiments of ``probes report`` on one level: feature sets, controls, splits, learning curves, decision rules.

Every experiment is a function of a ``LevelStudy`` and gives plain JSON values. Settings are chosen on validation
problems, figures are of test problems, intervals come from resampling test problems, and detectors are compared in
pairs over the same draws. Nothing is chosen by a test figure.

Legend: ``n`` decisions, ``m`` traces, ``R`` bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neureasoner.artifacts import read_tensors, write_tensors
from neureasoner.probes.detectors.examine import Fitted, fit_best, fit_one
from neureasoner.probes.detectors.metrics import (
    auroc,
    calibration_bins,
    interval,
    paired_difference,
    weighted_auroc,
    weighted_log_loss,
    youden_threshold,
)
from neureasoner.probes.detectors.scoring import Decisions, Evaluation
from neureasoner.probes.detectors.sequential import Sequential, threshold_for_budget
from neureasoner.probes.detectors.tables import Table, beside

PAPER, ENTROPY = "spectral", "entropy"
CONTROLS = ("random", "random block", "length")
RULES = (
    Sequential("none"),
    *(Sequential("consecutive", m=m) for m in (2, 3, 4)),
    *(Sequential("ewma", alpha=a) for a in (0.3, 0.5, 0.7)),
    *(Sequential("cusum", kappa=k) for k in (-1.0, 0.0, 1.0)),
)
NESTED = (  # (smaller, larger): what the larger one's extra part adds
    ("entropy", "entropy+spectral"),
    ("entropy", "entropy+random"),
    ("entropy", "entropy+magnitude"),
    ("entropy+magnitude", "entropy+magnitude+spectral"),
    ("entropy", "entropy+residual"),
    ("entropy+residual", "entropy+residual+spectral"),
    ("residual", "residual+spectral"),
    ("residual", "entropy+residual"),
    ("magnitude", "magnitude+spectral"),
)
TELLING = (("entropy", "spectral"), ("spectral", "entropy"), ("residual", "spectral"), ("magnitude", "spectral"))


def _bare(value: dict[str, Any] | None) -> float:
    return float(value["value"]) if value and value["value"] is not None else float("nan")


@dataclass
class LevelStudy:
    """One level's features, decisions and settings, shared by all experiments.

    tables  parts by key; a feature set ``a+b`` puts the tables ``a`` and ``b`` side by side
    sets    feature sets examined, in order; controls among them are named in ``CONTROLS``
    kinds   estimators tried for each
    budget  share of clean traces that may be alarmed
    cache   folder that keeps fitted scores, so that a kill costs one fit
    """

    decisions: Decisions
    tables: dict[str, Table]
    sets: Sequence[str]
    kinds: Sequence[str]
    budget: float
    bootstrap: int
    seed: int
    cache: Path
    fitted: dict[str, Fitted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.evaluation = Evaluation(self.decisions, self.bootstrap, self.seed)
        self.train, self.held = (self.decisions.rows(part) for part in ("train", "validation"))

    def table(self, name: str) -> Table:
        """The features of a set."""
        return beside([self.tables[p] for p in name.split("+")])

    def fit(self, name: str) -> Fitted:
        """The set's best estimator on validation; fitted once."""
        if name not in self.fitted:
            path = self.cache / f"{name.replace(' ', '_')}.safetensors"
            if path.is_file():
                tensors, info = read_tensors(path)
                self.fitted[name] = Fitted(p=tensors["p"].numpy(), **info["fitted"])
            else:
                fitted = fit_best(self.table(name), self.decisions.y, self.train, self.held, self.kinds, self.seed)
                info = {k: getattr(fitted, k) for k in ("kind", "settings", "validation_auroc")}
                write_tensors(path, {"p": torch.from_numpy(fitted.p)}, {"fitted": info})
                self.fitted[name] = fitted
        return self.fitted[name]

    @property
    def chosen(self) -> str:
        """The feature set with the best validation AUROC, controls left out; fewer parts win ties (3 digits)."""
        sets = [s for s in self.sets if s not in CONTROLS]
        return max(sets, key=lambda s: (round(self.fit(s).validation_auroc, 3), -s.count("+")))

    def threshold(self, statistic: np.ndarray, default: float = 0.5) -> float:
        """Threshold at the false alarm budget, on the clean validation traces."""
        d = self.decisions
        clean = np.flatnonzero(d.clean & (d.split == "validation"))
        return threshold_for_budget(statistic, d.trace, clean, self.budget, default)


def feature_sets(study: LevelStudy) -> list[dict[str, Any]]:
    """Every feature set and control, each with its best estimator: test figures at the false alarm budget.

    ``balanced``: accuracy, balanced accuracy, recall and precision per decision at the threshold with the best balanced
    accuracy on validation, the nearest to what the paper's Table 4 reports.
    """
    d, out = study.decisions, []
    for name in study.sets:
        fitted = study.fit(name)
        held = study.held & np.isfinite(fitted.p)
        balanced = float(youden_threshold(d.y[held], fitted.p[held], np.ones((1, int(held.sum()))))[0])
        rows = study.evaluation.rows(fitted.p)
        out.append(
            {
                "set": name,
                "control": name in CONTROLS,
                "dims": int(study.table(name).x.shape[1]),
                "estimator": fitted.kind,
                "settings": fitted.settings,
                "validation_auroc": round(fitted.validation_auroc, 4),
                "test": study.evaluation.figures(fitted.p, study.threshold(fitted.p)),
                "balanced": {"threshold": balanced, **study.evaluation.decided(fitted.p > balanced, rows)},
            }
        )
    return out


def estimators(study: LevelStudy, name: str, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """The same features through every kind of estimator, each with its own settings chosen on validation."""
    out = []
    for kind in kinds:
        fitted = fit_best(study.table(name), study.decisions.y, study.train, study.held, [kind], study.seed)
        out.append(
            {
                "set": name,
                "estimator": kind,
                "settings": fitted.settings,
                "validation_auroc": round(fitted.validation_auroc, 4),
                "auroc": study.evaluation.ranking(fitted.p)["auroc"],
            }
        )
    return out


def shuffled(study: LevelStudy, name: str, repeats: int) -> dict[str, Any]:
    """Training labels permuted: the test AUROC over ``repeats`` permutations, which must be chance."""
    d, table, areas = study.decisions, study.table(name), []
    settings = {"C": 0.1}
    for r in range(repeats):
        rng = np.random.default_rng([study.seed, r])
        y = d.y.copy()
        y[study.train] = rng.permutation(y[study.train])
        p = fit_one(table, y, study.train, study.held, "logistic", settings, study.seed).p
        rows = study.evaluation.rows(p)
        areas.append(auroc(d.y[rows], p[rows]))
    low, high = np.quantile(areas, [0.025, 0.975])
    return {"set": name, "mean": round(float(np.mean(areas)), 4), "low": round(low, 4), "high": round(high, 4)}


def splits(study: LevelStudy, name: str, repeats: int) -> dict[str, Any]:
    """One feature set under three splits: decisions at random (neighbours on both sides), by problem, by family.

    Logistic regression with C = 0.1 throughout, so that only the split differs. By family: trained on the problems of
    the other families and tested on this family's test problems; None where a family has one class only.
    """
    d, table = study.decisions, study.table(name)
    usable = table.valid & (d.y >= 0)
    settings = {"C": 0.1}

    def area(train: np.ndarray, test: np.ndarray) -> float | None:
        if any(len(set(d.y[rows].tolist())) < 2 for rows in (train, test)):
            return None
        p = fit_one(table, d.y, train, train, "logistic", settings, study.seed).p
        return auroc(d.y[test], p[test])

    at_random = []
    for r in range(repeats):
        test = usable & (np.random.default_rng([study.seed, 1, r]).random(len(d.y)) < 0.2)
        at_random.append(area(usable & ~test, test))
    fit_rows = usable & (study.train | study.held)
    p = fit_one(table, d.y, fit_rows, fit_rows, "logistic", settings, study.seed).p
    found = [a for a in at_random if a is not None]
    out: dict[str, Any] = {
        "set": name,
        "random decisions": {
            "value": round(float(np.mean(found)), 4) if found else None,
            "low": round(float(np.min(found)), 4) if found else None,
            "high": round(float(np.max(found)), 4) if found else None,
        },
        "by problem": study.evaluation.ranking(p)["auroc"],
        "by family": {},
    }
    for family in np.unique(d.family).tolist():
        inside = d.family[d.trace] == family
        there = Evaluation(d, study.bootstrap, study.seed, (d.split == "test") & (d.family == family))
        rows = there.rows(p)
        entry: dict[str, Any] = {"seen": interval(weighted_auroc(d.y[rows], p[rows], there.weights(rows)))}
        train = fit_rows & ~inside
        if len(set(d.y[train].tolist())) < 2:
            entry["held out"] = None
        else:
            q = fit_one(table, d.y, train, train, "logistic", settings, study.seed).p
            entry["held out"] = interval(weighted_auroc(d.y[rows], q[rows], there.weights(rows)))
        out["by family"][family] = entry
    return out


def learning_curve(study: LevelStudy, name: str, sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Test AUROC by number of labelled training trajectories, half failing and half clean as far as there are.

    Logistic regression with C = 0.1 (no labels are spent on validation). Band: 95 % over draws of trajectories and, in
    each, of test problems.
    """
    d, table = study.decisions, study.table(name)
    rng = np.random.default_rng([study.seed, 2])
    usable = study.train & table.valid
    failing = np.unique(d.trace[usable & (d.y == 1)])
    clean = np.setdiff1d(np.unique(d.trace[usable]), failing)
    out = []
    for size in [*[s for s in sizes if s < len(failing) + len(clean)], len(failing) + len(clean)]:
        everything = size == len(failing) + len(clean)
        areas, own = [], []
        for _ in range(1 if everything else repeats):
            n = len(failing) if everything else min(size // 2, len(failing))
            picked = np.concatenate([rng.permutation(failing)[:n], rng.permutation(clean)[: size - n]])
            train = usable & np.isin(d.trace, picked)
            if len(set(d.y[train].tolist())) < 2:
                continue
            p = fit_one(table, d.y, train, train, "logistic", {"C": 0.1}, study.seed).p
            rows = study.evaluation.rows(p)
            values = weighted_auroc(d.y[rows], p[rows], study.evaluation.weights(rows)[:201])
            own.append(values[0])
            areas.append(values[1:])
        if own:
            low, high = np.nanquantile(np.concatenate(areas), [0.025, 0.975])
            out.append(
                {
                    "trajectories": int(size),
                    "failing": int(n),
                    "mean": round(float(np.mean(own)), 4),
                    "low": round(float(low), 4),
                    "high": round(float(high), 4),
                    "repeats": len(own),
                }
            )
    return out


def nested(study: LevelStudy, kind: str) -> list[dict[str, Any]]:
    """What a part adds to others: paired differences in AUROC and log loss, overall and by family.

    Both models are of one kind with settings chosen on validation, and are compared on decisions valid for both.
    ``confident``: within the half of the decisions to which the smaller model gives the lowest scores, the AUROC of
    either, which says whether the part sees failures that the smaller model is sure are none.
    """
    d, out, kept = study.decisions, [], {}

    def fitted(name: str) -> Fitted:
        if name not in kept:
            kept[name] = fit_best(study.table(name), d.y, study.train, study.held, [kind], study.seed)
        return kept[name]

    for small, large in NESTED:
        if any(p not in study.tables for p in large.split("+")):
            continue
        a, b = fitted(small).p, fitted(large).p
        rows = study.evaluation.rows(a) & study.evaluation.rows(b)
        y, w = d.y[rows], study.evaluation.weights(rows)
        entry: dict[str, Any] = {"smaller": small, "larger": large, "estimator": kind, "n": int(rows.sum())}
        area = [weighted_auroc(y, p[rows], w) for p in (a, b)]
        loss = [weighted_log_loss(y, p[rows], w) for p in (a, b)]
        entry["auroc"] = [interval(v) for v in area]
        entry["auroc_difference"] = paired_difference(area[1], area[0])
        entry["log_loss_difference"] = paired_difference(loss[1], loss[0])
        sure = a[rows] <= np.median(a[rows])
        if len(set(y[sure].tolist())) == 2:
            low = [weighted_auroc(y[sure], p[rows][sure], w[:, sure]) for p in (a, b)]
            entry["confident"] = {
                "failing": int((y[sure] == 1).sum()),
                "auroc": [interval(v) for v in low],
                "auroc_difference": paired_difference(low[1], low[0]),
            }
        entry["by_family"] = {}
        for family in np.unique(d.family).tolist():
            inside = d.family[d.trace[rows]] == family
            if len(set(y[inside].tolist())) == 2:
                pair = [weighted_auroc(y[inside], p[rows][inside], w[:, inside]) for p in (a, b)]
                entry["by_family"][family] = paired_difference(pair[1], pair[0])
        out.append(entry)
    return out


def redundancy(study: LevelStudy) -> dict[str, Any]:
    """How far one part tells the other: R² of ridge regressions between features on test decisions.

    Mean and largest over the predicted features; negative values count as 0. Says why a part adds nothing (it is told
    by the other) or could add something (it is not).
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    d, out = study.decisions, {}
    for given, told in TELLING:
        if given not in study.tables or told not in study.tables:
            continue
        both = beside([study.tables[given], study.tables[told]]).valid & (d.y >= 0)
        train, test = both & study.train, both & (d.split[d.trace] == "test")
        x, t = (StandardScaler().fit(study.tables[k].x[train]) for k in (given, told))
        model = RidgeCV(alphas=[1.0, 10.0, 100.0, 1000.0]).fit(
            x.transform(study.tables[given].x[train]), t.transform(study.tables[told].x[train])
        )
        want = t.transform(study.tables[told].x[test])
        rest = want - model.predict(x.transform(study.tables[given].x[test]))
        r2 = 1 - rest.var(axis=0) / np.maximum(want.var(axis=0), 1e-12)
        r2 = np.clip(r2, 0, 1)
        out[f"{given} -> {told}"] = {"mean_r2": round(float(r2.mean()), 4), "max_r2": round(float(r2.max()), 4)}
    return out


def decision_rules(study: LevelStudy, name: str) -> list[dict[str, Any]]:
    """Sequential rules over one detector's scores at the same false alarm budget (set on validation).

    The difference is to the rule ``none``, in failing test traces detected, over the same draws. ``validation`` is the
    share of failing validation traces detected, by which a rule may be chosen.
    """
    d, p = study.decisions, study.fit(name).p
    held = Evaluation(d, 1, study.seed, d.split == "validation")
    out: list[dict[str, Any]] = []
    for rule in RULES:
        statistic = rule.apply(p, d.trace)
        alarm = statistic > study.threshold(statistic, rule.middle)
        out.append(
            {
                "rule": rule.to_dict(),
                "validation": _bare(held.alarms(alarm)["failing_traces_detected"]),
                "test": study.evaluation.alarms(alarm),
            }
        )
    return out


def calibration(study: LevelStudy, name: str) -> dict[str, Any]:
    """Reliability of a detector's probabilities on test decisions: bins, and the expected calibration error."""
    p, d = study.fit(name).p, study.decisions
    rows = study.evaluation.rows(p)
    bins = calibration_bins(d.y[rows], p[rows], study.evaluation.weights(rows))
    return {
        "set": name,
        "error": interval(bins["error"]),
        **{
            key: [None if not np.isfinite(v) else round(float(v), 4) for v in bins[key][0]]
            for key in ("predicted", "observed", "share")
        },
    }


def errors(study: LevelStudy, name: str) -> dict[str, Any]:
    """Which failures are missed at the false alarm budget, and where false alarms fall: by family and by depth.

    Depth is the step of the decision, in thirds of the steps that labelled decisions have.
    """
    d, p = study.decisions, study.fit(name).p
    rows, alarm = study.evaluation.rows(p), p > study.threshold(p)
    thirds = np.quantile(d.step[rows], [1 / 3, 2 / 3])
    depth = np.array(["early", "middle", "late"])[np.searchsorted(thirds, d.step)]
    out: dict[str, Any] = {"set": name, "by": {}}
    for label, groups in (("family", d.family[d.trace]), ("depth", depth)):
        for group in dict.fromkeys(sorted(groups[rows].tolist())):
            inside = rows & (groups == group)
            failing, clean = inside & (d.y == 1), inside & (d.y == 0)
            out["by"][f"{label}: {group}"] = {
                "failing": int(failing.sum()),
                "found": round(float(alarm[failing].mean()), 4) if failing.any() else None,
                "clean": int(clean.sum()),
                "alarmed": round(float(alarm[clean].mean()), 4) if clean.any() else None,
                "auroc": round(auroc(d.y[inside], p[inside]), 4) if failing.any() and clean.any() else None,
            }
    return out
