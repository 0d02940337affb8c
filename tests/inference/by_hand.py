"""Steering written by hand, on bare module names: the oracle that plans are held against; and short ways to run a plan.

``edits`` maps ``(part, block)`` to ``fn(value [B, T, C], seen ids [B, T], prefill) -> value``; parts are the modules'
own places: ``residual`` (output of the block), ``attn_out``, ``mlp_out``, ``neuron`` (input of down_proj), ``head``
(input of o_proj).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from neureasoner.directions import Direction
from neureasoner.forward import cache_argument
from neureasoner.inference.controller import Controller
from neureasoner.inference.decode import Generation, generate_batch
from neureasoner.inference.plan import Action, Plan, Rule, Strength, Trigger

Edit = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def install(model: Any, edits: Mapping[tuple[str, int], Edit]) -> list[Any]:
    """Hooks for one ``generate`` call, and one that keeps the ids of the forward. Returns the handles."""
    state: dict[str, Any] = {"ids": None, "calls": 0}

    def keep(_: Any, args: tuple[Any, ...]) -> None:
        state["ids"], state["calls"] = args[0], state["calls"] + 1

    handles = [model.model.embed_tokens.register_forward_pre_hook(keep)]
    for (part, block), fn in edits.items():
        layer = model.model.layers[block]
        if part in ("neuron", "head"):
            module = layer.mlp.down_proj if part == "neuron" else layer.self_attn.o_proj

            def pre(_: Any, args: tuple[Any, ...], fn: Edit = fn) -> tuple[Any, ...]:
                return (fn(args[0].clone(), state["ids"], state["calls"] == 1),)

            handles.append(module.register_forward_pre_hook(pre))
        else:
            module = {"residual": layer, "attn_out": layer.self_attn, "mlp_out": layer.mlp}[part]

            def post(_: Any, __: Any, out: Any, fn: Edit = fn) -> Any:
                value = out[0] if isinstance(out, tuple) else out
                new = fn(value.clone(), state["ids"], state["calls"] == 1)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            handles.append(module.register_forward_hook(post))
    return handles


def greedy(
    model: Any, prompt: list[int], tokens: int, edits: Mapping[tuple[str, int], Edit], eos: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding of one prompt with the KV cache, in an own loop: ids, and the logits behind each ``[n, V]``."""
    handles = install(model, edits)
    try:
        ids, logits, cache = [], [], None
        given = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(tokens):
                out = model(given, use_cache=True, **{cache_argument(model): cache})
                cache = getattr(out, cache_argument(model))
                logits.append(out.logits[0, -1])
                ids.append(int(logits[-1].argmax()))
                if ids[-1] == eos:
                    break
                given = torch.tensor([[ids[-1]]])
        return ids, torch.stack(logits)
    finally:
        for handle in handles:
            handle.remove()


def rule(action: Mapping[str, Any], trigger: Mapping[str, Any] | None = None, **parts: Any) -> Rule:
    """A rule named ``r`` on direction ``d`` unless said otherwise."""
    settings: dict[str, Any] = {"direction": "d", "name": "r"} | parts
    if isinstance(settings.get("strength"), Mapping):
        settings["strength"] = Strength(**settings["strength"])
    return Rule(trigger=Trigger(**(trigger or {"always": True})), action=Action(**action), **settings)


def steer(model: Any, tokenizer: Any, prompts: Any, plan: Any, directions: Any, **settings: Any) -> list[Generation]:
    """``generate_batch`` under a plan or a rule; greedy and 24 tokens unless said otherwise."""
    plan = Plan("test", (plan,)) if isinstance(plan, Rule) else plan
    known = {"d": directions} if isinstance(directions, Direction) else directions
    made = {k: settings.pop(k) for k in ("probes", "oracles", "gates", "record") if k in settings}
    controller = Controller(model, tokenizer, plan, directions=known, **made)
    settings = {"max_new_tokens": 24, "temperature": 0.0, "seed": 1} | settings
    return generate_batch(model, tokenizer, prompts, controller=controller, **settings)


def logits_of(model: Any, tokenizer: Any, prompt: list[int], plan: Any, directions: Any, n: int = 24) -> Any:
    """Ids and the raw logits ``[n, V]`` of a steered greedy generation of one prompt."""
    plan = Plan("test", (plan,)) if isinstance(plan, Rule) else plan
    known = {"d": directions} if isinstance(directions, Direction) else directions
    controller = Controller(model, tokenizer, plan, directions=known)
    with controller.watch([prompt]) as watch:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=GenerationConfig(
                max_new_tokens=n, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([watch]),
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.stack(out.logits)[:, 0]


def at_last(fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The edit at the last position of each forward, written as a loop over rows."""

    def edit(x: torch.Tensor, ids: torch.Tensor, prefill: bool) -> torch.Tensor:
        for row in range(len(x)):
            x[row, -1] = fn(x[row, -1])
        return x

    return edit


def everywhere(fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The edit at every position of each forward, position by position."""

    def edit(x: torch.Tensor, ids: torch.Tensor, prefill: bool) -> torch.Tensor:
        for row in range(len(x)):
            for t in range(x.shape[1]):
                x[row, t] = fn(x[row, t])
        return x

    return edit
