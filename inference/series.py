"""Buffers for what is read while decoding. B rows, T response tokens, C channels, V vocabulary.

Row ``t`` of a series belongs to response token ``t`` (docs/architecture.md, Conventions).
"""

from __future__ import annotations

import numpy as np
import torch


class SeriesBuffer:
    """A growing ``[B, Tmax, C]`` store on the model's device, with a host copy that is brought up to date on demand.

    One device write per token for the whole batch; the host copy (a synchronisation on a GPU) happens only when a row
    needs features, and copies each value once. On a CPU in float32 there is no second copy.
    """

    def __init__(self, capacity: int = 256):
        self._capacity = capacity
        self._data: torch.Tensor | None = None
        self._host: np.ndarray | None = None
        self._synced = 0
        self.length = 0

    def append(self, value: torch.Tensor, rows: torch.Tensor | None = None, batch: int | None = None) -> None:
        """Add one token's values. value [B, C], or [L, C] with the ``rows`` they are of; the others get nothing.

        ``batch``: B, which a first value of [L, C] does not tell.
        """
        value = value.detach()
        if self._data is None:
            size = value.shape[0] if batch is None else batch
            self._data = value.new_empty((size, self._capacity, value.shape[1]))
        elif self.length == self._data.shape[1]:
            self._data = torch.cat([self._data, torch.empty_like(self._data)], 1)
            self._host = None if self._shared else self._host
        if rows is None:
            self._data[:, self.length] = value
        else:
            self._data[rows.to(value.device), self.length] = value
        self.length += 1

    @property
    def _shared(self) -> bool:
        return self._data is not None and self._data.device.type == "cpu" and self._data.dtype == torch.float32

    def host(self) -> np.ndarray:
        """Everything so far as float32 on the host, [B, T, C]. Valid until the next ``append``."""
        if self._data is None:
            return np.zeros((0, 0, 0), np.float32)
        if self._shared:
            if self._host is None:
                self._host = self._data.numpy()
            return self._host[:, : self.length]
        if self._host is None or self._host.shape[1] < self.length:
            grown = np.zeros(tuple(self._data.shape), np.float32)
            if self._host is not None:
                grown[:, : self._synced] = self._host[:, : self._synced]
            self._host = grown
        if self._synced < self.length:
            new = self._data[:, self._synced : self.length].to("cpu", torch.float32)
            self._host[:, self._synced : self.length] = new.numpy()
            self._synced = self.length
        return self._host[:, : self.length]


class LogitSeries:
    """The ``logits`` series: (entropy of the distribution a token was drawn from, -log p of the token), in nats.

    At temperature 1 on raw logits: ``look`` is called with the model's own scores before any other processing.
    """

    def __init__(self) -> None:
        self.buffer = SeriesBuffer()
        self._entropy: torch.Tensor | None = None
        self._logp: torch.Tensor | None = None

    def look(self, scores: torch.Tensor) -> None:
        """Keep the distribution of the token about to be drawn. scores [B, V]."""
        self._logp = torch.log_softmax(scores.float(), -1)
        self._entropy = torch.special.entr(self._logp.exp()).sum(-1)

    def draw(self, tokens: torch.Tensor) -> None:
        """Append the row of the tokens that were drawn from it. tokens [B]."""
        assert self._logp is not None and self._entropy is not None
        chosen = -self._logp.gather(1, tokens[:, None].to(self._logp.device))[:, 0]
        self.buffer.append(torch.stack([self._entropy, chosen], 1))
