"""InfiniteHiP (Lee et al., arXiv 2502.08910, algorithms 1 to 3): chunk pruning in stages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._hierarchy import HierarchicalMethod, kept_since
from lowcontext.methods._streaming import search_keys, search_queries, streamed
from lowcontext.methods.base import LayerContext, Part, Rotary, is_decoding
from lowcontext.ops.hierarchy import Chunks, SearchOptions, Stage, StageOptions, hip_stages


@dataclass(frozen=True)
class InfiniteHiP(HierarchicalMethod):
    """Reads the tiles that survive stages of pruning ever smaller chunks of keys.

    The first stage is linear in the context with a small constant, the later ones are constant. The
    published preset "3K" is `stages="256:32768/4 32:8192/4 8/1", budget=2048, window=1024,
    sink=256, share="layer", refresh="16/8/4", wide_layers=3, block_k=8`.

    Args:
        stages: "chunk:keep" for each stage and "chunk" for the last: keys of a chunk, and keys in
            the chunks that go on. "/n" behind it scores the mean of every n queries, 32 if absent.
            In prefill "xn" lets n blocks of queries share the stage, or as many as the next stage
            where the window is not longer than n - 1 blocks.
        representative: key that stands for half a chunk: "center", "first" or "last".
        chunk_score: "max" of the representatives that won on the way, or of the "last" one.
        refresh: decode steps after which each stage runs again, as "16/4"; later stages run
            with earlier ones. The last number stands for all stages behind it.
        wide_layers: first layers that list `wide` times the budget.
        wide: see `wide_layers`.
        positions: "original", or "streaming" for contexts beyond the trained length: listed keys
            are read at consecutive positions that end at the window. Their search sees all keys at
            one distance, or in the `wide_layers` at the index of their chunk. Needs share="layer"
            and a second copy of the keys; `dense_last` does not apply.
    """

    name: ClassVar[str] = "infinitehip"

    stages: str = "64:32768x4 2"
    representative: str = "center"
    chunk_score: str = "max"
    refresh: int | str = "16/4"
    wide_layers: int = 3
    wide: int = 2
    positions: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(wide_layers=0, wide=1)
        self._expect_choice("positions", ("original", "streaming"))
        if self.moves_keys and self.share != "layer":
            raise ValueError(
                'infinitehip: share: expected "layer" with positions="streaming", which reads one '
                f"list for all heads, got {self.share!r}"
            )
        intervals, count = self._intervals, len(_stages(self.stages))
        if len(intervals) > count or min(intervals) < 1:
            raise ValueError(
                f"infinitehip: refresh: expected at most {count} positive numbers, got "
                f"{self.refresh!r}"
            )

    @property
    def moves_keys(self) -> bool:
        """Whether listed keys are read at other positions."""
        return self.positions == "streaming"

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """Parts as of every hierarchical method; with streaming positions one for each list."""
        Lq, Lk = q.shape[2], k.shape[2]
        if not self.moves_keys or layer.layer_idx < self.dense_layers or Lk < self.min_length:
            yield from super().parts(q, k, layer)
            return
        if layer.rotary is None:
            raise NotImplementedError(
                'infinitehip: positions: "streaming" moves rotated keys and needs a model with '
                'rotary embeddings of fixed frequencies; use positions="original"'
            )
        offset, decoding = Lk - Lq, is_decoding(Lq, Lk)
        row = 0
        while row < Lq:
            step = 1 if decoding else self.query_chunk - (offset + row) % self.query_chunk
            end = min(row + step, Lq)
            part = q[:, :, row:end], k[:, :, : offset + end]
            yield from self._streamed_parts(*part, row, decoding, layer, layer.rotary)
            row = end

    def _streamed_parts(
        self, q: Tensor, k: Tensor, row: int, decoding: bool, layer: LayerContext, rotary: Rotary
    ) -> Iterator[Part]:
        """Parts of the queries from `row` of the call on, one for each block of them."""
        Lq, Lk = q.shape[2], k.shape[2]
        options = self._options(layer.layer_idx, 1 if decoding else self.block_q)
        chunk = _stages(self.stages)[0].chunk if layer.layer_idx < self.wide_layers else 0
        keys = search_keys(layer.memory, k, rotary, chunk)
        queries = search_queries(q, Lk, rotary, chunk, self.window)
        index = (self.decode if decoding else self.prefill)(queries, keys, layer)
        if index is None:
            yield row, row + Lq, None
            return
        behind = Lk - kept_since(layer, Lk) if decoding else 0
        geometry = options.geometry(Lk)
        for block in range(index.kv_starts.shape[2]):
            row0 = ((Lk - Lq) // options.block_q + block) * options.block_q
            low, high = options.candidates(row0, behind)
            seen = min(row0 + options.block_q, Lk)
            rows = max(row0 - (Lk - Lq), 0), seen - (Lk - Lq)
            if high - low <= geometry.picks:
                yield row + rows[0], row + rows[1], None
                continue
            front = geometry.sinks + geometry.picks
            recent = high * self.block_k, seen
            yield row + rows[0], row + rows[1], streamed(index, block, front, recent, rotary)

    def _options(self, layer_idx: int, block_q: int) -> SearchOptions:
        return _stage_options(self, layer_idx < self.wide_layers, block_q)

    def _search(
        self,
        q: Tensor,
        k: Tensor,
        options: SearchOptions,
        kept: tuple[Chunks, ...] = (),
        behind: int = 0,
        ahead: int = 0,
    ) -> tuple[BlockIndex, tuple[Chunks, ...]]:
        return hip_stages(q, k, options, kept=kept, behind=behind, ahead=ahead)  # type: ignore[arg-type]

    @property
    def _intervals(self) -> tuple[int, ...]:
        return _intervals(self.refresh, self.stages)


@cache
def _intervals(refresh: int | str, stages: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(/\d+)*", str(refresh)):
        raise ValueError(f"infinitehip: refresh: expected numbers as '16/4', got {refresh!r}")
    each = [int(x) for x in str(refresh).split("/")]
    return tuple(each + each[-1:] * (len(_stages(stages)) - len(each)))


@cache
def _stages(text: str | int) -> tuple[Stage, ...]:
    stages = []
    for part in str(text).split():
        match = re.fullmatch(r"(\d+)(?::(\d+))?(?:/(\d+))?(?:x(\d+))?", part)
        if not match:
            raise ValueError(f"stages: expected 'chunk:keep ... chunk', got {text!r}")
        chunk, keep, rows, blocks = match.groups()
        stages.append(Stage(int(chunk), int(keep or 0), int(rows or 32), int(blocks or 1)))
    return tuple(stages)


@cache
def _stage_options(method: InfiniteHiP, wide: bool, block_q: int) -> StageOptions:
    stages: list[Stage] = []
    for stage in reversed(_stages(method.stages)):
        fits = block_q > 1 and (stage.blocks - 1) * block_q < method.window
        shared = stage.blocks if fits else stages[-1].blocks if stages else 1
        stages.append(replace(stage, blocks=shared))
    return StageOptions(
        block_q=block_q,
        block_k=method.block_k,
        budget=method.budget * (method.wide if wide else 1),
        sink=method.sink,
        window=method.window,
        share=method.share,
        stages=tuple(stages[::-1]),
        representative=method.representative,
        chunk_score=method.chunk_score,
    )
