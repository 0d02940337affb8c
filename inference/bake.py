"""``inference bake``: always-on rules become weights, and the model runs anywhere without hooks (related.md §G, B1).

Legend: ``D`` hidden size, ``C`` inputs of a projection, ``S`` some of them, ``W [D, C]``, ``b [D]``, ``s`` strength.

======================== =====================================================================
rule, at every position  written as
======================== =====================================================================
add residual, mlp_out    ``b += s v`` of ``down_proj``
add neuron               ``b += W[:, S] (s v)`` of ``down_proj``
add attn_out, head       the same of ``o_proj``
scale mlp_out, attn_out  ``W, b = P W, P b`` with ``P = I - s u uᵀ``, u the unit direction
scale neuron, head       ``W[:, S] = W[:, S] (I - s u uᵀ)``, head by head
scale head along u [D]   ``W[:, S] = (I - s u uᵀ) W[:, S]`` of ``o_proj`` (ThinkEdit)
set neuron, head to 0    ``W[:, S] *= 1 - s``
======================== =====================================================================

Everything else is refused by name. Biases exist in stock Llama (``mlp_bias``, ``attention_bias``; the others they bring
are 0), not in Qwen; a Qwen2 can be written as a Llama, a Qwen3 (norms on queries and keys) cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neureasoner.artifacts import file_fingerprint
from neureasoner.directions import Direction
from neureasoner.errors import UserError
from neureasoner.inference.bake_config import BakeConfig
from neureasoner.inference.plan import PLAN_FILE, Plan, Rule
from neureasoner.inference.steering import Steering
from neureasoner.inference.writes import Write
from neureasoner.sites import INDEXED, Layout, Site
from neureasoner.stages import StageFolder

ADDED = ("residual", "mlp_out", "attn_out")


def refusal(rule: Rule, writes: Sequence[Write]) -> str:
    """Why a rule cannot become weights; empty if it can. ``writes``: what it writes in the model."""
    kind, strength = rule.action.kind, rule.strength
    if not rule.edits:
        return f"{kind} acts on {'the text' if rule.forces else 'the scores'}, which no weight of a block holds"
    if rule.source != "always" or rule.trigger.gate is not None:
        when = rule.source if rule.trigger.gate is None else f"gate {rule.trigger.gate}"
        return f"its trigger is {when}, and weights act at every position of every question; only `always` can be baked"
    varying = [k for k in ("schedule", "per_row", "draw", "relative") if getattr(strength, k)]
    if varying:
        return f"its strength is not a constant ({varying[0]})"
    if kind == "add_keep_norm":
        return "add_keep_norm is not linear in what it edits"
    places = {w.place.kind for w in writes}
    if kind == "scale" and "residual" in places:
        return "scale at residual would have to change what earlier blocks wrote; scale attn_out and mlp_out instead"
    if kind == "set" and (rule.action.set or not places <= set(INDEXED)):
        return "set can be baked only for neurons or heads, to 0"
    return ""


def bake_into(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    directions: Mapping[str, Direction],
    *,
    as_llama: bool = False,
    accept: Sequence[str] = (),
) -> Any:
    """The model with every rule of ``plan`` in its weights: ``model`` itself, changed, or a new Llama (``as_llama``).

    Computed in float32 and rounded once. Raises UserError, before anything is changed, naming each rule that cannot be
    baked and why.
    """
    steering = Steering(model, tokenizer, plan, directions, accept)
    flat = [w for ws in steering.writes.values() for w in ws]
    reasons = {r.name: refusal(r, [w for w in flat if w.rule == r]) for r in plan.rules}
    reasons |= _entangled(flat, reasons)
    biased = sorted({_projection(w) for w in flat if w.rule.action.add})
    reasons |= _no_bias(model, [w for w in flat if w.rule.action.add and not reasons[w.rule.name]], as_llama)
    refused = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if refused:
        raise UserError(f"plan {plan.name} cannot be baked: {refused}")
    with torch.no_grad():
        if as_llama:
            model = _as_llama(model)
        _open_biases(model, biased)
        for layer in range(steering.layout.n_layers):
            for name in ("o_proj", "down_proj"):
                here = [w for w in flat if w.place.layer == layer and _projection(w) == name]
                if here:
                    _rewrite(_module(model, layer, name), here)
    return model


def _projection(write: Write) -> str:
    """The projection a write goes into."""
    return "o_proj" if write.place.kind in ("attn_out", "head") else "down_proj"


def _module(model: Any, layer: int, name: str) -> nn.Linear:
    site = Site("head" if name == "o_proj" else "neuron", layer)
    module: Any = Layout.of(model).module(site)[0]
    return module  # type: ignore[no-any-return]


def _entangled(writes: Sequence[Write], reasons: Mapping[str, str]) -> dict[str, str]:
    """Head projections beside other rules at one ``o_proj``: their product is not the rules one after the other."""
    out = {}
    for write in writes:
        at = write.place.layer, _projection(write)
        others = [w.rule.name for w in writes if w is not write and (w.place.layer, _projection(w)) == at]
        if write.columns is not None and others and not reasons[write.rule.name]:
            out[write.rule.name] = f"rule {others[0]} writes the same o_proj (block {at[0]}); bake one, then the other"
    return out


def _no_bias(model: Any, adding: Sequence[Write], as_llama: bool) -> dict[str, str]:
    """Rules that need a bias the stock architecture does not have."""
    kind = Layout.of(model).model_type
    if as_llama and kind == "qwen2" and "sliding_attention" in getattr(model.config, "layer_types", []):
        return {w.rule.name: "this Qwen2 has sliding attention, which a Llama has not" for w in adding}
    if kind == "llama" or (as_llama and kind == "qwen2"):
        return {}
    why = {
        "qwen2": "set as_llama to write it as a Llama, which computes the same",
        "qwen3": "and its norms on queries and keys keep it from being written as a Llama",
    }[kind]
    return {w.rule.name: f"{_projection(w)} of a stock {kind} has no bias to add to; {why}" for w in adding}


def _as_llama(model: Any) -> Any:
    """A Qwen2 as LlamaForCausalLM: the same tensors under the same names, attention and MLP with biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if Layout.of(model).model_type != "qwen2":
        raise UserError(
            f"as_llama: a {Layout.of(model).model_type} is not written as a Llama; only a qwen2 needs to be"
        )
    old = model.config
    keys = LlamaConfig().to_dict().keys() & old.to_dict().keys()
    shared = {k: copy.deepcopy(getattr(old, k)) for k in keys - {"architectures", "model_type", "transformers_version"}}
    layout = Layout.of(model)
    config = LlamaConfig(**shared | {"attention_bias": True, "mlp_bias": False, "head_dim": layout.head_dim})
    with torch.device("meta"):
        new = LlamaForCausalLM(config)
    tensors = model.state_dict()
    for block in range(layout.n_layers):
        name = f"model.layers.{block}.self_attn.o_proj"
        tensors[f"{name}.bias"] = torch.zeros_like(tensors[f"{name}.weight"][:, 0])
    new.load_state_dict(tensors, strict=True, assign=True)
    new.model.rotary_emb = type(new.model.rotary_emb)(config).to(model.device)  # not in the state
    new.tie_weights()
    new.generation_config = copy.deepcopy(model.generation_config)
    return new.eval()


def _open_biases(model: Any, projections: Sequence[str]) -> None:
    """Give a Llama the biases these projections need, all 0, and say so in its config."""
    groups = {
        "o_proj": ("attention_bias", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        "down_proj": ("mlp_bias", "mlp", ("gate_proj", "up_proj", "down_proj")),
    }
    for projection in projections:
        flag, part, names = groups[projection]
        setattr(model.config, flag, True)
        for layer in Layout.of(model).layers:
            for name in names:
                linear: Any = getattr(getattr(layer, part), name)
                if linear.bias is None:
                    linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]), requires_grad=False)


def _rewrite(linear: nn.Linear, writes: Sequence[Write]) -> None:
    """Put the writes of one projection into it.

    What edits its input is taken in reverse order (the first to act is the innermost), then what edits its output, in
    order, and the residual last, as the block does.
    """
    weight = linear.weight.detach().float()
    bias = torch.zeros(len(weight), device=weight.device) if linear.bias is None else linear.bias.detach().float()
    inputs = [w for w in writes if w.place.kind in INDEXED]
    outputs = [w for w in writes if w.place.kind in ("attn_out", "mlp_out")]
    for write in [*inputs[::-1], *outputs, *[w for w in writes if w.place.kind == "residual"]]:
        weight, bias = _edited(weight, bias, write)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


def _edited(weight: torch.Tensor, bias: torch.Tensor, write: Write) -> tuple[torch.Tensor, torch.Tensor]:
    """``W [D, C]``, ``b [D]`` after one write."""
    strength, kind, vector = write.rule.strength.value, write.rule.action.kind, write.vector
    if write.place.kind not in INDEXED:
        along = vector[0]
        if kind == "add":
            return weight, bias + strength * along
        columns = slice(None) if write.columns is None else write.columns
        weight = weight.clone()
        weight[:, columns] -= strength * torch.outer(along, along @ weight[:, columns])
        return weight, bias if write.columns is not None else bias - strength * along * (along @ bias)
    index = torch.arange(weight.shape[1], device=weight.device) if write.index is None else write.index
    part = weight[:, index]
    if kind == "add":
        return weight, bias + part @ (strength * vector.flatten())
    if kind == "set":
        part = part * (1 - strength)
    else:
        grouped = part.unflatten(1, tuple(vector.shape))
        part = (grouped - strength * (grouped * vector).sum(-1, keepdim=True) * vector).flatten(1)
    return weight.index_copy(1, index, part), bias


def bake(config: BakeConfig) -> dict[str, Any]:
    """Stage ``inference bake``. Writes a plain Transformers folder whose logits are those of the hooked model."""
    from neureasoner.inference.steered import SteeredModel
    from neureasoner.model_files import model_files
    from neureasoner.models import fingerprint, resolve, stored_dtype

    source = Path(resolve(config.model))
    path = Path(config.plan) if config.plan else source / PLAN_FILE
    if not path.is_file():
        raise UserError(f"{source} holds no {PLAN_FILE}; name a plan file with plan")
    plan = Plan.load(path)
    plan = plan.select(config.rules) if config.rules else plan
    inputs = [path, *plan.files, *model_files(config.model)]
    folder = StageFolder(config.out, "inference bake", config, inputs=inputs)
    if folder.done:
        return folder.summary
    steered = SteeredModel.from_pretrained(config.model, plan, device="cpu", dtype=stored_dtype(config.model))
    options: dict[str, Any] = {"as_llama": config.as_llama, "accept": steered.accept}
    baked = bake_into(steered.model, steered.tokenizer, plan, steered.directions, **options)
    baked.save_pretrained(folder.path)
    steered.tokenizer.save_pretrained(folder.path)
    return folder.finish(
        {
            "rules": plan.names,
            "plan": plan.to_dict(),
            "architecture": type(baked).__name__,
            "fingerprint": fingerprint(baked),
            "inputs": file_fingerprint([path, *plan.files]),
        }
    )
