"""Top-k key blocks by mean-pooled scores, the simplest content-based selection.

The block-sparse pattern of MInference (Jiang et al., arXiv 2407.02490, section 3.2) with sink and
local blocks always read; the same pooling scores single queries in decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._select import block_statistics, top_k_mask
from lowcontext.methods.base import LayerContext, Method


@dataclass(frozen=True)
class BlockTopK(Method):
    """Reads the `budget // block_k` key blocks whose mean key scores highest, per query head.

    score(n, m) = mean of the queries of block n . mean of the keys of block m. The sink block and
    the blocks that hold the local window and the queries themselves are always read and count
    towards the budget. Only complete blocks of the past are scored.

    Args:
        budget: keys that a block of queries reads, forced ones included.
        sink: keys at the start that are always read, rounded up to whole blocks.
        local: keys before the block of queries that are always read, rounded out to whole blocks.
        block_q: queries per block in prefill.
        block_k: keys per block.
    """

    name: ClassVar[str] = "block_topk"

    budget: int = 2048
    sink: int = 64
    local: int = 256
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(budget=1, sink=0, local=0, block_q=1, block_k=1)
        forced = -(-self.sink // self.block_k) + self._most_local(self.block_q)
        if self.budget // self.block_k < forced:
            raise ValueError(
                f"block_topk: budget: expected at least {forced * self.block_k}, the keys that are "
                f"always read, got {self.budget}"
            )

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index by pooled queries and pooled keys."""
        return self._index(q, k, layer, self.block_q)

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index by each query and pooled keys."""
        return self._index(q, k, layer, 1)

    def _most_local(self, block_q: int) -> int:
        return (self.local + block_q - 2) // self.block_k + 2

    def _index(self, q: Tensor, k: Tensor, layer: LayerContext, block_q: int) -> BlockIndex | None:
        Lq, Lk, width = q.shape[2], k.shape[2], self.block_k
        limit = self.budget // width
        if limit * width >= Lk:
            return None
        means = block_statistics(layer.memory, k, width, lambda keys: keys.mean(dim=3))
        pooled = _pool_queries(q, Lk - Lq, block_q)  # [B, Hq, Nq, D]
        grouped = rearrange(pooled, "b (h g) n d -> b h (g n) d", h=k.shape[1])
        scores = grouped @ means.transpose(2, 3)
        scores = rearrange(scores, "b h (g n) m -> b (h g) n m", n=pooled.shape[2])

        first, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
        Nk = -(-Lk // width)
        block = torch.arange(first, first + Nq, device=q.device)
        row0 = (block * block_q).clamp(min=Lk - Lq)
        row1 = ((block + 1) * block_q).clamp(max=Lk)
        local0 = ((row0 - self.local).clamp(min=0) // width)[:, None]  # first local block
        local1 = ((row1 - 1) // width)[:, None]  # block of the last query
        m = torch.arange(Nk, device=q.device)
        sinks = -(-self.sink // width)
        forced = ((m >= local0) & (m <= local1)) | ((m < sinks) & (m <= local1))  # [Nq, Nk]
        candidates = (m < local0) & (m >= sinks)
        complete = means.shape[2]
        scores = scores.masked_fill(~candidates[:, :complete], -torch.inf)
        keep = forced.expand(*scores.shape[:2], Nq, Nk).clone()
        keep[..., :complete] |= top_k_mask(scores, limit - forced.sum(-1), limit)
        return BlockIndex.from_blocks(keep, (block_q, width), limit)


def _pool_queries(q: Tensor, offset: int, block_q: int) -> Tensor:
    """fp32 mean of the queries of each block anchored at position 0: [B, Hq, Nq, D]."""
    if block_q == 1:
        return q.float()
    B, H, Lq, D = q.shape
    first, Nq = BlockIndex.query_blocks(Lq, offset + Lq, block_q)
    block = torch.arange(offset, offset + Lq, device=q.device) // block_q - first
    sums = q.new_zeros(B, H, Nq, D, dtype=torch.float32).index_add_(2, block, q.float())
    rows = torch.zeros(Nq, device=q.device).index_add_(0, block, torch.ones(Lq, device=q.device))
    return sums / rows[:, None]
