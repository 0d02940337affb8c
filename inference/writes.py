"""Where a tensor rule writes and with which vector: a rule and its Direction, resolved for one model.

Legend: ``D`` hidden size, ``hd`` head size, ``n`` channels a write touches, in ``g`` groups of width ``w`` (one a head,
else one).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.rules import DIRECTED, Rule, wild_kind
from neureasoner.sites import INDEXED, Layout, Site, runs_on, values_of

DENSE = ("residual", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Write:
    """One rule's edit at one place.

    place    whose full value is edited (no indices)
    index    channels of it ``[n]``, None for all
    vector   ``[g, w]`` float32, ``g * w = n``; of norm 1 in each group for ``scale``; the value ``[1, 1]`` for ``set``
    columns  where heads are held against a direction of hidden size: the channels of ``o_proj``'s input ``[n]`` they
             are read from, ``reader [n]`` giving the component of what they write
    """

    rule: Rule
    place: Site
    index: torch.Tensor | None
    vector: torch.Tensor
    columns: torch.Tensor | None = None
    reader: torch.Tensor | None = None

    @property
    def read_place(self) -> Site | None:
        """The place whose value has to be seen besides, if any."""
        return None if self.columns is None else Site("head", self.place.layer)


def written_sites(rule: Rule, direction: Direction | None, layout: Layout) -> list[Site]:
    """The sites a rule writes in this model. Raises UserError naming a site that is not in it."""
    if not rule.edits:
        return []
    names = list(rule.site) or (direction.sites if direction is not None else [])
    out: list[Site] = []
    for name in names:
        kind = wild_kind(name)
        out += [Site.parse(name)] if kind is None else _every(kind, direction, layout)
    return list(dict.fromkeys(layout.check(s) for s in out))


def written_places(rule: Rule, direction: Direction | None, layout: Layout) -> list[Site]:
    """``written_sites``, but what is written where it is not named: heads held against a direction of hidden size."""
    found = written_sites(rule, direction, layout)
    if rule.action.kind != "scale" or direction is None:
        return found
    own = {s: direction.values.get(str(s)) for s in found if s.kind == "head"}
    moved = {s for s, value in own.items() if value is None or value.ndim == 1}
    return [Site("attn_out", s.layer) if s in moved else s for s in found]


def _every(kind: str, direction: Direction | None, layout: Layout) -> list[Site]:
    """The sites ``kind:*`` stands for: the direction's of this kind, else one in each block it has a vector for."""
    if direction is None:
        return [Site(kind, block) for block in range(layout.n_layers)]
    own = [Site.parse(s) for s in direction.sites]
    same = [s for s in own if s.kind == kind]
    blocks = sorted({s.layer for s in own if s.kind in DENSE and s.layer is not None})
    found = same or ([Site(kind, block) for block in blocks] if kind not in INDEXED else [])
    if not found:
        raise UserError(f"site '{kind}:*' fits nothing of the direction, which has {', '.join(direction.sites)}")
    return found


def _vector(rule: Rule, direction: Direction, site: Site) -> torch.Tensor:
    """The direction's values for a site (``[D]``, ``[n]``, ``[n, hd]``): its own, or those ``[D]`` of its block."""
    value = direction.values.get(str(site))
    if value is None and (site.kind in DENSE or (site.kind == "head" and rule.action.scale)):
        near = [v for s, v in direction.values.items() if (p := Site.parse(s)).kind in DENSE and p.layer == site.layer]
        value = near[0] if len(near) == 1 else None
    if value is None:
        raise UserError(f"site '{site}': the direction has no values for it, only for {', '.join(direction.sites)}")
    return value / _spread(direction) if rule.strength.unit == "sigma" else value


def _spread(direction: Direction) -> float:
    """Root mean square, over all its neurons, of the direction's values in standard deviations.

    Divided by it, a direction moves its neurons by one deviation, so that a strength means the same along any of them
    (core.md §3.3). Raises UserError where a deviation is not known.
    """
    parts = []
    for site, value in direction.values.items():
        std = direction.info.get("std", {}).get(site)
        if Site.parse(site).kind != "neuron" or std is None or len(std) != len(value) or not all(s > 0 for s in std):
            raise UserError(
                f"site '{site}': unit sigma needs each neuron's standard deviation, which the direction lacks here "
                "(info 'std'); use unit raw or make the direction again"
            )
        parts.append(value.double() / torch.tensor(std, dtype=torch.float64))
    spread = float(torch.cat(parts).square().mean().sqrt())
    if not spread:
        raise UserError("the direction is 0 everywhere, so it has no length in standard deviations")
    return spread


def _channels(site: Site, layout: Layout, device: torch.device) -> torch.Tensor | None:
    """Channels of the full value that a site names ``[n]``; None for all."""
    if site.indices is None:
        return None
    at = torch.tensor(site.indices, device=device)
    return at if site.kind == "neuron" else _of_heads(at, layout)


def _of_heads(heads: torch.Tensor, layout: Layout) -> torch.Tensor:
    return (heads[:, None] * layout.head_dim + torch.arange(layout.head_dim, device=heads.device)).flatten()


def writes_of(rule: Rule, direction: Direction | None, layout: Layout) -> list[Write]:
    """What a rule writes, place by place. Raises UserError for what this model or direction does not have."""
    return [_write(rule, direction, layout, site) for site in written_sites(rule, direction, layout)]


def _write(rule: Rule, direction: Direction | None, layout: Layout, site: Site) -> Write:
    place = Site(site.kind, site.layer)
    device = runs_on(*layout.module(place)[0].modules())
    index = _channels(site, layout, device)
    if rule.action.kind == "set":
        return Write(rule, place, index, torch.full((1, 1), float(rule.action.set or 0.0), device=device))
    assert direction is not None
    vector = _vector(rule, direction, site).to(device)
    if rule.action.kind == "scale":
        length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
        if not bool((length > 0).all()):
            raise UserError(f"site '{site}': scale needs a direction of some length, it is 0 here")
        vector = vector / length
    if site.kind == "head" and vector.ndim == 1:
        return _head_projection(rule, layout, site, vector)
    return Write(rule, place, index, vector if vector.ndim == 2 else vector[None])


def _head_projection(rule: Rule, layout: Layout, site: Site, vector: torch.Tensor) -> Write:
    """Scale the component along ``vector [D]`` of what heads write (ThinkEdit, related.md B1): an edit of attn_out."""
    project = values_of(layout.module(Site("head", site.layer))[0]).to(vector.device)
    heads = range(layout.n_heads) if site.indices is None else site.indices
    columns = _of_heads(torch.tensor(list(heads), device=vector.device), layout)
    reader = project[:, columns].float().T @ vector
    return Write(rule, Site("attn_out", site.layer), None, vector[None], columns, reader)


@dataclass
class Dose:
    """What one rule gives in one forward: ``amount [B]`` float32, ``on [B]`` bool. ``kept``: deltas made of it."""

    amount: torch.Tensor
    on: torch.Tensor
    kept: dict[int, torch.Tensor] = field(default_factory=dict)


def apply_write(write: Write, value: torch.Tensor, dose: Dose, seen: torch.Tensor | None = None) -> torch.Tensor:
    """``value [B, T, C]`` edited at every one of its positions; rows that are off come back bit by bit.

    ``seen [B, T, H * hd]``: the input of ``o_proj``, for a write that reads heads.
    """
    kind, strength = write.rule.action.kind, write.rule.strength
    if kind == "add" and not strength.relative:
        delta = dose.kept.get(id(write))
        if delta is None or delta.dtype != value.dtype:
            delta = dose.amount.to(write.vector.device)[:, None] * write.vector.flatten()
            # x + -0.0 is x for every x, which +0.0 is not
            delta = torch.where(dose.on.to(delta.device)[:, None], delta, -0.0).to(value.dtype)[:, None]
            dose.kept[id(write)] = delta
        if write.index is None:
            return value + delta
        return value.index_add(-1, write.index, delta.expand(-1, value.shape[1], -1))
    amount = dose.amount.to(value.device)[:, None, None, None]
    on = dose.on.to(value.device)[:, None, None, None]
    old = value if write.index is None else value.index_select(-1, write.index)
    x = old.to(torch.promote_types(old.dtype, torch.float32))
    x = x.unflatten(-1, tuple(write.vector.shape) if kind in DIRECTED else (1, -1))
    if write.columns is not None and write.reader is not None and seen is not None:
        component = (seen[..., write.columns].to(x.dtype) @ write.reader.to(x.dtype))[..., None, None]
        new = x - amount * component * write.vector
    elif kind == "scale":
        new = x - amount * (x * write.vector).sum(-1, keepdim=True) * write.vector
    elif kind == "set":
        new = torch.lerp(x, write.vector.to(x.dtype), amount.to(x.dtype))
    else:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        new = x + amount * (length if strength.relative else 1.0) * write.vector
        if kind == "add_keep_norm":
            new = new * (length / torch.linalg.vector_norm(new, dim=-1, keepdim=True).clamp_min(1e-12))
    done = torch.where(on, new, x).flatten(-2).to(value.dtype)
    return done if write.index is None else value.index_copy(-1, write.index, done)
