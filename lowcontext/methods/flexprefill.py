"""FlexPrefill (Lai et al., arXiv 2502.20766): sparsity found per head and prompt, in prefill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._select import diagonal_sums, top_k_mask
from lowcontext.methods.base import LayerContext, Method, Part, is_decoding
from lowcontext.ops.block_scores import pooled_scores
from lowcontext.ops.vertical_slash import last_window_scores
from lowcontext.ops.votes import mass_mask

# A part has at most this many (query block, key block) pairs over all heads, and this many queries.
_PART_PAIRS = 2**24
_PART_QUERIES = 8192


@dataclass(frozen=True)
class FlexPrefill(Method):
    """Reads as many block columns and block diagonals as hold `gamma` of the last queries' weight.

    Per query head: the last `block` queries give vertical and slash sums; as many tokens as hold
    `gamma` of each, in blocks, are the head's numbers of block columns and block diagonals, the
    best of which are read. Where mean-pooled queries and keys predict the vertical sums well
    (square root of the Jensen-Shannon divergence below `tau`), the head is query-aware: columns
    and diagonals fall to `min_budget`, and each block of queries adds the blocks that hold `gamma`
    of its pooled attention. Column 0 and the diagonal are always read. Decode is
    dense, as published.

    Ours where the published code differs: slash sums go to block diagonals by the share of rows in
    which they lie there, at any prompt length; budgets are counted in `block`, whatever it is;
    pooled attention is cut per block of queries, not over the whole matrix.

    Args:
        gamma: share of the estimated attention to read, above 0; from 1 on, everything.
        tau: divergence below which a head is query-aware; 0 turns that off.
        min_budget: keys per query that columns and diagonals each read at least.
        max_budget: keys per query that they each read at most; 0 for no limit.
        block: queries per block and keys per tile; also the window of the estimate.
        min_length: leave contexts of fewer keys dense.
    """

    name: ClassVar[str] = "flexprefill"
    query_chunk: ClassVar[int] = 0

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int = 0
    block: int = 128
    min_length: int = 3072

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(min_budget=0, max_budget=0, block=1)
        self._expect_numbers("gamma", above_0=True)
        self._expect_numbers("tau")
        if self.block > 256:
            raise ValueError(f"flexprefill: block: expected at most 256, got {self.block}")

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the whole prompt; `parts` gives it in pieces."""
        return self._index(q, k, layer, *self._lines(q, k, layer))

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: FlexPrefill reads densely in decode."""
        return None

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """Columns and diagonals chosen once, the index of some query blocks at a time."""
        B, H, Lq, _ = q.shape
        Lk = k.shape[2]
        dense = layer.layer_idx < self.dense_layers or Lk < self.min_length
        if dense or is_decoding(Lq, Lk):
            yield 0, Lq, None
            return
        lines = self._lines(q, k, layer)
        blocks = _PART_PAIRS // (B * H * -(-Lk // self.block))
        rows = self.block * max(1, min(blocks, _PART_QUERIES // self.block))
        row = 0
        while row < Lq:
            end = min(row + rows - (Lk - Lq + row) % rows, Lq)
            keys = Lk - Lq + end
            yield row, end, self._index(q[:, :, row:end], k[:, :, :keys], layer, *lines)
            row = end

    def _lines(self, q: Tensor, k: Tensor, layer: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        """Block columns and diagonals bool [B, H, Nk], and which heads are query-aware [B, H]."""
        block, Lk = self.block, k.shape[2]
        n = min(block, q.shape[2])
        scores = last_window_scores(q, k, window=block, scale=layer.scale, softcap=layer.softcap)
        vertical, slash = (x / n for x in scores)
        blocks = torch.nn.functional.pad(vertical, (0, -Lk % block))
        columns = blocks.unflatten(-1, (-1, block)).sum(-1)
        diagonals = diagonal_sums(slash, block)
        aware = self._divergence(q[:, :, -n:], k, layer, columns) < self.tau
        lowest = -(-self.min_budget // block)
        highest = -(-self.max_budget // block) if self.max_budget else columns.shape[-1]
        chosen = []
        for tokens, pooled in ((vertical, columns), (slash, diagonals)):
            needed = -(-mass_mask(tokens, self.gamma).sum(-1) // block)
            needed = needed.clamp(min=lowest).clamp(max=max(1, highest))
            needed = torch.where(aware, max(1, lowest), needed)
            pooled = pooled.clone()
            pooled[..., 0] = torch.inf
            chosen.append(top_k_mask(pooled, needed, pooled.shape[-1]))
        return chosen[0], chosen[1], aware

    def _divergence(self, q: Tensor, k: Tensor, layer: LayerContext, columns: Tensor) -> Tensor:
        """Square root of the Jensen-Shannon divergence of pooled and true attention: [B, H]."""
        mean = q.mean(dim=2, keepdim=True, dtype=torch.float32).to(q.dtype)
        pooled = pooled_scores(mean, k, block=self.block, scale=layer.scale)[:, :, -1]
        a, b = pooled.softmax(-1), columns
        middle = (a + b) / 2
        terms = [torch.where(x > 0, x * (x / middle).log(), 0.0).sum(-1) for x in (a, b)]
        return ((terms[0] + terms[1]) / 2).clamp(min=0).sqrt()

    def _index(
        self,
        q: Tensor,
        k: Tensor,
        layer: LayerContext,
        columns: Tensor,
        diagonals: Tensor,
        aware: Tensor,
    ) -> BlockIndex:
        block = self.block
        first, Nq = BlockIndex.query_blocks(q.shape[2], k.shape[2], block)
        n = torch.arange(first, first + Nq, device=q.device)[:, None]
        m = torch.arange(first + Nq, device=q.device)
        keep = columns[:, :, None, : first + Nq] | diagonals[..., (n - m).clamp(min=0)]
        # Reading it would make a GPU wait: there the pooled scores are made for nothing at times.
        if q.device.type != "cpu" or bool(aware.any()):
            scores = pooled_scores(q, k, block=block, scale=layer.scale)
            weights = scores.masked_fill(m > n, -torch.inf).softmax(-1)
            keep = keep | (mass_mask(weights, self.gamma) & aware[:, :, None, None])
        return BlockIndex.from_blocks(keep & (m <= n), (block, block))
