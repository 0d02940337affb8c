"""The detector: scaler, MLP, calibrated probability, threshold, and everything needed to use them elsewhere.

Legend: ``n`` samples, ``d`` features. Settings go into the constructor, ``fit`` returns self, learned values
end in ``_``.
"""

from __future__ import annotations

import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, read_json, read_tensors, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.probes.detectors.metrics import auroc
from neureasoner.probes.features import BACKEND, EPS, FeatureSet
from neureasoner.sites import Site

SCHEMA = 1
CLIP = 8.0  # standard deviations
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


def platt(logits: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """``(a, b)`` such that ``sigmoid(a * logit + b)`` is a probability on this data; ``a > 0`` keeps the order."""
    from sklearn.linear_model import LogisticRegression

    if len(set(y.tolist())) < 2:
        return 1.0, 0.0
    scale = float(np.std(logits)) or 1.0
    model = LogisticRegression(C=10.0).fit(logits[:, None] / scale, y)
    return max(float(model.coef_[0, 0]) / scale, 1e-3 / scale), float(model.intercept_[0])


class Probe:
    """A detector of one failure level. An alarm is ``predict_proba(x) > threshold``, on valid features only.

    ``features``: what to compute; ``model``, ``model_fingerprint``, ``layer``: which model it was fitted on.
    Learned: ``mean_``, ``scale_`` ``[d]``, ``net_``, ``platt_``, ``threshold``, ``history_`` (validation per epoch).
    """

    def __init__(
        self,
        features: FeatureSet,
        *,
        model: str = "",
        model_fingerprint: str = "",
        layer: int | None = None,
        hidden: int = 128,
        dropout: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        batch_size: int = 256,
        epochs: int = 40,
        patience: int = 6,
        seed: int = 0,
    ):
        self.features = features
        self.model, self.model_fingerprint, self.layer = model, model_fingerprint, layer
        self.hidden, self.dropout, self.lr, self.weight_decay = hidden, dropout, lr, weight_decay
        self.batch_size, self.epochs, self.patience, self.seed = batch_size, epochs, patience, seed
        self.threshold = 0.5
        self.platt_ = (1.0, 0.0)
        self.history_: list[dict[str, float]] = []
        self.notes: dict[str, Any] = {}

    def _scaled(self, x: np.ndarray) -> torch.Tensor:
        x = np.asarray(x, dtype=np.float32).astype(np.float64)  # cached features are float32: one rounding everywhere
        if x.ndim != 2 or x.shape[1] != len(self.mean_):
            raise ValueError(f"expected features [n, {len(self.mean_)}], got {list(x.shape)}")
        return torch.from_numpy(np.clip((x - self.mean_) / self.scale_, -CLIP, CLIP))

    def fit(self, x: np.ndarray, y: np.ndarray, validation: tuple[np.ndarray, np.ndarray] | None = None) -> Probe:
        """Train on ``x [n, d]``, ``y [n]`` in {0, 1}; stop early and calibrate on ``validation`` (default: ``x, y``).

        Deterministic by ``seed``; leaves the global random state alone. Raises UserError unless both classes occur.
        """
        y = np.asarray(y)
        if not 0 < y.sum() < len(y):
            raise UserError(f"probe '{self.features.level}': training needs both classes, got {int(y.sum())}/{len(y)}")
        x = np.asarray(x, dtype=np.float32).astype(np.float64)
        self.mean_, sd = x.mean(axis=0), x.std(axis=0)
        self.scale_ = np.where(sd > 1e-8, sd, 1.0)
        xv, yv = (x, y) if validation is None else (validation[0], np.asarray(validation[1]))
        inputs, targets, held = self._scaled(x).float(), torch.tensor(y, dtype=torch.float32), self._scaled(xv).float()
        weight = torch.tensor((len(y) - y.sum()) / y.sum(), dtype=torch.float32)
        held_targets = torch.tensor(yv, dtype=torch.float32)
        batch = min(self.batch_size, max(16, len(y) // 16))  # few samples still make 16 updates an epoch
        best: tuple[float, float] | None = None
        self.history_ = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
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
                    logits = net(held)[:, 0]
                    loss = float(loss_of(logits, held_targets))
                area = auroc(yv, logits.numpy()) if 0 < yv.sum() < len(yv) else 0.5
                self.history_.append({"epoch": epoch, "loss": round(loss, 6), "auroc": round(area, 6)})
                if best is None or (round(area, 3), -loss) > best:
                    best, state, waited = (round(area, 3), -loss), deepcopy(net.state_dict()), 0
                else:
                    waited += 1
                    if waited >= self.patience:
                        break
        net.load_state_dict(state)
        self.net_ = net.double().eval()
        self.platt_ = platt(self.decision_function(xv), yv)
        return self

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        """Logits before calibration. ``[n, d]`` -> ``[n]``."""
        with torch.inference_mode():
            return self.net_(self._scaled(x))[:, 0].numpy()

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """Calibrated probability of the failure. ``[n, d]`` -> ``[n]``, float64."""
        a, b = self.platt_
        return 1.0 / (1.0 + np.exp(-np.clip(a * self.decision_function(x) + b, -500, 500)))

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Alarms. ``[n, d]`` -> bool ``[n]``."""
        return self.predict_proba(x) > self.threshold

    def save(self, folder: str | Path) -> None:
        """Write ``probe.safetensors``, then ``probe.json`` that names its content hash."""
        folder = Path(folder)
        tensors = {f"mlp.{k}": v for k, v in self.net_.state_dict().items()}
        tensors["scaler.mean"], tensors["scaler.scale"] = torch.from_numpy(self.mean_), torch.from_numpy(self.scale_)
        write_tensors(folder / "probe.safetensors", tensors)
        site = Site.parse(self.features.channels) if self.features.channels else None
        write_json(
            folder / "probe.json",
            {
                "schema": SCHEMA,
                "kind": "probe",
                "features": self.features.to_dict(),
                "feature_backend": BACKEND,
                "epsilon": EPS,
                "scalar": SCALARS.get(site.kind) if site else None,
                "model": self.model,
                "model_fingerprint": self.model_fingerprint,
                "layer": self.layer,
                "threshold": self.threshold,
                "platt": list(self.platt_),
                "clip": CLIP,
                "settings": {
                    key: getattr(self, key)
                    for key in ("hidden", "dropout", "lr", "weight_decay", "batch_size", "epochs", "patience", "seed")
                },
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
        if info.get("kind") != "probe" or info.get("schema") != SCHEMA:
            raise UserError(f"{folder}: probe.json has schema {info.get('schema')}, expected {SCHEMA}; fit it again")
        if info.get("feature_backend") != BACKEND or info.get("epsilon") != EPS:
            raise UserError(
                f"{folder}: fitted on features '{info.get('feature_backend')}', this version computes '{BACKEND}'; "
                "fit it again"
            )
        tensors, _ = read_tensors(folder / "probe.safetensors")
        if file_fingerprint([folder / "probe.safetensors"]) != info.get("tensors"):
            raise UserError(f"{folder}: probe.json and probe.safetensors are of different fits; fit it again")
        try:
            probe = cls(
                FeatureSet.from_dict(info["features"]),
                model=info["model"],
                model_fingerprint=info["model_fingerprint"],
                layer=info["layer"],
                **info["settings"],
            )
            probe.mean_, probe.scale_ = tensors.pop("scaler.mean").numpy(), tensors.pop("scaler.scale").numpy()
            probe.net_ = build_mlp(len(probe.mean_), probe.hidden, probe.dropout).double().eval()
            probe.net_.load_state_dict({k.removeprefix("mlp."): v for k, v in tensors.items()})
            probe.threshold, probe.platt_ = float(info["threshold"]), (info["platt"][0], info["platt"][1])
            probe.history_, probe.notes = info["history"], info["notes"]
        except (KeyError, TypeError, IndexError, RuntimeError) as e:
            raise UserError(f"{folder}: damaged probe ({str(e).splitlines()[0]}); fit it again") from None
        return probe

    def check(self, model: Any) -> None:
        """Raises UserError unless ``model`` holds the weights this probe was fitted on and gives it its features."""
        from neureasoner.models import fingerprint
        from neureasoner.sites import Layout

        layout = Layout.of(model)
        found = fingerprint(model)
        if found != self.model_fingerprint:
            raise UserError(
                f"the {self.features.level} probe was fitted on model '{self.model}' ({self.model_fingerprint}), "
                f"this one is {found}; run probes locate and probes fit on this model"
            )
        d = self.features.dim(layout.hidden_size)
        if d != len(self.mean_):
            raise UserError(
                f"the {self.features.level} probe was fitted on {len(self.mean_)} features, its feature set "
                f"'{self.features.name}' gives {d}; fit it again"
            )
