"""Rows of the embedding and of the head that have no identity, and new ones for the tokens that are to be taught.

Tokens that a base never saw end up as one and the same vector: each got the same push away from all. (Of the tiny
reasoner's 632 rows 331 are one; the spare rows of large models are, too, or have next to no length.) While two tokens
share a vector the model cannot tell them apart, and learns their mixture: ``[FAILUREINTRA_]``. So rows without an
identity are drawn anew before training, from the distribution of the rows that have one.

Legend: ``V`` rows of a matrix, ``D`` their width, ``N`` tokens in question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

SAME = 0.99  # cosine above which two rows are one vector; trained rows stay below (0.97 in the tiny reasoner)
SHORT = 0.1  # of the median length: a row that was never trained, or only decayed
FEWEST = 16  # rows with an identity that a distribution is read from
APART = 0.15  # of a row's length: how far rows that would start as one vector are moved apart
NUMBERS = 1 << 24  # cosines held at a time


def matrices(model: Any) -> dict[str, Any]:
    """``{"input": weights [V, D], "output": weights [V, D]}``, the input alone where both are one matrix."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {"input": embed.weight}
    if head is not None and head.weight is not embed.weight:
        found["output"] = head.weight
    return found


def gathered(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """Whole parameters inside, which rank 0's values leave; under anything but ZeRO-3 they are whole anyway."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)  # type: ignore[no-any-return]


def faceless(matrix: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Which of ``tokens`` have no row of their own in ``matrix [V, D]``: bool ``[N]``.

    Their row points where another row points (cosine above ``SAME``), or is next to nothing. Holds no ``[V, V]``.
    """
    rows = matrix.detach()[list(tokens)].float()
    length = rows.norm(dim=1)
    unit = rows / length.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    alike = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    lengths = []
    size = max(1, NUMBERS // max(len(rows), matrix.shape[1]))
    for begin in range(0, matrix.shape[0], size):
        block = matrix.detach()[begin : begin + size].float()
        lengths.append(block.norm(dim=1))
        alike += (unit @ block.T > SAME * lengths[-1]).sum(1)
    usual = max(float(torch.cat(lengths).median()), float(length.median()))
    return (alike > 1) | (length < SHORT * usual)  # each row is like itself


def drawn(healthy: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """``n`` rows from the distribution of ``healthy [H, D]``: its mean and deviations, its median length."""
    noise = torch.randn(n, healthy.shape[1], generator=generator).to(healthy.device)
    rows = healthy.mean(0) + healthy.std(0) * noise
    wanted = healthy.norm(dim=1).median()
    return rows * (wanted / rows.norm(dim=1, keepdim=True))


def lost_rows(model: Any, tokens: Sequence[int]) -> dict[str, list[int]]:
    """``{matrix: those of tokens without an identity}``; each matrix is looked at alone, of tied ones there is one."""
    tokens = sorted(set(tokens))
    weights = matrices(model)
    with gathered(list(weights.values())):
        return {
            name: [t for t, lost in zip(tokens, faceless(matrix, tokens).tolist(), strict=True) if lost]
            for name, matrix in weights.items()
            if tokens
        }


def redraw(model: Any, tokens: Sequence[int], lost: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, list[int]]:
    """Draw the rows ``lost`` anew, from the distribution of the rows of the other ``tokens``; returns what was drawn.

    Nothing else changes. A matrix stays as it is where fewer than ``FEWEST`` tokens have rows to go by. Matrices that
    ZeRO-3 has split are gathered.
    """
    generator = torch.Generator().manual_seed(seed)
    weights, done = matrices(model), {}
    with torch.no_grad(), gathered(list(weights.values())):
        for name, ids in lost.items():
            matrix = weights[name]
            healthy = matrix[sorted(set(tokens) - set(ids))].float()
            if ids and len(healthy) >= FEWEST:
                done[name] = list(ids)
                matrix[done[name]] = drawn(healthy, len(ids), generator).to(matrix.dtype)
    return done


def part(model: Any, tokens: Sequence[int], seed: int = 0) -> list[int]:
    """Move rows of ``tokens`` apart that are one vector, by a small step each; returns the tokens that were.

    The steps add up to nothing, so two rows that start at a mean have that mean between them. A second call changes
    nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    moved: set[int] = set()
    weights = list(matrices(model).values())
    with torch.no_grad(), gathered(weights):
        for matrix in weights:
            rows = matrix[list(tokens)].float()
            unit = torch.nn.functional.normalize(rows, dim=1)
            one = ((unit @ unit.T) > SAME).sum(1) > 1
            ids = [t for t, is_one in zip(tokens, one.tolist(), strict=True) if is_one]
            if ids:
                step = torch.randn(len(ids), rows.shape[1], generator=generator).to(rows.device)
                step = torch.nn.functional.normalize(step - step.mean(0), dim=1)
                matrix[ids] = (rows[one] + APART * rows[one].norm(dim=1, keepdim=True) * step).to(matrix.dtype)
                moved |= set(ids)
    return sorted(moved)


def told(found: Mapping[str, Sequence[int]], tokenizer: Any, shown: int = 12) -> str:
    """``'FAILURE', '_', …`` of the tokens found in any matrix."""
    ids = sorted({i for part in found.values() for i in part})
    names = [repr(tokenizer.convert_ids_to_tokens(i)) for i in ids[:shown]]
    return ", ".join(names) + (", …" if len(ids) > shown else "")
