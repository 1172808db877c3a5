"""InfiniteHiP (Lee et al., arXiv 2502.08910, algorithms 1 to 3): chunk pruning in stages."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._hierarchy import HierarchicalMethod
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
        wide: see `wide_layers`. With positions="streaming" the search of these layers sees each key
            at the index of its chunk.
    """

    name: ClassVar[str] = "infinitehip"

    stages: str = "64:32768x4 2"
    representative: str = "center"
    chunk_score: str = "max"
    refresh: int | str = "16/4"
    wide_layers: int = 3
    wide: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(wide_layers=0, wide=1)
        intervals, count = self._intervals, len(_stages(self.stages))
        if len(intervals) > count or min(intervals) < 1:
            raise ValueError(
                f"infinitehip: refresh: expected at most {count} positive numbers, got "
                f"{self.refresh!r}"
            )

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

    def _chunk(self, layer_idx: int) -> int:
        return _stages(self.stages)[0].chunk if layer_idx < self.wide_layers else 0

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
