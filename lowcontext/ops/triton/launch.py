"""From arguments to kernel launches: which kernel, which tiles, how many splits.

A plan is a list of `Launch`; it is made from shapes alone, so that the same plan can be compiled
ahead of time on a machine without a GPU (`resources.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.triton import attend
from lowcontext.ops.triton.sizes import power_of_2

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

    Args:
        BLOCK_M, BLOCK_N: query rows and keys.
        num_warps, num_stages: of the compiler.
        registers: at most so many per thread. Left alone, the assembler gives a 16-bit kernel 128
            where 146 are needed and spills 8 bytes, for the hope of one block more. In fp32 a limit
            can have it unroll until it spills more.
        programs: of a decode, per multiprocessor, which it reaches by splitting lists.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    registers: int | None = 255
    programs: int = 2


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
        self.kernel.run(grid=self.grid, warmup=False, **self.args, **self.options)


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


@dataclass(frozen=True)
class QueryBlocks:
    """Blocks of `size` queries; the first has `lead` rows before the first query."""

    size: int
    lead: int
    count: int


def prefill_tiles(D: int, itemsize: int, block_q: int, capability: int) -> Tiles:
    """Tile sizes of the prefill kernel.

    Chosen from the compiler's report alone (`python -m bench.kernels_report --all`): the widest
    tiles that spill no register and fit in shared memory. Not timed yet: `python -m bench.gpu
    --only tune,tables` times them beside the others.
    """
    rows = max(16, min(128, power_of_2(block_q)))
    # IEEE products do not use tensor cores: 32 rows spill up to 864 bytes, 32 keys up to 40, and 8
    # warps up to 24 with D = 256. D = 128 spills without a limit of registers.
    if itemsize == 4:
        return Tiles(16, 16, 8, 2, 128) if D <= 128 else Tiles(16, 16, 4, 2, None)
    if D > 128:  # 64 keys spill 32 bytes with softcap and window, on sm_90 as well
        return Tiles(min(rows, 64), _wide_keys(rows, capability), 8, 3)
    # mma.sync reads its operands from registers: on sm_80 64 keys of D = 128 spill 32 bytes, and
    # 128 rows 8. wgmma (sm_90) and tcgen05 (sm_10x) read them from shared memory.
    if D > 64 and not 90 <= capability < 120:
        return Tiles(min(rows, 64), 32, 4, 3)
    if rows == 128:
        # Registers leave room for one block, shared memory for copies of two tiles ahead.
        return Tiles(128, 64, 8, 4)
    if rows == 64:
        return Tiles(64, _square_keys(capability), 4, 3)
    return Tiles(rows, 64 if rows > 16 else 32, 4, 3)


def decode_tiles(D: int, itemsize: int, rows: int, capability: int) -> Tiles:
    """Tile sizes of the decode kernel, from the compiler's report as in `prefill_tiles`."""
    rows = max(16, power_of_2(rows))
    # Without a limit D = 64 spills 16 bytes over some lists, with one D = 128 does; so do 4 warps
    # with D = 128 and 8 with D = 256, each on one architecture or two.
    if itemsize == 4:
        if D <= 64:
            return Tiles(rows, 16, 4, 2, 168)
        return Tiles(rows, 16, 8 if D <= 128 else 4, 2, None)
    if D <= 128:
        return Tiles(rows, _square_keys(capability) if rows == 64 else 64, 4, 3)
    # 4 warps spill 408 bytes with 64 rows. 4 stages have copies of 4 tiles in flight, not of 2, but
    # take 105 KB.
    return Tiles(rows, _wide_keys(rows, capability), 8 if rows > 32 else 4, 3)


def _square_keys(capability: int) -> int:
    """Keys of a tile of 64 rows and 4 warps with D <= 128 in 16 bits.

    With tcgen05, which leaves the logits in a memory of its own, 64 keys spill up to 144 bytes over
    columns.
    """
    return 32 if 100 <= capability < 120 else 64


def _wide_keys(rows: int, capability: int) -> int:
    """Keys of a tile with 128 < D <= 256 in 16 bits and three stages.

    64 rows with 32 keys take 128 KB, with 16 keys 66: sm_86, sm_89 and sm_12x have 99.
    """
    return 32 if rows <= 32 or capability in (80, 90, 100, 103) else 16


def plan(
    problem: Problem, target: Target, tiles: Tiles | None = None
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that compute the problem, and the (out, lse) that they fill.

    Args:
        problem: arguments of the op.
        target: the device.
        tiles: in place of those of the tables; of a decode, with no fewer rows.
    """
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
    blocks = QueryBlocks(Lq, 0, 1)
    if index is not None:
        first, count = BlockIndex.query_blocks(Lq, Lk, index.block_q)
        if count > 1:
            blocks = QueryBlocks(index.block_q, Lk - Lq - first * index.block_q, count)
    limit = min(_MAX_DECODE_QUERIES, _MAX_DECODE_ROWS[q.element_size()])
    short = Lq <= limit and blocks.count == 1
    if short or (index is not None and index.block_q < _MIN_PREFILL_BLOCK):
        return _decode(problem, target, out, lse, blocks, tiles), out, lse
    tiles = tiles or prefill_tiles(D, q.element_size(), blocks.size, target.capability)
    return [_prefill(problem, out, lse, blocks, tiles)], out, lse


def _prefill(
    problem: Problem, out: Tensor, lse: Tensor, blocks: QueryBlocks, tiles: Tiles
) -> Launch:
    B, Hq, Lq, _ = problem.q.shape
    if problem.index is None:
        blocks = QueryBlocks(tiles.BLOCK_M, 0, -(-Lq // tiles.BLOCK_M))
    sub_tiles = -(-blocks.size // tiles.BLOCK_M)
    args = _arguments(problem, out, lse, tiles, blocks) | {"sub_tiles": sub_tiles}
    grid = (blocks.count * sub_tiles * Hq, B)
    return _launch(attend.prefill_kernel, grid, args, tiles)


def _decode(
    problem: Problem,
    target: Target,
    out: Tensor,
    lse: Tensor,
    blocks: QueryBlocks,
    tiles: Tiles | None,
) -> list[Launch]:
    q, index = problem.q, problem.index
    B, Hq, Lq, D = q.shape
    Hkv, Lk = problem.k.shape[1:3]
    G = Hq // Hkv
    shared = index is None or index.kv_starts.shape[1] in (1, Hkv)
    pack = min(G, max(1, _MAX_DECODE_ROWS[q.element_size()] // blocks.size)) if shared else 1
    chunks = -(-G // pack)
    tiles = tiles or decode_tiles(D, q.element_size(), blocks.size * pack, target.capability)
    programs = B * Hkv * chunks * blocks.count
    if index is None:
        keys = min(Lk, problem.window + Lq) if problem.window else Lk
    else:
        keys = index.kv_starts.shape[3] * index.block_k
        keys += 0 if index.kv_columns is None else index.kv_columns.shape[3]
    # From sizes that the host knows: no count is waited for.
    wanted = tiles.programs * target.processors // programs
    splits = max(1, min(wanted, keys // _MIN_SPLIT_KEYS, _MAX_SPLITS))
    args = _arguments(problem, out, lse, tiles, blocks)
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
        "BLOCK_D": power_of_2(D),
        "BLOCK_S": power_of_2(splits),
        "CHUNK": 16,
    }
    return [launch, Launch(attend.combine_kernel, (B * Hq * Lq, 1), combine, 4, 1)]


def _launch(kernel: Any, grid: tuple[int, int], args: dict[str, Any], tiles: Tiles) -> Launch:
    return Launch(kernel, grid, args, tiles.num_warps, tiles.num_stages, tiles.registers)


def _arguments(
    problem: Problem, out: Tensor, lse: Tensor, tiles: Tiles, blocks: QueryBlocks
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
        "lead": blocks.lead,
        "block_q": blocks.size,
        "window": window,
        "S": S,
        "C": C,
        "logit_scale": 2 * factor / problem.softcap if problem.softcap else factor,
        "cap": problem.softcap * LOG2E,
        "D": D,
        "BLOCK_D": max(16, power_of_2(D)),
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
