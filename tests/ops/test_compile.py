"""The public ops under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowcontext import BlockIndex, attention, sparse_attention
from lowcontext.ops import block_scores, hierarchy, rotary, vertical_slash, votes


def test_ops_compile_into_one_graph() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator) for n in (5, 40, 40))
    index = BlockIndex.from_blocks(torch.ones(1, 1, 5, 3, dtype=torch.bool), (1, 16))

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, index)

    for op in (attention, sparse):
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True, backend="eager")
        assert torch.equal(compiled(q, k, v), op(q, k, v))


def votes_of(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    scores, lse = votes.token_scores(q[:, :, -1:], k)
    small, scales = votes.quantize_keys(k)
    rough, _ = votes.token_scores(q[:, :, -1:], small, scales=scales)
    return (*votes.topk(votes.soft_vote(scores, lse, heads=2), 8), rough)


def lines_of(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    vertical, slash = vertical_slash.last_window_scores(q, k)
    index = vertical_slash.line_index(vertical > 0.3, slash > 0.5, q.shape[2], k.shape[2])
    return vertical, slash, sparse_attention(q, k, k, index)


TREE, STAGES = hierarchy.TreeOptions(), hierarchy.StageOptions()


def searched(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    tree = hierarchy.hip_tree(q, k, TREE)
    stages = hierarchy.hip_stages(q, k, STAGES)[0]
    return sparse_attention(q, k, k, tree), sparse_attention(q, k, k, stages)


def pooled(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    antidiagonal = block_scores.antidiagonal_scores(q, k, block=32)
    return block_scores.pooled_scores(q, k, block=16), antidiagonal


def moved(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    f, Lk = 1e4 ** -(torch.arange(8) / 8), k.shape[2]
    turned = rotary.rotate_to(q, range(Lk), 5, f, dtype=torch.float32)
    starts = torch.arange(8, 28, 4, dtype=torch.int32).expand(1, 2, 5)
    counts = torch.full((1,), 4, dtype=torch.int32)
    keys, first = rotary.list_keys(starts, counts, Lk - 50, Lk, 80, width=4, sink=8)
    return turned, *rotary.gather_moved(k, k, keys, first, f)


@pytest.mark.parametrize("op", [votes_of, lines_of, searched, pooled, moved])
def test_score_and_select_ops_compile_into_one_graph(
    op: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 400, 16, generator=generator), torch.randn(1, 2, 400, 16)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(compiled(q, k), op(q, k), strict=True):
        assert torch.equal(ours, plain)
