"""Shapes and dtypes of what the ops return, for tracing: the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.index import BlockIndex


def last_window_scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Shapes of `lowcontext.ops.vertical_slash.last_window_scores`."""
    shape = (q.shape[0], q.shape[1], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def line_index(
    vertical: Tensor,
    slash: Tensor,
    Lq: int,
    dense_from: Tensor | None,
    block: int,
    tiles: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of `lowcontext.ops.vertical_slash.line_index`."""
    B, H, Lk = vertical.shape
    _, Nq = BlockIndex.query_blocks(Lq, Lk, block)

    def empty(*shape: int) -> Tensor:
        return vertical.new_empty(shape, dtype=torch.int32)

    counts = empty(B, H, Nq), empty(B, H, Nq)
    return counts[0], empty(B, H, Nq, tiles), counts[1], empty(B, H, Nq, columns)
