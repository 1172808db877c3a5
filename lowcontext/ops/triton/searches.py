"""Launches of the hierarchical searches, whose kernels are in `hierarchy.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.hierarchy.options import (
    NODE_REPRESENTATIVES,
    SearchOptions,
    StageOptions,
    TreeOptions,
)
from lowcontext.ops.triton import hierarchy
from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.scores import products
from lowcontext.ops.triton.select import plan_topk
from lowcontext.ops.triton.sizes import ceil_div, power_of_2

# Query blocks are searched in groups whose scores hold at most this many numbers (256 MiB).
_SCORES = 2**26


@dataclass(frozen=True)
class _Search:
    """Some query blocks of a call, from number `first` on.

    Args:
        q, k, options: as in `hierarchy.hip_tree`.
        behind, ahead: as in `hierarchy.hip_stages`.
        first, blocks: the first query block, and how many.
    """

    q: Tensor
    k: Tensor
    options: SearchOptions
    behind: int
    ahead: int
    first: int
    blocks: int

    @property
    def lists(self) -> int:
        """Lists of each batch row and query block."""
        return self.options.lists(self.q.shape[1], self.k.shape[1])

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """A tensor [B, lists, blocks, *shape]."""
        full = (self.q.shape[0], self.lists, self.blocks, *shape)
        return torch.empty(full, dtype=dtype, device=self.q.device)

    def grid(self, programs: int) -> tuple[int, int]:
        """`programs` for each list."""
        return programs * self.blocks * self.lists, self.q.shape[0]

    def common(self) -> dict[str, Any]:
        """Arguments of several kernels."""
        o = self.options
        low, _ = o.candidates(0)
        return {
            "Hq": self.q.shape[1],
            "group": self.q.shape[1] // self.k.shape[1],
            "heads": self.q.shape[1] // self.lists,
            "lists": self.lists,
            "Nq": self.blocks,
            "Lk": self.k.shape[2],
            "first": self.first,
            "block_q": o.block_q,
            "block_k": o.block_k,
            "low": low,
            "behind": self.behind,
            "window": o.window,
            "ahead": self.ahead,
        }

    def rows(self, stride: int) -> tuple[Launch, dict[str, Any]]:
        """The launch that makes the scored rows, and the arguments of a kernel that scores them."""
        B, Hq, Lq, D = self.q.shape
        R = -(-self.options.block_q // stride)
        rows = torch.empty((B, Hq, self.blocks, R, D), device=self.q.device)
        block_d = max(16, power_of_2(D))
        args: dict[str, Any] = self.common() | {"q_ptr": self.q, "rows_ptr": rows, "R": R}
        args |= zip(("stride_qb", "stride_qh", "stride_ql"), self.q.stride(), strict=False)
        args |= {"offset": self.k.shape[2] - Lq, "row_stride": stride, "D": D, "BLOCK_D": block_d}
        args |= {"BLOCK_N": 16, "MEAN": self.options.rows == "mean"}
        launch = _launch(hierarchy.rows_kernel, (R * self.blocks * Hq, B), args)
        scoring: dict[str, Any] = self.common() | {"rows_ptr": rows, "k_ptr": self.k, "R": R}
        scoring |= zip(("stride_kb", "stride_kh", "stride_kl"), self.k.stride(), strict=False)
        kind = products(self.k.dtype)
        # D = 256 in four parts: in one, or in two, 64 keys spill up to 376 bytes; fp32, whose parts
        # the compiler loads at once, up to 192 in two, and none in one with 32 keys.
        wide = D > 128
        block_n = 32 if wide and kind == "ieee" else 64
        block_d = 64 if wide and kind != "ieee" else block_d
        scoring |= {"D": D, "BLOCK_D": block_d, "BLOCK_M": 16, "BLOCK_N": block_n}
        return launch, scoring | {"PRODUCTS": kind}

    def list(self, entries: dict[str, Any], scores: Tensor, width: int, size: int) -> _Lists:
        """The launches that list the best tiles of scored entries, and the lists.

        Args:
            entries: what `_tile` reads: pointers, strides, sizes.
            scores: fp32 [..., M].
            width: entries of a list.
            size: most of them in one tile.
        """
        geometry = self.options.geometry(self.k.shape[2], self.behind, self.ahead)
        votes = self.empty(width, dtype=torch.float32)
        args = self.common() | entries | {"scores_ptr": scores, "M": scores.shape[3]}
        args |= {"entries": width, "votes_ptr": votes, "size": size, "BLOCK": 256}
        launches = [_launch(hierarchy.tile_votes_kernel, self.grid(ceil_div(width, 256)), args)]
        chosen, ids, found = plan_topk(votes.view(-1, width), geometry.picks, None)
        counts, starts = self.empty(), self.empty(geometry.width)
        args |= {"chosen_ptr": ids, "chosen_counts_ptr": found, "keep": ids.shape[1]}
        args |= {"picks": geometry.picks, "width": geometry.width}
        args |= {"counts_ptr": counts, "starts_ptr": starts}
        last = _launch(hierarchy.tile_list_kernel, self.grid(1), args)
        return [*launches, *chosen, last], counts, starts


_Lists = tuple[list[Launch], Tensor, Tensor]


def _launch(kernel: Any, grid: tuple[int, int], args: dict[str, Any]) -> Launch:
    """A launch with those of the arguments that the kernel has.

    From the compiler's report alone (`python -m bench.kernels_report --all --only search`), not
    timed. 4 warps that score 64 keys in tf32 spill 16 bytes on sm_80; without a limit of registers
    the assembler spills up to 24 for the hope of one block more.
    """
    own = {name: args[name] for name in kernel.arg_names}
    warps = 8 if own.get("PRODUCTS", "bf16") != "bf16" else 4
    return Launch(kernel, grid, own, warps, 1, 255 if "PRODUCTS" in own else None)


def searches(
    q: Tensor, k: Tensor, options: SearchOptions, behind: int, ahead: int, width: int
) -> list[_Search]:
    """The query blocks of a call, in groups whose lists of `width` scores fit the memory."""
    first, blocks = BlockIndex.query_blocks(q.shape[2], k.shape[2], options.block_q)
    lists = q.shape[0] * options.lists(q.shape[1], k.shape[1])
    step = max(1, _SCORES // max(1, lists * width))
    return [
        _Search(q, k, options, behind, ahead, first + n, min(step, blocks - n))
        for n in range(0, blocks, step)
    ]


def plan_tree(search: _Search, options: TreeOptions) -> _Lists:
    """The launches of `hierarchy.hip_tree`, and the (counts, starts) of the lists."""
    beam, per_tile = options.beam, options.block_k // options.leaf
    low, high = options.candidates((search.first + search.blocks - 1) * options.block_q)
    halvings = max(0, -(-(high - low) * per_tile // (2 * beam)) - 1).bit_length()
    offsets = options.leaf // options.key_stride
    launch, args = search.rows(options.row_stride)
    launches = [launch]
    keys = min(power_of_2(offsets), args["BLOCK_N"])
    args |= {"window": options.window, "beam": beam, "leaf": options.leaf, "offsets": offsets}
    args |= {"key_stride": options.key_stride, "halvings": halvings, "per_tile": per_tile}
    args |= {"KEYS": keys, "WHICH": NODE_REPRESENTATIVES.index(options.representative)}
    args |= {"M": 2 * beam, "parent_width": beam}
    kept: dict[str, Any] = dict.fromkeys(("ids_ptr", "counts_ptr", "parents_ptr"))
    grid = search.grid(ceil_div(2 * beam, args["BLOCK_N"] // keys))
    for level in range(halvings + 1):
        nodes = search.empty(2 * beam, 2)
        scores = search.empty(2 * beam, dtype=torch.float32)
        level_args = args | kept | {"nodes_ptr": nodes, "scores_ptr": scores, "level": level}
        launches.append(_launch(hierarchy.tree_kernel, grid, level_args))
        chosen, ids, counts = plan_topk(scores.view(-1, 2 * beam), beam, None)
        launches += chosen
        kept = {"ids_ptr": ids, "counts_ptr": counts, "parents_ptr": nodes}
    entries = {"ids_ptr": ids, "counts_ptr": counts, "nodes_ptr": nodes, "leaf": options.leaf}
    entries |= _no_chunks() | {"chunk": 0, "parts": 1}
    listed, counts, starts = search.list(entries, scores, beam, per_tile)
    return [*launches, *listed], counts, starts


def plan_stage(
    search: _Search,
    options: StageOptions,
    number: int,
    kept: tuple[Tensor, Tensor] | None,
) -> _Lists:
    """The launches of a stage of `hierarchy.hip_stages`, and what `reference.hip_stage` returns.

    Args:
        search, options: the query blocks and the settings.
        number: the stage, from 0.
        kept: (counts, starts) of these blocks from the stage before, starts with a contiguous last
            dim; None for stage 0.
    """
    stage, Lk = options.stages[number], search.k.shape[2]
    width = None if kept is None else kept[1].shape[3]
    entries = stage_entries(options, number, Lk, width)
    chunks = _no_chunks() | {"chunk": stage.chunk, "parts": 1}
    if kept is not None:
        chunks |= {"kept_ptr": kept[0], "old_ptr": kept[1]}
        for name, x in zip(("kept", "old"), kept, strict=True):
            chunks |= zip((f"{name}_{axis}" for axis in "bhn"), x.stride(), strict=False)
        chunks["parts"] = options.chunks[number - 1] // stage.chunk
    launch, args = search.rows(stage.row_stride)
    scores = search.empty(entries, dtype=torch.float32)
    args |= chunks | {"scores_ptr": scores, "entries": entries}
    args |= {"rounds": max(1, (stage.chunk - 1).bit_length())}
    args |= {"WHICH": NODE_REPRESENTATIVES.index(options.representative)}
    args["LAST"] = options.chunk_score == "last"
    grid = search.grid(ceil_div(entries, args["BLOCK_N"]))
    launches = [launch, _launch(hierarchy.stage_kernel, grid, args)]
    if number + 1 == len(options.stages):
        chunks |= {"ids_ptr": None, "counts_ptr": None, "nodes_ptr": None, "leaf": 0}
        listed, counts, starts = search.list(
            chunks, scores, entries, options.block_k // stage.chunk
        )
        return [*launches, *listed], counts, starts
    keep = options.kept_width(number, Lk, width)
    chosen, ids, counts = plan_topk(scores.view(-1, entries), keep, None)
    starts = search.empty(keep)
    args = search.common() | chunks | {"ids_ptr": ids, "counts_ptr": counts, "keep": keep}
    last = _launch(
        hierarchy.kept_kernel, search.grid(1), args | {"starts_ptr": starts, "BLOCK": 256}
    )
    return [*launches, *chosen, last], counts.view(starts.shape[:3]), starts


def stage_entries(options: StageOptions, number: int, Lk: int, width: int | None) -> int:
    """Chunks that a stage scores in a list: of the grid, or parts of `width` kept ones."""
    chunk = options.chunks[number]
    return -(-Lk // chunk) if width is None else width * (options.chunks[number - 1] // chunk)


def _no_chunks() -> dict[str, Any]:
    """Arguments of kernels that read no chunks kept by an earlier stage."""
    strides = [f"{name}_{axis}" for name in ("kept", "old") for axis in "bhn"]
    return dict.fromkeys(("kept_ptr", "old_ptr")) | dict.fromkeys(strides, 0)
