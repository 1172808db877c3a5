"""What the block scores return, without computing it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.index import BlockIndex


def fake_scores(q: Tensor, k: Tensor, block: int) -> Tensor:
    """[B, Hq, Nq, Nk]."""
    _, Nq = BlockIndex.query_blocks(q.shape[2], k.shape[2], block)
    return q.new_empty((*q.shape[:2], Nq, -(-k.shape[2] // block)), dtype=torch.float32)


def fake_means(x: Tensor, block: int, offset: int) -> Tensor:
    """[B, H, n, D]."""
    _, blocks = BlockIndex.query_blocks(x.shape[2], offset + x.shape[2], block)
    return x.new_empty((*x.shape[:2], blocks, x.shape[3]), dtype=torch.float32)
