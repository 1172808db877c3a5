"""Top-k key blocks by mean-pooled scores, the simplest content-based selection.

The block-sparse pattern of MInference (Jiang et al., arXiv 2407.02490, section 3.2) with sink and
local blocks always read; the same pooling scores single queries in decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._select import block_statistics, on_device
from lowcontext.methods.base import LayerContext, Method
from lowcontext.ops import votes
from lowcontext.ops.block_scores import block_means
from lowcontext.ops.lists import tile_lists


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
        forced = self._sinks + self._most_local(self.block_q)
        if self.budget // self.block_k < forced:
            raise ValueError(
                f"block_topk: budget: expected at least {forced * self.block_k}, the keys that are "
                f"always read, got {self.budget}"
            )

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index by pooled queries and pooled keys."""
        Lq, Lk, width, block_q = q.shape[2], k.shape[2], self.block_k, self.block_q
        limit = self.budget // width
        if limit * width >= Lk:
            return None
        means = block_statistics(layer.memory, k, width, block_means)
        first, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
        block = torch.arange(first, first + Nq, device=q.device)
        row0 = (block * block_q).clamp(min=Lk - Lq)
        row1 = ((block + 1) * block_q).clamp(max=Lk)
        local0 = (row0 - self.local).clamp(min=0) // width  # first local block
        local1 = (row1 - 1) // width  # block of the last query
        sinks = (local1 + 1).clamp(max=self._sinks)
        local0 = torch.maximum(local0, sinks)
        forced = sinks + local1 + 1 - local0  # [Nq]
        pooled = block_means(q, block_q, offset=Lk - Lq)
        scores = self._candidates(pooled, means, local0)
        limits = (limit - forced).expand(scores.shape[:3])
        ids, counts = votes.topk(scores, limit, limits=limits, first=self._sinks)
        return _merge(ids, counts, sinks, local0, local1, limit, (block_q, width))

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index by each query and pooled keys."""
        Lq, Lk, width = q.shape[2], k.shape[2], self.block_k
        limit = self.budget // width
        if limit * width >= Lk:
            return None
        means = block_statistics(layer.memory, k, width, block_means)
        queries = range(Lk - Lq, Lk)
        local0 = [max((i - self.local) // width, self._sinks) for i in queries]
        most = [
            limit - self._sinks - (i // width + 1 - j) for i, j in zip(queries, local0, strict=True)
        ]
        limits = None
        if local0[0] == local0[-1]:
            scores, _ = votes.token_scores(q, means[:, :, self._sinks : local0[-1]], causal=False)
        else:
            scores = self._candidates(q, means, on_device(local0, q.device))
        if min(most) != max(most):  # ends may agree where rows between them do not
            limits = on_device(most, q.device).expand(scores.shape[:3])
        pages = votes.topk(scores, max(most), limits=limits, first=self._sinks)
        low, sink = Lk - 1 - self.local, self._sinks * width
        lists = tile_lists(k, Lq, width=width, low=low, sink=sink, align=width, pages=pages)
        return BlockIndex(*lists, (1, width))

    @property
    def _sinks(self) -> int:
        return -(-self.sink // self.block_k)

    def _most_local(self, block_q: int) -> int:
        return (self.local + block_q - 2) // self.block_k + 2

    def _candidates(self, q: Tensor, means: Tensor, local0: Tensor) -> Tensor:
        """Scores of the blocks behind the sink, -inf from local block local0 [rows] on."""
        scores, _ = votes.token_scores(q, means[:, :, self._sinks :], causal=False)
        blocks = torch.arange(self._sinks, means.shape[2], device=q.device)
        return scores.masked_fill(blocks >= local0[:, None], -torch.inf)


def _merge(
    ids: Tensor,
    counts: Tensor,
    sinks: Tensor,
    local0: Tensor,
    local1: Tensor,
    limit: int,
    block_size: tuple[int, int],
) -> BlockIndex:
    """Sink blocks [0, sinks), the chosen ids, then local blocks [local0, local1] as one list."""
    slot = torch.arange(limit, device=ids.device)
    sinks, local0, local1 = (x.int()[:, None] for x in (sinks, local0, local1))  # [Nq, 1]
    chosen = counts[..., None]  # [B, Hq, Nq, 1]
    rank = (slot - sinks).clamp(0, max(ids.shape[3] - 1, 0)).expand(*counts.shape, limit)
    middle = ids.gather(3, rank) if ids.shape[3] else slot.int()
    blocks = torch.where(slot < sinks, slot.int(), middle)
    tail = slot.int() - sinks - chosen + local0
    blocks = torch.where(slot < sinks + chosen, blocks, tail)
    total = (sinks + chosen + local1 + 1 - local0)[..., 0]
    return BlockIndex(total.to(torch.int32), blocks * block_size[1], block_size)
