"""What hip and infinitehip share: fixed parts of a list, a dense end, and lists kept in decode."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._streaming import search_keys, search_queries, streamed
from lowcontext.methods.base import (
    MAX_DECODE_QUERIES,
    LayerContext,
    Method,
    Part,
    Rotary,
    is_decoding,
)
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
        positions: "original", or "streaming" for contexts beyond the trained length: listed keys
            are read at consecutive positions that end at the window, and their search sees all keys
            at one distance. Needs share="layer" and a second copy of the keys; `dense_last` does
            not apply.
    """

    budget: int = 4096
    sink: int = 64
    window: int = 1024
    block_q: int = 64
    block_k: int = 64
    share: str = "group"
    dense_last: int = 64
    positions: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(dense_last=0)
        self._expect_choice("positions", ("original", "streaming"))
        if self.moves_keys and self.share != "layer":
            raise ValueError(
                f'{self.name}: share: expected "layer" with positions="streaming", which reads one '
                f"list for all heads, got {self.share!r}"
            )
        try:
            for block_q in (self.block_q, 1):
                # A layer behind all those with settings of their own.
                self._options(sys.maxsize, block_q)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None

    @property
    def moves_keys(self) -> bool:
        """Whether listed keys are read at other positions."""
        return self.positions == "streaming"

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

    def _chunk(self, layer_idx: int) -> int:
        """Keys that share a position in the search with streaming positions; 0: all of them."""
        return 0

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """Parts as of every method, but the blocks with the last `dense_last` queries are dense.

        With streaming positions one part for each list.
        """
        Lq, Lk = q.shape[2], k.shape[2]
        if self.moves_keys and layer.layer_idx >= self.dense_layers and Lk >= self.min_length:
            yield from self._streamed_parts(q, k, layer)
            return
        end = (Lk - self.dense_last) // self.block_q * self.block_q - (Lk - Lq)
        if is_decoding(Lq, Lk) or not self.dense_last:
            yield from super().parts(q, k, layer)
        elif end <= MAX_DECODE_QUERIES:
            yield 0, Lq, None
        else:
            yield from super().parts(q[:, :, :end], k[:, :, : Lk - Lq + end], layer)
            yield end, Lq, None

    def _streamed_parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        if layer.rotary is None:
            raise NotImplementedError(
                f'{self.name}: positions: "streaming" moves rotated keys and needs a model with '
                'rotary embeddings of fixed frequencies; use positions="original"'
            )
        Lq, Lk = q.shape[2], k.shape[2]
        offset, decoding = Lk - Lq, is_decoding(Lq, Lk)
        row = 0
        while row < Lq:
            step = 1 if decoding else self.query_chunk - (offset + row) % self.query_chunk
            end = min(row + step, Lq)
            part = q[:, :, row:end], k[:, :, : offset + end]
            for row0, row1, found in self._streamed_chunk(*part, decoding, layer, layer.rotary):
                yield row + row0, row + row1, found
            row = end

    def _streamed_chunk(
        self, q: Tensor, k: Tensor, decoding: bool, layer: LayerContext, rotary: Rotary
    ) -> Iterator[Part]:
        """Parts of a chunk of queries, or of one in decode: one for each block of them."""
        Lq, Lk = q.shape[2], k.shape[2]
        options = self._options(layer.layer_idx, 1 if decoding else self.block_q)
        chunk = self._chunk(layer.layer_idx)
        keys = search_keys(layer.memory, k, rotary, chunk)
        queries = search_queries(q, Lk, rotary, chunk, self.window)
        index = (self.decode if decoding else self.prefill)(queries, keys, layer)
        if index is None:
            yield 0, Lq, None
            return
        behind = Lk - _kept_since(layer, Lk) if decoding else 0
        geometry = options.geometry(Lk)
        for block in range(index.kv_starts.shape[2]):
            row0 = ((Lk - Lq) // options.block_q + block) * options.block_q
            low, high = options.candidates(row0, behind)
            seen = min(row0 + options.block_q, Lk)
            rows = max(row0 - (Lk - Lq), 0), seen - (Lk - Lq)
            if high - low <= geometry.picks:
                yield *rows, None
                continue
            front = geometry.sinks + geometry.picks
            recent = range(high * self.block_k, seen)
            yield *rows, streamed(index, block, front, recent, rotary)

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


def _kept_since(layer: LayerContext, Lk: int) -> int:
    """Keys there were when the first stage of the search behind the last list ran."""
    kept: _Kept | None = layer.memory.get(_KEY)
    return kept.made[0] if kept else Lk


def _grown(index: BlockIndex, tiles: int) -> BlockIndex:
    """The list with as many more of the tiles that are written behind its counts."""
    if tiles == 0:
        return index
    return BlockIndex(index.kv_num_blocks + tiles, index.kv_starts, index.block_size)
