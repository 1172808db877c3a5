"""The native kernels of the block scores: csrc/cpu/block_scores.h."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops import native
from lowcontext.ops.block_scores._fakes import fake_means, fake_scores

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this, else the reason they do not."""
    if like.device.type != "cpu":
        return f"its kernels run on the CPU, got {like.device.type}"
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16 and fp16, got {like.dtype}"
    D = like.shape[3]
    if D % 8 or not 0 < D <= _MAX_HEAD_DIM:
        return f"its kernels take a head_dim that is a multiple of 8 up to 256, got {D}"
    return None


def block_means(x: Tensor, block: int, offset: int) -> Tensor:
    """See `lowcontext.ops.block_scores.block_means`."""
    _load()
    return torch.ops.lowcontext.block_means(x, block, offset)


def antidiagonal_scores(q: Tensor, k: Tensor, *, stride: int, block: int, scale: float) -> Tensor:
    """See `lowcontext.ops.block_scores.antidiagonal_scores`."""
    _load()
    return torch.ops.lowcontext.antidiagonal_scores(q, k, stride, block, scale)


def _fake_antidiagonal(q: Tensor, k: Tensor, stride: int, block: int, scale: float) -> Tensor:
    return fake_scores(q, k, block)


_load = native.loader({"antidiagonal_scores": _fake_antidiagonal, "block_means": fake_means})
