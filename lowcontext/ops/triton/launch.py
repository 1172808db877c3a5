"""From arguments to kernel launches: which kernel, which tiles, how many splits.

A plan is a list of `Launch`; it is made from shapes alone, so that the same plan can be compiled
ahead of time on a machine without a GPU (`resources.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.triton import attend

LOG2E = math.log2(math.e)

# Query blocks shorter than this run in the decode kernel, which fills its rows with query heads.
_MIN_PREFILL_BLOCK = 16
# The most query rows (queries times heads) of a decode program, by bytes per number: 32 rows of
# fp32 spill 384 bytes per thread.
_MAX_DECODE_ROWS = {2: 64, 4: 16}
# A dense call of at most this many queries, or a sparse one inside one query block, is a decode.
_MAX_DECODE_QUERIES = 32
# A split reads at least this many keys: below it the combine costs more than the split gains.
_MIN_SPLIT_KEYS = 256
_MAX_SPLITS = 128


@dataclass(frozen=True)
class Target:
    """What a plan needs to know of a device.

    Args:
        capability: compute capability, 10 * major + minor.
        processors: streaming multiprocessors.
    """

    capability: int
    processors: int


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel launch.

    Left alone, the assembler gives a 16-bit kernel 128 registers where 146 are needed and spills 8
    bytes, for the hope of one block more. In fp32 a limit can have it unroll until it spills more.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    registers: int | None = 255


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, all its arguments by name, and its compiler options."""

    kernel: Any
    grid: tuple[int, int]
    args: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    enable_fp_fusion: bool = True

    @property
    def options(self) -> dict[str, int | None]:
        """Compiler options."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.maxnreg,
            "enable_fp_fusion": self.enable_fp_fusion,
        }

    def __call__(self) -> None:
        """Runs the kernel on the current stream."""
        self.kernel[self.grid](**self.args, **self.options)


@dataclass(frozen=True)
class Problem:
    """The arguments of `attention` (index None) or `sparse_attention`, already validated."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: BlockIndex | None
    scale: float
    softcap: float
    window: int
    kv_start: Tensor | None


def prefill_tiles(D: int, itemsize: int, block_q: int, capability: int) -> Tiles:
    """Tile sizes of the prefill kernel.

    Chosen from the compiler's report alone (`python -m bench.kernels_report --all`): the widest
    tiles that spill no register and fit in shared memory. Not timed yet.
    """
    rows = max(16, min(128, triton.next_power_of_2(block_q)))
    # IEEE products do not use tensor cores: 32 rows spill up to 864 bytes, 32 keys up to 40, and 16
    # up to 24 with D = 256 over pages or columns. With a limit, D = 256 spills 16 on sm_100 as well
    # where nothing is listed; without one, D = 128.
    if itemsize == 4:
        return Tiles(16, 16, 8, 2, 128 if D <= 128 else None)
    if D > 128:  # 64 keys spill 32 bytes with softcap and window, on sm_90 as well
        # Three stages take 128 KB, which sm_86, sm_89 and sm_12x do not have.
        return Tiles(min(rows, 64), 32, 8, 3 if capability in (80, 90, 100, 103) else 2)
    # mma.sync reads its operands from registers: on sm_80 64 keys of D = 128 spill 32 bytes, and
    # 128 rows 8. wgmma (sm_90) and tcgen05 (sm_10x) read them from shared memory.
    if D > 64 and not 90 <= capability < 120:
        return Tiles(min(rows, 64), 32, 4, 3)
    return Tiles(rows, 64 if rows > 16 else 32, 8 if rows > 64 else 4, 3)


def decode_tiles(D: int, itemsize: int, rows: int) -> Tiles:
    """Tile sizes of the decode kernel, from the compiler's report as in `prefill_tiles`."""
    rows = max(16, triton.next_power_of_2(rows))
    # 4 warps spill 16 bytes with D = 256, and up to 152 with a limit. Left: 16 bytes in D = 64, 128
    # and 256 with some lists, each on one architecture or two.
    if itemsize == 4:
        return Tiles(rows, 16, 8 if D > 128 else 4, 2, None)
    if D <= 128:
        return Tiles(rows, 64, 4, 3)
    return Tiles(rows, 32, 8 if rows > 32 else 4, 2)


def plan(problem: Problem, target: Target) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that compute the problem, and the (out, lse) that they fill."""
    if problem.scale <= 0 and not problem.softcap:
        # The kernels take the largest logit before they scale it.
        q = -problem.q if problem.scale < 0 else torch.zeros_like(problem.q)
        problem = replace(problem, q=q, scale=abs(problem.scale) or 1.0)
    q, index = problem.q, problem.index
    B, Hq, Lq, D = q.shape
    # Memory order [B, L, H, D]: the projection after attention then needs no copy.
    out = torch.empty((B, Lq, Hq, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((B, Hq, Lq), dtype=torch.float32, device=q.device)
    if 0 in (B, Hq, Lq, D):
        return [], out, lse
    Lk = problem.k.shape[2]
    if index is None:
        block_q, lead, Nq = Lq, 0, 1
    else:
        first, Nq = BlockIndex.query_blocks(Lq, Lk, index.block_q)
        block_q, lead = index.block_q, Lk - Lq - first * index.block_q
        if Nq == 1:
            block_q, lead = Lq, 0
    limit = min(_MAX_DECODE_QUERIES, _MAX_DECODE_ROWS[q.element_size()])
    short = Lq <= limit and Nq == 1
    if short or (index is not None and index.block_q < _MIN_PREFILL_BLOCK):
        return _decode(problem, target, out, lse, block_q, lead, Nq), out, lse
    return [_prefill(problem, target, out, lse, block_q, lead, Nq)], out, lse


def _prefill(
    problem: Problem, target: Target, out: Tensor, lse: Tensor, block_q: int, lead: int, Nq: int
) -> Launch:
    q = problem.q
    B, Hq, Lq, D = q.shape
    tiles = prefill_tiles(D, q.element_size(), block_q, target.capability)
    if problem.index is None:
        block_q, Nq = tiles.BLOCK_M, -(-Lq // tiles.BLOCK_M)
    sub_tiles = -(-block_q // tiles.BLOCK_M)
    args = _arguments(problem, out, lse, tiles, block_q, lead) | {"sub_tiles": sub_tiles}
    grid = (Nq * sub_tiles * Hq, B)
    return _launch(attend.prefill_kernel, grid, args, tiles)


def _decode(
    problem: Problem, target: Target, out: Tensor, lse: Tensor, block_q: int, lead: int, Nq: int
) -> list[Launch]:
    q, index = problem.q, problem.index
    B, Hq, Lq, D = q.shape
    Hkv, Lk = problem.k.shape[1:3]
    G = Hq // Hkv
    shared = index is None or index.kv_starts.shape[1] in (1, Hkv)
    pack = min(G, max(1, _MAX_DECODE_ROWS[q.element_size()] // block_q)) if shared else 1
    chunks = -(-G // pack)
    tiles = decode_tiles(D, q.element_size(), block_q * pack)
    programs = B * Hkv * chunks * Nq
    if index is None:
        keys = min(Lk, problem.window + Lq) if problem.window else Lk
    else:
        keys = index.kv_starts.shape[3] * index.block_k
        keys += 0 if index.kv_columns is None else index.kv_columns.shape[3]
    # Two programs per multiprocessor, from sizes that the host knows: no count is waited for.
    wanted = 2 * target.processors // programs
    splits = max(1, min(wanted, keys // _MIN_SPLIT_KEYS, _MAX_SPLITS))
    args = _arguments(problem, out, lse, tiles, block_q, lead)
    args |= {"pack": pack, "chunks": chunks, "splits": splits, "SPLIT": splits > 1}
    grid = (programs // B * splits, B)
    launch = _launch(attend.decode_kernel, grid, args, tiles)
    if splits == 1:
        return [launch]
    partial = torch.empty((B, Hq, Lq, splits, D), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((B, Hq, Lq, splits), dtype=torch.float32, device=q.device)
    args |= {"out_ptr": partial, "lse_ptr": partial_lse}
    combine = {
        "partial_ptr": partial,
        "partial_lse_ptr": partial_lse,
        "out_ptr": out,
        "lse_ptr": lse,
        "stride_ob": out.stride(0),
        "stride_oh": out.stride(1),
        "stride_ol": out.stride(2),
        "Hq": Hq,
        "Lq": Lq,
        "splits": splits,
        "D": D,
        "BLOCK_D": triton.next_power_of_2(D),
        "BLOCK_S": triton.next_power_of_2(splits),
        "CHUNK": 16,
    }
    return [launch, Launch(attend.combine_kernel, (B * Hq * Lq, 1), combine, 4, 1)]


def _launch(kernel: Any, grid: tuple[int, int], args: dict[str, Any], tiles: Tiles) -> Launch:
    return Launch(kernel, grid, args, tiles.num_warps, tiles.num_stages, tiles.registers)


def _arguments(
    problem: Problem, out: Tensor, lse: Tensor, tiles: Tiles, block_q: int, lead: int
) -> dict[str, Any]:
    """Arguments that the prefill and the decode kernel share."""
    q, k, v, index = problem.q, problem.k, problem.v, problem.index
    Hq, Lq, D = q.shape[1:]
    Hkv, Lk = k.shape[1:3]
    window = 0 if problem.window >= Lk else problem.window
    args: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse}
    args["kv_start_ptr"] = problem.kv_start
    for name, x in (("q", q), ("k", k), ("v", v), ("o", out)):
        args |= zip(
            (f"stride_{name}b", f"stride_{name}h", f"stride_{name}l"), x.stride(), strict=False
        )
    lists = (None, None, None, None)
    if index is not None:
        lists = (index.kv_num_blocks, index.kv_starts, index.kv_num_columns, index.kv_columns)
    for name, x in zip(("counts", "starts", "column_counts", "columns"), lists, strict=True):
        args[f"{name}_ptr"] = x
        strides = _broadcast_strides(x)
        last = "s" if name == "starts" else "c"
        axes = ("b", "h", "n", last) if name in ("starts", "columns") else ("b", "h", "n")
        args |= zip((f"{name}_{axis}" for axis in axes), strides, strict=False)
    S = 0 if index is None else index.kv_starts.shape[3]
    C = 0 if index is None or index.kv_columns is None else index.kv_columns.shape[3]
    block_k = tiles.BLOCK_N if index is None else index.block_k
    heads = 1 if index is None else index.kv_starts.shape[1]
    factor = problem.scale * LOG2E
    return args | {
        "Hq": Hq,
        "group": Hq // Hkv,
        "index_group": Hq // heads,
        "Lq": Lq,
        "Lk": Lk,
        "lead": lead,
        "block_q": block_q,
        "window": window,
        "S": S,
        "C": C,
        "logit_scale": 2 * factor / problem.softcap if problem.softcap else factor,
        "cap": problem.softcap * LOG2E,
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK_K": block_k,
        "BLOCK_M": tiles.BLOCK_M,
        "BLOCK_N": tiles.BLOCK_N,
        "DENSE": index is None,
        "GATHER": block_k % tiles.BLOCK_N != 0,
        "COLUMNS": C > 0,
        "KV_START": problem.kv_start is not None,
        "WINDOW": window > 0,
        "SOFTCAP": problem.softcap > 0,
    }


def _broadcast_strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of an index tensor, 0 for the batch where it has one row for all."""
    if x is None:
        return (0, 0, 0, 0)
    return (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:])
