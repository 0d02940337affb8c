"""A Direction: what steering adds, by site, with the meaning of its sign in words.

Legend: ``D`` hidden size, ``hd`` head size, ``n`` indices of a site. Values are float32 on the CPU:

- ``residual:3``, ``attn_out:3``, ``mlp_out:3``: a vector ``[D]``;
- ``neuron:3[1,5,9]``: one number a neuron ``[n]``; ``head:3[0,2]``: one slice a head ``[n, hd]``.

They are in the units of the activations: a strength of 1 adds the values as they are. Keys of ``info`` that others
read: ``sizes`` ``{"neuron": F, "head": H}`` of the model, from which ``random_like`` draws other indices, and ``std``
``{site: [n]}``, the standard deviation of each neuron of a ``neuron`` site.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from neureasoner import __version__
from neureasoner.artifacts import file_fingerprint, fingerprint, read_json, read_tensors, write_json, write_tensors
from neureasoner.errors import UserError
from neureasoner.sites import BARE, INDEXED, Layout, Site

SCHEMA = 1
TENSORS_FILE, INFO_FILE = "direction.safetensors", "direction.json"


@dataclass(frozen=True)
class Direction:
    """Values by site string, and what their sign means. Immutable: treat the tensors as such.

    ``fingerprint``: of the model it was made on (``neureasoner.models.fingerprint``), empty if it fits any of its
    sizes. Raises UserError for no meaning, no site, a site no vector can be added to, or values of another form.
    """

    values: Mapping[str, torch.Tensor]
    meaning: str
    model: str = ""
    fingerprint: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.meaning, str) or not self.meaning.strip():
            raise UserError("a direction needs the meaning of its sign in words, such as 'positive = shorter thinking'")
        if not self.values:
            raise UserError("a direction needs values at one site at least")
        values: dict[str, torch.Tensor] = {}
        for text, value in self.values.items():
            name = str(Site.parse(text))
            if name in values:
                raise UserError(f"a direction names site '{name}' twice")
            values[name] = _checked(Site.parse(text), value)
        object.__setattr__(self, "values", types.MappingProxyType(values))

    @property
    def sites(self) -> list[str]:
        """Its sites, in the order they were given."""
        return list(self.values)

    def norms(self) -> dict[str, float]:
        """Euclidean norm of the values at each site."""
        return {site: float(value.double().norm()) for site, value in self.values.items()}

    def scaled(self, factor: float) -> Direction:
        """The same direction, ``factor`` times as long (the meaning of ``positive`` turns with a negative one)."""
        return replace(self, values={site: value * factor for site, value in self.values.items()})

    def __neg__(self) -> Direction:
        return replace(self.scaled(-1.0), meaning=f"flipped sign of: {self.meaning}")

    def random_like(self, seed: int) -> Direction:
        """The control: a random direction of the same norm at each site, and for neurons and heads of other places.

        Dense vectors are uniform on the sphere. The numbers of neurons keep their sizes, shuffled, with random signs;
        head slices keep theirs each, turned at random. The new indices are of the same block and, as far as it has so
        many, none of the old. Raises UserError if ``info`` lacks the ``sizes`` those are drawn from.
        """
        values: dict[str, torch.Tensor] = {}
        std: dict[str, list[float]] = {}
        for text, value in self.values.items():
            # a generator of each site's own: what one site draws does not hang on the others
            rng = torch.Generator().manual_seed(int(fingerprint(seed, text), 16) % (1 << 63))
            site = Site.parse(text)
            if site.indices is None:
                values[text] = _of_norms(torch.randn(value.shape, generator=rng), value)
                continue
            new = Site(site.kind, site.layer, self._others(site, rng))
            order = torch.randperm(len(value), generator=rng)
            sizes = value[order]
            if site.kind == "neuron":
                sign = torch.randint(0, 2, value.shape, generator=rng) * 2 - 1
                values[str(new)] = sizes.abs() * sign
            else:
                values[str(new)] = _of_norms(torch.randn(value.shape, generator=rng), sizes)
            if text in self.info.get("std", {}):  # each size keeps its own, so that the norm in deviations is equal too
                std[str(new)] = [self.info["std"][text][i] for i in order.tolist()]
        info = {**self.info, "random_like": {"seed": seed, "of": self.meaning}}
        if "std" in info:
            info["std"] = std
        return replace(self, values=values, meaning=f"random control (seed {seed}) of: {self.meaning}", info=info)

    def _others(self, site: Site, rng: torch.Generator) -> tuple[int, ...]:
        size = self.info.get("sizes", {}).get(site.kind)
        if not isinstance(size, int) or size < len(site.indices or ()):
            raise UserError(
                f"site '{site}': info 'sizes' does not say how many {site.kind}s a block has, so no others can be "
                "drawn; make the direction again, or add it to info"
            )
        old = set(site.indices or ())
        order: list[int] = torch.randperm(size, generator=rng).tolist()
        drawn = [i for i in order if i not in old] + [i for i in order if i in old]
        return tuple(drawn[: len(old)])

    def check(self, model: Any, accept: Sequence[str] = ()) -> None:
        """Raises UserError unless every site is in ``model``, of this width, and the weights are the ones it knows.

        ``accept``: further fingerprints of weights it may be used on, such as those of a fine-tuned copy.
        """
        from neureasoner.models import fingerprint as fingerprint_of
        from neureasoner.models import known_as

        layout = Layout.of(model)
        for text, value in self.values.items():
            site = layout.check(text)
            width = layout.head_dim if site.kind == "head" else layout.width(site)
            if value.shape[-1] != width:
                what = "size of a head" if site.kind == "head" else "hidden size"
                raise UserError(
                    f"direction '{self.meaning}', site '{site}': {value.shape[-1]} values, but the {what} of this "
                    f"model is {width}; it was made on another model ({self.model or 'unnamed'})"
                )
        if self.fingerprint:
            found = fingerprint_of(model)
            if not {self.fingerprint, *accept} & set(known_as(found)):
                raise UserError(
                    f"direction '{self.meaning}' was made on model '{self.model or 'unnamed'}' ({self.fingerprint}), "
                    f"this one is {found}; make it again on this model"
                )

    def save(self, folder: str | Path) -> None:
        """Write ``direction.safetensors`` and then ``direction.json``, which names it by its hash."""
        folder = Path(folder)
        write_tensors(folder / TENSORS_FILE, dict(self.values))
        write_json(
            folder / INFO_FILE,
            {
                "kind": "direction",
                "schema": SCHEMA,
                "meaning": self.meaning,
                "model": self.model,
                "fingerprint": self.fingerprint,
                "sites": self.sites,
                "norms": self.norms(),
                "info": dict(self.info),
                "version": __version__,
                "tensors": file_fingerprint([folder / TENSORS_FILE]),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Direction:
        """Read a folder that ``save`` wrote. Raises UserError if it is missing, damaged, or of another schema."""
        folder = Path(folder)
        if not (folder / INFO_FILE).is_file():
            raise UserError(f"{folder}: holds no {INFO_FILE}; name a folder written by probes directions or probes rcn")
        found = read_json(folder / INFO_FILE)
        if not isinstance(found, dict) or found.get("kind") != "direction" or found.get("schema") != SCHEMA:
            raise UserError(f"{folder}: {INFO_FILE} is not one of a direction (schema {SCHEMA}); make it again")
        tensors, _ = read_tensors(folder / TENSORS_FILE)
        if file_fingerprint([folder / TENSORS_FILE]) != found.get("tensors"):
            raise UserError(f"{folder}: {INFO_FILE} and {TENSORS_FILE} are of different runs; make the direction again")
        try:
            values = {site: tensors[site] for site in found["sites"]}
            return cls(values, found.get("meaning", ""), found["model"], found["fingerprint"], found["info"])
        except KeyError as e:
            raise UserError(f"{folder}: damaged, {e} is missing; make the direction again") from None
        except UserError as e:
            raise UserError(f"{folder}: {e}") from None


def _checked(site: Site, value: torch.Tensor) -> torch.Tensor:
    """``value`` as float32 on the CPU. Raises UserError for a site without vectors, a wrong form, NaN or infinity."""
    if site.kind in BARE:
        raise UserError(f"site '{site}' holds no vector, so no direction can be added there")
    if site.kind in INDEXED and site.indices is None:
        raise UserError(f"site '{site}' needs its indices, such as '{site}[0,1]', in a direction")
    value = torch.as_tensor(value).detach().to("cpu", torch.float32)
    form = {"neuron": "[indices]", "head": "[indices, head size]"}.get(site.kind, "[hidden size]")
    count = None if site.indices is None else len(site.indices)
    if value.ndim != (2 if site.kind == "head" else 1) or (count is not None and len(value) != count):
        raise UserError(f"site '{site}': values must be {form}, got shape {tuple(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"site '{site}': values hold NaN or infinity, in float32")
    return value


def _of_norms(random: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``random`` with the norms ``like`` has along the last dimension."""
    length = torch.linalg.vector_norm(random.double(), dim=-1, keepdim=True)
    wanted = torch.linalg.vector_norm(like.double(), dim=-1, keepdim=True)
    return (random * (wanted / length)).float()
