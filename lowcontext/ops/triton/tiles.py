"""Lists of tiles for decode steps: kernel and launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.sizes import power_of_2

# fmt: off
UNSPECIALIZED = ["low", "sink", "width", "align", "Lk", "group", "rows", "M", "S"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tile_lists_kernel(
    lows_ptr, ids_ptr, chosen_ptr, counts_ptr, starts_ptr,
    low, sink, width, align, Lk, group, rows, M, S,
    BLOCK: tl.constexpr,
):
    """counts [B, H, rows] and starts [B, H, rows, S] of `lowcontext.ops.lists.tile_lists`.

    Grid (B * H * rows, 1); group is H * rows.
    """
    out = tl.program_id(0).to(tl.int64)
    behind = rows - 1 - tl.program_id(0) % rows
    if lows_ptr is not None:
        low = tl.load(lows_ptr + out // group)
    start = tl.maximum(low - behind, sink)
    start -= start % align
    lead = sink // width
    front = lead
    if ids_ptr is not None:
        front += tl.load(chosen_ptr + out)
    for first in range(0, S, BLOCK):
        slot = first + tl.arange(0, BLOCK)  # [BLOCK]
        place = start + (slot - front) * width
        if ids_ptr is not None:
            page = (slot >= lead) & (slot < front)
            place = tl.where(
                page, tl.load(ids_ptr + out * M + slot - lead, mask=page, other=0) * width, place
            )
        place = tl.where(slot < lead, slot * width, place)
        tl.store(starts_ptr + out * S + slot, place, mask=slot < S)
    recent = tl.maximum(Lk - behind - start + width - 1, 0) // width
    tl.store(counts_ptr + out, front + recent)
# fmt: on


def plan_tile_lists(
    counts: Tensor, starts: Tensor, given: Sequence[Tensor | None], numbers: dict[str, int]
) -> list[Launch]:
    """The launch that fills counts and starts.

    Args:
        counts, starts: as the kernel has them, contiguous.
        given: lows, ids and chosen of the kernel, contiguous or None.
        numbers: low, sink, width, align and Lk of the kernel.
    """
    B, H, rows, S = starts.shape
    lows, ids, chosen = given
    args = {"lows_ptr": lows, "ids_ptr": ids, "chosen_ptr": chosen, "counts_ptr": counts}
    args |= {"starts_ptr": starts, **numbers, "group": H * rows, "rows": rows, "S": S}
    args |= {"M": 0 if ids is None else ids.shape[3]}
    args |= {"BLOCK": min(1024, max(32, power_of_2(S)))}
    return [Launch(tile_lists_kernel, (B * H * rows, 1), args, 4, 1)]
