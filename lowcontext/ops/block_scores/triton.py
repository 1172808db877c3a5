"""The Triton kernels of the block scores: lowcontext/ops/triton/blocks.py."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.block_scores._fakes import fake_means, fake_scores
from lowcontext.ops.triton import execute, operator, unfit_device

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_D = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this, else the reason they do not."""
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16 and fp16, got {like.dtype}"
    if not 0 < like.shape[3] <= _MAX_D or 0 in like.shape:
        return f"its kernels take tokens with a head_dim of 1 to {_MAX_D}, got {list(like.shape)}"
    if like.shape[0] >= 2**16:
        return f"its kernels take a batch below {2**16}, got {like.shape[0]}"
    return unfit_device(like)


def _block_means(x: Tensor, block: int, offset: int) -> Tensor:
    from lowcontext.ops.triton.blocks import plan_block_means

    launch, means = plan_block_means(x, offset, block)
    execute([launch], x.device)
    return means


def _antidiagonal_scores(q: Tensor, k: Tensor, *, stride: int, block: int, scale: float) -> Tensor:
    from lowcontext.ops.triton.blocks import plan_antidiagonal_scores

    launch, scores = plan_antidiagonal_scores(q, k, stride, block, scale)
    execute([launch], q.device)
    _, Nq = BlockIndex.query_blocks(q.shape[2], k.shape[2], block)
    if scores.shape[2] == Nq:
        return scores
    parts = scores.shape[2] // Nq
    return rearrange(scores, "b h (n c) (m e) -> b h n m c e", c=parts, e=parts).sum(dim=(4, 5))


def _fake_antidiagonal(q: Tensor, k: Tensor, *, stride: int, block: int, scale: float) -> Tensor:
    return fake_scores(q, k, block)


# See the functions of the same names in `lowcontext.ops.block_scores`.
block_means = operator("block_means", _block_means, fake_means)
antidiagonal_scores = operator("antidiagonal_scores", _antidiagonal_scores, _fake_antidiagonal)
