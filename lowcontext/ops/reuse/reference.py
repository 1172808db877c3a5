"""Plain PyTorch on any device: what the kernel is tested against, and what a CPU runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Sums over a few queries.
FIT_FOR_GPU = True


def supports(op: str, like: Tensor) -> str | None:
    """Supports everything."""
    return None


def stale(
    q: Tensor, kept: Tensor, lows: Tensor, oldest: int, threshold: float, by_head: bool
) -> Tensor:
    """See `lowcontext.ops.reuse.stale`."""
    return turned(q, kept, threshold, by_head, lambda sums: sums) | (lows < oldest)


def turned(
    q: Tensor,
    kept: Tensor,
    threshold: float,
    by_head: bool,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """bool [B]: the cosine of q [B, Hq, 1, D] and kept [B, Hq * D] is below the threshold.

    Args:
        q, kept, threshold, by_head: as in `lowcontext.ops.reuse.stale`.
        reduce: sums a tensor over the ranks that hold the other heads.
    """
    q, other = q[:, :, 0].float(), kept.view(q.shape[0], *q.shape[1::2]).float()
    dot, size, length = (q * other).sum(2), q.square().sum(2), other.square().sum(2)  # [B, Hq]
    if by_head:
        return reduce((dot < threshold * (size * length).sqrt()).sum(1).float()) > 0
    sums = reduce(torch.stack([dot.sum(1), size.sum(1), length.sum(1)]))
    return ~(sums[0] >= threshold * (sums[1] * sums[2]).sqrt())
