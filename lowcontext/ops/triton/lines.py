"""The index of chosen vertical and slash lines: kernels and launches.

The walk for the query block that ends at `end`, as in `vertical_slash.line_index`:

    reach = 0; while reach < end and a distance below end - reach is chosen:
        d = the largest of them; start = max(end - d - block, reach)
        list start; reach = start + block

last[x] is the largest chosen distance up to x: a step is one load, last[end - reach - 1]. One lane
walks for one query block; LANES blocks of a head walk together. The columns of a block are the
chosen keys before its last `reach` that no tile holds: a binary search over its starts for each.

Masks become ids and running maxima in two passes of one program per chunk: the first leaves what a
chunk holds, the second adds up the chunks before its own and writes. That moves 12 bytes per key
and head: both masks twice, and two int32 numbers. A prompt of 1M tokens and 32 heads in 128 parts
does it for half of the keys on average, 26 GB in all, 5 ms at 4.8 TB/s; once for all parts would
save that, and need a third op and 256 MiB that live as long as the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.select import sum_before
from lowcontext.ops.triton.sizes import ceil_div

_CHUNK = 1024
_LANES = 32

# fmt: off
UNSPECIALIZED = [
    "vertical_b", "vertical_h", "vertical_n", "slash_b", "slash_h", "slash_n", "dense_b", "dense_h",
    "Lk", "chunks", "Nq", "first", "block", "tiles", "columns", "halvings",
]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _chosen(mask_ptr, b, h, i, stride_b, stride_h, stride_n, Lk):
    """Entries i [CHUNK] of one row of a mask: bool [CHUNK], False from Lk on."""
    row = mask_ptr + b * stride_b + h * stride_h
    return tl.load(row + i.to(tl.int64) * stride_n, mask=i < Lk, other=0) != 0


@triton.jit(do_not_specialize=UNSPECIALIZED)
def line_counts_kernel(
    vertical_ptr, slash_ptr, counts_ptr, largest_ptr,
    vertical_b, vertical_h, vertical_n, slash_b, slash_h, slash_n, Lk, chunks,
    CHUNK: tl.constexpr,
):
    """counts, largest [B, H, chunks]: chosen keys of a chunk, its largest chosen distance (or -1).

    Grid (chunks * H, B).
    """
    h = (tl.program_id(0) // chunks).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    key = _chosen(vertical_ptr, b, h, i, vertical_b, vertical_h, vertical_n, Lk)
    distance = _chosen(slash_ptr, b, h, i, slash_b, slash_h, slash_n, Lk)
    place = b * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts_ptr + place, tl.sum(key.to(tl.int32), 0))
    tl.store(largest_ptr + place, tl.max(tl.where(distance, i, -1), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def line_lists_kernel(
    vertical_ptr, slash_ptr, counts_ptr, largest_ptr, keys_ptr, totals_ptr, last_ptr,
    vertical_b, vertical_h, vertical_n, slash_b, slash_h, slash_n, Lk, chunks,
    CHUNK: tl.constexpr,
):
    """keys [B, H, Lk]: chosen keys, ascending; totals [B, H] of them; last [B, H, Lk].

    Grid (chunks * H, B).
    """
    chunk = tl.program_id(0) % chunks
    h = (tl.program_id(0) // chunks).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    i = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    unit = b * (tl.num_programs(0) // chunks) + h
    key = _chosen(vertical_ptr, b, h, i, vertical_b, vertical_h, vertical_n, Lk)
    before = sum_before(counts_ptr + unit * chunks, chunk)
    rank = tl.cumsum(key.to(tl.int32), 0)  # [CHUNK]
    tl.store(keys_ptr + unit * Lk + before + rank - 1, i, mask=key)
    if chunk == chunks - 1:
        tl.store(totals_ptr + unit, before + tl.max(rank, 0))
    largest = tl.full([256], -1, tl.int32)
    for first in range(0, chunk, 256):
        j = first + tl.arange(0, 256)
        found = tl.load(largest_ptr + unit * chunks + j, mask=j < chunk, other=-1)  # [256]
        largest = tl.maximum(largest, found)
    distance = _chosen(slash_ptr, b, h, i, slash_b, slash_h, slash_n, Lk)
    last = tl.associative_scan(tl.where(distance, i, -1), 0, _larger)  # [CHUNK]
    tl.store(last_ptr + unit * Lk + i, tl.maximum(last, tl.max(largest, 0)), mask=i < Lk)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def line_tiles_kernel(
    last_ptr, dense_from_ptr, counts_ptr, starts_ptr, dense_b, dense_h,
    Lk, Nq, first, block, tiles, LANES: tl.constexpr,
):
    """starts [B, H, Nq, tiles] and counts [B, H, Nq] of the tiles of LANES query blocks.

    `first` is the number of the first query block. Grid (groups of blocks * H, B).
    """
    groups = tl.cdiv(Nq, LANES)
    h = (tl.program_id(0) // groups).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    unit = b * (tl.num_programs(0) // groups) + h
    n = tl.program_id(0) % groups * LANES + tl.arange(0, LANES)  # [LANES]
    live = n < Nq
    end = (first + n + 1) * block
    dense = n < 0
    if dense_from_ptr is not None:
        dense = end > tl.load(dense_from_ptr + b * dense_b + h * dense_h)
    last = last_ptr + unit * Lk
    starts = starts_ptr + (unit * Nq + n) * tiles
    reach = tl.zeros([LANES], tl.int32)
    count = tl.zeros([LANES], tl.int32)
    step = tl.full([], 0, tl.int32)
    going = tl.full([], 1, tl.int32)
    while going > 0:
        d = tl.load(last + tl.minimum(end - reach, Lk) - 1, mask=live, other=-1)  # [LANES]
        live = live & (dense | (d >= 0))
        start = tl.where(dense, reach, tl.maximum(end - d - block, reach))
        tl.store(starts + step, start, mask=live)
        reach = tl.where(live, start + block, reach)
        count += live.to(tl.int32)
        live = live & (reach < end)
        step += 1
        going = tl.where(step < tiles, tl.max(live.to(tl.int32), 0), 0)
    tl.store(counts_ptr + unit * Nq + n, count, mask=n < Nq)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def line_columns_kernel(
    keys_ptr, totals_ptr, counts_ptr, starts_ptr, column_counts_ptr, columns_ptr,
    Lk, Nq, block, tiles, columns, halvings, BLOCK: tl.constexpr,
):
    """columns [B, H, Nq, columns] and column_counts [B, H, Nq] of one query block.

    2^halvings > tiles. Grid (Nq * H, B).
    """
    n = tl.program_id(0) % Nq
    b = tl.program_id(1).to(tl.int64)
    unit = b * (tl.num_programs(0) // Nq) + tl.program_id(0) // Nq
    row = unit * Nq + n
    count = tl.load(counts_ptr + row)  # scalar
    starts = starts_ptr + row * tiles
    reach = tl.load(starts + count - 1, mask=count > 0, other=0)
    reach = tl.where(count > 0, reach + block, 0)
    total = tl.load(totals_ptr + unit)
    found = tl.full([], 0, tl.int32)
    begin = tl.full([], 0, tl.int32)
    going = tl.minimum(total, reach)
    while going > 0:
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(keys_ptr + unit * Lk + i, mask=i < total, other=2147483647)  # [BLOCK]
        before = key < reach
        low = tl.zeros([BLOCK], tl.int32)
        high = low + count
        for _ in range(halvings):
            middle = (low + high) // 2
            start = tl.load(starts + middle, mask=before & (low < high), other=2147483647)
            after = start <= key
            low = tl.where(after, middle + 1, low)
            high = tl.where(after, high, middle)
        start = tl.load(starts + low - 1, mask=before & (low > 0), other=-2147483647)
        keep = before & (key - block >= start)
        rank = tl.cumsum(keep.to(tl.int32), 0)  # [BLOCK]
        slot = found + rank - 1
        tl.store(columns_ptr + row * columns + slot, key, mask=keep & (slot < columns))
        found += tl.max(rank, 0)
        begin += BLOCK
        going = tl.where(begin < total, tl.min(before.to(tl.int32), 0), 0)
    tl.store(column_counts_ptr + row, tl.minimum(found, columns))
# fmt: on


def plan_line_index(
    vertical: Tensor,
    slash: Tensor,
    Lq: int,
    block: int,
    tiles: int,
    columns: int,
    dense_from: Tensor | None,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The launches of `vertical_slash.line_index`, and the four tensors of the index.

    Beside the index they need 8 bytes per key and head.
    """
    B, H, Lk = vertical.shape
    first, Nq = BlockIndex.query_blocks(Lq, Lk, block)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=vertical.device)

    counts, starts = ints(B, H, Nq), ints(B, H, Nq, tiles)
    column_counts, listed = ints(B, H, Nq), ints(B, H, Nq, columns)
    index = (counts, starts, column_counts, listed)
    if counts.numel() == 0:
        return [], index
    chunks = ceil_div(Lk, _CHUNK)
    parts, keys, totals, last = ints(2, B, H, chunks), ints(B, H, Lk), ints(B, H), ints(B, H, Lk)
    masks: dict[str, Any] = {"counts_ptr": parts[0], "largest_ptr": parts[1], "CHUNK": _CHUNK}
    for name, mask in (("vertical", vertical), ("slash", slash)):
        masks[f"{name}_ptr"] = mask.view(torch.uint8)
        masks |= zip((f"{name}_{axis}" for axis in "bhn"), mask.stride(), strict=True)
    masks |= {"Lk": Lk, "chunks": chunks}
    lists = masks | {"keys_ptr": keys, "totals_ptr": totals, "last_ptr": last}
    walk: dict[str, Any] = {"counts_ptr": counts, "starts_ptr": starts, "Lk": Lk, "Nq": Nq}
    walk |= {"block": block, "tiles": tiles}
    dense_strides = (0, 0) if dense_from is None else dense_from.stride()
    lanes = walk | {"last_ptr": last, "dense_from_ptr": dense_from, "first": first}
    lanes |= {"dense_b": dense_strides[0], "dense_h": dense_strides[1], "LANES": _LANES}
    single = walk | {"keys_ptr": keys, "totals_ptr": totals, "column_counts_ptr": column_counts}
    single |= {"columns_ptr": listed, "columns": columns, "halvings": tiles.bit_length()}
    single["BLOCK"] = 512
    launches = [
        Launch(line_counts_kernel, (chunks * H, B), masks, 4, 1),
        Launch(line_lists_kernel, (chunks * H, B), lists, 4, 1),
        Launch(line_tiles_kernel, (ceil_div(Nq, _LANES) * H, B), lanes, 1, 1),
        Launch(line_columns_kernel, (Nq * H, B), single, 4, 1),
    ]
    return launches, index
