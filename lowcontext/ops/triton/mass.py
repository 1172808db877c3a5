"""The largest entries of rows that together hold a share of their mass: kernels and launches.

    mass_i = floor(x_i * 2^39 / 2^e)        2^e <= max x < 2^(e + 1)
    T      = the largest t with sum of mass_i over {x_i >= t} >= target
    room   = ceil((target - sum of mass_i over {x_i > T}) / mass at T)
    kept   = {i: x_i > T} + the first `room` of {i: x_i = T}

Masses are integers, whose sums do not depend on the order of the additions: the set is the same at
every call and on every backend. As in `select.py` nothing is sorted. A row of up to 8192 entries
stays in the registers of one program, which finds T bit by bit. Longer rows are cut into chunks:
one pass for the largest entry, eight that add up the masses by digits of 4 bits from the top, one
that counts the ties of each chunk and one that writes. Each reads the row once.

Memory beside the mask: 1 KiB and N / 512 bytes per long row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.select import (
    kept,
    order_of,
    reaching,
    row_launch,
    sum_before,
    threshold,
)
from lowcontext.ops.triton.sizes import ceil_div, power_of_2

# Entries of a row that one program holds, and of a chunk of a longer one.
ROW = 8192
CHUNK = 2048
BITS = 4

# fmt: off
UNSPECIALIZED = ["N", "share", "chunks", "stride", "forced_rows", "forced_r", "forced_n"]


@triton.jit
def _entries(weights_ptr, forced_ptr, row, i, stride, N, forced_rows, forced_r, forced_n):
    """Order of entries i [BLOCK] of a row, negative where one takes no part; which are forced."""
    x = tl.load(weights_ptr + row * stride + i, mask=i < N, other=-1.0)  # [BLOCK]
    order = order_of(x)
    forced = i < 0
    if forced_ptr is not None:
        flags = forced_ptr + row % forced_rows * forced_r + i.to(tl.int64) * forced_n
        forced = (tl.load(flags, mask=i < N, other=0) != 0) & (order >= 0)  # [BLOCK]
    return order, forced


@triton.jit
def _mass(order, top):
    """int64 masses of entries of this order, in a row whose largest entry has order `top`."""
    exponent = tl.maximum(order >> 23, 1)
    fraction = (order & 0x7FFFFF) | tl.where((order >> 23) > 0, 0x800000, 0)
    shift = tl.maximum(tl.minimum(tl.maximum(top >> 23, 1) - exponent, 40), 0)
    return tl.where(order >= 0, (fraction.to(tl.int64) << 16) >> shift.to(tl.int64), 0)


@triton.jit
def _target(total, share):
    """ceil(total * share / 2^30) without the 93 bits of the product."""
    high = total >> 32
    low = total & 0xFFFFFFFF
    return ((high * share) << 2) + ((low * share + 0x3FFFFFFF) >> 30)


@triton.jit
def _room(left, mass):
    """Ties of this mass that reach `left`."""
    return tl.where(left > 0, (left + mass - 1) // tl.maximum(mass, 1), 0).to(tl.int32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mass_row_kernel(
    weights_ptr, forced_ptr, keep_ptr, stride, N, share, forced_rows, forced_r, forced_n,
    BLOCK: tl.constexpr,
):
    """keep [rows, N] of rows of N <= BLOCK entries. Grid (rows, 1)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)  # [BLOCK]
    order, forced = _entries(
        weights_ptr, forced_ptr, row, i, stride, N, forced_rows, forced_r, forced_n,
    )
    top = tl.max(order, 0)
    mass = _mass(order, top)
    target = _target(tl.sum(mass, 0), share.to(tl.int64))
    if forced_ptr is not None:
        target -= tl.sum(tl.where(forced, mass, 0), 0)
        mass = tl.where(forced, 0, mass)
        order = tl.where(forced, -2147483648, order)
    t = reaching(order, mass, target)
    left = target - tl.sum(tl.where(order > t, mass, 0), 0)
    keep = kept(order, t, _room(left, _mass(t, top)), 0) | forced
    tl.store(keep_ptr + row * N + i, keep.to(tl.uint8), mask=i < N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mass_tops_kernel(weights_ptr, tops_ptr, stride, N, chunks, CHUNK: tl.constexpr):
    """tops[row] = the order of its largest entry. Grid (rows * chunks, 1)."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    order, _ = _entries(weights_ptr, None, row, i, stride, N, 1, 0, 0)
    tl.atomic_max(tops_ptr + row, tl.max(order, 0), sem="relaxed")


@triton.jit
def _free(
    weights_ptr, forced_ptr, tops_ptr, stride, N, chunks, forced_rows, forced_r, forced_n,
    CHUNK: tl.constexpr,
):
    """Row, chunk and entries [CHUNK] of this program; their order, masses, and which are forced."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    i = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    order, forced = _entries(
        weights_ptr, forced_ptr, row, i, stride, N, forced_rows, forced_r, forced_n,
    )
    mass = _mass(order, tl.load(tops_ptr + row))
    return row, chunk, i, tl.where(forced, -2147483648, order), mass, forced


@triton.jit
def _wanted(digits_ptr, row, share, BITS: tl.constexpr):
    """Mass that the entries which are not forced must hold: of the row's share, less the forced."""
    WIDTH: tl.constexpr = 1 << BITS
    sums = digits_ptr + row * (32 // BITS) * WIDTH + tl.arange(0, WIDTH)
    # Entries have no sign, so the lower half of the first digits is free: digit 0 holds the forced.
    held = tl.load(sums)  # [WIDTH]
    forced = tl.sum(tl.where(tl.arange(0, WIDTH) == 0, held, 0), 0)
    return _target(tl.sum(held, 0), share.to(tl.int64)) - forced


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mass_digits_kernel(
    weights_ptr, forced_ptr, tops_ptr, digits_ptr,
    stride, N, share, chunks, forced_rows, forced_r, forced_n,
    PASS: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr,
):
    """digits[row, PASS, d] += mass of a chunk with digit d and the first PASS digits of T.

    Grid (rows * chunks, 1).
    """
    row, _, _, order, mass, forced = _free(
        weights_ptr, forced_ptr, tops_ptr, stride, N, chunks, forced_rows, forced_r, forced_n,
        CHUNK,
    )
    WIDTH: tl.constexpr = 1 << BITS
    SHIFT: tl.constexpr = 32 - BITS * (PASS + 1)
    if PASS == 0:
        value = tl.where(forced, 0, (order >> SHIFT) + WIDTH // 2)
    else:
        prefix, _ = threshold(
            digits_ptr, row, _wanted(digits_ptr, row, share, BITS), PASS, BITS,
        )
        inside = (order >> (SHIFT + BITS)) == (prefix >> (SHIFT + BITS))
        mass = tl.where(inside, mass, 0)
        value = (order >> SHIFT) & (WIDTH - 1)
    place = digits_ptr + (row * (32 // BITS) + PASS) * WIDTH
    for d in tl.static_range(WIDTH):
        held = tl.sum(tl.where(value == d, mass, 0), 0)
        tl.atomic_add(place + d, held, mask=held > 0, sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mass_ties_kernel(
    weights_ptr, forced_ptr, tops_ptr, digits_ptr, ties_ptr,
    stride, N, share, chunks, forced_rows, forced_r, forced_n,
    CHUNK: tl.constexpr, BITS: tl.constexpr,
):
    """ties [rows, chunks]: entries of a chunk at T. Grid (rows * chunks, 1)."""
    row, chunk, _, order, _, _ = _free(
        weights_ptr, forced_ptr, tops_ptr, stride, N, chunks, forced_rows, forced_r, forced_n,
        CHUNK,
    )
    wanted = _wanted(digits_ptr, row, share, BITS)
    t, _ = threshold(digits_ptr, row, wanted, 32 // BITS, BITS)
    tl.store(ties_ptr + row * chunks + chunk, tl.sum((order == t).to(tl.int32), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mass_keep_kernel(
    weights_ptr, forced_ptr, tops_ptr, digits_ptr, ties_ptr, keep_ptr,
    stride, N, share, chunks, forced_rows, forced_r, forced_n,
    CHUNK: tl.constexpr, BITS: tl.constexpr,
):
    """keep [rows, N] of a chunk. Grid (rows * chunks, 1)."""
    row, chunk, i, order, _, forced = _free(
        weights_ptr, forced_ptr, tops_ptr, stride, N, chunks, forced_rows, forced_r, forced_n,
        CHUNK,
    )
    wanted = _wanted(digits_ptr, row, share, BITS)
    t, left = threshold(digits_ptr, row, wanted, 32 // BITS, BITS)
    room = _room(left, _mass(t, tl.load(tops_ptr + row)))
    keep = kept(order, t, room, sum_before(ties_ptr + row * chunks, chunk)) | forced
    tl.store(keep_ptr + row * N + i, keep.to(tl.uint8), mask=i < N)
# fmt: on


def plan_mass_mask(
    weights: Tensor, share: int, forced: Tensor | None
) -> tuple[list[Launch], Tensor]:
    """The launches of `votes.mass_mask`, and the mask bool [rows, N] that they fill.

    Args:
        weights: fp32 [rows, N], last dim contiguous.
        share: in units of 2^-30.
        forced: bool [R, N], for rows r, r + R, ...; any strides.
    """
    rows, N = weights.shape
    keep = torch.empty((rows, N), dtype=torch.bool, device=weights.device)
    if keep.numel() == 0:
        return [], keep
    args: dict[str, Any] = {"weights_ptr": weights, "keep_ptr": keep.view(torch.uint8)}
    args |= {"stride": weights.stride(0), "N": N, "share": share}
    args |= {"forced_ptr": None, "forced_rows": 1, "forced_r": 0, "forced_n": 0}
    if forced is not None:
        args |= {"forced_ptr": forced.view(torch.uint8), "forced_rows": forced.shape[0]}
        args |= zip(("forced_r", "forced_n"), forced.stride(), strict=True)
    if N <= ROW:
        block = max(32, power_of_2(N))
        return [row_launch(mass_row_kernel, rows, args | {"BLOCK": block})], keep
    chunks = ceil_div(N, CHUNK)
    tops = torch.full((rows,), -1, dtype=torch.int32, device=weights.device)
    digits = torch.zeros((rows, 32 // BITS, 1 << BITS), dtype=torch.int64, device=weights.device)
    ties = torch.empty((rows, chunks), dtype=torch.int32, device=weights.device)
    args |= {"tops_ptr": tops, "digits_ptr": digits, "ties_ptr": ties}
    args |= {"chunks": chunks, "CHUNK": CHUNK, "BITS": BITS}
    passes = [args | {"PASS": number} for number in range(32 // BITS)]
    kernels = [(mass_tops_kernel, args), *((mass_digits_kernel, each) for each in passes)]
    kernels += [(mass_ties_kernel, args), (mass_keep_kernel, args)]
    grid = (rows * chunks, 1)
    return [Launch(kernel, grid, _own(kernel, given), 8, 1) for kernel, given in kernels], keep


def _own(kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the kernel has."""
    return {name: args[name] for name in kernel.arg_names}
