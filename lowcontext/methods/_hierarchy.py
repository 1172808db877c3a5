"""What hip and infinitehip share: fixed parts of a list, a dense end, and lists kept in decode."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods.base import MAX_DECODE_QUERIES, LayerContext, Method, Part, is_decoding
from lowcontext.ops.hierarchy import Chunks, SearchOptions

_KEY = "list"


@dataclass
class _Kept:
    """The list of the last search of a sequence and layer.

    Args:
        seen: keys when decode was last called.
        made: keys when each stage of the search last ran.
        chunks: what the stages but the last left.
        index: the list, with tiles written behind its counts for the steps until it is made again.
    """

    seen: int
    made: list[int]
    chunks: tuple[Chunks, ...]
    index: BlockIndex


@dataclass(frozen=True)
class HierarchicalMethod(Method):
    """Base of the methods that search a hierarchy of key intervals.

    Args:
        budget: keys that the search lists, at most; sink and window come on top.
        sink: keys at the start that are always read, rounded up to whole tiles.
        window: last keys that every query reads, itself included, rounded out to whole tiles.
        block_q: queries per list in prefill.
        block_k: keys per tile.
        share: the query heads of a KV head share a list ("group"), or each "head" has its own, or
            the whole "layer" shares one.
        dense_last: last queries of a prompt, or of a chunk of it, that read everything.
    """

    budget: int = 4096
    sink: int = 64
    window: int = 1024
    block_q: int = 64
    block_k: int = 64
    share: str = "group"
    dense_last: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(dense_last=0)
        try:
            for block_q in (self.block_q, 1):
                # A layer behind all those with settings of their own.
                self._options(sys.maxsize, block_q)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None

    @abstractmethod
    def _options(self, layer_idx: int, block_q: int) -> SearchOptions:
        """Settings of the search in one layer."""

    @abstractmethod
    def _search(
        self,
        q: Tensor,
        k: Tensor,
        options: SearchOptions,
        kept: tuple[Chunks, ...] = (),
        behind: int = 0,
        ahead: int = 0,
    ) -> tuple[BlockIndex, tuple[Chunks, ...]]:
        """The list, and what the stages but the last left; see `hip_stages`."""

    @property
    @abstractmethod
    def _intervals(self) -> tuple[int, ...]:
        """Decode steps after which each stage of the search runs again."""

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """Parts as of every method, but the blocks with the last `dense_last` queries are dense."""
        Lq, Lk = q.shape[2], k.shape[2]
        end = (Lk - self.dense_last) // self.block_q * self.block_q - (Lk - Lq)
        if is_decoding(Lq, Lk) or not self.dense_last:
            yield from super().parts(q, k, layer)
        elif end <= MAX_DECODE_QUERIES:
            yield 0, Lq, None
        else:
            yield from super().parts(q[:, :, :end], k[:, :, : Lk - Lq + end], layer)
            yield end, Lq, None

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index by a search for each block of queries."""
        layer.memory.pop(_KEY, None)
        options = self._options(layer.layer_idx, self.block_q)
        return None if options.covers(k.shape[2]) else self._search(q, k, options)[0]

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index by a search for each query, or by the last one with the window of today.

        A list is kept for a sequence that grows token by token. Several queries at once, or a
        sequence that has changed otherwise, are searched anew. Between searches the window begins
        where it began at the search, so no key is lost between list and window.
        """
        options = self._options(layer.layer_idx, 1)
        Lq, Lk = q.shape[2], k.shape[2]
        kept: _Kept | None = layer.memory.get(_KEY)
        if options.covers(Lk) or Lq > 1:
            layer.memory.pop(_KEY, None)
            return None if options.covers(Lk) else self._search(q, k, options)[0]
        intervals = self._intervals
        if kept is None or kept.seen != Lk - 1:
            kept, due = None, 0
        else:
            stale = [Lk - made >= every for made, every in zip(kept.made, intervals, strict=True)]
            due = stale.index(True) if True in stale else len(stale)
            if due == len(stale):
                kept.seen = Lk
                return _grown(
                    kept.index, (Lk - 1) // self.block_k - (kept.made[-1] - 1) // self.block_k
                )
        chunks, made = (kept.chunks[:due], kept.made[:due]) if kept else ((), [])
        index, chunks = self._search(
            q, k, options, chunks, Lk - made[0] if made else 0, intervals[-1] - 1
        )
        made = made + [Lk] * (len(intervals) - due)
        layer.memory[_KEY] = _Kept(Lk, made, chunks, index)
        return index


def kept_since(layer: LayerContext, Lk: int) -> int:
    """Keys there were when the first stage of the search behind the last list ran."""
    kept: _Kept | None = layer.memory.get(_KEY)
    return kept.made[0] if kept else Lk


def _grown(index: BlockIndex, tiles: int) -> BlockIndex:
    """The list with as many more of the tiles that are written behind its counts."""
    if tiles == 0:
        return index
    return BlockIndex(index.kv_num_blocks + tiles, index.kv_starts, index.block_size)
