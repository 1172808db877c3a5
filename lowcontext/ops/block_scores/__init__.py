"""Means of blocks, and scores of key blocks that are cheaper than the logits themselves."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.ops import _checks, _dispatch
from lowcontext.ops.block_scores import native, reference, triton

__all__ = ["antidiagonal_scores", "block_means", "pooled_scores"]

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def block_means(x: Tensor, block: int, *, offset: int = 0, backend: str = "auto") -> Tensor:
    """The mean of each block of tokens, over those that exist.

    Args:
        x: [B, H, L, D].
        block: tokens per block; blocks are anchored at position 0.
        offset: position of the first row of x.
        backend: "auto" or a backend's name.

    Returns:
        fp32 [B, H, n, D] for the blocks from `offset // block` to that of the last row; n is 0
        without rows.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from lowcontext.ops.block_scores import block_means
        >>> x = torch.arange(6.0).view(1, 1, 6, 1)  # positions 3 to 8: one in block 0
        >>> block_means(x, 4, offset=3)[0, 0, :, 0].tolist()
        [0.0, 2.5, 5.0]
    """
    _checks.check_floats("x", x)
    _expect_int("block", block, 1)
    _expect_int("offset", offset, 0)
    if x.shape[2] == 0:
        return x.new_empty(x.shape, dtype=torch.float32)
    _checks.check_rows("x", x)
    return _means(x, block, offset, backend)


def pooled_scores(
    q: Tensor,
    k: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores key blocks by the mean query of each query block times the mean key of each block.

    score[n, m] = scale * mean(q of block n) . mean(k of block m)

    Blocks are anchored at position 0. Means are over the tokens that exist: the first block of
    queries may be cut by Lk - Lq, the last ones by the end. Nothing is masked. The block-sparse
    pattern of MInference (Jiang et al., arXiv 2407.02490, section 3.2).

    Args:
        q: [B, Hq, Lq, D], the last Lq positions; k: [B, Hkv, Lk, D].
        block: queries and keys per block.
        scale: factor of the scores, default `D ** -0.5`.
        backend: "auto" or a backend's name.

    Returns:
        fp32 [B, Hq, Nq, Nk]: query blocks as in a BlockIndex, Nk = ceil(Lk / block).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from lowcontext.ops.block_scores import pooled_scores
        >>> q, k = torch.randn(1, 4, 100, 64), torch.randn(1, 2, 300, 64)
        >>> pooled_scores(q, k).shape  # positions 200 to 299 lie in the blocks 3 and 4
        torch.Size([1, 4, 2, 5])
    """
    _checks.check_qkv(q, k, k)
    _checks.check_rows("q", q)
    _expect_int("block", block, 1)
    queries = _means(q, block, k.shape[2] - q.shape[2], backend)
    keys = _means(k, block, 0, backend)
    # A product of matrices on 1 / block of the tokens: the library's kernel.
    grouped = rearrange(queries, "b (h g) n d -> b h (g n) d", h=k.shape[1])
    scores = grouped * _checks.check_scale(scale, q.shape[3]) @ keys.transpose(2, 3)
    return rearrange(scores, "b h (g n) m -> b (h g) n m", n=queries.shape[2])


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    *,
    stride: int = 16,
    block: int = 128,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scores key blocks by antidiagonals of the logits: one of `stride` logits is looked at.

    Tokens form cells of `stride`. For query cell a and key cell b <= a

        logit[a, b] = scale / stride * sum_t q[stride * a + stride - 1 - t] . k[stride * b + t]
        score[n, m] = sum over the cells a of block n and b of block m of softmax_b(logit[a])

    Rows of a block sum to its number of query cells. Tokens that do not exist add nothing, and a
    cell without a token takes no part. XAttention (Xu et al., arXiv 2503.16428, section 2.1).

    Args:
        q: [B, Hq, Lq, D], the last Lq positions; k: [B, Hkv, Lk, D].
        stride: tokens per cell; divides `block`.
        block: queries and keys per block, anchored at position 0.
        scale: factor of the logits, default `D ** -0.5`.
        backend: "auto" or a backend's name.

    Returns:
        fp32 [B, Hq, Nq, Nk]; zero for key blocks after the query block.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from lowcontext.ops.block_scores import antidiagonal_scores
        >>> q, k = torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64)
        >>> antidiagonal_scores(q, k).sum(-1)[0, 0].round().tolist()
        [8.0, 8.0, 8.0, 8.0]
    """
    _checks.check_qkv(q, k, k)
    _checks.check_rows("q", q)
    _expect_int("stride", stride, 1)
    _expect_int("block", block, 1)
    if block % stride:
        raise ValueError(f"block: expected a multiple of stride={stride}, got {block}")
    run = _dispatch.implementation(BACKENDS, "antidiagonal_scores", backend, q)
    return run(q, k, stride=stride, block=block, scale=_checks.check_scale(scale, q.shape[3]))


def _means(x: Tensor, block: int, offset: int, backend: str) -> Tensor:
    return _dispatch.implementation(BACKENDS, "block_means", backend, x)(x, block, offset)


def _expect_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
