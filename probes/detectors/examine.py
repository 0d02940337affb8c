"""Fit a feature set the fair way: settings chosen and calibrated on validation problems, then scored everywhere.

Legend: ``n`` decisions, ``d`` features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neureasoner.probes.detectors.estimators import make_estimator, sigmoid
from neureasoner.probes.detectors.metrics import auroc
from neureasoner.probes.detectors.probe import platt
from neureasoner.probes.detectors.tables import Table

SETTINGS: dict[str, list[dict[str, Any]]] = {  # tried for every feature set; the best on validation is kept
    "logistic": [{"C": 0.01}, {"C": 0.1}, {"C": 1.0}],
    "mlp": [{"weight_decay": 0.01}, {"weight_decay": 3.0}],
    "boosting": [{}],
}


@dataclass
class Fitted:
    """A feature set's best estimator: its kind and settings, validation AUROC, and probabilities ``p [n]``.

    ``p`` is -inf where the features are not valid.
    """

    kind: str
    settings: dict[str, Any]
    validation_auroc: float
    p: np.ndarray


def fit_one(
    table: Table, y: np.ndarray, train: np.ndarray, held: np.ndarray, kind: str, settings: dict[str, Any], seed: int
) -> Fitted:
    """One estimator trained on rows ``train``; stopped, calibrated and measured on ``held`` (both bool ``[n]``)."""
    train, held = train & table.valid, held & table.valid
    estimator = make_estimator(kind, seed=seed, **settings).fit(
        table.x[train], y[train], validation=(table.x[held], y[held])
    )
    logits = estimator.decision_function(table.x)
    a, b = platt(logits[held], y[held])
    return Fitted(kind, settings, auroc(y[held], logits[held]), np.where(table.valid, sigmoid(a * logits + b), -np.inf))


def fit_best(
    table: Table, y: np.ndarray, train: np.ndarray, held: np.ndarray, kinds: Sequence[str], seed: int
) -> Fitted:
    """The best of all kinds and their ``SETTINGS`` by validation AUROC; ties go to the first."""
    tried = [fit_one(table, y, train, held, k, s, seed) for k in kinds for s in SETTINGS[k]]
    return max(tried, key=lambda f: round(f.validation_auroc, 4))
