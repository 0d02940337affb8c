"""Where to read and edit a model's inside. The one place that knows module names.

Legend: ``B`` batch, ``T`` tokens of this forward pass, ``D`` hidden size, ``F`` neurons of one block (intermediate
size), ``H`` query heads, ``hd`` head size. Blocks count from 0; ``residual:l`` is the output of block ``l``.

Supported are the stock Transformers modules of Llama, Qwen2 and Qwen3. Other layouts (fused projections, experts,
norms after the MLP) put something else at the same names, so they are refused instead of guessed at.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from neureasoner.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
INDEXED = ("neuron", "head")
LAYERED = ("residual", *INDEXED, "attn_out", "mlp_out")
BARE = ("logits", "tokens")

_FORM = re.compile(r"([a-z_]+)(?::(\d+)(?:\[(\d+(?:,\d+)*)\])?)?")


@dataclass(frozen=True)
class Site:
    """One place of a model, written ``residual:3``, ``neuron:3[1,5,9]``, ``head:3[0,2]``, ``logits``, …

    ``indices`` are neurons or query heads; None means all of them. ``logits`` and ``tokens`` are series of the
    generation and have no layer. Raises UserError for a combination that names nothing.
    """

    kind: str
    layer: int | None = None
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        known = f"use one of {', '.join(f'{k}:LAYER' for k in LAYERED)}, {', '.join(BARE)}"
        if self.kind not in LAYERED + BARE:
            raise UserError(f"site '{self.kind}' is unknown; {known}")
        if self.kind in BARE and (self.layer is not None or self.indices is not None):
            raise UserError(f"site '{self.kind}' takes no layer and no indices")
        if self.kind in LAYERED and (self.layer is None or self.layer < 0):
            raise UserError(f"site '{self.kind}' needs a layer from 0 upwards, for example '{self.kind}:3'")
        if self.indices is not None:
            if self.kind not in INDEXED:
                raise UserError(f"site '{self.kind}' takes no indices; only neuron and head do")
            if not self.indices or len(set(self.indices)) != len(self.indices) or min(self.indices) < 0:
                raise UserError(f"site '{self}' needs at least one index, from 0 upwards, none of them twice")

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read a site string (a Site passes through). Raises UserError showing the expected form."""
        if isinstance(text, Site):
            return text
        match = _FORM.fullmatch(text.replace(" ", ""))
        if match is None:
            raise UserError(f"site '{text}' is malformed; write it like residual:3, neuron:3[1,5,9] or logits")
        kind, layer, indices = match.groups()
        return cls(
            kind,
            None if layer is None else int(layer),
            None if indices is None else tuple(int(i) for i in indices.split(",")),
        )

    def __str__(self) -> str:
        layer = "" if self.layer is None else f":{self.layer}"
        return self.kind + layer + ("" if self.indices is None else f"[{','.join(map(str, self.indices))}]")


@dataclass(frozen=True)
class Layout:
    """Modules and sizes of a supported model. ``head_dim`` comes from the config: ``D // H`` is wrong for Qwen3."""

    model_type: str
    layers: nn.ModuleList
    final_norm: nn.Module
    lm_head: nn.Module
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, model: Any) -> Layout:
        """Resolve ``model``. Raises UserError naming an architecture that is not supported, or a quantised weight."""
        names = {c.__name__ for c in type(model).__mro__}
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        if not any(name in names and model_type == kind for name, kind in SUPPORTED.items()):
            raise UserError(
                f"architecture {type(model).__name__} (model_type {model_type}) is not supported; "
                f"use one of {', '.join(SUPPORTED)}"
            )
        assert config is not None
        if quantisation(config) or getattr(model, "is_quantized", False):
            refuse_quantised(type(model).__name__, quantisation(config) or "is_quantized")
        layout = cls(
            model_type=str(model_type),
            layers=model.model.layers,
            final_norm=model.model.norm,
            lm_head=model.lm_head,
            hidden_size=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
        )
        layout._check_matrices(model)
        return layout

    def _check_matrices(self, model: Any) -> None:
        """Raises UserError naming the first projection that is not a plain matrix of the size its sites need."""
        heads, groups = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = {"q_proj": heads, "k_proj": groups, "v_proj": groups, "o_proj": self.hidden_size}
        mlp = {"gate_proj": self.intermediate_size, "up_proj": self.intermediate_size, "down_proj": self.hidden_size}
        _check_matrix(model, "model.embed_tokens", model.model.embed_tokens, (None, self.hidden_size))
        _check_matrix(model, "lm_head", self.lm_head, (None, self.hidden_size))
        for i, layer in enumerate(self.layers):
            for part, sizes in (("self_attn", attention), ("mlp", mlp)):
                for name, rows in sizes.items():
                    inputs = {"o_proj": heads, "down_proj": self.intermediate_size}.get(name, self.hidden_size)
                    module = getattr(getattr(layer, part), name)
                    _check_matrix(model, f"model.layers.{i}.{part}.{name}", module, (rows, inputs))

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.layers)

    def check(self, site: str | Site) -> Site:
        """Parse ``site`` and hold it against this model. Raises UserError naming the valid range."""
        site = Site.parse(site)
        if site.layer is not None and site.layer >= self.n_layers:
            raise UserError(
                f"site '{site}': layer {site.layer} is out of range; this model has layers 0 to {self.n_layers - 1}"
            )
        size = {"neuron": self.intermediate_size, "head": self.n_heads}.get(site.kind)
        if site.indices is not None and size is not None and max(site.indices) >= size:
            raise UserError(
                f"site '{site}': {site.kind} {max(site.indices)} is out of range; a layer has {site.kind}s "
                f"0 to {size - 1}"
            )
        return site

    def width(self, site: str | Site) -> int:
        """Channels ``read_sites`` delivers for ``site`` (2 for logits: entropy and surprisal; 1 for tokens)."""
        site = self.check(site)
        if site.kind in BARE:
            return 2 if site.kind == "logits" else 1
        if site.indices is not None:
            return len(site.indices)
        return {"neuron": self.intermediate_size, "head": self.n_heads}.get(site.kind, self.hidden_size)

    def module(self, site: Site) -> tuple[nn.Module, bool]:
        """The module that carries ``site`` and whether the value is its input (True) or its output (False)."""
        if site.layer is None:
            raise UserError(f"site '{site}' is a series of the generation, not a place in the model; it has no hook")
        layer: Any = self.layers[site.layer]
        places: dict[str, tuple[nn.Module, bool]] = {
            "residual": (layer, False),
            "attn_out": (layer.self_attn, False),
            "mlp_out": (layer.mlp, False),
            "neuron": (layer.mlp.down_proj, True),
            "head": (layer.self_attn.o_proj, True),
        }
        return places[site.kind]


def quantisation(config: Any) -> str:
    """The method by which a model's config (an object, or what config.json holds) says it is quantised; else empty."""
    for key in ("quantization_config", "compression_config"):
        found = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
            return str(getattr(method, "value", method) or key)
    return ""


def refuse_quantised(what: str, method: str) -> NoReturn:
    """Raises UserError: ``what`` is quantised by ``method``."""
    raise UserError(
        f"{what}: its weights are quantised ({method}), and neurons, heads and the fingerprint need the plain "
        "matrices; load the unquantised weights it was made from, or dequantise and save it first"
    )


def _check_matrix(model: Any, name: str, module: Any, shape: tuple[int | None, int]) -> None:
    import torch

    weight = getattr(module, "weight", None)
    # ZeRO-3 keeps the sizes beside a weight that lies on other ranks; a DTensor is a plain one spread over ranks
    sizes = tuple(getattr(weight, "ds_shape", getattr(weight, "shape", ())))
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) or type(weight).__name__ == "DTensor"
    if not plain or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):  # type: ignore[union-attr]
        how = type(module if weight is None or plain else weight).__name__
        refuse_quantised(type(model).__name__, f"{name} is {how} {getattr(weight, 'dtype', '')}".strip())
    if len(sizes) != 2 or sizes[1] != shape[1] or shape[0] not in (None, sizes[0]):
        wanted = [n for n in shape if n is not None]
        raise UserError(f"{type(model).__name__}: {name} holds {list(sizes)}, but the config asks for {wanted}")


def hooks_of(module: Any) -> list[Any]:
    """The hooks by which accelerate moves a module's weights in and out; none for a module that stays where it is."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def values_of(module: Any, name: str = "weight") -> torch.Tensor:
    """A module's parameter, fetched where accelerate keeps its values elsewhere; ``meta`` if nobody has them."""
    value: torch.Tensor = getattr(module, name)
    if value.device.type == "meta":
        for hook in hooks_of(module):
            kept = getattr(hook, "weights_map", None)
            if kept is not None:
                found: torch.Tensor = kept[name]
                return found.to(value.dtype)
    return value.detach()


def runs_on(*modules: Any) -> torch.device:
    """Where the first of these modules runs, whoever of them knows it. ``meta`` if none does.

    Weights that accelerate keeps elsewhere are ``meta`` between two calls; its hook knows where they run.
    """
    import torch

    for hook in (h for module in modules for h in hooks_of(module)):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    device: torch.device = next(modules[0].parameters()).device
    return device


def _reader(layout: Layout, site: Site, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from the module's full value to what the site delivers. The index tensor is made once, here."""
    import torch

    index = None if site.indices is None else torch.tensor(site.indices, device=device)

    def read(value: torch.Tensor) -> torch.Tensor:
        if site.kind == "head":
            value = value.unflatten(-1, (layout.n_heads, layout.head_dim))
            if index is not None:
                value = value.index_select(-2, index)
            # float32, because a norm sums squares and half precision overflows
            wide = torch.promote_types(value.dtype, torch.float32)
            return torch.linalg.vector_norm(value, dim=-1, dtype=wide).float()
        return value if index is None else value.index_select(-1, index)

    return read


def _first(output: Any) -> torch.Tensor:
    """``self_attn`` returns a tuple, blocks a tensor (a tuple in older releases)."""
    return output[0] if isinstance(output, tuple) else output


# Who calls the model. A hook sits on the module, where every caller's forward passes come by: those of another thread,
# and those of a callback that asks the same model in the middle of a generation.
_CALLER: ContextVar[object] = ContextVar("caller")


def caller() -> object:
    """Whose forward passes are running here: what ``called_by`` names, else this thread."""
    return _CALLER.get(threading.get_ident())


@contextmanager
def called_by(owner: object) -> Iterator[None]:
    """Forward passes inside are ``owner``'s, and hooks set inside act in those alone."""
    token = _CALLER.set(owner)
    try:
        yield
    finally:
        _CALLER.reset(token)


def own(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook`` for the present caller's forward passes; in those of others it does nothing."""
    owner = caller()
    return lambda *args: hook(*args) if caller() == owner else None


@contextmanager
def read_sites(
    model: Any, sites: Iterable[str | Site], callback: Callable[[str, torch.Tensor], None]
) -> Iterator[Layout]:
    """While active, call ``callback(str(site), value)`` for every site in every forward pass of this caller.

    Values, attached to the graph as they are: ``head`` float32 norms ``[B, T, n]``; ``neuron`` signed activations
    ``[B, T, n]``; ``residual``, ``attn_out``, ``mlp_out`` vectors ``[B, T, D]``. ``n`` counts the site's indices.
    Nothing here waits for the device. Raises UserError before any hook is set if a site is not in this model.
    """
    layout = Layout.of(model)
    resolved = []
    for site in [layout.check(s) for s in sites]:
        module, is_input = layout.module(site)
        resolved.append((module, is_input, str(site), _reader(layout, site, runs_on(module))))
    handles = []
    try:
        for module, is_input, name, read in resolved:
            if is_input:

                def before(_: nn.Module, args: tuple[Any, ...], name: str = name, read: Any = read) -> None:
                    callback(name, read(args[0]))

                handles.append(module.register_forward_pre_hook(own(before)))
            else:

                def after(_: nn.Module, __: Any, output: Any, name: str = name, read: Any = read) -> None:
                    callback(name, read(_first(output)))

                handles.append(module.register_forward_hook(own(after)))
        yield layout
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edit_site(model: Any, site: str | Site, fn: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Layout]:
    """While active, replace the value at ``site`` by ``fn(value)`` in every forward pass of this caller.

    ``fn`` gets the full tensor whatever the site's indices: ``neuron`` ``[B, T, F]``, ``head`` ``[B, T, H * hd]`` (the
    input of ``o_proj``), the others ``[B, T, D]``. Raises ValueError if it returns another shape.
    """
    layout = Layout.of(model)
    checked = layout.check(site)
    module, is_input = layout.module(checked)

    def replaced(value: torch.Tensor) -> torch.Tensor:
        new = fn(value)
        if new.shape != value.shape:
            raise ValueError(f"edit of '{checked}' returned shape {tuple(new.shape)}, expected {tuple(value.shape)}")
        return new

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replaced(args[0]), *args[1:])

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        new = replaced(_first(output))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = None
    try:
        register = module.register_forward_pre_hook if is_input else module.register_forward_hook
        handle = register(own(before if is_input else after))
        yield layout
    finally:
        if handle is not None:
            handle.remove()
