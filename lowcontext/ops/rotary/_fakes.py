"""Shapes and dtypes of what the ops return, for tracing: the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_to(
    x: Tensor,
    old: Tensor | None,
    new: Tensor | None,
    steps: list[int],
    inv_freq: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Shape of `lowcontext.ops.rotary.rotate_to`."""
    return x.new_empty(x.shape, dtype=dtype)


def list_keys(
    starts: Tensor,
    counts: Tensor,
    low: Tensor | None,
    bounds: list[int],
    size: int,
    width: int,
    sink: int,
) -> tuple[Tensor, Tensor]:
    """Shapes of `lowcontext.ops.rotary.list_keys`."""
    return starts.new_empty(*starts.shape[:2], size), starts.new_empty(starts.shape[0])


def gather_moved(
    k: Tensor, v: Tensor, keys: Tensor, first: Tensor, inv_freq: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Shapes of `lowcontext.ops.rotary.gather_moved`."""
    shape = (*k.shape[:2], keys.shape[2])
    return k.new_empty(*shape, k.shape[3]), v.new_empty(*shape, v.shape[3])
