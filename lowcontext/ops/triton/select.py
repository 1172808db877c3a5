"""The largest entries of rows, as ascending ids: kernels and launches.

    T = the k-th largest entry of a row    room = k - #{i: x_i > T}
    ids = {i: x_i > T} + the first `room` of {i: x_i = T}

Entries are compared as int32 in the order of the floats, bit by bit, so that a selection is exact
and the same at every call. A row of up to 16384 entries stays in the registers of one program,
which finds T in 32 counts, one bit each. Longer rows are cut into chunks of 2048, one program each:
four passes count the digits of 8 bits from the top, in histograms that the chunks of a row add up
(integers: the order of the additions does not matter); then each chunk counts what it keeps, and
after that knows where to write it. Nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton.launch import Launch

# Entries of a row that one program holds, and of a chunk of a longer one. 32768 entries on 16 warps
# spill 40 bytes on sm_100; a chunk of 4096 on 8 warps spills 8 on sm_90.
ROW = 16384
CHUNK = 2048
# Passes over the digits of a long row.
DIGITS = 4

# fmt: off
UNSPECIALIZED = ["N", "k", "chunks", "stride"]


@triton.jit
def order_of(x):
    """int32 in the order of the floats x. -0 equals 0; -inf and NaN are -2^31, below all."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # -2139095041 is -inf and 0x7f800000 is inf: what lies outside is NaN.
    number = (order > -2139095041) & (order <= 0x7F800000)
    return tl.where(number, order, -2147483648)


@triton.jit
def reaching(order, mass, target):
    """The largest T with sum of `mass` [BLOCK] over {order >= T} >= target, from the top bit down.

    -2^31 if all of them hold less than the target; 2^31 - 1 for a target of 0.
    """
    one = tl.full([], 1, tl.int32)
    t = tl.full([], -2147483648, tl.int32)
    for i in range(32):
        candidate = t ^ (one << (31 - i))
        held = tl.sum(tl.where(order >= candidate, mass, 0), 0)
        t = tl.where(held >= target, candidate, t)
    return t


@triton.jit
def kept(order, t, room, ties_before):
    """bool [BLOCK]: entries above t, and ties with it while fewer than `room` came before."""
    tie = ((order == t) & (t > -2147483648)).to(tl.int32)
    return (order > t) | ((tie > 0) & (ties_before + tl.cumsum(tie, 0) <= room))


@triton.jit
def _most(limits_ptr, row, k):
    """Entries wanted from a row."""
    if limits_ptr is not None:
        k = tl.minimum(tl.load(limits_ptr + row), k)
    return k


@triton.jit(do_not_specialize=UNSPECIALIZED)
def topk_row_kernel(
    scores_ptr, limits_ptr, ids_ptr, counts_ptr, stride, N, k, BLOCK: tl.constexpr,
):
    """ids [rows, k], zeros beyond the count, and counts [rows], of rows of N <= BLOCK entries.

    Grid (rows, 1).
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(scores_ptr + row * stride + i, mask=i < N, other=float("-inf"))  # [BLOCK]
    order = order_of(x)
    most = _most(limits_ptr, row, k)
    t = reaching(order, 1, most)  # the k-th largest
    room = most - tl.sum((order > t).to(tl.int32), 0)
    keep = kept(order, t, room, 0)
    rank = tl.cumsum(keep.to(tl.int32), 0)  # [BLOCK]
    count = tl.max(rank, 0)
    ids = ids_ptr + row * k
    tl.store(ids + rank - 1, i, mask=keep)
    tl.store(ids + i, tl.zeros([BLOCK], tl.int32), mask=(i >= count) & (i < k))
    tl.store(counts_ptr + row, count)


@triton.jit
def threshold(digits_ptr, row, most, PASSES: tl.constexpr, BITS: tl.constexpr):
    """The first PASSES digits of T, and what of `most` is left to entries that share them.

    T is the largest t such that the sums [rows, 32 / BITS, 2^BITS] over {order >= t} reach `most`.
    """
    WIDTH: tl.constexpr = 1 << BITS
    digit = tl.arange(0, WIDTH)
    prefix = tl.full([], 0, tl.int32)
    for p in tl.static_range(PASSES):
        held = tl.load(digits_ptr + (row * (32 // BITS) + p) * WIDTH + digit)  # [WIDTH]
        at_least = tl.sum(held, 0) - tl.cumsum(held, 0) + held  # [WIDTH], falling
        chosen = tl.sum((at_least >= most).to(tl.int32), 0) - 1
        most -= tl.sum(tl.where(digit == chosen + 1, at_least, 0), 0)
        # The top digit is signed.
        value = chosen - WIDTH // 2 if p == 0 else chosen
        prefix |= value << (32 - BITS * (p + 1))
    return prefix, most


@triton.jit
def _chunk(scores_ptr, stride, N, chunks, CHUNK: tl.constexpr):
    """Row and chunk of this program; entry numbers [CHUNK] and their order."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    i = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    x = tl.load(scores_ptr + row * stride + i, mask=i < N, other=float("-inf"))  # [CHUNK]
    return row, chunk, i, order_of(x)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def digits_kernel(
    scores_ptr, limits_ptr, digits_ptr, stride, N, k, chunks,
    PASS: tl.constexpr, CHUNK: tl.constexpr,
):
    """digits[row, PASS, d] += entries of a chunk with digit d and the first PASS digits of T.

    Grid (rows * chunks, 1).
    """
    row, _, i, order = _chunk(scores_ptr, stride, N, chunks, CHUNK)
    exists = i < N
    SHIFT: tl.constexpr = 24 - 8 * PASS
    if PASS == 0:
        value = (order >> 24) + 128
    else:
        prefix, _ = threshold(digits_ptr, row, _most(limits_ptr, row, k), PASS, 8)
        exists = exists & ((order >> (SHIFT + 8)) == (prefix >> (SHIFT + 8)))
        value = (order >> SHIFT) & 255
    count = tl.histogram(value, 256, mask=exists)  # [256]
    place = digits_ptr + (row * 4 + PASS) * 256 + tl.arange(0, 256)
    tl.atomic_add(place, count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def topk_counts_kernel(
    scores_ptr, limits_ptr, digits_ptr, above_ptr, ties_ptr, stride, N, k, chunks,
    CHUNK: tl.constexpr,
):
    """above and ties [rows, chunks]: entries of a chunk above T and at T.

    Grid (rows * chunks, 1).
    """
    row, chunk, _, order = _chunk(scores_ptr, stride, N, chunks, CHUNK)
    t, _ = threshold(digits_ptr, row, _most(limits_ptr, row, k), 4, 8)
    ties = (order == t) & (t > -2147483648)
    tl.store(above_ptr + row * chunks + chunk, tl.sum((order > t).to(tl.int32), 0))
    tl.store(ties_ptr + row * chunks + chunk, tl.sum(ties.to(tl.int32), 0))


@triton.jit
def sum_before(counts_ptr, end):
    """Sum of the first `end` int32 counts."""
    total = tl.zeros([256], tl.int32)
    for first in range(0, end, 256):
        j = first + tl.arange(0, 256)
        total += tl.load(counts_ptr + j, mask=j < end, other=0)  # [256]
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def topk_ids_kernel(
    scores_ptr, limits_ptr, digits_ptr, above_ptr, ties_ptr, ids_ptr, counts_ptr,
    stride, N, k, chunks, CHUNK: tl.constexpr,
):
    """ids [rows, k] that a chunk keeps, at their places, and by the last chunk counts [rows].

    Grid (rows * chunks, 1).
    """
    row, chunk, i, order = _chunk(scores_ptr, stride, N, chunks, CHUNK)
    t, room = threshold(digits_ptr, row, _most(limits_ptr, row, k), 4, 8)
    ties_before = sum_before(ties_ptr + row * chunks, chunk)
    before = sum_before(above_ptr + row * chunks, chunk) + tl.minimum(ties_before, room)
    keep = kept(order, t, room, ties_before)
    rank = tl.cumsum(keep.to(tl.int32), 0)  # [CHUNK]
    tl.store(ids_ptr + row * k + before + rank - 1, i, mask=keep)
    if chunk == chunks - 1:
        tl.store(counts_ptr + row, before + tl.max(rank, 0))
# fmt: on


def plan_topk(scores: Tensor, k: int, limits: Tensor | None) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of `votes.topk`, and the (ids, counts) that they fill.

    Args:
        scores: fp32 [rows, N], last dim contiguous.
        k: as there.
        limits: int32 [rows], contiguous.
    """
    rows, N = scores.shape
    width = min(k, N)
    ids = torch.zeros((rows, width), dtype=torch.int32, device=scores.device)
    counts = torch.zeros(rows, dtype=torch.int32, device=scores.device)
    if ids.numel() == 0:
        return [], ids, counts
    args: dict[str, Any] = {"scores_ptr": scores, "limits_ptr": limits, "k": width, "N": N}
    args["stride"] = scores.stride(0)
    if N <= ROW:
        block = max(32, triton.next_power_of_2(N))
        args |= {"ids_ptr": ids, "counts_ptr": counts, "BLOCK": block}
        return [row_launch(topk_row_kernel, rows, args)], ids, counts
    chunks = triton.cdiv(N, CHUNK)
    digits = torch.zeros((rows, DIGITS, 256), dtype=torch.int32, device=scores.device)
    parts = torch.empty((2, rows, chunks), dtype=torch.int32, device=scores.device)
    args |= {"digits_ptr": digits, "chunks": chunks, "CHUNK": CHUNK}
    grid = (rows * chunks, 1)
    launches = [
        Launch(digits_kernel, grid, args | {"PASS": number}, 8, 1) for number in range(DIGITS)
    ]
    args |= {"above_ptr": parts[0], "ties_ptr": parts[1]}
    launches.append(Launch(topk_counts_kernel, grid, args, 8, 1))
    args = args | {"ids_ptr": ids, "counts_ptr": counts}
    launches.append(Launch(topk_ids_kernel, grid, args, 8, 1))
    return launches, ids, counts


def row_launch(kernel: Any, rows: int, args: dict[str, Any]) -> Launch:
    """The launch of a kernel that holds a row of BLOCK entries in the registers of one program."""
    warps = max(1, min(32, args["BLOCK"] // 512))
    # 16 warps for 16384 entries spill 8 bytes with triton 3.6, and 32 on sm_100 with 3.7 if given
    # 128 registers.
    return Launch(kernel, (rows, 1), args, warps, 1)
