"""StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.2): attention sinks and a local window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._select import listed
from lowcontext.methods.base import LayerContext, Method


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Reads the first `sink` keys and the last `window` keys; forgets everything between.

    Keys keep their true positions and nothing is evicted, so this is the paper's attention pattern
    without its cache compaction. It is the line that a selecting method must beat: what lies
    between sink and window is lost. In prefill a block of queries shares one list, so a query reads
    at least `window` and at most `window + block_q - 1` recent keys; decode is exact.

    Args:
        sink: keys at the start that every query reads.
        window: recent keys that every query reads, itself included.
        block_q: queries per block in prefill.
        block_k: keys per tile.
    """

    name: ClassVar[str] = "streaming_llm"

    sink: int = 4
    window: int = 1024
    block_q: int = 64
    block_k: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(sink=0, window=1, block_q=1, block_k=1)

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of sink and window for every block of queries."""
        Lq, Lk, block_q = q.shape[2], k.shape[2], self.block_q
        if self.sink + self.window >= Lk:
            return None
        offset, width = Lk - Lq, self.block_k
        first, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
        block = torch.arange(first, first + Nq, device=q.device)
        # The window of the first query of the block, up to the last query of the block.
        low = ((block * block_q).clamp(min=offset) - self.window + 1).clamp(min=0)
        last = ((block + 1) * block_q).clamp(max=Lk) - 1
        span = self.window + block_q - 1
        S = -(-span // width)
        # Tiles are laid from the oldest key of the window; the last may reach past the block.
        starts = low[:, None] + torch.arange(S, device=q.device) * width
        counts = (last - low) // width + 1
        sinks = torch.arange(self.sink, device=q.device).expand(Nq, self.sink)
        return BlockIndex(
            kv_num_blocks=counts[None, None].to(torch.int32),
            kv_starts=starts[None, None].to(torch.int32),
            block_size=(block_q, width),
            kv_num_columns=low.clamp(max=self.sink)[None, None].to(torch.int32),
            kv_columns=sinks[None, None].to(torch.int32).contiguous(),
        )

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of sink and window for each query."""
        Lk = k.shape[2]
        if self.sink + self.window >= Lk:
            return None
        return listed(k, q.shape[2], (1, self.block_k), Lk - self.window, self.sink)
