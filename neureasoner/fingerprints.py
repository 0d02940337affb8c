"""Tell one set of weights from another: the fingerprint that binds a probe, a gate or a direction to its model.

A fingerprint is ``sample-whole``, 16 hexadecimal digits each. Both hash sizes, names and shapes; ``sample`` adds at
most 64 values of each parameter, ``whole`` a checksum of all. Older versions wrote ``sample`` alone, which a change of
one neuron can miss; what they made is still known by it (``known_as``).

Values are rounded to bfloat16 first, so a checkpoint has one fingerprint in float32 and in bfloat16. From float16 that
would round a second time, and float16 holds no values under 6e-8. Where a model's float16 weights are those of its
folder, rounded, the folder's values are hashed instead; a weight that was changed after loading has only itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neureasoner.artifacts import fingerprint as hash_of
from neureasoner.errors import UserError
from neureasoner.sites import Layout, values_of
from neureasoner.weights import weight_files

if TYPE_CHECKING:
    import torch

SAMPLE = 64  # values of each parameter in the sample
WORDS = 1 << 18  # of 8 bytes, that share a checksum


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Content hash of which id every token has."""
    return hash_of(tokenizer.get_vocab())


def known_as(fingerprint: str) -> tuple[str, str]:
    """The names under which artifacts may record these weights: the fingerprint, and what older versions wrote."""
    return fingerprint, fingerprint.partition("-")[0]


def fingerprint(model: Any) -> str:
    """Content hash of the weights, the same in float32, bfloat16 and (for a model loaded from a folder) float16.

    Weights may be offloaded. Not told apart are float32 values that bfloat16 rounds to the same. Raises UserError for
    an architecture that is not supported, quantised weights, and weights that are nowhere.
    """
    layout = Layout.of(model)
    stored = _Stored(model)
    own, original = _Digest(), _Digest()
    for name, value in weights(model):
        own.add(name, value)
        if stored.same(name, value):
            original.add(name, stored.value(name))
    digest = original if stored.unchanged else own
    sizes = (layout.model_type, layout.hidden_size, layout.n_heads, layout.n_kv_heads, layout.head_dim)
    about = (sizes, layout.n_layers, layout.intermediate_size, digest.shapes)
    sample = hash_of(*about, digest.sample.hexdigest())
    return f"{sample}-{hash_of(*about, digest.sums)}"


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """``named_parameters`` in the order of their names, with values also where accelerate keeps them elsewhere.

    Raises UserError naming a parameter that has no value at all.
    """
    names = sorted(name for name, _ in model.named_parameters())
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if hasattr(model.lm_head, "_hf_hook") and getattr(model.config, "tie_word_embeddings", False):
        import torch

        # offloading parts what is tied
        if head in names and torch.equal(_here(model, head), _here(model, embedding)):
            names.remove(head)
    for name in names:
        yield name, _here(model, name)


def _here(model: Any, name: str) -> torch.Tensor:
    """The values of a parameter; those that accelerate has put away are fetched, on the CPU."""
    parent, _, leaf = name.rpartition(".")
    value = values_of(model.get_submodule(parent), leaf)
    if value.device.type == "meta":
        raise UserError(f"{name} of {type(model).__name__} has no values (device meta); load the weights first")
    return value


class _Digest:
    """Hashes of parameters, added in order."""

    def __init__(self) -> None:
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.sample = hashlib.sha256()
        self.sums: list[list[int]] = []
        self._factors: dict[torch.device, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        import torch

        flat = value.reshape(-1)
        self.shapes.append((name, tuple(value.shape)))
        sample = flat[:: max(1, -(-flat.numel() // SAMPLE))]
        self.sample.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
        self.sums.append(self._sums(flat))

    def _sums(self, flat: torch.Tensor) -> list[int]:
        """A 64-bit checksum of every ``4 * WORDS`` values, made where they lie: a weighted sum of their bits, four
        values a word. An odd factor for each word: a change of one is always seen."""
        import torch

        if flat.device not in self._factors:
            mixed = (torch.arange(WORDS, device=flat.device) + 1) * 0x1E3779B97F4A7C15
            self._factors[flat.device] = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9 | 1
        factors = self._factors[flat.device]
        sums = []
        for part in flat.split(4 * WORDS):
            part = part.to(torch.bfloat16)
            if len(part) % 4 or part.storage_offset() % 4:
                part = torch.nn.functional.pad(part, (0, -len(part) % 4))
            words = part.view(torch.int64)
            weighted = factors[: len(words)]
            # the product that makes no copy is there for integers on the CPU only
            sums.append(words.dot(weighted) if words.device.type == "cpu" else (words * weighted).sum())
        return [int(n) for n in torch.stack(sums).tolist()]


class _Stored:
    """The values of the folder a float16 model was loaded from. ``unchanged``: the model's are these, so far."""

    def __init__(self, model: Any):
        import torch

        folder = _folder(model) if any(p.dtype == torch.float16 for p in model.parameters()) else None
        self._files: dict[str, Any] = {}
        for path in [] if folder is None else weight_files(folder):
            self._open(path)
        self.unchanged = bool(self._files)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(str(path), framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError):
            return  # not the file it was; then the model's own values are hashed

    def value(self, name: str) -> torch.Tensor:
        stored: torch.Tensor = self._files[name].get_tensor(name)
        return stored

    def same(self, name: str, value: torch.Tensor) -> bool:
        """Whether this parameter, and every one before it, is the stored one in the model's dtype."""
        import torch

        if self.unchanged:
            self.unchanged = name in self._files and torch.equal(self.value(name).to(value.dtype), value.cpu())
        return self.unchanged


def _folder(model: Any) -> Path | None:
    """Where a model was loaded from: its folder, or that of a hub id in the cache. Asks no network."""
    from transformers.utils import cached_file

    name = str(getattr(model.config, "name_or_path", "") or "")
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(found).parent if found else None
