"""The failure gate: will the model fail this question? Asked once, before any response token (core.md §3.5).

Legend: ``n`` questions, ``T`` prompt tokens without position 0, ``d`` channels (neurons of any block), ``N`` neurons of
all blocks, ``B`` rows of a batch. Label and score polarity: 1 means the question needs intervention (will fail).

Channels are kept as (block, neuron) pairs, and the gate runs on the model that generates: no second copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, read_json, read_tensors, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.forward import read
from neureasoner.models import input_device
from neureasoner.probes.attribution.contrast import span_means
from neureasoner.probes.detectors.metrics import auroc
from neureasoner.probes.detectors.probe import git_revision
from neureasoner.sampling import left_padded
from neureasoner.sites import Layout, Site, read_sites

SCHEMA = 1
POLARITY = "1 = needs intervention (the model is predicted to fail); intervene where score > threshold"
SETTINGS = ("hidden", "dropout", "lr", "weight_decay", "train_batch", "epochs", "patience", "seed")
COLUMNS = 1 << 14  # neurons tested at once
Prompt = Sequence[int]


def select_channels(pooled: np.ndarray, y: np.ndarray, d: int, width: int) -> np.ndarray:
    """The ``d`` neurons whose prompt means tell the classes apart best, by the F statistic: (block, neuron) ``[d, 2]``.

    ``pooled [n, N]``, ``y [n]``, ``width`` neurons a block. Best first, ties to the lower block and neuron; fewer than
    ``d`` where the model has fewer.
    """
    from sklearn.feature_selection import f_classif

    scores = []
    for start in range(0, pooled.shape[1], COLUMNS):
        x = pooled[:, start : start + COLUMNS].astype(np.float64)
        moving = x.std(axis=0) > 0
        f = np.zeros(x.shape[1])
        f[moving] = np.nan_to_num(f_classif(x[:, moving], y)[0]) if moving.any() else 0.0
        scores.append(f)
    chosen = np.argsort(-np.concatenate(scores), kind="stable")[:d]
    return np.stack(np.divmod(chosen, width), axis=1)


def pooled_prompts(model: Any, prompts: Sequence[Prompt], batch_size: int) -> np.ndarray:
    """Mean of every neuron over each prompt without position 0: ``[n, N]`` float32.

    0.7 GB for 1000 questions of Qwen3-1.7B (N = 172,032).
    """
    from neureasoner.progress import track

    layout = Layout.of(model)
    out = np.zeros((len(prompts), layout.n_layers * layout.intermediate_size), dtype=np.float32)
    batches = span_means(model, [(list(p), 1, len(p)) for p in prompts], batch_size)
    for members, mean, _ in track(batches, "reading questions", -(-len(prompts) // batch_size)):
        out[members] = mean
    return out


def read_channels(
    model: Any, channels: np.ndarray, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One prefill: ``channels [d, 2]`` over ``ids [B, T]`` -> values ``[B, T, d]`` and what counts of them ``[B, T]``.

    Padding and each row's first token do not count; their values are 0.
    """
    sites, places = {}, {}
    for block in np.unique(channels[:, 0]):
        at = np.flatnonzero(channels[:, 0] == block)
        site = str(Site("neuron", int(block), tuple(int(i) for i in channels[at, 1])))
        sites[site], places[site] = block, torch.as_tensor(at, device=ids.device)
    counts = (mask.cumsum(dim=1) > 1) & (mask > 0)
    values = torch.zeros(*ids.shape, len(channels), device=ids.device)

    def keep(site: str, value: torch.Tensor) -> None:
        values[:, :, places[site]] = value.float().to(values.device)
        sites.pop(site, None)

    with torch.inference_mode(), read_sites(model, list(sites), keep):
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        read(model, ids, mask, position)
    if sites:
        raise UserError(f"site '{next(iter(sites))}' did not fire; the model skips it, so the gate cannot read it")
    return torch.where(counts[..., None], values, 0.0), counts


def question_values(model: Any, channels: np.ndarray, prompts: Sequence[Prompt], batch_size: int) -> list[np.ndarray]:
    """Values of the channels over each prompt's tokens: a list of ``[T, d]`` float32, in order."""
    device = input_device(model)
    out: dict[int, np.ndarray] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        values, counts = read_channels(model, channels, *left_padded([prompts[i] for i in members], 0, device))
        out |= {i: v[c].cpu().numpy() for i, v, c in zip(members, values, counts, strict=True)}
    return [out[i] for i in range(len(prompts))]


class AttentionPool(nn.Module):
    """Token weights ``softmax(tanh(w x + b))``, their weighted mean, one hidden layer, one logit."""

    def __init__(self, d: int, hidden: int, dropout: float):
        super().__init__()
        self.score = nn.Linear(d, 1)
        self.head = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """``x [B, T, d]``, ``counts [B, T]`` bool, at least one a row -> logits ``[B]``."""
        weight = torch.tanh(self.score(x))[..., 0].masked_fill(~counts, -torch.inf).softmax(dim=1)
        return self.head((weight[:, None] @ x)[:, 0])[:, 0]


def youden(y: np.ndarray, score: np.ndarray) -> float:
    """Threshold with the largest sensitivity + specificity - 1, halfway to the next lower score. Alarms lie above."""
    values = np.unique(score)
    cuts = np.r_[values[0] - 1e-6, (values[1:] + values[:-1]) / 2]
    above = score[None] > cuts[:, None]
    gain = above[:, y == 1].mean(axis=1) - above[:, y == 0].mean(axis=1)
    return float(cuts[int(np.argmax(gain))])


class FailureGate:
    """Predicts from prompt activations whether the model will fail. Steer where ``predict_proba > threshold``.

    Score polarity: high = fails (1 = needs intervention). ``channels [d, 2]``: (block, neuron) pairs. Learned:
    ``mean_``, ``scale_`` ``[d]`` of the training tokens (unlike the release, which takes raw activations), ``net_``,
    ``threshold`` (Youden's J on validation), ``history_``. Classes are weighted, so scores are no frequencies.
    """

    def __init__(
        self,
        channels: np.ndarray,
        *,
        model: str = "",
        model_fingerprint: str = "",
        hidden: int = 256,
        dropout: float = 0.3,
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        train_batch: int = 8,
        epochs: int = 100,
        patience: int = 10,
        seed: int = 0,
    ):
        self.channels = np.asarray(channels, dtype=np.int64)
        self.model, self.model_fingerprint = model, model_fingerprint
        self.hidden, self.dropout, self.lr, self.weight_decay = hidden, dropout, lr, weight_decay
        self.train_batch, self.epochs, self.patience, self.seed = train_batch, epochs, patience, seed
        self.threshold = 0.5
        self.history_: list[dict[str, float]] = []
        self.notes: dict[str, Any] = {}

    def _padded(self, values: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """A list of ``[T, d]`` -> standardised ``[n, longest, d]`` float64 and what counts. Refuses empty questions."""
        d = len(self.channels)
        if any(v.ndim != 2 or v.shape[1] != d or not len(v) for v in values):
            raise ValueError(f"expected values [T, {d}] with at least one token, got {[v.shape for v in values][:3]}")
        x = nn.utils.rnn.pad_sequence([torch.from_numpy(v).double() for v in values], batch_first=True)
        counts = torch.arange(x.shape[1]) < torch.tensor([len(v) for v in values])[:, None]
        return torch.where(counts[..., None], (x - self.mean_) / self.scale_, 0.0), counts

    def fit(
        self,
        values: Sequence[np.ndarray],
        y: np.ndarray,
        validation: tuple[Sequence[np.ndarray], np.ndarray] | None = None,
    ) -> FailureGate:
        """Train on ``values`` (``[T, d]`` a question) and ``y [n]`` (1 = fails); stop and threshold on ``validation``.

        Deterministic by ``seed``; leaves the global random state alone. Raises UserError unless both classes occur.
        """
        y = np.asarray(y)
        held, yv = (values, y) if validation is None else (validation[0], np.asarray(validation[1]))
        for labels, part in ((y, "training"), (yv, "validation")):
            if not 0 < labels.sum() < len(labels):
                raise UserError(f"gate: {part} needs both classes, got {int(labels.sum())} failing of {len(labels)}")
        tokens = np.concatenate(values).astype(np.float64)
        sd = tokens.std(axis=0)
        self.mean_ = torch.from_numpy(tokens.mean(axis=0))
        self.scale_ = torch.from_numpy(np.where(sd > 1e-8, sd, 1.0))
        (x, counts), (xv, counts_v) = self._padded(values), self._padded(held)
        x, xv = x.float(), xv.float()
        targets = torch.tensor(y, dtype=torch.float32)
        loss_of = nn.BCEWithLogitsLoss(pos_weight=torch.tensor((len(y) - y.sum()) / y.sum(), dtype=torch.float32))
        held_targets = torch.tensor(yv, dtype=torch.float32)
        best = (-1.0, 0.0)
        self.history_ = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = AttentionPool(len(self.channels), self.hidden, self.dropout)
            optimizer = torch.optim.Adam(net.parameters(), lr=self.lr, weight_decay=self.weight_decay)
            state, waited = deepcopy(net.state_dict()), 0
            for epoch in range(self.epochs):
                net.train()
                for rows in torch.randperm(len(x)).split(self.train_batch):
                    optimizer.zero_grad(set_to_none=True)
                    loss_of(net(x[rows], counts[rows]), targets[rows]).backward()
                    optimizer.step()
                net.eval()
                with torch.no_grad():
                    logits = net(xv, counts_v)
                    loss = float(loss_of(logits, held_targets))
                area = auroc(yv, logits.numpy())
                self.history_.append({"epoch": epoch, "loss": round(loss, 6), "auroc": round(area, 6)})
                waited = 0 if area > best[0] else waited + 1
                if (area, -loss) > best:  # of epochs alike, the one with the lower loss
                    best, state = (area, -loss), deepcopy(net.state_dict())
                if waited >= self.patience:
                    break
        net.load_state_dict(state)
        self.net_ = net.double().eval()
        self.threshold = youden(yv, self.predict_proba(held))
        return self

    def predict_proba(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Score of failing, high = fails. A list of ``[T, d]`` -> ``[n]``, float64."""
        x, counts = self._padded(values)
        with torch.inference_mode():
            return torch.sigmoid(self.net_(x, counts)).numpy()

    def predict(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Whether to intervene. A list of ``[T, d]`` -> bool ``[n]``."""
        return self.predict_proba(values) > self.threshold

    def save(self, folder: str | Path) -> None:
        """Write ``gate.safetensors``, then ``gate.json`` that names its content hash."""
        folder = Path(folder)
        tensors = {f"net.{k}": v for k, v in self.net_.state_dict().items()}
        tensors |= {"mean": self.mean_, "scale": self.scale_, "channels": torch.from_numpy(self.channels)}
        write_tensors(folder / "gate.safetensors", tensors)
        write_json(
            folder / "gate.json",
            {
                "schema": SCHEMA,
                "kind": "gate",
                "polarity": POLARITY,
                "model": self.model,
                "model_fingerprint": self.model_fingerprint,
                "threshold": self.threshold,
                "settings": {name: getattr(self, name) for name in SETTINGS},
                "history": self.history_,
                "notes": self.notes,
                "version": __version__,
                "git": git_revision(),
                "tensors": file_fingerprint([folder / "gate.safetensors"]),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> FailureGate:
        """Read a gate folder. Raises UserError if it is missing, damaged, or of two different fits."""
        folder = Path(folder)
        if not (folder / "gate.json").is_file():
            raise UserError(f"{folder}: holds no gate.json; name a folder written by probes gate")
        info = read_json(folder / "gate.json")
        if info.get("kind") != "gate" or info.get("schema") != SCHEMA:
            raise UserError(f"{folder}: gate.json has schema {info.get('schema')}, expected {SCHEMA}; fit it again")
        tensors, _ = read_tensors(folder / "gate.safetensors")
        if file_fingerprint([folder / "gate.safetensors"]) != info.get("tensors"):
            raise UserError(f"{folder}: gate.json and gate.safetensors are of different fits; fit it again")
        try:
            origin = {"model": info["model"], "model_fingerprint": info["model_fingerprint"]}
            gate = cls(tensors.pop("channels").numpy(), **origin, **info["settings"])
            gate.mean_, gate.scale_ = tensors.pop("mean"), tensors.pop("scale")
            gate.net_ = AttentionPool(len(gate.channels), gate.hidden, gate.dropout).double().eval()
            gate.net_.load_state_dict({k.removeprefix("net."): v for k, v in tensors.items()})
            gate.threshold, gate.history_, gate.notes = float(info["threshold"]), info["history"], info["notes"]
        except (KeyError, TypeError, RuntimeError) as e:
            raise UserError(f"{folder}: damaged gate ({str(e).splitlines()[0]}); fit it again") from None
        return gate

    def check(self, model: Any) -> None:
        """Raises UserError unless ``model`` holds the weights this gate was fitted on."""
        from neureasoner.models import fingerprint, known_as

        found = fingerprint(model)
        if self.model_fingerprint not in known_as(found):
            raise UserError(
                f"the gate was fitted on model '{self.model}' ({self.model_fingerprint}), this one is {found}; "
                "run probes gate on this model"
            )


def gate_scores(gate: FailureGate, model: Any, prompts: Sequence[Prompt], batch_size: int = 0) -> np.ndarray:
    """``question_scores`` of a gate that is checked to be this model's first. Raises UserError if it is not."""
    gate.check(model)
    return question_scores(gate, model, prompts, batch_size)


def question_scores(gate: FailureGate, model: Any, prompts: Sequence[Prompt], batch_size: int = 0) -> np.ndarray:
    """Score of failing for each prompt's token ids: ``[n]``, high = fails. One prefill of the model that generates.

    A row's score does not depend on the rows beside it. ``batch_size`` 0: all at once. Raises UserError for a prompt of
    one token.
    """
    if min(map(len, prompts)) < 2:
        raise UserError("the gate needs prompts of at least 2 tokens: it leaves the first one out")
    return gate.predict_proba(question_values(model, gate.channels, prompts, batch_size or len(prompts)))
