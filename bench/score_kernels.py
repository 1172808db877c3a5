"""Configurations of the Triton kernels that score and search for `bench.kernels_report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.select_kernels import (
    KEYS,
    LinesConfig,
    ListsConfig,
    MassConfig,
    ReuseConfig,
    TopkConfig,
    empty,
)
from lowcontext.ops.hierarchy.options import Stage, StageOptions, TreeOptions
from lowcontext.ops.triton import blocks, mass, rotary, scores, searches, select, window
from lowcontext.ops.triton.launch import Launch

_HKV, _GROUP = 8, 4


@dataclass(frozen=True)
class ScoreConfig:
    """One op on tensors without memory: 32 query heads, 8 KV heads, 64K - 1 keys.

    Args:
        op: "tokens", "pages" (keys of chosen pages), "bounds", "vote" or "quantize".
        dtype, D: of the keys; "uint8" is two channels of 4 bits.
        R: queries per head.
        bits: of "quantize".
        queries: dtype of the queries.
    """

    op: str
    dtype: str = "bfloat16"
    D: int = 128
    R: int = 1
    bits: int = 8
    queries: str = "bfloat16"

    @property
    def name(self) -> str:
        """Short label."""
        last = f"bits={self.bits}" if self.op == "quantize" else f"R={self.R}"
        if self.queries != "bfloat16":
            last += f" q {self.queries}"
        return f"scores {self.op} {self.dtype} D={self.D} {last}"

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        dtype, D = getattr(torch, self.dtype), self.D
        q = empty(1, _HKV * _GROUP, self.R, D, dtype=getattr(torch, self.queries))
        k = _keys(D // 2 if dtype == torch.uint8 else D, dtype)
        scales = None if dtype.is_floating_point else empty(1, _HKV, KEYS)
        if self.op == "bounds":
            bounds = empty(1, _HKV, KEYS // 16, 2 * D, dtype=dtype)
            active = empty(1, dtype=torch.bool)
            return scores.plan_page_scores(q, bounds, 0.1, True, active)[0]
        if self.op == "quantize":
            return scores.plan_quantize_keys(k, self.bits)[0]
        if self.op == "vote":
            return scores.plan_soft_vote(empty(*q.shape[:3], KEYS), empty(*q.shape[:3]), _HKV)[0]
        pages = empty(1, _HKV, 512, dtype=torch.int32) if self.op == "pages" else None
        return scores.plan_token_scores(q, k, scales, pages, 16, 128, 0.1, pages is None)[0]


@dataclass(frozen=True)
class WindowConfig:
    """`last_window_scores` on tensors without memory: 32 query heads, 8 KV heads, 64K - 1 keys.

    Args:
        dtype, D: of q and k.
        window: queries that vote.
        softcap: of the logits, 0 for none.
    """

    dtype: str = "bfloat16"
    D: int = 128
    window: int = 64
    softcap: float = 0.0

    @property
    def name(self) -> str:
        """Short label."""
        label = f"window {self.dtype} D={self.D} n={self.window}"
        return f"{label} softcap" if self.softcap else label

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        dtype = getattr(torch, self.dtype)
        q = empty(1, _HKV * _GROUP, self.window, self.D, dtype=dtype)
        k = _keys(self.D, dtype)
        return window.plan_window_scores(q, k, 0.1, self.softcap)[0]


@dataclass(frozen=True)
class BlockConfig:
    """A block score on tensors without memory: 32 query heads, 8 KV heads, L = 64K - 1.

    Args:
        op: "means" or "antidiagonal".
        dtype, D: of q and k.
        stride, block: tokens per cell and per block.
    """

    op: str
    dtype: str = "bfloat16"
    D: int = 128
    stride: int = 16
    block: int = 128

    @property
    def name(self) -> str:
        """Short label."""
        return f"{self.op} {self.dtype} D={self.D} stride={self.stride} block={self.block}"

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        dtype = getattr(torch, self.dtype)
        q = empty(1, _HKV * _GROUP, KEYS, self.D, dtype=dtype)
        k = _keys(self.D, dtype)
        if self.op == "means":
            return [blocks.plan_block_means(q, 0, self.block)[0]]
        return [blocks.plan_antidiagonal_scores(q, k, self.stride, self.block, 0.1)[0]]


@dataclass(frozen=True)
class SearchConfig:
    """A search on tensors without memory: 32 query heads, 8 KV heads, 64 queries, 64K - 1 keys.

    Args:
        op: "tree" or "stages".
        dtype, D: of q and k.
        which: representative of a node or chunk.
        rows: row of a stride of queries.
    """

    op: str
    dtype: str = "bfloat16"
    D: int = 128
    which: str = "center"
    rows: str = "mean"

    @property
    def name(self) -> str:
        """Short label."""
        return f"search {self.op} {self.dtype} D={self.D} {self.which} {self.rows}"

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        dtype = getattr(torch, self.dtype)
        q = empty(1, _HKV * _GROUP, 64, self.D, dtype=dtype)
        k = _keys(self.D, dtype)
        if self.op == "tree":
            tree = TreeOptions(beam=128, representative=self.which, rows=self.rows)
            (search,) = searches.searches(q, k, tree, 0, 0, 2 * tree.beam)
            return searches.plan_tree(search, tree)[0]
        stages = StageOptions(
            stages=(Stage(64, 4096), Stage(2)), representative=self.which, rows=self.rows
        )
        (search,) = searches.searches(q, k, stages, 0, 0, KEYS // 64)
        first, counts, starts = searches.plan_stage(search, stages, 0, None)
        return [*first, *searches.plan_stage(search, stages, 1, (counts, starts))[0]]


@dataclass(frozen=True)
class RotaryConfig:
    """An op of `ops.rotary` on tensors without memory: 8 KV heads, 64K - 1 keys.

    Args:
        op: "rotate" (of all keys, to one position), "gather" (2688 keys a head) or "list" (of as
            many).
        dtype, D: of the keys.
        pairs: of channels that are rotated.
        interleaved: whether a pair is two neighbouring channels.
    """

    op: str
    dtype: str = "bfloat16"
    D: int = 128
    pairs: int = 64
    interleaved: bool = False

    @property
    def name(self) -> str:
        """Short label."""
        label = f"rotary {self.op} {self.dtype} D={self.D} P={self.pairs}"
        return f"{label} interleaved" if self.interleaved else label

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        dtype, size = getattr(torch, self.dtype), 2688
        k, f = _keys(self.D, dtype), empty(self.pairs)
        count = empty(1, dtype=torch.int32)
        if self.op == "rotate":
            steps = [0, 1, 0, 0]
            return rotary.plan_rotate_to(k, (None, None), steps, f, self.interleaved, dtype)[0]
        lists = empty(1, _HKV, size, dtype=torch.int32)
        if self.op == "list":
            return rotary.plan_list_keys(lists, count, count, [0, KEYS], size, 1, 128)[0]
        return rotary.plan_gather_moved(k, k, lists, count, f, self.interleaved)[0]


AnyScoreConfig = (
    SearchConfig
    | ScoreConfig
    | WindowConfig
    | BlockConfig
    | TopkConfig
    | MassConfig
    | LinesConfig
    | RotaryConfig
    | ReuseConfig
    | ListsConfig
)

REPRESENTATIVE = (
    ScoreConfig("tokens"),
    ScoreConfig("tokens", D=64),
    ScoreConfig("tokens", "float32", R=32, queries="float32"),
    ScoreConfig("pages", "float16", R=32),
    ScoreConfig("pages", "int8"),
    ScoreConfig("bounds"),
    ScoreConfig("vote", "float32"),
    ScoreConfig("tokens", "uint8"),
    ScoreConfig("quantize"),
    ScoreConfig("quantize", bits=4),
    WindowConfig(),
    WindowConfig(D=64),
    WindowConfig("float32"),
    BlockConfig("means"),
    BlockConfig("antidiagonal"),
    BlockConfig("antidiagonal", D=64),
    BlockConfig("antidiagonal", "float32"),
    TopkConfig(select.ROW, pages=True),
    TopkConfig(2**20, limits=True),
    TopkConfig(2**20, 8192),
    ListsConfig(lows=True),
    ReuseConfig(),
    MassConfig(mass.ROW, forced=True),
    MassConfig(2**20),
    LinesConfig(dense_from=True),
    SearchConfig("tree"),
    SearchConfig("tree", D=64),
    SearchConfig("stages", "float32"),
    RotaryConfig("rotate", "float32"),
    RotaryConfig("gather"),
    RotaryConfig("list"),
)


def everything() -> Iterator[AnyScoreConfig]:
    """Every tile size with every kind of product."""
    for dtype in ("bfloat16", "float16", "float32", "int8", "uint8"):
        for D in (64, 80, 128, 256):
            for R in (1, 32):
                for op in ("tokens", "pages", "bounds"):
                    if op != "bounds" or not dtype.endswith("int8"):
                        yield ScoreConfig(op, dtype, D, R)
            if not dtype.endswith("int8"):
                yield ScoreConfig("quantize", dtype, D)
                yield ScoreConfig("quantize", dtype, D, bits=4)
    yield ScoreConfig("vote", "float32")
    for D in (64, 80, 128, 256):
        for n in (1, 64, 128, 256):
            yield WindowConfig("bfloat16", D, n)
        yield WindowConfig("bfloat16", D, softcap=30.0)
        yield WindowConfig("float32", D)
    yield WindowConfig("float32", 256, 256)
    for dtype in ("bfloat16", "float32"):
        for D in (64, 80, 128, 256):
            yield BlockConfig("means", dtype, D)
            for stride in (1, 8, 16, 128):
                yield BlockConfig("antidiagonal", dtype, D, stride)
    for dtype, D in (("bfloat16", 64), ("bfloat16", 256), ("float16", 128), ("float16", 256)):
        yield SearchConfig("tree", dtype, D, "spread")
        yield SearchConfig("stages", dtype, D, "last", "last")
    yield SearchConfig("tree", "float32", 256)
    for limits in (False, True):
        for N in (32, 1024, 4096, 8192, select.ROW, 2**20):
            yield TopkConfig(N, limits=limits)
            yield TopkConfig(N, 8192, limits, pages=True)
        for N in (32, 1024, 4096, mass.ROW, 2**20):
            yield MassConfig(N, forced=limits)
        yield LinesConfig(dense_from=limits)
        for lows in (False, True):
            yield ListsConfig(limits, lows)
        for D in (64, 80, 128, 256):
            yield ReuseConfig("float32", D, limits)
    for dtype in ("bfloat16", "float16", "float32"):
        for D, pairs in ((64, 32), (80, 40), (128, 16), (128, 64), (256, 128)):
            for interleaved in (False, True):
                yield RotaryConfig("rotate", dtype, D, pairs, interleaved)
                yield RotaryConfig("gather", dtype, D, pairs, interleaved)


def _keys(D: int, dtype: torch.dtype) -> Tensor:
    return empty(1, _HKV, KEYS + 1, D, dtype=dtype)[:, :, :KEYS]
