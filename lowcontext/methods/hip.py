"""HiP (Lee et al., arXiv 2406.09827): hierarchical pruning by a beam search over key intervals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._hierarchy import HierarchicalMethod
from lowcontext.ops.hierarchy import Chunks, SearchOptions, TreeOptions, hip_tree


@dataclass(frozen=True)
class HiP(HierarchicalMethod):
    """Reads the tiles that a beam search over a binary tree of key intervals ends in.

    O(T log T) for a prompt and O(log T) for a token, with no calibration. As published the leaves
    themselves are read and the beam is budget / leaf: `block_k=2, leaf=2, key_stride=1, beam=256,
    budget=512, window=256, sink=16, rows="last", row_stride=2, share="head"`. Here the beam is
    independent, and leaves vote for larger tiles, which read memory in longer runs.

    Args:
        leaf: keys of a leaf of the tree; `block_k` is a multiple.
        beam: intervals kept at each level.
        key_stride: keys of a leaf per scored one, in prefill.
        decode_stride: the same in decode, where a search serves `refresh` tokens.
        row_stride: queries per scored row.
        rows: a scored row is the "mean" of its queries or the "last" of them.
        representative: keys that stand for an interval: in its "center", "first" or "last" leaf, or
            "spread" over all its leaves.
        refresh: decode steps for which a list is kept; 1 searches at every step.
        dense_layers: first layers left dense, 3 as published.
    """

    name: ClassVar[str] = "hip"

    leaf: int = 64
    beam: int = 512
    key_stride: int = 4
    decode_stride: int = 1
    row_stride: int = 32
    rows: str = "mean"
    representative: str = "center"
    refresh: int = 8
    dense_layers: int = 3

    def __post_init__(self) -> None:
        self._expect_ints(leaf=1, refresh=1, decode_stride=1)
        if self.decode_stride > self.leaf:
            raise ValueError(
                f"hip: decode_stride: expected at most leaf={self.leaf}, got {self.decode_stride}"
            )
        super().__post_init__()

    def _options(self, layer_idx: int, block_q: int) -> SearchOptions:
        stride = self.key_stride if block_q > 1 else self.decode_stride
        return _tree_options(self, block_q, stride)

    def _search(
        self,
        q: Tensor,
        k: Tensor,
        options: SearchOptions,
        kept: tuple[Chunks, ...] = (),
        behind: int = 0,
        ahead: int = 0,
    ) -> tuple[BlockIndex, tuple[Chunks, ...]]:
        return hip_tree(q, k, options, ahead=ahead), ()  # type: ignore[arg-type]

    @property
    def _intervals(self) -> tuple[int, ...]:
        return (self.refresh,)


@cache
def _tree_options(method: HiP, block_q: int, key_stride: int) -> TreeOptions:
    return TreeOptions(
        block_q=block_q,
        block_k=method.block_k,
        budget=method.budget,
        sink=method.sink,
        window=method.window,
        share=method.share,
        rows=method.rows,
        leaf=method.leaf,
        beam=method.beam,
        row_stride=method.row_stride,
        key_stride=key_stride,
        representative=method.representative,
    )
