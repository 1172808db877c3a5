"""Lists of tiles for decode steps, from what a method chose and what every query reads besides.

Plain integers, but a dozen tensor operations a step: on a GPU each of them would be a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowcontext.ops import _dispatch
from lowcontext.ops.lists import reference, triton

__all__ = ["tile_lists"]

BACKENDS = {"triton": triton, "reference": reference}


def tile_lists(
    k: Tensor,
    rows: int,
    *,
    width: int,
    low: int | Tensor,
    sink: int = 0,
    align: int = 1,
    span: int | None = None,
    pages: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tiles of the sink, of chosen pages and of recent keys, for each of the last rows.

        |sink|            |page|       |page|    |start  recent  end|
        0    sink                                 low              Lk     of the last row

    Row r is the query at key Lk - rows + r. Its recent keys begin where those of the last row do,
    less the rows in between, but not in the sink, rounded down to a multiple of `align`.

    Args:
        k: keys [B, Hkv, Lk, D]; their values are not read.
        rows: queries.
        width: keys per tile.
        low: first recent key of the last row; int32 [B] where the rows of the batch differ.
        sink: keys at the start; their whole tiles are listed.
        align: divides `sink`.
        span: the most recent keys of a row, needed where `low` is a tensor.
        pages: (int32 [B, H, rows, M], int32 [B, H, rows]): ascending numbers of pages of `width`
            keys, and how many of them count; a row's pages end before its recent keys.
        backend: "auto", "triton" or "reference".

    Returns:
        int32 [B, H, rows] and int32 [B, H, rows, S], the counts and starts of a `BlockIndex`; H is
        1 without pages, and B is 1 where neither `low` nor `pages` depend on the batch.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> tile_lists(torch.zeros(1, 1, 100, 8), 1, width=16, low=70, sink=16)
        (tensor([[[3]]], dtype=torch.int32), tensor([[[[ 0, 70, 86]]]], dtype=torch.int32))
    """
    for name, value, least in (("rows", rows, 1), ("width", width, 1), ("sink", sink, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if align < 1 or sink % align:
        raise ValueError(f"align: expected a divisor of sink={sink}, got {align}")
    B, Lk = k.shape[0], k.shape[2]
    lows = None
    if isinstance(low, Tensor):
        _check_int32("low", low, (B,), k)
        if span is None:
            raise ValueError("span: expected the most recent keys of a row with a tensor `low`")
        lows, low = low, 0
    elif span is None:
        span = max(Lk - max(low, sink), 0) + align - 1
    ids, counts = pages if pages is not None else (None, None)
    if ids is not None and counts is not None:
        _check_int32("pages", ids, (B, ids.shape[1], rows, ids.shape[-1]), k)
        _check_int32("counts of pages", counts, ids.shape[:3], k)
    run = _dispatch.implementation(BACKENDS, "tile_lists", backend, k)
    return run(k, lows, ids, counts, rows, width, low, sink, align, -(-span // width))


def _check_int32(name: str, x: Tensor, shape: Sequence[int], like: Tensor) -> None:
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {x.dtype}")
    if x.shape != shape or x.device != like.device:
        raise ValueError(
            f"{name}: expected shape {list(shape)} on {like.device}, got {list(x.shape)} on "
            f"{x.device}"
        )
