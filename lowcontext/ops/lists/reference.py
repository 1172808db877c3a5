"""Plain PyTorch on any device: what the kernel is tested against, and what a CPU runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Integers of a few rows.
FIT_FOR_GPU = True


def supports(op: str, like: Tensor) -> str | None:
    """Supports everything."""
    return None


def tile_lists(
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
    """See `lowcontext.ops.lists.tile_lists`; `recent` is the most recent tiles of a row."""
    options: dict[str, Any] = {"dtype": torch.int32, "device": k.device}
    behind = torch.arange(rows - 1, -1, -1, **options)
    first = torch.full((1,), low, **options) if lows is None else lows
    start = (first[:, None] - behind).clamp(min=sink)  # [B, rows]
    start = (start - start % align)[:, None]  # [B, 1, rows]
    lead = sink // width
    counts = lead + ((k.shape[2] - behind - start + width - 1) // width).clamp(min=0)
    M = 0
    front: int | Tensor = lead
    if ids is not None and chosen is not None:
        M, front = ids.shape[3], lead + chosen[..., None]  # [B, H, rows, 1]
        counts = counts + chosen
    slot = torch.arange(lead + M + recent, **options)
    starts = start[..., None] + (slot - front) * width
    if ids is not None and M:
        rank = (slot - lead).clamp(0, M - 1).long().expand(*ids.shape[:3], -1)
        starts = torch.where(slot < front, ids.gather(3, rank) * width, starts)
    return counts, torch.where(slot < lead, slot * width, starts)
