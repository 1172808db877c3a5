"""Oracle top-k: the keys with the most softmax mass, found by reading all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods.base import LayerContext, Method
from lowcontext.ops import votes

# Numbers in the scores of one call (64 MiB).
_SCORES = 2**24


@dataclass(frozen=True)
class Oracle(Method):
    """Reads the keys that hold the most softmax mass. A yardstick: it scores every key, slowly.

    Top-k attention (Gupta et al., arXiv 2106.06899) by exact weights. What a method loses and the
    oracle keeps at the same budget is lost by its selection; what both lose does not fit the
    budget. One list serves a block of queries and the query heads of a KV head: the keys with the
    largest sums of softmax weights over both, and always the block's own keys. It costs more than
    dense attention, and its density counts what attention reads, not what was scored. The largest
    mass need not give the smallest error of the output.

    Args:
        budget: keys that a query reads, the block of queries included.
        block_q: queries that share a list in prefill; in decode each has its own.
    """

    name: ClassVar[str] = "oracle"

    budget: int = 2048
    block_q: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(block_q=1, budget=self.block_q)

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of blocks of queries."""
        return self._index(q, k, layer, self.block_q)

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of each query."""
        return self._index(q, k, layer, 1)

    def _index(self, q: Tensor, k: Tensor, layer: LayerContext, block_q: int) -> BlockIndex | None:
        Lq, Lk = q.shape[2], k.shape[2]
        if self.budget >= Lk:
            return None
        offset, width = Lk - Lq, self.budget - block_q
        first, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
        everything = torch.arange(width, dtype=torch.int32, device=k.device)
        lists = []
        for start in range(first * block_q, Lk, block_q):
            end = min(start + block_q, Lk)
            if start > width:
                rows = q[:, :, max(start - offset, 0) : end - offset]
                mass = _mass(rows.float(), k[:, :, :end], layer)
                lists.append(votes.topk(mass[..., :start], width))
            else:
                count = torch.full(k.shape[:2], start, dtype=torch.int32, device=k.device)
                lists.append((everything.expand(*k.shape[:2], -1), count))
        columns, counts = (torch.stack(x, dim=2) for x in zip(*lists, strict=True))
        own = torch.arange(first, first + Nq, dtype=torch.int32, device=k.device) * block_q
        return BlockIndex(
            torch.ones_like(counts),
            own[:, None].expand(*counts.shape, 1),
            (block_q, block_q),
            counts,
            columns,
        )


def _mass(q: Tensor, k: Tensor, layer: LayerContext) -> Tensor:
    """Softmax weights of each key, summed over the queries and the heads of a KV head.

    Args:
        q: fp32 [B, Hq, R, D], the last R positions; k: [B, Hkv, N, D].
        layer: where this runs.

    Returns:
        fp32 [B, Hkv, N].
    """
    B, Hq, R, _ = q.shape
    Hkv, N = k.shape[1:3]
    mass = torch.zeros(B, Hkv, N, device=k.device)
    at_once = max(1, _SCORES // (B * Hq * N))
    for row in range(0, R, at_once):
        end = min(row + at_once, R)
        seen = N - (R - end)
        scores, lse = votes.token_scores(q[:, :, row:end], k[:, :, :seen], scale=layer.scale)
        if layer.softcap is not None:
            capped = layer.softcap * torch.tanh(scores / layer.softcap)
            scores = torch.where(scores == -torch.inf, scores, capped)
            lse = scores.logsumexp(dim=-1)
        weights = votes.soft_vote(scores, lse, heads=Hkv)
        mass[..., :seen] += weights.clamp(min=0).sum(dim=2)
    return mass
