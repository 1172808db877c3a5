"""TidalDecode (Yang et al., arXiv 2410.05076): a few layers select for all that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods.base import LayerContext, Method
from lowcontext.ops import votes


@dataclass(frozen=True)
class TidalDecode(Method):
    """Reads in most layers the tokens that scored highest in the selecting layer before them.

    A selecting layer attends densely and takes the k keys with the largest logits (section 3.2);
    the layers after it read those keys and the newest, until the next selecting layer. Layers
    before the first one are dense, and so is prefill. Scores are exact, so a step reads the whole
    cache in those few layers and k keys elsewhere. A list is of one step: a layer that finds none
    for its step, because memory was dropped, attends densely.

    Args:
        k: tokens that a query reads, besides the newest.
        local: recent keys that are always read, the query itself included.
        select_layers: layers that attend densely and select. The second is the one to tune for a
            model: 13 of 32 in the paper's Llama runs. Those behind the last layer of a model do
            nothing; a model where none can select for a layer after it is refused.
        scope: "query_head" selects for each query head (as published); "kv_head" takes the largest
            logit over the query heads of a KV head, so that they share one list and one read.
    """

    name: ClassVar[str] = "tidaldecode"
    query_chunk: ClassVar[int] = 0

    k: int = 256
    local: int = 1
    select_layers: tuple[int, ...] = (2, 13)
    scope: str = "query_head"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(k=1, local=1)
        self._expect_choice("scope", ("query_head", "kv_head"))
        layers = self.select_layers
        if not isinstance(layers, (list, tuple)) or not layers:
            raise ValueError(
                f"tidaldecode: select_layers: expected a list of one layer or more, got {layers!r}"
            )
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in layers):
            raise ValueError(
                f"tidaldecode: select_layers: expected indices of layers, got {layers!r}"
            )
        # A list from a configuration file; the fields of a method are hashable.
        object.__setattr__(self, "select_layers", tuple(layers))

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises unless the selecting layers see their decode steps and a layer follows one."""
        seen = [n for n in layers if n >= self.dense_layers]
        last = max(seen, default=-1)
        lost = [n for n in self.select_layers if n < last and n not in seen]
        if lost or min(self.select_layers) >= last:
            raise ValueError(
                "tidaldecode: select_layers: expected layers with full attention, none of the "
                f"first dense_layers={self.dense_layers}, one of them before the last, {last}; got "
                f"{list(self.select_layers)}"
            )

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: a prompt is read densely."""
        return None

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None in layers that select and before them; else the index of the last selection."""
        Lq, Lk = q.shape[2], k.shape[2]
        step = (Lk, q.shape[0], Lq)
        if Lk <= self.k + self.local or layer.layer_idx < min(self.select_layers):
            return None
        if layer.layer_idx in self.select_layers:
            scores, _ = votes.token_scores(q, k[:, :, : Lk + 1 - self.local])
            if self.scope == "kv_head":
                scores = rearrange(scores, "b (h g) r n -> b h g r n", h=k.shape[1]).amax(dim=2)
            # The window of row r begins at its own position + 1 - local: never a candidate.
            behind = torch.arange(Lq - 1, -1, -1, device=q.device)
            ends = Lk - self.local - behind
            keys = torch.arange(scores.shape[3], device=q.device)
            scores = scores.masked_fill(keys >= ends[:, None], -torch.inf)
            layer.shared["step"], layer.shared["list"] = step, votes.topk(scores, self.k)
            return None
        if layer.shared.get("step") != step:
            return None
        ids, counts = (x.to(k.device) for x in layer.shared["list"])
        low = torch.arange(Lk - Lq + 1 - self.local, Lk + 1 - self.local, device=k.device)
        low = low.clamp(min=0).to(torch.int32)[:, None].expand(*counts.shape, 1)
        return BlockIndex(torch.ones_like(counts), low, (1, self.local), counts, ids)
