"""The ops on a CUDA device against the reference; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import lowcontext
from lowcontext import BlockIndex, attention, sparse_attention
from lowcontext.ops import hierarchy, vertical_slash, votes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def qkv(Lq: int, Lk: int, D: int, dtype: torch.dtype, G: int = 4) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = [(2, 2 * G, Lq, D), (2, 2, Lk, D), (2, 2, Lk, D)]
    return [torch.randn(s, generator=gen).to("cuda", dtype) for s in shapes]


def bounded(out: torch.Tensor, exact: torch.Tensor) -> bool:
    """err(ours) <= 2 * err(rounding to the dtype) + 1e-5; fp32 products are IEEE."""
    rounding = (exact.to(out.dtype).double() - exact).abs().max()
    return bool((out.double() - exact).abs().max() <= 2 * rounding + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("Lq", "Lk"), [(1, 65), (65, 130), (1, 4097), (1000, 3000)], ids=["small", "small", "", ""]
)
def test_dense_attention_matches_the_reference(
    dtype: torch.dtype, D: int, Lq: int, Lk: int
) -> None:
    q, k, v = qkv(Lq, Lk, D, dtype)
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    assert bounded(attention(q, k, v), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["streaming_llm", "block_topk", "quest"])
@pytest.mark.parametrize(
    ("Lq", "Lk"), [(1, 900), (130, 900), (1, 8192), (4096, 4096)], ids=["small", "small", "", ""]
)
def test_the_index_of_each_method_matches_the_reference(
    dtype: torch.dtype, name: str, Lq: int, Lk: int
) -> None:
    budget = {"window": 200} if name == "streaming_llm" else {"budget": 640}
    method = lowcontext.get_method(name, **budget)
    q, k, v = qkv(Lq, Lk, 128, dtype)
    layer = lowcontext.LayerContext(layer_idx=5)
    for row0, row1, index in method.parts(q, k, layer):
        if index is not None:
            assert isinstance(index, BlockIndex)
            end = Lk - Lq + row1
            args = [q[:, :, row0:row1], k[:, :, :end], v[:, :, :end]]
            exact = sparse_attention(*(x.double() for x in args), index, backend="reference")
            assert bounded(sparse_attention(*args, index), exact)


def decode_step(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every op of a decode step that selects: votes, lines and both searches."""
    scores, lse = votes.token_scores(q.float(), k)
    chosen, counts = votes.topk(votes.soft_vote(scores, lse), 100)
    lines = vertical_slash.line_index(scores[:, :, 0] > 2.0, scores[:, :, 0] > 2.5, 1, k.shape[2])
    tree = hierarchy.hip_tree(q, k, hierarchy.TreeOptions(block_q=1, budget=256, window=64))
    options = hierarchy.StageOptions(block_q=1, budget=256, window=64)
    staged, _ = hierarchy.hip_stages(q, k, options)
    attended = [sparse_attention(q, k, k, index) for index in (tree, staged)]
    return (chosen, counts, lines.kv_num_blocks, lines.kv_num_columns, *attended)


@pytest.mark.parametrize("Lk", [900, 40000], ids=["small", ""])
def test_a_decode_step_in_a_cuda_graph_gives_what_it_gives_outside(Lk: int) -> None:
    q, k, _ = qkv(1, Lk, 128, torch.bfloat16)
    decode_step(q, k)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_step(q, k)
    q.copy_(q.roll(1, dims=1))
    graph.replay()
    for inside, outside in zip(captured, decode_step(q, k), strict=True):
        assert torch.equal(inside, outside)
