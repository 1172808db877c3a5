"""The Triton kernels of the searches: hierarchy.py and searches.py in lowcontext/ops/triton."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.hierarchy.options import (
    CHUNK_SCORES,
    NODE_REPRESENTATIVES,
    ROWS,
    SHARES,
    SearchOptions,
    Stage,
    StageOptions,
    TreeOptions,
)
from lowcontext.ops.triton import execute, operator, unfit_device

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_D = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like `like`, else the reason they do not."""
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16 and fp16, q is {like.dtype}"
    if not 0 < like.shape[3] <= _MAX_D:
        return f"its kernels take a head_dim of 1 to {_MAX_D}, q has {like.shape[3]}"
    if like.shape[0] >= 2**16:
        return f"its kernels take a batch below {2**16}, got {like.shape[0]}"
    return unfit_device(like)


def hip_tree(q: Tensor, k: Tensor, options: TreeOptions, ahead: int) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.hierarchy.hip_tree`; returns (kv_num_blocks, kv_starts)."""
    own = [options.leaf, options.beam, options.row_stride, options.key_stride]
    own.append(NODE_REPRESENTATIVES.index(options.representative))
    return _tree(q, k, [*_shared(options), *own], ahead)


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
    own = [NODE_REPRESENTATIVES.index(options.representative)]
    own.append(CHUNK_SCORES.index(options.chunk_score))
    for stage in options.stages:
        own += [stage.chunk, stage.keep, stage.row_stride]
    counts, starts = (None, None) if kept is None else kept
    return _stage(q, k, [*_shared(options), *own], number, counts, starts, behind, ahead)


def _shared(options: SearchOptions) -> list[int]:
    """The settings of both searches as numbers: an op takes no other types."""
    shape = [options.block_q, options.block_k, options.budget, options.sink, options.window]
    return [*shape, SHARES.index(options.share), ROWS.index(options.rows)]


def _tree_options(settings: list[int]) -> TreeOptions:
    block_q, block_k, budget, sink, window, share, rows = settings[:7]
    leaf, beam, row_stride, key_stride, representative = settings[7:]
    shared = (block_q, block_k, budget, sink, window, SHARES[share], ROWS[rows])
    which = NODE_REPRESENTATIVES[representative]
    return TreeOptions(*shared, leaf, beam, row_stride, key_stride, which)


def _stage_options(settings: list[int]) -> StageOptions:
    block_q, block_k, budget, sink, window, share, rows, representative, score = settings[:9]
    shared = (block_q, block_k, budget, sink, window, SHARES[share], ROWS[rows])
    stages = tuple(Stage(*settings[i : i + 3]) for i in range(9, len(settings), 3))
    return StageOptions(*shared, stages, NODE_REPRESENTATIVES[representative], CHUNK_SCORES[score])


def _run_tree(q: Tensor, k: Tensor, settings: list[int], ahead: int) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.searches import plan_tree, searches

    q, k = _contiguous_rows(q), _contiguous_rows(k)
    options = _tree_options(settings)
    lists = []
    for search in searches(q, k, options, 0, ahead, 2 * options.beam):
        launches, *found = plan_tree(search, options)
        execute(launches, q.device)
        lists.append(found)
    return _joined(lists)


def _run_stage(
    q: Tensor,
    k: Tensor,
    settings: list[int],
    number: int,
    kept_counts: Tensor | None,
    kept_starts: Tensor | None,
    behind: int,
    ahead: int,
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.searches import plan_stage, searches, stage_entries

    q, k = _contiguous_rows(q), _contiguous_rows(k)
    options = _stage_options(settings)
    width = None if kept_starts is None else kept_starts.shape[3]
    entries = stage_entries(options, number, k.shape[2], width)
    lists, begin = [], 0
    for search in searches(q, k, options, behind, ahead, entries):
        blocks = slice(begin, begin + search.blocks)
        begin = blocks.stop
        kept = None
        if kept_counts is not None and kept_starts is not None:
            kept = kept_counts[:, :, blocks], _contiguous_rows(kept_starts[:, :, blocks])
        launches, *found = plan_stage(search, options, number, kept)
        execute(launches, q.device)
        lists.append(found)
    return _joined(lists)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _joined(lists: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    counts, starts = zip(*lists, strict=True)
    if len(lists) == 1:
        return counts[0], starts[0]
    return torch.cat(counts, dim=2), torch.cat(starts, dim=2)


def _fake_tree(q: Tensor, k: Tensor, settings: list[int], ahead: int) -> tuple[Tensor, Tensor]:
    options = _tree_options(settings)
    return _fake(q, k, options, options.geometry(k.shape[2], ahead=ahead).width)


def _fake_stage(
    q: Tensor,
    k: Tensor,
    settings: list[int],
    number: int,
    kept_counts: Tensor | None,
    kept_starts: Tensor | None,
    behind: int,
    ahead: int,
) -> tuple[Tensor, Tensor]:
    options, Lk = _stage_options(settings), k.shape[2]
    if number + 1 == len(options.stages):
        return _fake(q, k, options, options.geometry(Lk, behind, ahead).width)
    before = None if kept_starts is None else kept_starts.shape[3]
    return _fake(q, k, options, options.kept_width(number, Lk, before))


def _fake(q: Tensor, k: Tensor, options: SearchOptions, width: int) -> tuple[Tensor, Tensor]:
    _, Nq = BlockIndex.query_blocks(q.shape[2], k.shape[2], options.block_q)
    shape = (q.shape[0], options.lists(q.shape[1], k.shape[1]), Nq)
    return q.new_empty(shape, dtype=torch.int32), q.new_empty((*shape, width), dtype=torch.int32)


_tree = operator("hip_tree", _run_tree, _fake_tree)
_stage = operator("hip_stage", _run_stage, _fake_stage)
