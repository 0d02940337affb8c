"""How a token is chosen, and which tokens end a response: the same in every room, nothing left to a model folder.

A folder's ``generation_config.json`` may hold penalties, banned words, cache settings and much else; of all that only
the list of end tokens is used (``eos_ids``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from neureasoner.errors import UserError

if TYPE_CHECKING:
    import torch


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a response: the model's generation settings' (Llama 3 and Qwen list several) and the tokenizer's.

    Empty where neither knows one: then a response ends at its token limit only.
    """
    listed: list[Any] = []
    for source in (getattr(model, "generation_config", None), tokenizer):
        ids: Any = getattr(source, "eos_token_id", None)
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        listed += list(ids) if isinstance(ids, list | tuple | set) else [ids]
    found = [i for i in listed if i is not None]
    wrong = [i for i in found if not isinstance(i, Integral) or isinstance(i, bool)]
    if wrong:
        raise UserError(f"eos_token_id holds {wrong[0]!r}; it has to be an id or a list of ids")
    return list(dict.fromkeys(map(int, found)))


def pad_id(tokenizer: Any, ends: Sequence[int] = ()) -> int:
    """The id that fills rows up; masked wherever it stands, so any will do where the tokenizer names none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(ends[0]) if ends else 0


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of unlike length, each ``(B, longest)``, padded on the left."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], dtype=torch.long)
    return ids.to(device), mask.to(device)


def check_whole(key: str, value: Any, least: int | None = None) -> None:
    """Raises UserError naming a setting that is no whole number, or less than it has to be."""
    if not isinstance(value, Integral) or isinstance(value, bool) or (least is not None and value < least):
        limit = "" if least is None else f" and at least {least}"
        raise UserError(f"{key} must be a whole number{limit}, got {value!r}")


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a response are chosen. Raises UserError naming the setting that is out of range.

    max_new_tokens  at most so many, forced ones included
    temperature     0 takes the likeliest token (greedy)
    top_p, top_k, min_p  cut the distribution to its likeliest part, in Transformers' sense and order; 1, 0, 0: not
    """

    max_new_tokens: int = 512
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("top_k", self.top_k, 0)  # 0: all tokens
        for key in ("temperature", "top_p", "min_p"):
            value = getattr(self, key)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise UserError(f"{key} must be a number, got {value!r}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p must lie in [0, 1), got {self.min_p}")

    @cached_property
    def _warpers(self) -> list[Any]:
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        chain: list[Any] = []
        if self.temperature not in (0, 1):
            chain.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature and self.top_k:
            chain.append(TopKLogitsWarper(int(self.top_k)))
        if self.temperature and self.top_p < 1:
            chain.append(TopPLogitsWarper(self.top_p))
        if self.temperature and self.min_p:
            chain.append(MinPLogitsWarper(self.min_p))
        return chain

    def warped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[B, V]`` -> those that the token is drawn from, cut-off tokens at minus infinity."""
        for warper in self._warpers:
            scores = warper(None, scores)
        return scores

    def choose(self, warped: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Warped scores ``[B, V]`` -> a token for each row, ``[B]``."""
        import torch

        if not self.temperature:
            return warped.argmax(-1)
        return torch.multinomial(torch.softmax(warped, -1), 1, generator=generator)[:, 0]
