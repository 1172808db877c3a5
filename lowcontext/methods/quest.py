"""Quest (Tang et al., arXiv 2406.10774, section 3): query-aware page selection in decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._select import block_statistics
from lowcontext.methods.base import LayerContext, Method
from lowcontext.ops import votes
from lowcontext.ops.lists import tile_lists


@dataclass(frozen=True)
class Quest(Method):
    """Reads the pages whose keys could score highest, by channel-wise minima and maxima of keys.

    bound(q, page) = sum_d max(q_d * min_d, q_d * max_d) >= q . key for every key of the page.
    Prefill is dense. The page of the query itself, full or not, is always read; the rest of the
    budget goes to the complete pages before it. Bounds come from the keys as the model rotated
    them; they cost two keys per page, in the dtype of the keys.

    Args:
        budget: keys that a query reads, its own page included.
        page: keys per page.
        scope: "query_head" selects for each query head (as published); "kv_head" takes the largest
            bound over the query heads of a KV head, so that they share one list and one read.
        dense_layers: first layers left dense, 2 as published.
    """

    name: ClassVar[str] = "quest"
    query_chunk: ClassVar[int] = 0

    budget: int = 2048
    page: int = 16
    scope: str = "query_head"
    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(page=1, budget=2 * self.page)
        self._expect_choice("scope", ("query_head", "kv_head"))

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: Quest reads a prompt densely."""
        return None

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the best pages for each query."""
        Lq, Lk = q.shape[2], k.shape[2]
        limit = self.budget // self.page
        if limit * self.page >= Lk:
            return None
        bounds = block_statistics(layer.memory, k, self.page, votes.page_bounds)
        last = (Lk - 1) // self.page
        scores = votes.page_scores(q, bounds[:, :, :last])
        if self.scope == "kv_head":
            scores = rearrange(scores, "b (h g) r p -> b h g r p", h=k.shape[1]).amax(dim=2)
        if Lq > 1:
            own = torch.arange(Lk - Lq, Lk, device=q.device) // self.page  # page of each query
            past = torch.arange(last, device=q.device) < own[:, None]
            scores = scores.masked_fill(~past, -torch.inf)
        pages = votes.topk(scores, limit - 1)
        lists = tile_lists(k, Lq, width=self.page, low=Lk - 1, align=self.page, pages=pages)
        return BlockIndex(*lists, (1, self.page))
