"""The native kernels of the vertical-slash ops: csrc/cpu/window_scores.h and line_index.h."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops import native
from lowcontext.ops.vertical_slash import _fakes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this, else the reason they do not."""
    if like.device.type != "cpu":
        return f"its kernels run on the CPU, got {like.device.type}"
    if op == "line_index":
        return None
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16 and fp16, got {like.dtype}"
    D = like.shape[3]
    if D % 8 or not 0 < D <= _MAX_HEAD_DIM:
        return f"its kernels take a head_dim that is a multiple of 8 up to 256, got {D}"
    return None


def last_window_scores(
    q: Tensor, k: Tensor, *, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.vertical_slash.last_window_scores`; q is the window [B, Hq, n, D]."""
    _load()
    return torch.ops.lowcontext.last_window_scores(q, k, scale, softcap)


def line_index(
    vertical: Tensor,
    slash: Tensor,
    Lq: int,
    dense_from: Tensor | None,
    *,
    block: int,
    tiles: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lowcontext.ops.vertical_slash.line_index`; returns the four tensors of the index."""
    _load()
    return torch.ops.lowcontext.line_index(vertical, slash, Lq, block, tiles, columns, dense_from)


def _fake_index(
    vertical: Tensor,
    slash: Tensor,
    Lq: int,
    block: int,
    tiles: int,
    columns: int,
    dense_from: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fakes.line_index(vertical, slash, Lq, dense_from, block, tiles, columns)


_load = native.loader({"last_window_scores": _fakes.last_window_scores, "line_index": _fake_index})
