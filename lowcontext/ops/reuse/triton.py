"""The Triton kernel of reuse, in lowcontext/ops/triton/reuse.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.triton import execute, operator, unfit_device

# Elements of the queries of a row, which one program holds.
_MOST = 16384


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this one, else the reason they do not."""
    if like.dtype == torch.float64:
        return "its kernel takes fp32, bf16 and fp16, the tensor is torch.float64"
    if like.shape[1] * like.shape[3] > _MOST:
        return f"its kernel takes queries of at most {_MOST} elements, got {list(like.shape)}"
    return unfit_device(like)


def _fake(
    q: Tensor, kept: Tensor, lows: Tensor, oldest: int, threshold: float, by_head: bool
) -> Tensor:
    return q.new_empty(q.shape[:1], dtype=torch.bool)


def _stale(
    q: Tensor, kept: Tensor, lows: Tensor, oldest: int, threshold: float, by_head: bool
) -> Tensor:
    from lowcontext.ops.triton.reuse import plan_stale

    given = q, kept.contiguous(), lows.contiguous()
    launches, out = plan_stale(*given, oldest, threshold, by_head)
    execute(launches, q.device)
    return out


# See `lowcontext.ops.reuse.stale`.
stale = operator("stale", _stale, _fake)
