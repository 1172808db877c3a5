"""Scores of key blocks for blocks of queries: block means, and antidiagonals of the logits.

    mean[n] = sum of the rows of block n / their number

    x[a, b]     = scale / stride * sum_t q[stride * a + stride - 1 - t] . k[stride * b + t]
    lse_a       = log sum_{b <= a} e^x[a, b]
    score[n, m] = sum over the cells a of block n and b <= a of block m of e^(x[a, b] - lse_a)

for cells a and b of `stride` tokens. `antidiagonal_kernel` is a product of matrices with an inner
dimension of stride * D, computed twice: once for the LSE of its rows, once for the sums. The second
product costs 1 / stride of the logits; keeping the first one would take Lq * Lk / stride^2 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.triton import interpreted
from lowcontext.ops.triton.attend import _load_rows
from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.sizes import ceil_div, power_of_2

# fmt: off
UNSPECIALIZED = [
    "H", "Hq", "group", "L", "Lq", "Lk", "offset", "first", "blocks", "Nq", "Nk", "block", "stride",
    "cells",
]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def block_means_kernel(
    x_ptr, out_ptr, stride_b, stride_h, stride_l, H, L, offset, blocks, block,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """fp32 means [B, H, blocks, D] of blocks of x, whose first row has position `offset` < block.

    Grid (blocks * H, B).
    """
    n = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    low = tl.maximum(n * block - offset, 0)
    high = tl.minimum((n + 1) * block - offset, L)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(low, high, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        x_rows = x_ptr + b * stride_b + h * stride_h + rows.to(tl.int64) * stride_l
        x = _load_rows(x_rows, rows < high, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        total += tl.sum(x.to(tl.float32), 0)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    out = out_ptr + ((b * H + h) * blocks + n) * D + d
    tl.store(out, total / (high - low).to(tl.float32), mask=d < D)


@triton.jit
def _cell_logits(
    q_base, k_base, q_valid, k_valid, q_cells, k_cells, stride_ql, stride_kl,
    offset, Lq, Lk, stride, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IEEE: tl.constexpr,
):
    """x [BLOCK_M, BLOCK_N] of query cells [BLOCK_M] and key cells [BLOCK_N]; -inf where b > a."""
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(stride):
        rows = q_cells * stride + (stride - 1 - t) - offset  # [BLOCK_M]
        q_rows = q_base + rows.to(tl.int64) * stride_ql
        q = _load_rows(q_rows, q_valid & (rows >= 0) & (rows < Lq), True, D, BLOCK_D)
        keys = k_cells * stride + t  # [BLOCK_N]
        k_rows = k_base + keys.to(tl.int64) * stride_kl
        k = _load_rows(k_rows, k_valid & (keys < Lk), True, D, BLOCK_D)
        if IEEE:
            keys_t = tl.trans(k.to(tl.float32))  # [BLOCK_D, BLOCK_N]
            x = tl.dot(q.to(tl.float32), keys_t, x, input_precision="ieee")
        else:
            x = tl.dot(q, tl.trans(k), x)  # products of 16-bit numbers are exact in fp32
    visible = k_valid[None, :] & (k_cells[None, :] <= q_cells[:, None])
    return tl.where(visible, x * scale, float("-inf"))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def antidiagonal_kernel(
    q_ptr, k_ptr, out_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    Hq, group, Lq, Lk, offset, first, Nq, Nk, stride, cells, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CELLS: tl.constexpr, IEEE: tl.constexpr,
):
    """score [B, Hq, Nq, Nk] for BLOCK_M // CELLS query blocks, from block `first` on.

    A block has `cells` cells, which take CELLS rows or columns of a tile. Blocks of keys after the
    query blocks are not written. Grid (tiles of query blocks * Hq, B); late ones start first.
    """
    BLOCKS_M: tl.constexpr = BLOCK_M // CELLS
    BLOCKS_N: tl.constexpr = BLOCK_N // CELLS
    h = (tl.program_id(0) % Hq).to(tl.int64)
    tile = tl.num_programs(0) // Hq - 1 - tl.program_id(0) // Hq
    b = tl.program_id(1).to(tl.int64)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    k_base = k_ptr + b * stride_kb + h // group * stride_kh
    i = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    j = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    q_blocks = tile * BLOCKS_M + i // CELLS
    q_cells = (first + q_blocks) * cells + i % CELLS
    q_valid = (i % CELLS < cells) & (q_blocks < Nq)
    end = first + tl.minimum((tile + 1) * BLOCKS_M, Nq)  # key blocks that some row sees

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    for k_block in range(0, end, BLOCKS_N):
        k_cells = (k_block + j // CELLS) * cells + j % CELLS
        k_valid = j % CELLS < cells
        x = _cell_logits(
            q_base, k_base, q_valid, k_valid, q_cells, k_cells, stride_ql, stride_kl,
            offset, Lq, Lk, stride, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, IEEE,
        )
        m_new = tl.maximum(m, tl.max(x, 1))
        # Key cell 0 is visible to every cell: after the first tile m is finite.
        z = z * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new[:, None]), 1)
        m = m_new
    lse = m + tl.log(z)

    # A cell without a query takes no part.
    exists = q_valid & ((q_cells + 1) * stride > offset) & (q_cells * stride < Lk)
    out_blocks = tile * BLOCKS_M + tl.arange(0, BLOCKS_M)  # [BLOCKS_M]
    out_rows = out_ptr + ((b * Hq + h) * Nq + out_blocks) * Nk
    for k_block in range(0, end, BLOCKS_N):
        k_cells = (k_block + j // CELLS) * cells + j % CELLS
        k_valid = j % CELLS < cells
        x = _cell_logits(
            q_base, k_base, q_valid, k_valid, q_cells, k_cells, stride_ql, stride_kl,
            offset, Lq, Lk, stride, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, IEEE,
        )
        p = tl.where(exists[:, None], tl.exp(x - lse[:, None]), 0.0)  # [BLOCK_M, BLOCK_N]
        p = tl.sum(tl.reshape(p, [BLOCK_M, BLOCKS_N, CELLS]), 2)  # [BLOCK_M, BLOCKS_N]
        p = tl.sum(tl.reshape(p, [BLOCKS_M, CELLS, BLOCKS_N]), 1)  # [BLOCKS_M, BLOCKS_N]
        columns = k_block + tl.arange(0, BLOCKS_N)  # [BLOCKS_N]
        stored = (out_blocks < Nq)[:, None] & (columns < Nk)[None, :]
        tl.store(out_rows[:, None] + columns[None, :], p, mask=stored)
# fmt: on


def plan_block_means(x: Tensor, offset: int, block: int) -> tuple[Launch, Tensor]:
    """The launch that computes fp32 means over blocks of x [B, H, L, D], and the means.

    The first row of x has position `offset`; blocks without a row are left out.
    """
    B, H, L, D = x.shape
    first, blocks = BlockIndex.query_blocks(L, offset + L, block)
    means = torch.empty((B, H, blocks, D), dtype=torch.float32, device=x.device)
    block_d = power_of_2(D)
    args: dict[str, Any] = {"x_ptr": x, "out_ptr": means, "H": H, "L": L}
    args |= zip(("stride_b", "stride_h", "stride_l"), x.stride(), strict=False)
    args |= {"offset": offset - first * block, "blocks": blocks, "block": block, "D": D}
    args |= {"BLOCK_D": block_d, "BLOCK_N": max(1, min(64, 8192 // block_d))}
    return Launch(block_means_kernel, (blocks * H, B), args, 4, 1), means


def plan_antidiagonal_scores(
    q: Tensor, k: Tensor, stride: int, block: int, scale: float
) -> tuple[Launch, Tensor]:
    """The launch of `block_scores.antidiagonal_scores`, and scores [B, Hq, Nq * f, Nk * f].

    f is 1, or where a block has more cells than a tile, the number of parts it is cut into.
    """
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    ieee = q.dtype == torch.float32
    tile, warps, stages = antidiagonal_tile(D, ieee)
    total = block // stride
    cells = max(x for x in range(1, tile + 1) if total % x == 0)
    first, Nq, Nk = (total // cells * x for x in block_counts(Lq, Lk, block))
    scores = torch.zeros((B, Hq, Nq, Nk), dtype=torch.float32, device=q.device)
    padded = power_of_2(cells)
    args: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "out_ptr": scores, "Hq": Hq}
    args |= zip(("stride_qb", "stride_qh", "stride_ql"), q.stride(), strict=False)
    args |= zip(("stride_kb", "stride_kh", "stride_kl"), k.stride(), strict=False)
    args |= {"group": Hq // Hkv, "Lq": Lq, "Lk": Lk, "offset": Lk - Lq, "first": first}
    args |= {"Nq": Nq, "Nk": Nk, "stride": stride, "cells": cells, "scale": scale / stride}
    args |= {"D": D, "BLOCK_D": max(16, power_of_2(D)), "CELLS": padded}
    # The interpreter's tl.dot multiplies the bits of bf16 as integers: it gets them in fp32.
    args |= {"BLOCK_M": tile, "BLOCK_N": tile, "IEEE": ieee or interpreted()}
    grid = (ceil_div(Nq, tile // padded) * Hq, B)
    # Without a limit the assembler spills up to 48 bytes, for the hope of one block more; with it,
    # up to 72 in 16 bits where a block is one cell.
    registers = None if padded == 1 and not ieee else 255
    return Launch(antidiagonal_kernel, grid, args, warps, stages, registers), scores


def block_counts(Lq: int, Lk: int, block: int) -> tuple[int, int, int]:
    """The first query block, the number of query blocks and the number of key blocks."""
    return *BlockIndex.query_blocks(Lq, Lk, block), -(-Lk // block)


def antidiagonal_tile(D: int, ieee: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile of the antidiagonal kernel, its warps and its stages.

    From the compiler's report alone (`python -m bench.kernels_report --only antidiagonal`). With 4
    warps a tile of 64 spills 8 bytes where a block is one cell; in fp32 up to 11232.
    """
    if ieee:
        return 32, 4, 1
    return 64, 8, 3 if D <= 128 else 2
