"""The native searches: C++ kernels of csrc/cpu/hierarchy.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import native
from lowcontext.ops.hierarchy.options import (
    NODE_REPRESENTATIVES,
    SearchOptions,
    StageOptions,
    TreeOptions,
)


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like `like`, else the reason they do not."""
    if like.device.type not in ("cpu", "meta"):
        return f"its kernels run on the CPU, q is on {like.device.type}"
    if like.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels take fp32, bf16 and fp16, q is {like.dtype}"
    D = like.shape[3]
    if D % 8 or D > 256:
        return f"its kernels take a head_dim that is a multiple of 8 up to 256, q has {D}"
    return None


def hip_tree(q: Tensor, k: Tensor, options: TreeOptions, ahead: int) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.hierarchy.hip_tree`; returns (kv_num_blocks, kv_starts)."""
    _load()
    geometry = options.geometry(k.shape[2], ahead=ahead)
    return torch.ops.lowcontext.hip_tree(
        q,
        k,
        *_layout(q, k, options, geometry.picks),
        geometry.width,
        options.row_stride,
        options.rows == "mean",
        NODE_REPRESENTATIVES.index(options.representative),
        ahead,
        options.leaf,
        options.key_stride,
        options.beam,
    )


def hip_stage(
    q: Tensor,
    k: Tensor,
    options: StageOptions,
    number: int,
    kept: tuple[Tensor, Tensor] | None,
    behind: int,
    ahead: int,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.hierarchy.reference.hip_stage`."""
    _load()
    stage = options.stages[number]
    final = number + 1 == len(options.stages)
    geometry = options.geometry(k.shape[2], behind, ahead)
    before = None if kept is None else kept[1].shape[3]
    width = geometry.width if final else options.kept_width(number, k.shape[2], before)
    counts, starts = (None, None) if kept is None else kept
    return torch.ops.lowcontext.hip_stage(
        q,
        k,
        *_layout(q, k, options, geometry.picks),
        width,
        stage.row_stride,
        options.rows == "mean",
        NODE_REPRESENTATIVES.index(options.representative),
        behind,
        ahead,
        stage.chunk,
        final,
        options.chunk_score == "last",
        counts,
        starts,
        options.chunks[number - 1] if kept is not None else 0,
    )


def _layout(q: Tensor, k: Tensor, options: SearchOptions, picks: int) -> tuple[int, ...]:
    lists = options.lists(q.shape[1], k.shape[1])
    return options.block_q, options.block_k, options.sink, options.window, picks, lists


def _fake(q: Tensor, k: Tensor, block_q: int, lists: int, width: int) -> tuple[Tensor, Tensor]:
    _, Nq = BlockIndex.query_blocks(q.shape[2], k.shape[2], block_q)
    shape = (q.shape[0], lists, Nq)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty((*shape, width), dtype=torch.int32)


def _fake_tree(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    sink: int,
    window: int,
    picks: int,
    lists: int,
    width: int,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    return _fake(q, k, block_q, lists, width)


_fake_stage = _fake_tree


_load = native.loader({"hip_tree": _fake_tree, "hip_stage": _fake_stage})
