"""Keys at other positions: rotation, lists that end at the last key, gathered rows. Kernels.

A pair of channels (a, b) with frequency f turns by d = fl(new f) - fl(old f), products in fp32:

    (a cos d - b sin d, b cos d + a sin d)

The difference is taken in fp64, where it keeps the 24 bits of both products. There too it is
reduced, d = n pi/2 + r with |r| <= pi/4, pi/2 in two numbers: r is within 1e-15 where the multiple
is fused into the subtraction, as the compiler does, and within |d| 2^-53 where not. The sine and
the cosine of r are Taylor polynomials in fp32. 8 operations of fp64 for an angle, which its head
uses once, hide behind the bytes of the row; the sine of a library would keep a table for huge
arguments in local memory, which is what a spill costs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton.attend import _load_rows
from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.sizes import ceil_div, power_of_2

# Rows that a program turns, where there are as many.
_ROWS = 16
_LIST = 512

# fmt: off
UNSPECIALIZED = [
    "old_b", "old_h", "old_l", "old_first", "old_step", "new_b", "new_h", "new_l", "new_first",
    "new_step", "keys_b", "keys_h", "starts_b", "starts_h", "counts_b", "low_b", "low", "first_b",
    "H", "L", "M", "Lk", "S", "width", "sink",
]


@triton.jit
def _cos_sin(old, new, inv_freq_ptr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """cos d and sin d, fp32 [N, BLOCK_P], for positions old and new [N]."""
    p = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    f = tl.load(inv_freq_ptr + p, mask=p < P, other=0.0)[None, :]  # [1, BLOCK_P]
    there = (new.to(tl.float32)[:, None] * f).to(tl.float64)  # [N, BLOCK_P]
    d = there - (old.to(tl.float32)[:, None] * f).to(tl.float64)
    n = tl.floor(d * 0.6366197723675814 + 0.5)
    r = (d - n * 1.5707963267948966 - n * 6.123233995736766e-17).to(tl.float32)
    z = r * r
    # The next terms are below 2e-9 and 2e-10.
    sine = 1.0 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    sine = r * sine
    cosine = 1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))
    cosine = 1.0 + z * (-0.5 + z * cosine)
    quarter = n.to(tl.int32)
    swap = (quarter & 1) != 0
    cos = tl.where(swap, sine, cosine)
    sin = tl.where(swap, cosine, sine)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    return cos, sin


@triton.jit
def _turn(a, b, cos, sin, stays):
    """The pairs (a, b) [N, BLOCK_P], turned unless their row stays: fp32."""
    x, y = a.to(tl.float32), b.to(tl.float32)
    # A product with 0 or 1 changes the sign of a zero and makes NaN of infinity.
    turned = tl.where(stays[:, None], x, x * cos - y * sin)
    return turned, tl.where(stays[:, None], y, y * cos + x * sin)


@triton.jit
def _store_rows(row_ptrs, x, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the first D numbers of rows x [N, BLOCK_D] to `row_ptrs` [N], where `inside` [N]."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    written = inside[:, None] & (d < D)[None, :]
    tl.store(row_ptrs[:, None] + d[None, :], x.to(row_ptrs.dtype.element_ty), mask=written)


@triton.jit
def _turn_rows(
    rows, out_rows, valid, inside, old, new, inv_freq_ptr,
    P: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    """Reads the `valid` rows at `rows` [N] and writes them, turned, where `inside`; else zeros."""
    stays = old == new
    if INTERLEAVED:
        x = _load_rows(rows, valid, True, 2 * P, 2 * BLOCK_P)  # [N, 2 * BLOCK_P]
        cos, sin = _cos_sin(old, new, inv_freq_ptr, P, BLOCK_P)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK_P, 2]))  # [N, BLOCK_P]
        a, b = _turn(a, b, cos, sin, stays)
        turned = tl.reshape(tl.join(a, b), [x.shape[0], 2 * BLOCK_P])
        _store_rows(out_rows, turned, inside, 2 * P, 2 * BLOCK_P)
    else:
        a = _load_rows(rows, valid, True, P, BLOCK_P)  # [N, BLOCK_P]
        b = _load_rows(rows + P, valid, True, P, BLOCK_P)  # [N, BLOCK_P]
        cos, sin = _cos_sin(old, new, inv_freq_ptr, P, BLOCK_P)
        a, b = _turn(a, b, cos, sin, stays)
        _store_rows(out_rows, a, inside, P, BLOCK_P)
        _store_rows(out_rows + P, b, inside, P, BLOCK_P)
    if 2 * P < D:
        BLOCK_REST: tl.constexpr = triton.next_power_of_2(D - 2 * P)
        rest = _load_rows(rows + 2 * P, valid, True, D - 2 * P, BLOCK_REST)  # [N, BLOCK_REST]
        _store_rows(out_rows + 2 * P, rest, inside, D - 2 * P, BLOCK_REST)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rotate_kernel(
    x_ptr, out_ptr, inv_freq_ptr, old_ptr, new_ptr, stride_b, stride_h, stride_l,
    old_b, old_h, old_l, old_first, old_step, new_b, new_h, new_l, new_first, new_step, H, L,
    P: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """out [B, H, L, D]: rows of x, turned from old to new positions. Grid (tiles of rows * H, B).

    Row i has position `first + step * i` where there is no tensor of them.
    """
    tiles = tl.cdiv(L, BLOCK_N)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = row < L
    old = old_first + row * old_step
    if old_ptr is not None:
        entries = old_ptr + b * old_b + h * old_h + row.to(tl.int64) * old_l
        old = tl.load(entries, mask=inside, other=0)  # [BLOCK_N]
    new = new_first + row * new_step
    if new_ptr is not None:
        entries = new_ptr + b * new_b + h * new_h + row.to(tl.int64) * new_l
        new = tl.load(entries, mask=inside, other=0)  # [BLOCK_N]
    rows = x_ptr + b * stride_b + h * stride_h + row.to(tl.int64) * stride_l
    out_rows = out_ptr + ((b * H + h) * L + row) * D
    _turn_rows(
        rows, out_rows, inside, inside, old, new, inv_freq_ptr, P, BLOCK_P, D, INTERLEAVED,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def list_keys_kernel(
    starts_ptr, counts_ptr, low_ptr, keys_ptr, first_ptr,
    starts_b, starts_h, counts_b, low_b, low, Lk, H, M, S, width, sink,
    BLOCK: tl.constexpr,
):
    """keys [B, H, M]: sink, tiles and recent keys, at the end; first [B], where they begin.

    Grid (chunks of a list * H, B).
    """
    chunks = tl.cdiv(M, BLOCK)
    h = (tl.program_id(0) // chunks).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    if low_ptr is not None:
        low = tl.load(low_ptr + b * low_b)
    recent = tl.maximum(low, sink)
    front = sink + tl.load(counts_ptr + b * counts_b) * width
    first = M - (front + Lk - recent)
    entry = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    slot = entry - first
    in_tile = (slot >= sink) & (slot < front) & (entry < M)
    tile = tl.minimum((slot - sink) // width, S - 1)
    start = tl.load(starts_ptr + b * starts_b + h * starts_h + tile, mask=in_tile, other=0)
    key = tl.where(slot < front, start + (slot - sink) % width, recent + slot - front)
    key = tl.where(slot < sink, tl.maximum(slot, 0), key)
    tl.store(keys_ptr + (b * H + h) * M + entry, key, mask=entry < M)
    if tl.program_id(0) == 0:
        tl.store(first_ptr + b, first)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gather_moved_kernel(
    k_ptr, v_ptr, keys_ptr, first_ptr, inv_freq_ptr, k_out_ptr, v_out_ptr,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, keys_b, keys_h, first_b,
    H, M, Lk,
    P: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    """Rows [B, H, M, D] of k, turned to stand one after another, and [B, H, M, DV] of v.

    Grid (tiles of entries * H, B).
    """
    tiles = tl.cdiv(M, BLOCK_N)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inside = entry < M
    listed = inside & (entry >= tl.load(first_ptr + b * first_b))
    key = tl.load(keys_ptr + b * keys_b + h * keys_h + entry, mask=listed, other=0)  # [BLOCK_N]
    # A list that breaks its promise gives a wrong result, but reads no foreign memory.
    valid = listed & (key >= 0) & (key < Lk)
    row = key.to(tl.int64)
    out = (b * H + h) * M + entry  # [BLOCK_N]
    v_rows = v_ptr + b * stride_vb + h * stride_vh + row * stride_vl
    v = _load_rows(v_rows, valid, True, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    k_rows = k_ptr + b * stride_kb + h * stride_kh + row * stride_kl
    _turn_rows(
        k_rows, k_out_ptr + out * D, valid, inside, key, Lk - M + entry, inv_freq_ptr,
        P, BLOCK_P, D, INTERLEAVED,
    )
    _store_rows(v_out_ptr + out * DV, v, inside, DV, BLOCK_DV)
# fmt: on


def plan_rotate_to(
    x: Tensor,
    positions: tuple[Tensor | None, Tensor | None],
    steps: list[int],
    inv_freq: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[list[Launch], Tensor]:
    """The launch of `rotary.rotate_to`, and what it fills.

    Args:
        x: at most 4 dimensions, the last contiguous.
        positions: old and new, where they are tensors.
        steps: first and step of the old positions, then of the new, where they are not.
        inv_freq: fp32 [P], contiguous.
        interleaved, dtype: as there.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return [], out
    shape = (1,) * (4 - x.dim()) + x.shape
    B, H, L, _ = shape
    args: dict[str, Any] = {"x_ptr": x, "out_ptr": out, "inv_freq_ptr": inv_freq, "H": H, "L": L}
    args |= zip(("stride_b", "stride_h", "stride_l"), x.expand(shape).stride(), strict=False)
    for i, (name, tensor) in enumerate(zip(("old", "new"), positions, strict=True)):
        strides = (0, 0, 0) if tensor is None else tensor.expand(shape[:3]).stride()
        args |= zip((f"{name}_{axis}" for axis in "bhl"), strides, strict=True)
        args |= {f"{name}_ptr": tensor, f"{name}_first": steps[2 * i]}
        args[f"{name}_step"] = steps[2 * i + 1]
    rows = 1 if L == 1 else _ROWS
    args |= _turns(inv_freq, x.shape[-1], rows, interleaved)
    grid = (ceil_div(L, rows) * H, B)
    return [Launch(rotate_kernel, grid, args, 1 if rows == 1 else 4, 1)], out


def plan_list_keys(
    starts: Tensor,
    counts: Tensor,
    low: Tensor | None,
    bounds: list[int],
    size: int,
    width: int,
    sink: int,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launch of `rotary.list_keys`, and the lists and their beginnings that it fills.

    Args:
        starts, counts, size, width, sink: as there.
        low: first recent keys, where they are a tensor.
        bounds: first recent key where it is none, and the number of keys.
    """
    B, H, S = starts.shape
    keys = torch.empty((B, H, size), dtype=torch.int32, device=starts.device)
    first = torch.empty(B, dtype=torch.int32, device=starts.device)
    if keys.numel() == 0:
        return [], keys, first
    args: dict[str, Any] = {"starts_ptr": starts, "counts_ptr": counts, "low_ptr": low}
    args |= {"keys_ptr": keys, "first_ptr": first, "low": bounds[0], "Lk": bounds[1]}
    args |= {"starts_b": starts.stride(0), "starts_h": starts.stride(1)}
    args["counts_b"] = counts.stride(0)
    args["low_b"] = 0 if low is None or low.shape[0] == 1 else low.stride(0)
    args |= {"H": H, "M": size, "S": S, "width": width, "sink": sink, "BLOCK": _LIST}
    return [Launch(list_keys_kernel, (ceil_div(size, _LIST) * H, B), args, 4, 1)], keys, first


def plan_gather_moved(
    k: Tensor, v: Tensor, keys: Tensor, first: Tensor, inv_freq: Tensor, interleaved: bool
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launch of `rotary.gather_moved`, and the keys and values that it fills.

    Args:
        k, v, keys, first, inv_freq, interleaved: as there; last dims contiguous.
    """
    (B, H, Lk, D), DV, M = k.shape, v.shape[3], keys.shape[2]
    k_out, v_out = k.new_empty(B, H, M, D), v.new_empty(B, H, M, DV)
    if 0 in (B, H, M):
        return [], k_out, v_out
    args: dict[str, Any] = {"k_ptr": k, "v_ptr": v, "keys_ptr": keys, "first_ptr": first}
    args |= {"inv_freq_ptr": inv_freq, "k_out_ptr": k_out, "v_out_ptr": v_out}
    for name, x in (("k", k), ("v", v)):
        axes = (f"stride_{name}b", f"stride_{name}h", f"stride_{name}l")
        args |= zip(axes, x.stride(), strict=False)
    args |= {"keys_b": keys.stride(0), "keys_h": 0 if keys.shape[1] == 1 else keys.stride(1)}
    args |= {"first_b": first.stride(0), "H": H, "M": M, "Lk": Lk}
    args |= {"DV": DV, "BLOCK_DV": power_of_2(DV)}
    args |= _turns(inv_freq, D, _ROWS, interleaved)
    grid = (ceil_div(M, _ROWS) * H, B)
    return [Launch(gather_moved_kernel, grid, args, 4, 1)], k_out, v_out


def _turns(inv_freq: Tensor, D: int, rows: int, interleaved: bool) -> dict[str, Any]:
    P = inv_freq.shape[0]
    sizes = {"P": P, "BLOCK_P": power_of_2(P), "D": D, "BLOCK_N": rows}
    return {**sizes, "INTERLEAVED": interleaved}
