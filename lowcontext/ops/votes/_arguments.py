"""Argument checks that the ops of this family share."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops._checks import FLOAT_DTYPES, check_groups
from lowcontext.ops.votes._pages import Pages


def check_queries(q: Tensor) -> None:
    """Raises unless q is a floating tensor of four dimensions."""
    if not isinstance(q, Tensor) or q.dtype not in FLOAT_DTYPES:
        got = q.dtype if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"q: expected a floating dtype, got {got}")
    if q.dim() != 4:
        raise ValueError(f"q: expected 4 dimensions, got shape {list(q.shape)}")


def check_pages(pages: Pages, B: int, H: int) -> None:
    """Raises unless these pages fit a batch of B and H heads."""
    ids = pages.ids
    if ids.dtype != torch.int32 or ids.dim() != 3:
        raise ValueError(f"pages: expected int32 [B, H, M], got {ids.dtype} {list(ids.shape)}")
    if ids.shape[0] not in (1, B) or ids.shape[1] not in (1, H):
        raise ValueError(f"pages: expected shape [1 or {B}, 1 or {H}, M], got {list(ids.shape)}")
    if pages.width < 1:
        raise ValueError(f"pages: expected a width of at least 1, got {pages.width}")


def check_float32(name: str, x: Tensor, dims: int) -> None:
    """Raises unless x is an fp32 tensor of so many dimensions."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected an fp32 tensor, got {got}")
    if x.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(x.shape)}")


def check_heads(q: Tensor, name: str, k: Tensor, width: int) -> None:
    """Raises unless k [B, Hkv, N, width] has rows for the query heads of q, on its device."""
    if k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != width:
        raise ValueError(
            f"{name}: expected shape {[q.shape[0], 'Hkv', 'N', width]}, got {list(k.shape)}"
        )
    check_groups(q.shape[1], k.shape[1])
    if k.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} of q, got {k.device}")


def check_active(active: Tensor | None, B: int) -> None:
    """Raises unless `active` is None or bool [B]."""
    if active is None:
        return
    if active.dtype != torch.bool or active.shape != (B,):
        raise ValueError(f"active: expected bool [{B}], got {active.dtype} {list(active.shape)}")
