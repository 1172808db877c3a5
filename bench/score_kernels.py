"""Configurations of the Triton score and select kernels for `bench.kernels_report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcontext.ops.hierarchy.options import Stage, StageOptions, TreeOptions
from lowcontext.ops.triton import blocks, lines, mass, rotary, scores, searches, select, window
from lowcontext.ops.triton.launch import Launch

# An odd number of keys, of a cache that holds one more: what a decode step knows of strides.
_HKV, _GROUP, _N = 8, 4, 65535


@dataclass(frozen=True)
class ScoreConfig:
    """One op on tensors without memory: 32 query heads, 8 KV heads, 64K - 1 keys.

    Args:
        op: "tokens", "pages" (keys of chosen pages), "bounds", "vote" or "quantize".
        dtype, D: of the keys; "uint8" is two channels of 4 bits.
        R: queries per head.
        bits: of "quantize".
    """

    op: str
    dtype: str = "bfloat16"
    D: int = 128
    R: int = 1
    bits: int = 8

    @property
    def name(self) -> str:
        """Short label."""
        last = f"bits={self.bits}" if self.op == "quantize" else f"R={self.R}"
        return f"scores {self.op} {self.dtype} D={self.D} {last}"

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        dtype, D = getattr(torch, self.dtype), self.D
        q = _empty(1, _HKV * _GROUP, self.R, D)
        k = _keys(D // 2 if dtype == torch.uint8 else D, dtype)
        scales = None if dtype.is_floating_point else _empty(1, _HKV, _N)
        if self.op == "bounds":
            return scores.plan_page_scores(q, _empty(1, _HKV, _N // 16, 2 * D, dtype=dtype))[0]
        if self.op == "quantize":
            return scores.plan_quantize_keys(k, self.bits)[0]
        if self.op == "vote":
            return scores.plan_soft_vote(_empty(*q.shape[:3], _N), _empty(*q.shape[:3]), _HKV)[0]
        starts = _empty(1, _HKV, 512, dtype=torch.int32) if self.op == "pages" else None
        return scores.plan_token_scores(q, k, scales, starts, 16, 0.1, starts is None)[0]


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
        q = _empty(1, _HKV * _GROUP, self.window, self.D, dtype=dtype)
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
        q = _empty(1, _HKV * _GROUP, _N, self.D, dtype=dtype)
        k = _keys(self.D, dtype)
        if self.op == "means":
            return [blocks.plan_block_means(q, 0, self.block)[0]]
        return [blocks.plan_antidiagonal_scores(q, k, self.stride, self.block, 0.1)[0]]


@dataclass(frozen=True)
class TopkConfig:
    """`votes.topk` on 32 rows without memory.

    Args:
        N: entries of a row.
        limits: whether each row has a limit of its own.
    """

    N: int
    limits: bool = False

    @property
    def name(self) -> str:
        """Short label."""
        return f"topk N={self.N}" + (" limits" if self.limits else "")

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        limits = _empty(32, dtype=torch.int32) if self.limits else None
        return select.plan_topk(_empty(32, self.N), 2048, limits)[0]


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
        forced = _empty(8, self.N, dtype=torch.bool) if self.forced else None
        return mass.plan_mass_mask(_empty(32, self.N), 2**29, forced)[0]


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
        mask = _empty(1, 32, _N, dtype=torch.bool)
        start = _empty(1, 32, dtype=torch.int32) if self.dense_from else None
        return lines.plan_line_index(mask, mask, 8192, 64, 1000, 1000, start)[0]


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
        q = _empty(1, _HKV * _GROUP, 64, self.D, dtype=dtype)
        k = _keys(self.D, dtype)
        if self.op == "tree":
            tree = TreeOptions(beam=128, representative=self.which, rows=self.rows)
            (search,) = searches.searches(q, k, tree, 0, 0, 2 * tree.beam)
            return searches.plan_tree(search, tree)[0]
        stages = StageOptions(
            stages=(Stage(64, 4096), Stage(2)), representative=self.which, rows=self.rows
        )
        (search,) = searches.searches(q, k, stages, 0, 0, _N // 64)
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
        k, f = _keys(self.D, dtype), _empty(self.pairs)
        count = _empty(1, dtype=torch.int32)
        if self.op == "rotate":
            steps = [0, 1, 0, 0]
            return rotary.plan_rotate_to(k, (None, None), steps, f, self.interleaved, dtype)[0]
        lists = _empty(1, _HKV, size, dtype=torch.int32)
        if self.op == "list":
            return rotary.plan_list_keys(lists, count, count, [0, _N], size, 1, 128)[0]
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
)

REPRESENTATIVE = (
    ScoreConfig("tokens"),
    ScoreConfig("tokens", D=64),
    ScoreConfig("tokens", "float32", R=32),
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
    TopkConfig(select.ROW),
    TopkConfig(2**20, limits=True),
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
            yield TopkConfig(N, limits)
        for N in (32, 1024, 4096, mass.ROW, 2**20):
            yield MassConfig(N, forced=limits)
        yield LinesConfig(dense_from=limits)
    for dtype in ("bfloat16", "float16", "float32"):
        for D, pairs in ((64, 32), (80, 40), (128, 16), (128, 64), (256, 128)):
            for interleaved in (False, True):
                yield RotaryConfig("rotate", dtype, D, pairs, interleaved)
                yield RotaryConfig("gather", dtype, D, pairs, interleaved)


def _keys(D: int, dtype: torch.dtype) -> Tensor:
    return _empty(1, _HKV, _N + 1, D, dtype=dtype)[:, :, :_N]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
