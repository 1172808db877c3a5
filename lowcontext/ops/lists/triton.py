"""The Triton kernel of tile lists, in lowcontext/ops/triton/tiles.py."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.triton import execute, operator, unfit_device


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this one, else the reason they do not."""
    return unfit_device(like)


def _fake(
    k: Tensor,
    lows: Tensor | None,
    ids: Tensor | None,
    chosen: Tensor | None,
    rows: int,
    width: int,
    low: int,
    sink: int,
    align: int,
    recent: int,
) -> tuple[Tensor, Tensor]:
    B, H, M = 1 if lows is None else lows.shape[0], 1, 0
    if ids is not None:
        B, H, _, M = ids.shape
    counts = k.new_empty((B, H, rows), dtype=torch.int32)
    return counts, counts.new_empty((B, H, rows, sink // width + M + recent))


def _tile_lists(
    k: Tensor,
    lows: Tensor | None,
    ids: Tensor | None,
    chosen: Tensor | None,
    rows: int,
    width: int,
    low: int,
    sink: int,
    align: int,
    recent: int,
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.tiles import plan_tile_lists

    counts, starts = _fake(k, lows, ids, chosen, rows, width, low, sink, align, recent)
    given = [None if x is None else x.contiguous() for x in (lows, ids, chosen)]
    numbers = {"low": low, "sink": sink, "width": width, "align": align, "Lk": k.shape[2]}
    execute(plan_tile_lists(counts, starts, given, numbers), k.device)
    return counts, starts


# See `lowcontext.ops.lists.tile_lists`.
tile_lists = operator("tile_lists", _tile_lists, _fake)
