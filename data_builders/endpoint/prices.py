"""What tokens cost: a small table that the user can edit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neureasoner.config import read_mapping
from neureasoner.data_builders.endpoint.config import EndpointConfig
from neureasoner.data_builders.endpoint.requests import Usage
from neureasoner.errors import UserError

SHIPPED = Path(__file__).with_name("prices.yaml")
_DATED = re.compile(r"-\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True)
class Price:
    """USD per one million tokens; ``batch`` is the factor of the Batch API."""

    input: float
    output: float
    cached: float
    batch: float = 1.0

    def cost(self, usage: Usage, batch: bool = False) -> float:
        """USD for ``usage``. Cached input is charged at its own rate."""
        cached = min(usage.cached_input, usage.input)
        full = (usage.input - cached) * self.input + cached * self.cached + usage.output * self.output
        return full * (self.batch if batch else 1.0) / 1e6


def read_prices(path: str | Path = "") -> dict[str, Price]:
    """Read a price table (the shipped one by default). Raises UserError naming the model and the key."""
    path = Path(path or SHIPPED)
    models = read_mapping(path).get("models")
    if not isinstance(models, dict):
        raise UserError(f"{path}: expected a key 'models' with one entry per model")
    return {str(name): _entry(f"{path}: model '{name}'", row) for name, row in models.items()}


def _entry(where: str, row: Any) -> Price:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected input, output and perhaps cached and batch, got {row!r}")
    unknown = set(row) - {"input", "output", "cached", "batch"}
    if unknown:
        raise UserError(f"{where}: key '{sorted(map(str, unknown))[0]}' is unknown")
    for key in ("input", "output"):
        if key not in row:
            raise UserError(f"{where}: key '{key}' is missing")
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UserError(f"{where}: key '{key}' must be a number of USD, got {value!r}")
    return Price(
        float(row["input"]),
        float(row["output"]),
        float(row["cached"] if "cached" in row else row["input"]),
        float(row.get("batch", 1.0)),
    )


def price_of(config: EndpointConfig) -> Price | None:
    """The price of the configured model; None when the table does not know it.

    Raises UserError when it is unknown and ``max_cost`` is set: a limit that cannot be kept is refused, not ignored.
    """
    table = read_prices(config.prices)
    price = table.get(config.model) or table.get(_DATED.sub("", config.model))
    if price is None and config.max_cost:
        raise UserError(
            f"key 'max_cost': the price of '{config.model}' is unknown; "
            f"add it to a price table of your own and give that as 'prices' (a copy of {SHIPPED.name} to start from)"
        )
    return price
