"""Recycled Attention (Xu et al., arXiv 2411.05787): a full step now and then, its top-k between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._candidates import Tokens, Vote
from lowcontext.methods._reuse import reuse
from lowcontext.methods._select import listed
from lowcontext.methods.base import LayerContext, Method

TILE = 64


@dataclass(frozen=True)
class Recycled(Method):
    """Attends to all keys every `stride` steps, and between to what those steps weighed most.

    A full step keeps the k keys with the largest attention weights; the steps after it read those
    and the keys that are new since. The next step is full when `stride` is reached or when the
    query has turned. The keys of a list are chosen by KV head, by the weights summed over its query
    heads (the paper leaves the reduction open). Prefill is dense, and so is a step of more than one
    query. The method saves reads, not memory: all keys stay. Where memory was dropped, the next
    step is full.

    Args:
        k: keys that a sparse step reads, besides the new ones.
        stride: steps from one full step to the next.
        threshold: least cosine with the query of the last full step; None goes by stride alone.
        cosine: "head" asks it of every head, "layer" of all heads as one vector.
    """

    name: ClassVar[str] = "recycled"
    query_chunk: ClassVar[int] = 0

    k: int = 2048
    stride: int = 32
    threshold: float | None = 0.8
    cosine: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(k=1, stride=1)
        self._expect_choice("cosine", ("head", "layer"))
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(
                f"recycled: threshold: expected None or a cosine, got {self.threshold!r}"
            )

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: a prompt is read densely."""
        return None

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the rows' lists; a row whose step is full lists every key."""
        Lk = k.shape[2]
        if Lk <= self.k or q.shape[2] > 1:
            return None
        vote = Vote(k=self.k, sink=0, lists="kv_head", scale=layer.scale)

        def weigh(rows: slice | Tensor) -> Tokens:
            return vote.exact(q, k, Lk, layer, rows)

        threshold = -1.0 if self.threshold is None else self.threshold
        by_head = self.cosine == "head"
        tokens, low = reuse(q, Lk, layer, threshold, by_head, self.stride - 1, weigh)
        # A list that was made in this step begins its new keys behind the last key.
        full = low == Lk
        counts = torch.where(full[:, None, None], 0, tokens.counts)
        low = torch.where(full, 0, low)
        return listed(k, 1, (1, TILE), low, 0, Lk, (tokens.ids, counts))
