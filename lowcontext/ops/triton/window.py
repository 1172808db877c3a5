"""The last queries' attention weights, summed along keys and along distances.

    x[r, j] = cap(scale * q_r . k_j)    p[r, j] = e^(x[r, j] - lse_r),  j <= i_r = Lk - n + r
    vertical[j] = sum_r p[r, j]         slash[d] = sum_r p[r, i_r - d]

for the n rows r of each query head. Two passes over K: `window_lse_kernel` leaves the LSE of every
row over each tile of keys, `scores.lse_kernel` joins them, `window_sums_kernel` computes the
weights again and sums them. A program holds one tile of keys and passes all rows of its KV head by
it, so that a pass reads each key once.

Slash sums. A tile of BLOCK_N keys meets n rows at BLOCK_N + n - 1 distances. Row r holds distance
entry e at column BLOCK_N - 1 + r - e: a gather along the row (through shared memory) puts equal
distances under each other. Tiles overlap in n - 1 distances, so each writes its sums to a buffer
of its own and `slash_kernel` adds, for every distance, the few tiles that hold it, in their order.
Nothing is added atomically: the result is the same at every call.

Memory, in fp32 numbers per query head: n * Lk / 128 LSEs and Lk / 64 buffers of BLOCK_E sums. For
n = 64 that is Lk / 2 and 2 * Lk, beside 2 * Lk of results.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton import interpreted
from lowcontext.ops.triton.attend import _load_rows
from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.scores import plan_lse
from lowcontext.ops.triton.sizes import ceil_div, power_of_2

# fmt: off
UNSPECIALIZED = ["Hkv", "group", "n", "Lk", "span", "tiles"]


@triton.jit
def _logits(q, k, scale, cap, IEEE: tl.constexpr, SOFTCAP: tl.constexpr):
    """cap(scale * q k^T) for q [BLOCK_M, BLOCK_D], k [BLOCK_N, BLOCK_D]; fp32."""
    if IEEE:
        x = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        x = tl.dot(q, tl.trans(k))  # products of 16-bit numbers are exact in fp32
    x *= scale
    if SOFTCAP:
        # tanh(y) = 1 - 2 / (e^2y + 1)
        x = cap * (1.0 - 2.0 / (tl.exp(x * (2.0 / cap)) + 1.0))
    return x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def window_lse_kernel(
    q_ptr, k_ptr, partial_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    Hkv, group, n, Lk, scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IEEE: tl.constexpr, SOFTCAP: tl.constexpr,
):
    """LSEs [B, Hkv, tiles, group * n] of the rows of a KV head over BLOCK_N keys.

    Grid (tiles * Hkv, B).
    """
    tiles = tl.num_programs(0) // Hkv
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_rows = k_ptr + b * stride_kb + kv_head * stride_kh + keys.to(tl.int64) * stride_kl
    k = _load_rows(k_rows, keys < Lk, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    rows = group * n
    for first in range(0, rows, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        head = kv_head * group + i // n
        q_rows = q_ptr + b * stride_qb + head * stride_qh + (i % n).to(tl.int64) * stride_ql
        q = _load_rows(q_rows, i < rows, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        x = _logits(q, k, scale, cap, IEEE, SOFTCAP)  # [BLOCK_M, BLOCK_N]
        x = tl.where(keys[None, :] <= (Lk - n + i % n)[:, None], x, float("-inf"))
        m = tl.max(x, 1)  # [BLOCK_M]
        base = tl.where(m == float("-inf"), 0.0, m)
        z = tl.sum(tl.exp(x - base[:, None]), 1)
        # z >= 1 where a row sees one of these keys, else 0.
        lse = tl.where(z == 0.0, float("-inf"), m + tl.log(tl.maximum(z, 1.0)))
        out = partial_ptr + ((b * Hkv + kv_head) * tiles + tile) * rows + i
        tl.store(out, lse, mask=i < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def window_sums_kernel(
    q_ptr, k_ptr, lse_ptr, vertical_ptr, slash_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    Hkv, group, n, Lk, scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, IEEE: tl.constexpr, SOFTCAP: tl.constexpr,
):
    """Vertical sums [B, Hq, Lk] and slash sums [B, Hq, tiles, BLOCK_E] of BLOCK_N keys.

    Entry e of a tile that ends at key `last` has distance Lk - n - last + e, negative ones are 0.
    Grid (tiles * Hkv, B).
    """
    tiles = tl.num_programs(0) // Hkv
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_rows = k_ptr + b * stride_kb + kv_head * stride_kh + keys.to(tl.int64) * stride_kl
    k = _load_rows(k_rows, keys < Lk, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    entries = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    for g in range(group):
        head = kv_head * group + g
        row = b * Hkv * group + head
        vertical = tl.zeros([BLOCK_N], tl.float32)
        slash = tl.zeros([BLOCK_E], tl.float32)
        for first in range(0, n, BLOCK_M):
            r = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            q_rows = q_ptr + b * stride_qb + head * stride_qh + r.to(tl.int64) * stride_ql
            q = _load_rows(q_rows, r < n, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            lse = tl.load(lse_ptr + row * n + r, mask=r < n, other=0.0)  # [BLOCK_M]
            x = _logits(q, k, scale, cap, IEEE, SOFTCAP)  # [BLOCK_M, BLOCK_N]
            visible = (r < n)[:, None] & (keys[None, :] <= (Lk - n + r)[:, None])
            p = tl.exp(tl.where(visible, x - lse[:, None], float("-inf")))
            vertical += tl.sum(p, 0)
            column = BLOCK_N - 1 + r[:, None] - entries[None, :]  # [BLOCK_M, BLOCK_E]
            inside = (column >= 0) & (column < BLOCK_N)
            skewed = tl.gather(p, tl.where(inside, column, 0), 1)  # [BLOCK_M, BLOCK_E]
            slash += tl.sum(tl.where(inside, skewed, 0.0), 0)
        tl.store(vertical_ptr + row * Lk + keys, vertical, mask=keys < Lk)
        tl.store(slash_ptr + (row * tiles + tile) * BLOCK_E + entries, slash)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def slash_kernel(
    parts_ptr, slash_ptr, n, Lk, tiles, span,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):
    """slash[d] = sum over the tiles t that hold distance d of parts[t, e], e as in the parts.

    The n keys at distance d from the n rows lie in at most `span` tiles. Grid (blocks * B * Hq, 1).
    """
    blocks = tl.cdiv(Lk, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    first = tl.maximum(Lk - n - d, 0) // BLOCK_N  # [BLOCK], the tile of the first key
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(span):
        t = first + s
        e = d - (Lk - n) + (t + 1) * BLOCK_N - 1
        held = (d < Lk) & (t < tiles) & (e >= 0) & (e < BLOCK_N + n - 1)
        part = parts_ptr + (row * tiles + t) * BLOCK_E + e
        total += tl.load(part, mask=held, other=0.0)  # [BLOCK]
    tl.store(slash_ptr + row * Lk + d, total, mask=d < Lk)
# fmt: on


def plan_window_scores(
    q: Tensor, k: Tensor, scale: float, softcap: float
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of `vertical_slash.last_window_scores`, and the sums that they fill.

    Args:
        q: the window, [B, Hq, n, D].
    """
    B, Hq, n, D = q.shape
    Hkv, Lk = k.shape[1:3]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    vertical, slash = empty(B, Hq, Lk), empty(B, Hq, Lk)
    if vertical.numel() == 0:
        return [], vertical, slash
    ieee = q.dtype == torch.float32
    args: dict[str, Any] = {"q_ptr": q, "k_ptr": k}
    args |= zip(("stride_qb", "stride_qh", "stride_ql"), q.stride(), strict=False)
    args |= zip(("stride_kb", "stride_kh", "stride_kl"), k.stride(), strict=False)
    args |= {"Hkv": Hkv, "group": Hq // Hkv, "n": n, "Lk": Lk, "scale": scale, "cap": softcap}
    args |= {"D": D, "BLOCK_D": max(16, power_of_2(D)), "SOFTCAP": softcap > 0}
    # The interpreter's tl.dot multiplies the bits of bf16 as integers: it gets them in fp32.
    args["IEEE"] = ieee or interpreted()

    block_m, block_n = lse_tiles(D, ieee)
    tiles = ceil_div(Lk, block_n)
    partial, lse = empty(B, Hkv, tiles, Hq // Hkv * n), empty(B, Hq, n)
    first = args | {"partial_ptr": partial, "BLOCK_M": block_m, "BLOCK_N": block_n}

    block_m, block_n, block_e = sum_tiles(D, ieee, n)
    held = ceil_div(Lk, block_n)
    parts = empty(B, Hq, held, block_e)
    second = args | {"lse_ptr": lse, "vertical_ptr": vertical, "slash_ptr": parts}
    second |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_E": block_e}
    third = {"parts_ptr": parts, "slash_ptr": slash, "n": n, "Lk": Lk, "tiles": held}
    third |= {"span": ceil_div(n - 1, block_n) + 1}
    third |= {"BLOCK_N": block_n, "BLOCK_E": block_e, "BLOCK": 512}
    # Left alone, the assembler spills 8 bytes with D = 256 for the hope of one block more.
    registers = None if ieee else 255
    launches = [
        Launch(window_lse_kernel, (tiles * Hkv, B), first, 4, 1),
        plan_lse(partial, lse),
        Launch(window_sums_kernel, (held * Hkv, B), second, 4, 1, registers),
        Launch(slash_kernel, (ceil_div(Lk, 512) * B * Hq, 1), third, 4, 1),
    ]
    return launches, vertical, slash


def lse_tiles(D: int, ieee: bool) -> tuple[int, int]:
    """BLOCK_M and BLOCK_N of the LSE kernel, with 4 warps.

    From the compiler's report alone (`python -m bench.kernels_report --only window`); not timed.
    """
    if ieee:
        return 16, 64 if D <= 128 else 32
    return (64, 128) if D <= 128 else (32, 64)


def sum_tiles(D: int, ieee: bool, n: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and BLOCK_E of the kernel of sums; as `lse_tiles`.

    A gathered tile of BLOCK_M * BLOCK_E numbers takes 64 registers of each of 128 threads at most.
    64 rows spill up to 40 bytes on sm_100, and 5632 in fp32.
    """
    block_n = 32 if D > 128 else 64
    block_e = power_of_2(block_n + n - 1)
    rows = 16 if ieee else min(32, power_of_2(n))
    return max(16, min(rows, 8192 // block_e)), block_n, block_e
