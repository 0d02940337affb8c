"""Plans and the controller that runs them while a model generates.

``SteeredModel``, ``Plan`` and ``Controller`` can be imported from here; torch is loaded when one of them is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neureasoner.inference.controller import Controller
    from neureasoner.inference.plan import Plan
    from neureasoner.inference.steered import SteeredModel

__all__ = ["Controller", "Plan", "SteeredModel"]

_HOME = {"Controller": "controller", "Plan": "plan", "SteeredModel": "steered"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"neureasoner.inference.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
