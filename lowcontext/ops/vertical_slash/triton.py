"""The Triton kernels of the vertical-slash ops: window.py and lines.py in lowcontext/ops/triton."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.triton import execute, operator, unfit_device
from lowcontext.ops.vertical_slash import _fakes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_D = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this, else the reason they do not."""
    if op == "last_window_scores":
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


def _line_index(
    vertical: Tensor,
    slash: Tensor,
    Lq: int,
    dense_from: Tensor | None,
    *,
    block: int,
    tiles: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lowcontext.ops.triton.lines import plan_line_index

    launches, index = plan_line_index(vertical, slash, Lq, block, tiles, columns, dense_from)
    execute(launches, vertical.device)
    return index


# See `lowcontext.ops.vertical_slash`; q is the window [B, Hq, n, D], and `line_index` returns the
# four tensors of the index.
last_window_scores = operator("last_window_scores", _last_window_scores, _fakes.last_window_scores)
line_index = operator("line_index", _line_index, _fakes.line_index)
