"""The buffers: growth, the host copy, and the logits series."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neureasoner.inference.series import LogitSeries, SeriesBuffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_copy_follows_growth(dtype):
    buffer, rows = SeriesBuffer(capacity=2), []
    assert buffer.host().size == 0
    for t in range(11):
        rows.append(torch.randn(3, 4).to(dtype))
        buffer.append(rows[-1])
        if t in (0, 1, 2, 3, 8, 10):
            host = buffer.host()
            assert host.dtype == np.float32 and host.shape == (3, t + 1, 4)
            np.testing.assert_array_equal(host, torch.stack(rows, 1).float().numpy())


def test_the_logits_series_is_entropy_and_surprisal_in_nats():
    series = LogitSeries()
    series.look(torch.tensor([[0.0, 0.0], [0.0, float("-inf")]]))
    series.draw(torch.tensor([1, 0]))
    np.testing.assert_allclose(series.buffer.host()[:, 0], [[np.log(2), np.log(2)], [0.0, 0.0]], atol=1e-7)
