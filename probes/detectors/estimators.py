"""Binary classifiers behind a probe, with scikit-learn's interface, so that its tools and ours compare them alike.

Legend: ``n`` samples, ``d`` features. Whatever the kind, features are rounded to float32 (as they are cached),
standardised by the training data and clipped at 8 standard deviations; both classes weigh the same; scores are float64
logits of the second of ``classes_``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from neureasoner.errors import UserError
from neureasoner.probes.detectors.metrics import auroc

CLIP = 8.0  # standard deviations


def build_mlp(d: int, hidden: int, dropout: float) -> nn.Sequential:
    """``d -> hidden -> hidden -> 1`` with GELU and dropout (core.md §1.7.1)."""
    return nn.Sequential(
        nn.Linear(d, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, 1),
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probability of a logit, without overflow."""
    return 1.0 / (1.0 + np.exp(-np.clip(logits, -500, 500)))


class Detector(ClassifierMixin, BaseEstimator, ABC):
    """What all kinds share: checks, standardised input, labels. A kind adds ``_fit``, ``_logits`` and its weights.

    Learned: ``classes_ [2]``, ``mean_``, ``scale_`` ``[d]`` (a constant column has scale 1), ``n_features_in_``.
    """

    kind = ""
    mean_: np.ndarray
    scale_: np.ndarray
    classes_: np.ndarray
    n_features_in_: int

    def fit(self, X: Any, y: Any, validation: tuple[Any, Any] | None = None) -> Detector:
        """Train on ``X [n, d]``, ``y [n]`` with two different labels; returns self.

        ``validation`` (features and labels; default: the training data) is where training may stop early, never trained
        on. Raises UserError for one class or more than two, for NaN or infinity (naming the column), and for a
        validation label that the training data lacks.
        """
        x, y = self._checked(X, y)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        if len(self.classes_) > 2:
            raise UserError(
                "Only binary classification is supported. The type of the target is multiclass; "
                f"give two labels, got {len(self.classes_)}"
            )
        if len(self.classes_) < 2:
            raise UserError(f"training needs both classes, got one class only: {self.classes_[0]}")
        self.mean_, sd = x.mean(axis=0), x.std(axis=0)
        self.scale_ = np.where(sd > 1e-8, sd, 1.0)
        held, held_y = (x, y) if validation is None else self._checked(*validation, reset=False)
        if not np.isin(held_y, self.classes_).all():
            raise UserError(f"validation has labels {np.unique(held_y).tolist()}, training {self.classes_.tolist()}")
        self._fit(self._scaled(x), self._targets(y), self._scaled(held), self._targets(held_y))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits of ``classes_[1]``. ``[n, d]`` -> ``[n]``, float64."""
        check_is_fitted(self, "mean_")
        return self._logits(self._scaled(self._checked(X, reset=False)))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Uncalibrated probabilities of ``classes_``. ``[n, d]`` -> ``[n, 2]``, float64."""
        p = sigmoid(self.decision_function(X))
        return np.stack([1 - p, p], axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """Labels. ``[n, d]`` -> ``[n]``."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Everything learned: ``scaler.mean``, ``scaler.scale`` ``[d]`` and ``<kind>.*``.

        Raises UserError for a kind that cannot be saved, and for labels other than 0 and 1 (tensors hold no labels).
        """
        check_is_fitted(self, "mean_")
        if self.classes_.tolist() != [0, 1]:
            raise UserError(f"only an estimator of labels 0 and 1 can be saved, these are {self.classes_.tolist()}")
        scaler = {"scaler.mean": torch.from_numpy(self.mean_), "scaler.scale": torch.from_numpy(self.scale_)}
        return {f"{self.kind}.{k}": v for k, v in self._weights().items()} | scaler

    def from_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Detector:
        """Take over what ``to_tensors`` of an estimator with the same settings gave; returns self. Raises UserError."""
        rest = dict(tensors)
        try:
            self.mean_, self.scale_ = rest.pop("scaler.mean").numpy(), rest.pop("scaler.scale").numpy()
            self.n_features_in_, self.classes_ = len(self.mean_), np.array([0, 1])
            self._restore({k.removeprefix(f"{self.kind}."): v for k, v in rest.items()})
        except (KeyError, RuntimeError) as e:
            raise UserError(f"damaged tensors of kind '{self.kind}' ({str(e).splitlines()[0]})") from None
        return self

    def _checked(self, x: Any, *y: Any, reset: bool = True) -> Any:
        """``x [n, d]`` as float64 that float32 can hold; with ``y``, both."""
        with np.errstate(over="ignore"):
            if not reset and not y and self._is_plain(x):
                x = x.astype(np.float32)
            else:
                out = validate_data(self, x, *y, reset=reset, dtype=np.float32, ensure_all_finite=False)
                x = out[0] if y else out
        bad = np.flatnonzero(~np.isfinite(x).all(axis=0))
        if len(bad):
            raise UserError(
                f"features hold NaN or infinity in column {bad[0]} ({len(bad)} of {x.shape[1]} columns); "
                "leave such samples out"
            )
        x = x.astype(np.float64, order="C")  # one memory layout: the same bits from any buffer
        return (x, out[1]) if y else x

    def _is_plain(self, x: Any) -> bool:
        """Nothing to check: a decision while generating takes a third of the time without scikit-learn's checks."""
        plain = type(x) is np.ndarray and x.dtype.kind == "f" and not hasattr(self, "feature_names_in_")
        return plain and len(x) > 0 and x.shape[1:] == (self.n_features_in_,)

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return np.clip((x - self.mean_) / self.scale_, -CLIP, CLIP)

    def _targets(self, y: np.ndarray) -> np.ndarray:
        return (y == self.classes_[1]).astype(np.int64)

    @abstractmethod
    def _fit(self, x: np.ndarray, y: np.ndarray, held: np.ndarray, held_y: np.ndarray) -> None: ...

    @abstractmethod
    def _logits(self, x: np.ndarray) -> np.ndarray: ...

    def _weights(self) -> dict[str, torch.Tensor]:
        raise UserError(f"estimator '{self.kind}' is for comparison and cannot be saved; use mlp or logistic")

    def _restore(self, weights: dict[str, torch.Tensor]) -> None:
        self._weights()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class MLPProbe(Detector):
    """The paper's probe: ``d-128-128-1``, GELU, dropout, BCE on logits, AdamW (core.md §1.7.1).

    Stops after ``patience`` epochs without a better validation AUROC (to 3 digits; then loss). Deterministic by
    ``seed``; leaves the global random state alone. Learned: ``net_`` (float64), ``history_`` (validation per epoch).
    """

    kind = "mlp"

    def __init__(
        self,
        *,
        hidden: int = 128,
        dropout: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        batch_size: int = 256,
        epochs: int = 40,
        patience: int = 6,
        seed: int = 0,
    ):
        self.hidden, self.dropout, self.lr, self.weight_decay = hidden, dropout, lr, weight_decay
        self.batch_size, self.epochs, self.patience, self.seed = batch_size, epochs, patience, seed

    def _fit(self, x: np.ndarray, y: np.ndarray, held: np.ndarray, held_y: np.ndarray) -> None:
        inputs, targets = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        held_inputs, held_targets = torch.from_numpy(held).float(), torch.from_numpy(held_y).float()
        weight = torch.tensor((len(y) - y.sum()) / y.sum(), dtype=torch.float32)
        batch = min(self.batch_size, max(16, len(y) // 16))  # few samples still make 16 updates an epoch
        best: tuple[float, float] | None = None
        self.history_: list[dict[str, float]] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed the GPUs too, for good
            net = build_mlp(x.shape[1], self.hidden, self.dropout)
            optimizer = torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=self.weight_decay)
            loss_of = nn.BCEWithLogitsLoss(pos_weight=weight)
            state = deepcopy(net.state_dict())
            waited = 0
            for epoch in range(self.epochs):
                net.train()
                for rows in torch.randperm(len(inputs)).split(batch):
                    optimizer.zero_grad(set_to_none=True)
                    loss_of(net(inputs[rows])[:, 0], targets[rows]).backward()
                    optimizer.step()
                net.eval()
                with torch.no_grad():
                    logits = net(held_inputs)[:, 0]
                    loss = float(loss_of(logits, held_targets))
                area = auroc(held_y, logits.numpy()) if 0 < held_y.sum() < len(held_y) else 0.5
                self.history_.append({"epoch": epoch, "loss": round(loss, 6), "auroc": round(area, 6)})
                if best is None or (round(area, 3), -loss) > best:
                    best, state, waited = (round(area, 3), -loss), deepcopy(net.state_dict()), 0
                else:
                    waited += 1
                    if waited >= self.patience:
                        break
        net.load_state_dict(state)
        self.net_ = net.double().eval()

    def _logits(self, x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.net_(torch.from_numpy(x))[:, 0].numpy()

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.net_.state_dict()

    def _restore(self, weights: dict[str, torch.Tensor]) -> None:
        self.net_ = build_mlp(self.n_features_in_, self.hidden, self.dropout).double().eval()
        self.net_.load_state_dict(weights)


class LogisticProbe(Detector):
    """Logistic regression with an L2 penalty of ``1 / C``; its one optimum needs no seed and no validation.

    Learned: ``coef_ [d]`` (of the standardised features), ``intercept_``, ``n_iter_``.
    """

    kind = "logistic"

    def __init__(self, *, C: float = 1.0, max_iter: int = 1000):
        self.C, self.max_iter = C, max_iter

    def _fit(self, x: np.ndarray, y: np.ndarray, held: np.ndarray, held_y: np.ndarray) -> None:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=self.C, class_weight="balanced", max_iter=self.max_iter).fit(x, y)
        self.coef_, self.intercept_, self.n_iter_ = model.coef_[0], float(model.intercept_[0]), int(model.n_iter_[0])

    def _logits(self, x: np.ndarray) -> np.ndarray:
        return x @ self.coef_ + self.intercept_

    def _weights(self) -> dict[str, torch.Tensor]:
        return {"coef": torch.from_numpy(self.coef_), "intercept": torch.tensor(self.intercept_, dtype=torch.float64)}

    def _restore(self, weights: dict[str, torch.Tensor]) -> None:
        self.coef_, self.intercept_ = weights["coef"].numpy(), float(weights["intercept"])
        if self.coef_.shape != self.mean_.shape:
            raise RuntimeError(f"coef {list(self.coef_.shape)}, scaler {list(self.mean_.shape)}")


class BoostingProbe(Detector):
    """Gradient-boosted trees of scikit-learn, to compare with; cannot be saved, since trees are pickles.

    Settings are those of ``HistGradientBoostingClassifier``; no early stopping. Learned: ``model_``, ``n_iter_``.
    """

    kind = "boosting"

    def __init__(
        self,
        *,
        learning_rate: float = 0.1,
        max_iter: int = 100,
        max_leaf_nodes: int = 31,
        min_samples_leaf: int = 20,
        l2_regularization: float = 0.0,
        seed: int = 0,
    ):
        self.learning_rate, self.max_iter, self.max_leaf_nodes = learning_rate, max_iter, max_leaf_nodes
        self.min_samples_leaf, self.l2_regularization, self.seed = min_samples_leaf, l2_regularization, seed

    def _fit(self, x: np.ndarray, y: np.ndarray, held: np.ndarray, held_y: np.ndarray) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        settings = {k: v for k, v in self.get_params().items() if k != "seed"}
        self.model_ = HistGradientBoostingClassifier(
            **settings, class_weight="balanced", early_stopping=False, random_state=self.seed
        ).fit(x, y)
        self.n_iter_ = self.model_.n_iter_

    def _logits(self, x: np.ndarray) -> np.ndarray:
        return self.model_.decision_function(x)


ESTIMATORS: dict[str, type[Detector]] = {c.kind: c for c in (MLPProbe, LogisticProbe, BoostingProbe)}
KINDS = tuple(ESTIMATORS)


def make_estimator(kind: str, *, seed: int = 0, **settings: Any) -> Detector:
    """An untrained estimator of a kind in ``KINDS``. Raises UserError for an unknown kind or setting.

    ``seed`` goes where chance has a part; logistic regression has none.
    """
    if kind not in ESTIMATORS:
        raise UserError(f"estimator '{kind}' is unknown; use one of {', '.join(KINDS)}")
    names = ESTIMATORS[kind]().get_params()
    for name in settings:
        if name not in names:
            raise UserError(f"estimator '{kind}' has no setting '{name}'; it has {', '.join(names)}")
    return ESTIMATORS[kind](**({"seed": seed} if "seed" in names else {}), **settings)
