"""The largest entries of rows, as ascending ids: kernels and launches.

    T = the k-th largest entry of a row    room = k - #{i: x_i > T}
    ids = {i: x_i > T} + the first `room` of {i: x_i = T}

Entries are compared as int32 in the order of the floats, bit by bit, so that a selection is exact
and the same at every call. A row of up to 16384 entries stays in the registers of one program,
which finds T in 32 counts, one bit each. Of a longer row each program takes the k best of 16384
entries, in their order, and the next launch takes the k best of those: two launches for 128K
entries and k = 2048, three for 1M. Where k is too large for that to shorten the row, it is cut into
chunks of 2048: four passes count the digits of 8 bits from the top, in histograms that the chunks
of a row add up (integers: the order of the additions does not matter); then each chunk counts what
it keeps, and after that knows where to write it. Nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.scores import idle
from lowcontext.ops.triton.sizes import ceil_div, power_of_2

# Entries of a row that one program holds, and of those how many it writes at a time: 16384 on 16
# warps take 100 registers; on 32 warps, which have 64, they spill up to 56 bytes.
ROW = 16384
STEP = 2048
# Entries of a chunk of a longer row: 4096 on 8 warps spill 8 bytes on sm_90.
CHUNK = 2048
# Programs take the best entries of parts of a row where k is at most 1 / SHRINK of a part.
SHRINK = 4
# Passes over the digits of a long row.
DIGITS = 4

# fmt: off
UNSPECIALIZED = ["N", "k", "chunks", "stride", "parts", "page_stride", "width", "first", "sharers"]


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
    """Entries wanted from a row; none where a limit is negative."""
    if limits_ptr is not None:
        k = tl.maximum(tl.minimum(tl.load(limits_ptr + row), k), 0)
    return k


@triton.jit
def _key_of(i, pages_ptr, row, page_stride, width, first, keep):
    """The keys of entries i over the pages of a row; without pages entry 0 is key `first`."""
    if pages_ptr is None:
        key = first + i
    else:
        page = tl.load(pages_ptr + row * page_stride + i // width, mask=keep, other=0)
        key = page * width + (first + i % width)
    return key


@triton.jit(do_not_specialize=UNSPECIALIZED)
def topk_row_kernel(
    scores_ptr, limits_ptr, pages_ptr, active_ptr, ids_ptr, counts_ptr, best_ptr,
    stride, page_stride, N, k, parts, width, first, sharers,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):
    """ids [rows, parts, k], zeros beyond the count, of the k largest of BLOCK entries at a time.

    With best_ptr also these entries [rows, parts, k], -inf beyond the count, else counts [rows].
    Rows of the batch that are not active are left out; each has `sharers` rows. Grid (rows * parts,
    1).
    """
    out = tl.program_id(0).to(tl.int64)
    row = out // parts
    if idle(active_ptr, row // sharers):
        return
    begin = tl.program_id(0) % parts * BLOCK
    scores = scores_ptr + row * stride
    i = begin + tl.arange(0, BLOCK)  # [BLOCK]
    order = order_of(tl.load(scores + i, mask=i < N, other=float("-inf")))  # [BLOCK]
    most = _most(limits_ptr, row, k)
    t = reaching(order, 1, most)  # the k-th largest
    room = most - tl.sum((order > t).to(tl.int32), 0)
    # Loaded again, a few at a time: with all of them there are not registers enough.
    ids = ids_ptr + out * k
    count = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    for first_entry in range(0, tl.minimum(N - begin, BLOCK), STEP):
        entry = begin + first_entry + tl.arange(0, STEP)  # [STEP]
        x = tl.load(scores + entry, mask=entry < N, other=float("-inf"))  # [STEP]
        order_here = order_of(x)
        keep = kept(order_here, t, room, ties)
        rank = tl.cumsum(keep.to(tl.int32), 0)  # [STEP]
        place = count + rank - 1
        key = _key_of(entry, pages_ptr, row, page_stride, width, first, keep)
        tl.store(ids + place, key, mask=keep)
        if best_ptr is not None:
            tl.store(best_ptr + out * k + place, x, mask=keep)
        ties += tl.sum((order_here == t).to(tl.int32), 0)
        count += tl.max(rank, 0)
    for first_id in range(0, k, STEP):
        j = first_id + tl.arange(0, STEP)  # [STEP]
        beyond = (j >= count) & (j < k)
        tl.store(ids + j, tl.zeros([STEP], tl.int32), mask=beyond)
        if best_ptr is not None:
            tl.store(
                best_ptr + out * k + j, tl.full([STEP], float("-inf"), tl.float32), mask=beyond
            )
    if best_ptr is None:
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
    scores_ptr, limits_ptr, pages_ptr, digits_ptr, above_ptr, ties_ptr, ids_ptr, counts_ptr,
    stride, page_stride, N, k, chunks, width, first,
    CHUNK: tl.constexpr,
):
    """ids [rows, k] that a chunk keeps, at their places; of the last chunk also what is beyond.

    That is counts [rows], and zeros for the ids behind them. Grid (rows * chunks, 1).
    """
    row, chunk, i, order = _chunk(scores_ptr, stride, N, chunks, CHUNK)
    t, room = threshold(digits_ptr, row, _most(limits_ptr, row, k), 4, 8)
    ties_before = sum_before(ties_ptr + row * chunks, chunk)
    before = sum_before(above_ptr + row * chunks, chunk) + tl.minimum(ties_before, room)
    keep = kept(order, t, room, ties_before)
    rank = tl.cumsum(keep.to(tl.int32), 0)  # [CHUNK]
    ids = ids_ptr + row * k
    i = _key_of(i, pages_ptr, row, page_stride, width, first, keep)
    tl.store(ids + before + rank - 1, i, mask=keep)
    if chunk == chunks - 1:
        count = before + tl.max(rank, 0)
        tl.store(counts_ptr + row, count)
        for start in range(0, k, CHUNK):
            j = start + tl.arange(0, CHUNK)  # [CHUNK]
            tl.store(ids + j, tl.zeros([CHUNK], tl.int32), mask=(j >= count) & (j < k))
# fmt: on


def plan_topk(
    scores: Tensor,
    k: int,
    limits: Tensor | None = None,
    pages: Tensor | None = None,
    width: int = 1,
    first: int = 0,
    active: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of `votes.topk`, and the (ids, counts) that they fill.

    Args:
        scores: fp32 [rows, N], last dim contiguous.
        k: as there.
        limits: int32 [rows], contiguous.
        pages, width, first: as in `keys_of`; pages int32 [rows, M], last dim contiguous.
        active: bool [B], for rows [B, ...]; a row of too many entries is computed all the same.
    """
    rows, N = scores.shape
    k = min(k, N)
    counts = torch.empty(rows, dtype=torch.int32, device=scores.device)
    launches: list[Launch] = []
    if rows == 0 or k == 0:
        return launches, counts.new_empty((rows, k)), counts.zero_()
    given = {"active_ptr": active, "sharers": 1 if active is None else rows // len(active)}
    while N > ROW and k * SHRINK <= ROW:
        parts = ceil_div(N, ROW)
        found = counts.new_empty((rows, parts * k))
        best = torch.empty((rows, parts * k), dtype=torch.float32, device=scores.device)
        args = given | _row_arguments(scores, k, limits, pages, width, first)
        args |= {"ids_ptr": found, "best_ptr": best, "parts": parts, **_blocks(ROW)}
        launches.append(row_launch(topk_row_kernel, rows * parts, args))
        scores, pages, width, first, N = best, found, 1, 0, parts * k
    ids = counts.new_empty((rows, k))
    args = given | _row_arguments(scores, k, limits, pages, width, first)
    args |= {"ids_ptr": ids, "counts_ptr": counts}
    if N <= ROW:
        args |= _blocks(max(32, power_of_2(N)))
        return [*launches, row_launch(topk_row_kernel, rows, args)], ids, counts
    return _digit_launches(args, rows), ids, counts


def _row_arguments(
    scores: Tensor, k: int, limits: Tensor | None, pages: Tensor | None, width: int, first: int
) -> dict[str, Any]:
    args: dict[str, Any] = {"scores_ptr": scores, "limits_ptr": limits, "pages_ptr": pages}
    args |= {"counts_ptr": None, "best_ptr": None, "parts": 1}
    args |= {"stride": scores.stride(0), "page_stride": 0 if pages is None else pages.stride(0)}
    return args | {"N": scores.shape[1], "k": k, "width": width, "first": first}


def _blocks(entries: int) -> dict[str, int]:
    return {"BLOCK": entries, "STEP": min(entries, STEP)}


def _digit_launches(args: dict[str, Any], rows: int) -> list[Launch]:
    """The launches for rows of which too much is taken: `args` are those of a single row."""
    chunks = ceil_div(args["N"], CHUNK)
    grid, like = (rows * chunks, 1), args["counts_ptr"]
    digits = like.new_zeros((rows, DIGITS, 256))
    parts = like.new_empty((2, rows, chunks))
    shared = {name: args[name] for name in ("scores_ptr", "limits_ptr", "stride", "N", "k")}
    shared |= {"digits_ptr": digits, "chunks": chunks, "CHUNK": CHUNK}
    launches = [
        Launch(digits_kernel, grid, shared | {"PASS": number}, 8, 1) for number in range(DIGITS)
    ]
    shared |= {"above_ptr": parts[0], "ties_ptr": parts[1]}
    launches.append(Launch(topk_counts_kernel, grid, shared, 8, 1))
    for name in ("pages_ptr", "page_stride", "width", "first", "ids_ptr", "counts_ptr"):
        shared = shared | {name: args[name]}
    return [*launches, Launch(topk_ids_kernel, grid, shared, 8, 1)]


def row_launch(kernel: Any, rows: int, args: dict[str, Any]) -> Launch:
    """The launch of a kernel that holds a row of BLOCK entries in the registers of one program."""
    warps = max(1, min(16, args["BLOCK"] // 512))
    return Launch(kernel, (rows, 1), args, warps, 1)
