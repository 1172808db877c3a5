"""Configurations of the Triton kernels that select and list for `bench.kernels_report`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowcontext.ops.triton import lines, mass, reuse, select, tiles
from lowcontext.ops.triton.launch import Launch

# Odd, of a cache that holds one more: what a decode step knows of strides.
KEYS = 65535


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class TopkConfig:
    """`votes.topk` on 32 rows without memory.

    Args:
        N: entries of a row.
        k: entries taken; more than a quarter of `select.ROW` are found by their digits.
        limits: whether each row has a limit of its own.
        pages: whether entries are those of pages of 16 keys, and some rows are not active.
    """

    N: int
    k: int = 2048
    limits: bool = False
    pages: bool = False

    @property
    def name(self) -> str:
        """Short label."""
        label = f"topk N={self.N} k={self.k}" + (" limits" if self.limits else "")
        return label + (" pages" if self.pages else "")

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        limits = empty(32, dtype=torch.int32) if self.limits else None
        pages = empty(32, self.N // 16, dtype=torch.int32) if self.pages else None
        active = empty(4, dtype=torch.bool) if self.pages else None
        return select.plan_topk(empty(32, self.N), self.k, limits, pages, 16, 128, active)[0]


@dataclass(frozen=True)
class ListsConfig:
    """`lists.tile_lists` without memory: 8 KV heads, batch 4.

    Args:
        pages: whether pages are listed.
        lows: whether recent keys begin at places of their own.
    """

    pages: bool = True
    lows: bool = False

    @property
    def name(self) -> str:
        """Short label."""
        return "lists" + (" pages" if self.pages else "") + (" lows" if self.lows else "")

    def launches(self, capability: int) -> list[Launch]:
        """The launch of this op; it is the same for every capability."""
        lows = empty(4, dtype=torch.int32) if self.lows else None
        ids = empty(4, 8, 1, 127, dtype=torch.int32) if self.pages else None
        chosen = empty(4, 8, 1, dtype=torch.int32) if self.pages else None
        counts, starts = (empty(*shape, dtype=torch.int32) for shape in ((4, 8, 1), (4, 8, 1, 140)))
        numbers = {"low": 9, "sink": 64, "width": 16, "align": 1, "Lk": KEYS}
        return tiles.plan_tile_lists(counts, starts, (lows, ids, chosen), numbers)


@dataclass(frozen=True)
class MassConfig:
    """`votes.mass_mask` on 32 rows without memory.

    Args:
        N: entries of a row.
        forced: whether some entries are forced.
    """

    N: int
    forced: bool = False

    @property
    def name(self) -> str:
        """Short label."""
        return f"mass N={self.N}" + (" forced" if self.forced else "")

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        forced = empty(8, self.N, dtype=torch.bool) if self.forced else None
        return mass.plan_mass_mask(empty(32, self.N), 2**29, forced)[0]


@dataclass(frozen=True)
class LinesConfig:
    """`vertical_slash.line_index` on masks without memory: 32 heads, 8192 queries, 64K - 1 keys.

    Args:
        dense_from: whether blocks from some position on list everything.
    """

    dense_from: bool = False

    @property
    def name(self) -> str:
        """Short label."""
        return "lines dense_from" if self.dense_from else "lines"

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        mask = empty(1, 32, KEYS, dtype=torch.bool)
        start = empty(1, 32, dtype=torch.int32) if self.dense_from else None
        return lines.plan_line_index(mask, mask, 8192, 64, 1000, 1000, start)[0]


@dataclass(frozen=True)
class ReuseConfig:
    """`reuse.stale` without memory: batch 4, 32 heads.

    Args:
        dtype, D: of the queries.
        by_head: whether every head counts for itself.
    """

    dtype: str = "bfloat16"
    D: int = 128
    by_head: bool = True

    @property
    def name(self) -> str:
        """Short label."""
        return f"stale {self.dtype} D={self.D}" + (" by head" if self.by_head else "")

    def launches(self, capability: int) -> list[Launch]:
        """The launch of this op; it is the same for every capability."""
        dtype = getattr(torch, self.dtype)
        q, kept = empty(4, 32, 1, self.D, dtype=dtype), empty(4, 32 * self.D, dtype=dtype)
        lows = empty(4, dtype=torch.int32)
        return reuse.plan_stale(q, kept, lows, 9, 0.9, self.by_head)[0]
