"""Hierarchical search for the keys that matter: HiP's tree and InfiniteHiP's stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import _checks, _dispatch
from lowcontext.ops.hierarchy import native, reference, triton
from lowcontext.ops.hierarchy.options import SearchOptions, Stage, StageOptions, TreeOptions

__all__ = [
    "Chunks",
    "SearchOptions",
    "Stage",
    "StageOptions",
    "TreeOptions",
    "hip_stages",
    "hip_tree",
]

BACKENDS = {"native": native, "triton": triton, "reference": reference}


@dataclass(frozen=True, eq=False)
class Chunks:
    """What one stage leaves to the next.

    Args:
        counts: int32 [B, H, Nq]; chunks kept, for each of the stage's blocks of queries.
        starts: int32 [B, H, Nq, n]; first key of each, ascending; zeros beyond the count.
    """

    counts: Tensor
    starts: Tensor


def hip_tree(
    q: Tensor, k: Tensor, options: TreeOptions, *, ahead: int = 0, backend: str = "auto"
) -> BlockIndex:
    """Finds the tiles of high scores by a beam search over a binary tree of key intervals.

    For each block of queries the candidate keys, those between the sink and the window of its first
    query, are cut into leaves. Nodes are intervals of 2^n leaves on a grid from the sink on, the
    last one shorter; n is the smallest for which there are at most `2 * beam`. Each level scores
    every node by the largest q . k of a scored row and a key of the leaf that represents it, keeps
    the best `beam`, and splits those in the middle, down to single leaves. The number of levels
    follows from the lengths alone. The leaves that are left vote for their tiles; the best
    `budget // block_k` are listed, besides the tiles of sink and window. Ties go to the lower
    position.
    Scored keys per block of queries: at most 2 * beam * leaf / key_stride in each of
    1 + log2(leaves / (2 * beam)) levels.

    HiP: Lee et al., arXiv 2406.09827, section 3; the beam is there budget / leaf, the leaves are
    the tiles, and the nodes of the first level are of equal size.

    Args:
        q: [B, Hq, Lq, D], the last Lq positions; fp32, bf16 or fp16.
        k: [B, Hkv, Lk, D], same dtype.
        options: settings; `block_q` is 1 in decode.
        ahead: tiles of this many keys after the last query are written behind the counts of the
            lists, so that a list can be kept while the window grows: raise its counts.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        BlockIndex of (Lq, Lk) with Hq, Hkv or 1 heads, as `options.share` says.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend, or not the named one, can run it; the message says why.

    Example:
        >>> import torch
        >>> from lowcontext.ops.hierarchy import TreeOptions, hip_tree
        >>> q, k = torch.randn(1, 4, 64, 32), torch.randn(1, 2, 8192, 32)
        >>> index = hip_tree(q, k, TreeOptions(budget=1024, window=256))
        >>> index.kv_num_blocks.tolist()  # 1 sink tile, 16 found, 5 of window and block
        [[[22], [22]]]
    """
    _check(q, k, options, TreeOptions, ahead=ahead)
    counts, starts = _dispatch.implementation(BACKENDS, "hip_tree", backend, q)(
        q, k, options, ahead
    )
    return BlockIndex(counts, starts, (options.block_q, options.block_k))


def hip_stages(
    q: Tensor,
    k: Tensor,
    options: StageOptions,
    *,
    kept: Sequence[Chunks] = (),
    behind: int = 0,
    ahead: int = 0,
    backend: str = "auto",
) -> tuple[BlockIndex, tuple[Chunks, ...]]:
    """Finds the tiles of high scores by pruning ever smaller chunks of keys, stage by stage.

    A stage cuts the keys it gets into chunks on a grid from position 0, and scores each chunk for
    every query head: of the two halves the one whose representative key scores higher is halved
    again, down to one key; the chunk's score is the largest on the way. Scores are reduced over the
    heads that share a list by their maximum, and the best chunks go to the next stage; several
    blocks of queries can share a stage, which is then scored with the rows of all of them. The
    chunks of the last stage vote for their tiles, and the best `budget // block_k` are listed,
    besides the tiles of sink and window. Ties go to the lower position.

    InfiniteHiP: Lee et al., arXiv 2502.08910, algorithms 1 to 3; there the score is that of the
    last representative, and representatives are the first keys of the halves
    (`chunk_score="last"`, `representative="first"`).

    Args:
        q: [B, Hq, Lq, D], the last Lq positions; fp32, bf16 or fp16.
        k: [B, Hkv, Lk, D], same dtype.
        options: settings; `block_q` is 1 in decode.
        kept: what the first `len(kept)` stages gave for the same blocks `behind` tokens ago; they
            are not run again.
        behind: tokens since the stages of `kept` ran. The window begins where it began then, so
            that no key is in neither.
        ahead: tiles of this many keys after the last query are written behind the counts of the
            lists, so that a list can be kept while the window grows: raise its counts.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        BlockIndex of (Lq, Lk) with Hq, Hkv or 1 heads, as `options.share` says; and the chunks that
        each stage but the last left.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend, or not the named one, can run it; the message says why.

    Example:
        >>> import torch
        >>> from lowcontext.ops.hierarchy import Stage, StageOptions, hip_stages
        >>> q, k = torch.randn(1, 4, 64, 32), torch.randn(1, 2, 8192, 32)
        >>> options = StageOptions(stages=(Stage(64, 2048), Stage(8)), budget=1024, window=256)
        >>> index, (chunks,) = hip_stages(q, k, options)
        >>> index.kv_num_blocks.tolist(), chunks.counts.tolist()
        ([[[22], [22]]], [[[32], [32]]])
    """
    _check(q, k, options, StageOptions, ahead=ahead, behind=behind)
    if len(kept) >= len(options.stages):
        raise ValueError(
            f"kept: expected fewer than the {len(options.stages)} stages, got {len(kept)}"
        )
    if behind and not kept:
        raise ValueError(f"behind: expected 0 without kept, got {behind}")
    run = _dispatch.implementation(BACKENDS, "hip_stage", backend, q)
    results = [(chunks.counts, chunks.starts) for chunks in kept]
    for number in range(len(kept), len(options.stages)):
        before = _shared(results[-1], q, k, options, number) if results else None
        results.append(run(q, k, options.of_stage(number), number, before, behind, ahead))
    counts, starts = results.pop()
    index = BlockIndex(counts, starts, (options.block_q, options.block_k))
    return index, tuple(Chunks(*result) for result in results)


def _shared(
    kept: tuple[Tensor, Tensor], q: Tensor, k: Tensor, options: StageOptions, number: int
) -> tuple[Tensor, Tensor]:
    """What the stage before `number` kept, for each block of queries of this stage."""
    blocks, before = options.stages[number].blocks, options.stages[number - 1].blocks
    if blocks == before:
        return kept
    Lq, Lk = q.shape[2], k.shape[2]
    first, Nq = BlockIndex.query_blocks(Lq, Lk, blocks * options.block_q)
    first_before, _ = BlockIndex.query_blocks(Lq, Lk, before * options.block_q)
    block = torch.arange(first, first + Nq, device=q.device) // (before // blocks) - first_before
    counts, starts = (x.index_select(2, block) for x in kept)
    return counts, starts


def _check(
    q: Tensor, k: Tensor, options: SearchOptions, kind: type[SearchOptions], **tokens: int
) -> None:
    _checks.check_qkv(q, k, k)
    if not isinstance(options, kind):
        raise TypeError(f"options: expected {kind.__name__}, got {type(options).__name__}")
    _checks.check_rows("q", q)
    for name, value in tokens.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
