"""What the block scores return, without computing it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.index import BlockIndex


def fake_scores(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Of pooled and of antidiagonal scores: [B, Hq, Nq, Nk]."""
    _, Nq = BlockIndex.query_blocks(q.shape[2], k.shape[2], block)
    return q.new_empty((*q.shape[:2], Nq, -(-k.shape[2] // block)), dtype=torch.float32)
