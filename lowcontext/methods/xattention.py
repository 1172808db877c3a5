"""XAttention (Xu et al., arXiv 2503.16428): key blocks by antidiagonal sums, in prefill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods.base import MAX_DECODE_QUERIES, LayerContext, Method, Part, is_decoding
from lowcontext.ops.block_scores import antidiagonal_scores
from lowcontext.ops.votes import mass_mask


@dataclass(frozen=True)
class XAttention(Method):
    """Reads the key blocks that hold `threshold` of a row's antidiagonal attention.

    Scores come from one antidiagonal of each `stride` x `stride` cell of the logits. For each block
    of queries, block 0, the diagonal and the `local` keys before it are taken first, then blocks in
    falling score until their share of the row reaches `threshold`. Decode is dense, as published.
    Keys that do not exist take no part in the softmax, and rows are scored per query head without
    repeating the keys.

    Two kinds of pairs escape the antidiagonals, and are read whatever the scores say;
    `local=0, dense_last=0` is the published method.

    - On an antidiagonal of an even stride, the distance between query and key is odd: a head that
      looks two tokens back has no score. Within a block it is on the diagonal; the first queries
      of a block need the block before.
    - A single (query, key) pair is met with probability 1 / stride. Most prompts ask their
      question in the last queries, which are therefore dense.

    Args:
        stride: side of a cell; the scores cost 1 / stride of the logits.
        threshold: share of the estimated attention to read, above 0; from 1 on, everything.
        block: queries per block and keys per tile; a multiple of `stride`.
        local: keys before each block of queries that are always read, rounded up to blocks.
        dense_last: last queries of a prompt, or of a chunk of it, that read everything.
        min_length: leave contexts of fewer keys dense.
    """

    name: ClassVar[str] = "xattention"

    stride: int = 16
    threshold: float = 0.9
    block: int = 128
    local: int = 128
    dense_last: int = 64
    min_length: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(stride=1, block=1, local=0, dense_last=0)
        if self.block % self.stride:
            raise ValueError(
                f"xattention: block: expected a multiple of stride={self.stride}, got {self.block}"
            )
        self._expect_numbers("threshold", above_0=True)

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """Parts as of every method, but the blocks with the last `dense_last` queries are dense."""
        Lq, Lk = q.shape[2], k.shape[2]
        end = (Lk - self.dense_last) // self.block * self.block - (Lk - Lq)
        if is_decoding(Lq, Lk) or not self.dense_last:
            yield from super().parts(q, k, layer)
        elif end <= MAX_DECODE_QUERIES or Lk < self.min_length:
            yield 0, Lq, None
        else:
            yield from super().parts(q[:, :, :end], k[:, :, : Lk - Lq + end], layer)
            yield end, Lq, None

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the blocks above the threshold for every block of queries and query head."""
        scores = antidiagonal_scores(q, k, stride=self.stride, block=self.block, scale=layer.scale)
        first, Nq = BlockIndex.query_blocks(q.shape[2], k.shape[2], self.block)
        n = torch.arange(first, first + Nq, device=q.device)[:, None]
        m = torch.arange(scores.shape[3], device=q.device)
        forced = (m == 0) | (m >= n - -(-self.local // self.block))
        weights = scores.masked_fill(m > n, -torch.inf)
        keep = mass_mask(weights, self.threshold, forced=forced)
        return BlockIndex.from_blocks(keep, (self.block, self.block))

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: XAttention reads densely in decode."""
        return None
