"""Dense never makes an index."""

from __future__ import annotations

import torch

from lowcontext import LayerContext, get_method


def test_dense_reads_everything_in_both_phases() -> None:
    q, k = torch.randn(1, 2, 500, 8), torch.randn(1, 2, 500, 8)
    assert list(get_method("dense").parts(q, k, LayerContext())) == [(0, 500, None)]
    assert list(get_method("dense").parts(q[:, :, :1], k, LayerContext())) == [(0, 1, None)]
