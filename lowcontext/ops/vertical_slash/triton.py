"""The Triton kernels of the vertical-slash scores: lowcontext/ops/triton/window.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.triton import execute, operator, unfit_device

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_D = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this, else the reason they do not."""
    if op == "line_index":
        return "it does not have this op"
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16 and fp16, got {like.dtype}"
    if not 0 < like.shape[3] <= _MAX_D:
        return f"its kernels take a head_dim of 1 to {_MAX_D}, got {like.shape[3]}"
    if like.shape[0] >= 2**16:
        return f"its kernels take a batch below {2**16}, got {like.shape[0]}"
    return unfit_device(like)


def _last_window_scores(
    q: Tensor, k: Tensor, *, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.window import plan_window_scores

    launches, vertical, slash = plan_window_scores(q, k, scale, softcap)
    execute(launches, q.device)
    return vertical, slash


def _fake_scores(q: Tensor, k: Tensor, *, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[1], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


# See `lowcontext.ops.vertical_slash.last_window_scores`; q is the window [B, Hq, n, D].
last_window_scores = operator("last_window_scores", _last_window_scores, _fake_scores)
