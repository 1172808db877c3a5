"""Tensors with a dimension of size 0: empty results, or an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowcontext import BlockIndex, attention, sparse_attention
from lowcontext.ops import votes
from lowcontext.ops.block_scores import antidiagonal_scores, block_means, pooled_scores
from lowcontext.ops.hierarchy import StageOptions, TreeOptions, hip_stages, hip_tree
from lowcontext.ops.vertical_slash import last_window_scores, line_index

EMPTY = {"no queries": (1, 0, 100), "no keys": (1, 0, 0), "no batch": (0, 3, 100)}  # B, Lq, Lk


def qkv(B: int, Lq: int, Lk: int, Hq: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, Hq, Lq, 16), torch.randn(B, 2, Lk, 16), torch.randn(B, 2, Lk, 16)


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_attention_without_queries_is_empty(backend: str, shape: tuple[int, int, int]) -> None:
    q, k, v = qkv(*shape)
    starts = torch.zeros(shape[0], dtype=torch.long)
    outs = [attention(q, k, v, return_lse=True, window=5, kv_start=starts, backend=backend)]
    for block_q in (1, 64):
        Nq = BlockIndex.query_blocks(*shape[1:], block_q)[1]
        for tiles in (0, 4):
            counts = torch.zeros(1, 1, Nq, dtype=torch.int32)
            index = BlockIndex(counts, counts[..., None].repeat(1, 1, 1, tiles), (block_q, 64))
            outs.append(sparse_attention(q, k, v, index, return_lse=True, backend=backend))
    for out, lse in outs:
        assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_votes_without_queries_are_empty(backend: str, shape: tuple[int, int, int]) -> None:
    q, k, _ = qkv(*shape)
    Lk = shape[2]
    scores, lse = votes.token_scores(q, k, backend=backend)
    assert (scores.shape, lse.shape) == ((*q.shape[:3], Lk), q.shape[:3])
    bounds = votes.page_bounds(k, 16)
    assert votes.page_scores(q, bounds, backend=backend).shape == (*q.shape[:3], Lk // 16)
    assert votes.soft_vote(scores, lse, heads=2, backend=backend).shape == (
        shape[0],
        2,
        *scores.shape[2:],
    )
    ids, counts = votes.topk(scores, 5, backend=backend)
    assert (ids.shape, counts.shape) == ((*q.shape[:3], min(5, Lk)), q.shape[:3])
    small, scales = votes.quantize_keys(k, bits=4, backend=backend)
    assert (small.shape, scales.shape) == ((*k.shape[:3], 8), k.shape[:3])


def test_selection_of_an_empty_batch_is_empty(backend: str) -> None:
    q, k, _ = qkv(0, 3, 100)
    assert block_means(k, 64, backend=backend).shape == (0, 2, 2, 16)
    assert block_means(q[:, :, :0], 64, backend=backend).shape == (0, 4, 0, 16)
    assert pooled_scores(q, k, backend=backend).shape == (0, 4, 1, 2)
    assert antidiagonal_scores(q, k, backend=backend).shape == (0, 4, 1, 1)
    assert last_window_scores(q, k, backend=backend)[0].shape == (0, 4, 100)
    lines = torch.zeros(0, 2, 100, dtype=torch.bool)
    for index in (
        line_index(lines, lines, 3, 100, backend=backend),
        hip_tree(q, k, TreeOptions(), backend=backend),
        hip_stages(q, k, StageOptions(), backend=backend)[0],
    ):
        assert index.kv_num_blocks.shape == (0, 2, 1)


SELECT: dict[str, Callable[[Tensor, Tensor, str], object]] = {
    "pooled_scores": lambda q, k, backend: pooled_scores(q, k, backend=backend),
    "antidiagonal_scores": lambda q, k, backend: antidiagonal_scores(q, k, backend=backend),
    "last_window_scores": lambda q, k, backend: last_window_scores(q, k, backend=backend),
    "hip_tree": lambda q, k, backend: hip_tree(q, k, TreeOptions(), backend=backend),
    "hip_stages": lambda q, k, backend: hip_stages(q, k, StageOptions(), backend=backend),
}


@pytest.mark.parametrize("op", SELECT)
def test_selection_without_queries_is_refused(backend: str, op: str) -> None:
    q, k, _ = qkv(1, 0, 100)
    with pytest.raises(ValueError, match=r"q: expected at least one row, got \[1, 4, 0, 16\]"):
        SELECT[op](q, k, backend)


def test_no_query_heads_are_refused(backend: str) -> None:
    q, k, v = qkv(1, 3, 100, Hq=0)
    for call in (
        lambda: attention(q, k, v, backend=backend),
        lambda: votes.token_scores(q, k, backend=backend),
        lambda: antidiagonal_scores(q, k, backend=backend),
    ):
        with pytest.raises(
            ValueError, match="q: expected a multiple of 2 heads, at least one, got 0"
        ):
            call()
    scores = torch.zeros(1, 0, 3, 100)
    with pytest.raises(ValueError, match="heads: expected a divisor of 0, got 2"):
        votes.soft_vote(scores, scores[..., 0], heads=2, backend=backend)
