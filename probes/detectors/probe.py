"""The detector: estimator, calibrated probability, decision rule, threshold, and all it takes to use them elsewhere.

Legend: ``n`` samples, ``d`` features. Settings go into the constructor, ``fit`` returns self, learned values
end in ``_``.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, read_json, read_tensors, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.probes.detectors.estimators import CLIP, make_estimator, sigmoid
from neureasoner.probes.detectors.sequential import Sequential
from neureasoner.probes.features import FeatureSet
from neureasoner.probes.sliding import SlidingWindow, check_spec, window_for
from neureasoner.probes.spectrum import EPS
from neureasoner.sites import Site

SCHEMA = 2  # 1: an MLP without a rule
SCALARS = {"neuron": "abs", "head": "norm"}


@cache
def git_revision() -> str:
    """Revision of the code, or "" outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def platt(logits: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """``(a, b)`` such that ``sigmoid(a * logit + b)`` is a probability on this data; ``a > 0`` keeps the order."""
    from sklearn.linear_model import LogisticRegression

    if len(set(y.tolist())) < 2:
        return 1.0, 0.0
    scale = float(np.std(logits)) or 1.0
    model = LogisticRegression(C=10.0).fit(logits[:, None] / scale, y)
    return max(float(model.coef_[0, 0]) / scale, 1e-3 / scale), float(model.intercept_[0])


class Probe:
    """A detector of one failure level. An alarm is a statistic above ``threshold``, on valid features only.

    ``features``: what to compute; ``model``, ``model_fingerprint``, ``layer``: which model it was fitted on; ``kind``
    and ``settings`` (hidden, weight_decay, seed, …): the estimator, see ``make_estimator``; ``rule``: what turns the
    probabilities of a trace into statistics, None for the probabilities themselves. ``threshold`` is in their unit.
    Learned: ``estimator``, ``platt_``, ``threshold``, ``history_`` (an MLP's validation per epoch).
    """

    def __init__(
        self,
        features: FeatureSet,
        *,
        model: str = "",
        model_fingerprint: str = "",
        layer: int | None = None,
        kind: str = "mlp",
        rule: Sequential | None = None,
        **settings: Any,
    ):
        self.features, self.rule = features, rule
        self.model, self.model_fingerprint, self.layer = model, model_fingerprint, layer
        self.estimator = make_estimator(kind, **settings)
        self.threshold = 0.5
        self.platt_ = (1.0, 0.0)
        self.history_: list[dict[str, float]] = []
        self.notes: dict[str, Any] = {}

    def fit(self, x: np.ndarray, y: np.ndarray, validation: tuple[np.ndarray, np.ndarray] | None = None) -> Probe:
        """Train on ``x [n, d]``, ``y [n]`` in {0, 1}; stop early and calibrate on ``validation`` (default: ``x, y``).

        Deterministic by its seed; leaves the global random state alone. Raises UserError unless both classes occur.
        """
        try:
            self.estimator.fit(x, y, validation)
        except UserError as e:
            raise UserError(f"probe '{self.features.level}': {e}") from None
        self.history_ = getattr(self.estimator, "history_", [])
        xv, yv = (x, y) if validation is None else validation
        self.platt_ = platt(self.decision_function(xv), np.asarray(yv))
        return self

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        """Logits before calibration. ``[n, d]`` -> ``[n]``."""
        return self.estimator.decision_function(x)

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Calibrated probability of the failure. ``[n, d]`` -> ``[n]``, float64."""
        a, b = self.platt_
        return sigmoid(a * self.decision_function(x) + b)

    def predict(self, x: np.ndarray, trace: np.ndarray | None = None) -> np.ndarray:
        """Alarms. ``[n, d]`` -> bool ``[n]``; a rule reads the rows of each ``trace [n]`` in turn (default: of one)."""
        p = self.predict_proba(x)
        if self.rule is not None:
            p = self.rule.apply(p, np.zeros(len(p)) if trace is None else trace)
        return p > self.threshold

    def save(self, folder: str | Path) -> None:
        """Write ``probe.safetensors``, then ``probe.json`` that names its content hash.

        Raises UserError for an estimator that is no tensors (``boosting``).
        """
        folder = Path(folder)
        write_tensors(folder / "probe.safetensors", self.estimator.to_tensors())
        kinds = {Site.parse(c).kind for c in self.features.channels.split()}
        write_json(
            folder / "probe.json",
            {
                "schema": SCHEMA,
                "kind": "probe",
                "features": self.features.to_dict(),
                "feature_backend": self.features.backend,
                "epsilon": EPS,
                "scalar": ", ".join(sorted(SCALARS[k] for k in kinds if k in SCALARS)) or None,
                "model": self.model,
                "model_fingerprint": self.model_fingerprint,
                "layer": self.layer,
                "rule": self.rule.to_dict() if self.rule else None,
                "threshold": self.threshold,
                "platt": list(self.platt_),
                "clip": CLIP,
                "estimator": self.estimator.kind,
                "settings": self.estimator.get_params(),
                "history": self.history_,
                "notes": self.notes,
                "version": __version__,
                "git": git_revision(),
                "tensors": file_fingerprint([folder / "probe.safetensors"]),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Probe:
        """Read a probe folder. Raises UserError if it is missing, damaged, or made for other features."""
        folder = Path(folder)
        if not (folder / "probe.json").is_file():
            raise UserError(f"{folder}: holds no probe.json; name a folder written by probes fit")
        info = read_json(folder / "probe.json")
        if info.get("kind") != "probe" or info.get("schema") not in range(1, SCHEMA + 1):
            raise UserError(
                f"{folder}: probe.json has schema {info.get('schema')}, expected at most {SCHEMA}; fit it again"
            )
        tensors, _ = read_tensors(folder / "probe.safetensors")
        if file_fingerprint([folder / "probe.safetensors"]) != info.get("tensors"):
            raise UserError(f"{folder}: probe.json and probe.safetensors are of different fits; fit it again")
        try:
            features = FeatureSet.from_dict(info["features"])
            if info["feature_backend"] != features.backend or info["epsilon"] != EPS:
                raise UserError(
                    f"fitted on features '{info['feature_backend']}' with epsilon {info['epsilon']}, its feature set "
                    f"computes '{features.backend}' with {EPS}; fit it again"
                )
            probe = cls(
                features,
                model=info["model"],
                model_fingerprint=info["model_fingerprint"],
                layer=info["layer"],
                kind=info.get("estimator", "mlp"),
                rule=Sequential.from_dict(info["rule"]) if info.get("rule") else None,
                **info["settings"],
            )
            probe.estimator.from_tensors(tensors)
            probe.threshold, probe.platt_ = float(info["threshold"]), (info["platt"][0], info["platt"][1])
            probe.history_, probe.notes = info["history"], info["notes"]
        except UserError as e:
            raise UserError(f"{folder}: {e}") from None
        except (KeyError, TypeError, IndexError, ValueError) as e:
            raise UserError(f"{folder}: damaged probe ({e}); fit it again") from None
        return probe

    def score_window(self, window: SlidingWindow) -> tuple[np.ndarray, np.ndarray]:
        """Probability ``[B]`` of every row of a sliding window, and whether it may be decided upon, bool ``[B]``.

        For probes of spectra alone. Raises UserError for a window of another back end, grid, length or level.
        """
        level = self.features.level
        check_spec(window_for(self.features, 1).spec(level), window.spec(level))
        if self.features.parts != ("spectral",):
            raise UserError(f"feature set '{self.features.name}' needs more than a window of activations")
        x, valid = window.features(level)
        return np.where(valid, self.predict_proba(x), -np.inf), valid

    def check(self, model: Any) -> None:
        """Raises UserError unless ``model`` holds the weights this probe was fitted on and gives it its features."""
        from neureasoner.models import fingerprint, known_as
        from neureasoner.sites import Layout

        layout = Layout.of(model)
        found = fingerprint(model)
        if self.model_fingerprint not in known_as(found):
            raise UserError(
                f"the {self.features.level} probe was fitted on model '{self.model}' ({self.model_fingerprint}), "
                f"this one is {found}; run probes locate and probes fit on this model"
            )
        d = self.features.dim(layout.hidden_size)
        if d != self.estimator.n_features_in_:
            raise UserError(
                f"the {self.features.level} probe was fitted on {self.estimator.n_features_in_} features, its feature "
                f"set '{self.features.name}' gives {d}; fit it again"
            )
