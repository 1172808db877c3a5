"""Configurations of the Triton score kernels for `bench.kernels_report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcontext.ops.triton import scores
from lowcontext.ops.triton.launch import Launch

_HKV, _GROUP, _N = 8, 4, 65536


@dataclass(frozen=True)
class ScoreConfig:
    """One op on tensors without memory: 32 query heads, 8 KV heads, 64K keys.

    Args:
        op: "tokens", "pages" (keys of chosen pages), "bounds", "vote" or "quantize".
        dtype, D: of the keys.
        R: queries per head.
    """

    op: str
    dtype: str = "bfloat16"
    D: int = 128
    R: int = 1

    @property
    def name(self) -> str:
        """Short label."""
        return f"scores {self.op} {self.dtype} D={self.D} R={self.R}"

    def launches(self, capability: int) -> list[Launch]:
        """The launches of this op; they are the same for every capability."""
        dtype, D = getattr(torch, self.dtype), self.D
        q = _empty(1, _HKV * _GROUP, self.R, D)
        k = _empty(1, _HKV, _N, D, dtype=dtype)
        scales = _empty(1, _HKV, _N) if dtype == torch.int8 else None
        if self.op == "bounds":
            return scores.plan_page_scores(q, _empty(1, _HKV, _N // 16, 2 * D, dtype=dtype))[0]
        if self.op == "quantize":
            return scores.plan_quantize_keys(k)[0]
        if self.op == "vote":
            return scores.plan_soft_vote(_empty(*q.shape[:3], _N), _empty(*q.shape[:3]), _HKV)[0]
        starts = _empty(1, _HKV, 512, dtype=torch.int32) if self.op == "pages" else None
        return scores.plan_token_scores(q, k, scales, starts, 16, 0.1, starts is None)[0]


REPRESENTATIVE = (
    ScoreConfig("tokens"),
    ScoreConfig("tokens", "float32", R=32),
    ScoreConfig("pages", "float16", R=32),
    ScoreConfig("pages", "int8"),
    ScoreConfig("bounds"),
    ScoreConfig("vote", "float32"),
    ScoreConfig("quantize"),
)


def everything() -> Iterator[ScoreConfig]:
    """Every tile size with every kind of product."""
    for dtype in ("bfloat16", "float16", "float32", "int8"):
        for D in (64, 80, 128, 256):
            for R in (1, 32):
                for op in ("tokens", "pages", "bounds"):
                    if (op, dtype) != ("bounds", "int8"):
                        yield ScoreConfig(op, dtype, D, R)
            if dtype != "int8":
                yield ScoreConfig("quantize", dtype, D)
    yield ScoreConfig("vote", "float32")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
