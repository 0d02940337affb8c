"""Settings of a ``generate`` call that leave nothing to a model folder's own defaults, the same in every room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neureasoner.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a response: the model's generation settings and the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]
    return list(dict.fromkeys([int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None]))


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of unlike length, each ``(B, longest)``, padded on the left."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], dtype=torch.long)
    return ids.to(device), mask.to(device)


def generation_config(
    model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """Settings that leave nothing to the model folder's defaults. Temperature 0 is greedy.

    Penalties that would run before the controller are off: the logits series is defined on raw logits.
    """
    from transformers import GenerationConfig

    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise UserError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], got {top_p}")
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=eos_ids(model, tokenizer),
        pad_token_id=pad,
        **drawn,
    )
