"""Training-free baselines with the interface of a ``SteeredModel`` (core.md §5; docs/baselines.md).

Usage::

    model = baseline("alpha_one", model, tokenizer, n_think=410.0)
    [answer] = model.generate(["What is 17 + 25 * 3?"], max_new_tokens=512, seed=1)

Torch is loaded when a baseline is built. The vote of Self-Consistency is ``evaluation.metrics.majority``: it belongs to
the evaluation, because it needs answers and not tokens.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from neureasoner.errors import UserError

if TYPE_CHECKING:
    from neureasoner.inference.steered import SteeredModel

# Name of a baseline -> module of this package whose function of that name builds it.
BASELINES = {
    "vanilla": "plans",
    "no_thinking": "plans",
    "thinking_budget": "plans",
    "wait_penalty": "plans",
    "budget_forcing": "budget",
    "think_or_not": "think_or_not",
    "alpha_one": "alpha_one",
}


def baseline(name: str, model: Any, tokenizer: Any, **settings: Any) -> SteeredModel:
    """A baseline by name, with its settings (docs/baselines.md).

    Raises UserError for an unknown name, an unknown or missing setting, or what the tokenizer cannot spell.
    """
    if name not in BASELINES:
        raise UserError(f"unknown baseline {name!r}; known: {', '.join(BASELINES)}")
    build = getattr(import_module(f"{__name__}.{BASELINES[name]}"), name)
    known = list(inspect.signature(build).parameters.values())[2:]
    for key in settings:
        if key not in [p.name for p in known]:
            takes = ", ".join(p.name for p in known) or "none"
            raise UserError(f"baseline {name} has no setting {key!r}; it takes {takes}")
    for p in known:
        if p.default is inspect.Parameter.empty and p.name not in settings:
            raise UserError(f"baseline {name} needs the setting {p.name!r}")
    steered: SteeredModel = build(model, tokenizer, **settings)
    return steered
