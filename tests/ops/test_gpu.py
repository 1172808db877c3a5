"""The kernels on a CUDA device at the sizes they are for; skipped where there is none.

The cases of `triton_*cases.py`, which also run on a GPU, have the odd shapes. Tests marked small
compute what they compare with on the CPU: they are what a memory checker runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowcontext
from bench.oracle import sampled_error
from lowcontext import BlockIndex, LayerContext, attention, sparse_attention
from lowcontext.methods.base import Moved, Rotary
from lowcontext.ops import (
    _dispatch,
    block_scores,
    hierarchy,
    lists,
    reuse,
    rotary,
    vertical_slash,
    votes,
)
from tests.ops.hierarchy.problems import STAGES, TREE, integers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = "cuda"


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(Lq: int, Lk: int, D: int, dtype: torch.dtype, G: int = 4) -> list[Tensor]:
    """On the CPU, two sequences and two KV heads."""
    shapes = [(2, 2 * G, Lq, D), (2, 2, Lk, D), (2, 2, Lk, D)]
    return [rand(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def tiles(Lq: int, Lk: int, block: tuple[int, int], heads: int, share: float = 0.3) -> BlockIndex:
    """Random aligned tiles on the CPU, the diagonal among them."""
    first, Nq = BlockIndex.query_blocks(Lq, Lk, block[0])
    keep = torch.rand(1, heads, Nq, -(-Lk // block[1]), generator=torch.Generator().manual_seed(3))
    keep = keep < share
    rows = (torch.arange(first, first + Nq) + 1) * block[0] - 1
    keep[:, :, torch.arange(Nq), rows.clamp(max=Lk - 1) // block[1]] = True
    return BlockIndex.from_blocks(keep, block)


def moved(index: BlockIndex, device: str) -> BlockIndex:
    fields = index.kv_num_blocks, index.kv_starts, index.kv_num_columns, index.kv_columns
    counts, starts, column_counts, columns = (x if x is None else x.to(device) for x in fields)
    return BlockIndex(counts, starts, index.block_size, column_counts, columns)


def columns(Lk: int, heads: int, count: int) -> BlockIndex:
    """Random single keys for one query, on the CPU."""
    gen = torch.Generator().manual_seed(4)
    keys = torch.rand(1, heads, 1, Lk, generator=gen).topk(count).indices.sort().values.int()
    counts = torch.full((1, heads, 1), count, dtype=torch.int32)
    return BlockIndex(torch.zeros_like(counts), keys[..., :0], (1, 64), counts, keys)


SIZES = [(torch.bfloat16, D, *lengths) for D in (64, 128) for lengths in ((1, 4097), (1000, 3000))]
SIZES += [(torch.bfloat16, D, 1000, 3000) for D in (80, 96, 256)]
SIZES += [(dtype, 128, 300, 700) for dtype in (torch.float32, torch.float16)]
SIZES += [(dtype, 128, 1, 4097) for dtype in (torch.float32, torch.float16)]


@pytest.mark.ops("attend")
@pytest.mark.parametrize(
    ("dtype", "D", "Lq", "Lk"),
    [
        pytest.param(torch.bfloat16, 64, 1, 65, marks=pytest.mark.small),
        pytest.param(torch.bfloat16, 128, 65, 130, marks=pytest.mark.small),
        pytest.param(torch.float32, 64, 33, 70, marks=pytest.mark.small),
        *SIZES,
    ],
)
def test_dense_attention_equals_the_reference(
    dtype: torch.dtype, D: int, Lq: int, Lk: int, request: pytest.FixtureRequest
) -> None:
    from tests.ops.triton_cases import check, rounded_attention  # imports triton

    inputs = qkv(Lq, Lk, D, dtype)
    out, lse = attention(*(x.to(GPU) for x in inputs), return_lse=True)
    if "small" not in request.keywords:
        inputs = [x.to(GPU) for x in inputs]
    exact = attention(*(x.double() for x in inputs), return_lse=True, backend="reference")
    mask = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq)[None, None]
    same = rounded_attention(*inputs, mask.to(inputs[0].device))
    _, same_lse = attention(*(x.float() for x in inputs), return_lse=True, backend="reference")
    check(out.to(same.device), same, exact[0], "out")
    check(lse.to(same.device), same_lse, exact[1], "lse")


LISTS: dict[str, tuple[int, int, BlockIndex]] = {
    "small tiles": (70, 200, tiles(70, 200, (64, 64), 8)),
    "small pages": (1, 200, tiles(1, 200, (1, 16), 2)),
    "small columns": (1, 200, columns(200, 2, 20)),
    "tiles": (2000, 6000, tiles(2000, 6000, (128, 64), 8)),
    "wide tiles": (2000, 6000, tiles(2000, 6000, (128, 128), 8)),
    "pages": (1, 60000, tiles(1, 60000, (1, 16), 8, 0.05)),
    "columns": (1, 60000, columns(60000, 2, 4096)),
}


@pytest.mark.ops("attend")
@pytest.mark.parametrize(
    ("name", "dtype", "G"),
    [
        *(
            pytest.param(name, torch.bfloat16, 4, marks=pytest.mark.small)
            for name in list(LISTS)[:3]
        ),
        *((name, torch.bfloat16, G) for name in ("pages", "columns") for G in (4, 7)),
        *((name, dtype, 4) for name in ("tiles",) for dtype in (torch.bfloat16, torch.float16)),
        ("wide tiles", torch.bfloat16, 4),
    ],
)
def test_attention_over_lists_equals_the_reference(name: str, dtype: torch.dtype, G: int) -> None:
    Lq, Lk, index = LISTS[name]
    if index.kv_starts.shape[1] == 8 and G == 7:
        index = tiles(Lq, Lk, index.block_size, 14, 0.05)
    q, k, v = qkv(Lq, Lk, 128, dtype, G)
    out = sparse_attention(*(x.to(GPU) for x in (q, k, v)), moved(index, GPU))
    error, allowed = sampled_error(q, k, v, out.cpu(), (0, Lq, index), 128**-0.5)
    assert error <= allowed


def listed(index: BlockIndex) -> tuple[Tensor, ...]:
    """Counts and entries of an index, -1 for what lies beyond a count."""
    found = []
    pairs = (index.kv_num_blocks, index.kv_starts), (index.kv_num_columns, index.kv_columns)
    for counts, entries in pairs:
        if counts is not None and entries is not None:
            beyond = torch.arange(entries.shape[-1], device=counts.device) >= counts[..., None]
            found += [counts, entries.masked_fill(beyond, -1)]
    return tuple(found)


Tensors = tuple[Tensor, ...]
To = Callable[[Tensor], Tensor]
BF16 = torch.bfloat16


def token_scores(n: int, to: To, backend: str) -> Tensors:
    q, k = to(rand(1, 8, 2, 128)), to(rand(1, 2, n, 128, seed=1, dtype=BF16))
    return votes.token_scores(q, k, scale=0.1, backend=backend)


def quantised_scores(bits: int) -> Callable[[int, To, str], Tensors]:
    def run(n: int, to: To, backend: str) -> Tensors:
        small, scales = votes.quantize_keys(rand(1, 2, n, 128, seed=1, dtype=BF16), bits=bits)
        q = to(rand(1, 8, 1, 128))
        found = votes.token_scores(q, to(small), scales=to(scales), scale=0.1, backend=backend)
        again = votes.quantize_keys(
            to(rand(1, 2, n, 128, seed=1, dtype=BF16)), bits=bits, backend=backend
        )
        return (*found, again[0].int(), again[1])

    return run


def page_scores(n: int, to: To, backend: str) -> Tensors:
    bounds = votes.page_bounds(rand(1, 2, 16 * n, 128, seed=1, dtype=BF16), 16)
    return (votes.page_scores(to(rand(1, 8, 1, 128)), to(bounds), backend=backend),)


def page_votes(n: int, to: To, backend: str) -> Tensors:
    bounds = votes.page_bounds(rand(1, 2, 16 * n, 128, seed=1, dtype=BF16), 16)
    q = to(rand(1, 8, 1, 128, dtype=BF16))
    return (votes.page_votes(q, to(bounds), scale=0.1, heads=2, backend=backend),)


def soft_vote(n: int, to: To, backend: str) -> Tensors:
    scores = rand(1, 8, 1, n)
    return (votes.soft_vote(to(scores), to(scores.logsumexp(-1)), heads=2, backend=backend),)


def topk(n: int, to: To, backend: str) -> Tensors:
    scores = (4 * rand(3, 20 * n)).round() / 4  # ties
    return votes.topk(to(scores), n // 20, backend=backend)


def chosen_keys(n: int, to: To, backend: str) -> Tensors:
    pages = votes.Pages(to(torch.arange(0, 2 * n, 2, dtype=torch.int32).expand(1, 3, n)), 20, 7)
    scores = (4 * rand(1, 3, 1, 20 * n)).round() / 4  # ties; at most a quarter of a program's row
    return votes.topk(to(scores), min(n, 4000), pages=pages, backend=backend)


def tiles(n: int, to: To, backend: str) -> Tensors:
    k, low = to(torch.empty(2, 3, 16 * n, 8)), torch.tensor([12 * n, 9 * n], dtype=torch.int32)
    ids, counts = torch.arange(4).expand(2, 3, 5, 4).int() + 2, torch.arange(30).view(2, 3, 5) % 5
    chosen = to(ids.contiguous()), to(counts.int())
    options: dict[str, Any] = {"width": 16, "low": to(low), "sink": 32, "span": 8 * n}
    found = lists.tile_lists(k, 5, pages=chosen, **options, backend=backend)
    return listed(BlockIndex(*found, (1, 16)))


def stale(n: int, to: To, backend: str) -> Tensors:
    q = rand(4, 32, 1, 128)
    kept = q + torch.tensor([0.0, 0.1, 1.0, 0.1]).view(4, 1, 1, 1) * rand(4, 32, 1, 128, seed=1)
    given = to(q.to(BF16)), to(kept.to(BF16).flatten(1)), to(torch.arange(n, n + 4).int())
    options: dict[str, Any] = {"threshold": 0.9, "backend": backend}
    return tuple(
        reuse.stale(*given, n + 1, by_head=each, **options).int() for each in (False, True)
    )


def mass_mask(n: int, to: To, backend: str) -> Tensors:
    weights = rand(2, 3, n).softmax(-1)
    return (votes.mass_mask(to(weights), 0.9, forced=to(rand(n) > 2), backend=backend).int(),)


def window_scores(n: int, to: To, backend: str) -> Tensors:
    q, k = to(rand(1, 8, 64, 128, dtype=BF16)), to(rand(1, 2, n, 128, seed=1, dtype=BF16))
    return vertical_slash.last_window_scores(q, k, backend=backend)


def line_index(n: int, to: To, backend: str) -> Tensors:
    vertical, slash = to(rand(1, 3, n) > 2), to(rand(1, 3, n, seed=1) > 2.5)
    return listed(vertical_slash.line_index(vertical, slash, n // 2, n, backend=backend))


def antidiagonals(n: int, to: To, backend: str) -> Tensors:
    n = min(n, 4000)
    q, k = to(rand(1, 4, n // 2, 128, dtype=BF16)), to(rand(1, 2, n, 128, seed=1, dtype=BF16))
    scores = block_scores.antidiagonal_scores(q, k, scale=0.1, backend=backend)
    return scores, block_scores.pooled_scores(q, k, block=64, backend=backend)


def search(phase: str) -> Callable[[int, To, str], Tensors]:
    def run(n: int, to: To, backend: str) -> Tensors:
        # Small integers: all scores are exact, and searches list the same keys.
        block_q, Lq = (1, 1) if phase == "decode" else (64, 300 if n > 1000 else 70)
        q = to(integers(1, 8, Lq, 128, seed=1).to(BF16))
        k = to(integers(1, 2, n, 128, seed=2).to(BF16))
        tree = replace(TREE, block_q=block_q, row_stride=min(4, block_q))
        stages = replace(STAGES, block_q=block_q)
        if n > 1000:
            sizes: dict[str, Any] = {"block_q": block_q, "budget": 512, "window": 256}
            tree, stages = hierarchy.TreeOptions(**sizes), hierarchy.StageOptions(**sizes)
        found = hierarchy.hip_tree(q, k, tree, backend=backend)
        index, _ = hierarchy.hip_stages(q, k, stages, backend=backend)
        return (*listed(found), *listed(index))

    return run


def moved_keys(n: int, to: To, backend: str) -> Tensors:
    """Rotation of all keys, and of a list of them at its end; bf16 in, fp32 to compare."""
    k, f = to(rand(2, 2, n, 128, dtype=BF16)), to(1e6 ** -(torch.arange(64) / 64))
    options: dict[str, Any] = {"interleaved": n > 1000, "backend": backend}
    turned = rotary.rotate_to(k, range(n), 0, f, dtype=torch.float32, **options)
    starts = to(rand(2, 2, n)).topk(n // 20, dim=2).indices.sort(2).values.int()
    counts = to(torch.tensor([n // 20, n // 30], dtype=torch.int32))
    size = n // 20 + n // 8 + 16
    keys, first = rotary.list_keys(starts, counts, n - n // 8, n, size, sink=16, backend=backend)
    moved = rotary.gather_moved(k.float(), k.float(), keys, first, f, **options)
    return turned, keys, first, *moved


# Name: (what a test of it covers, the op on inputs that it makes and sends to a device).
PROBLEMS: dict[str, tuple[str, Callable[[int, To, str], Tensors]]] = {
    "token scores": ("scores", token_scores),
    "int8 scores": ("scores", quantised_scores(8)),
    "int4 scores": ("scores", quantised_scores(4)),
    "page scores": ("scores", page_scores),
    "soft vote": ("scores", soft_vote),
    "page votes": ("scores", page_votes),
    "topk": ("topk", topk),
    "keys of pages": ("topk", chosen_keys),
    "tile lists": ("lists", tiles),
    "reuse": ("lists", stale),
    "mass mask": ("mass", mass_mask),
    "window scores": ("window", window_scores),
    "line index": ("lines", line_index),
    "antidiagonals": ("blocks", antidiagonals),
    "search, decode": ("search", search("decode")),
    "search, prefill": ("search", search("prefill")),
    "moved keys": ("rotary", moved_keys),
}
EACH = [pytest.param(name, marks=pytest.mark.ops(covers)) for name, (covers, _) in PROBLEMS.items()]


def assert_close(ours: Tensors, plain: Tensors) -> None:
    """Integers equal; fp32 sums in another order within 1e-4 of the largest number."""
    for a, b in zip(ours, plain, strict=True):
        a = a.to(b.device)
        assert a.dtype == b.dtype
        if not a.is_floating_point():
            assert torch.equal(a, b)
            continue
        assert torch.equal(a.isinf(), b.isinf())
        finite = ~b.isinf()
        largest = b[finite].abs().max()
        assert (a[finite] - b[finite]).abs().max() <= 1e-4 * largest


@pytest.mark.small
@pytest.mark.parametrize("name", EACH)
def test_a_small_problem_equals_the_reference_on_the_cpu(name: str) -> None:
    run = PROBLEMS[name][1]
    assert_close(run(300, lambda x: x.to(GPU), "triton"), run(300, lambda x: x, "reference"))


@pytest.mark.parametrize("name", EACH)
def test_a_large_problem_equals_the_reference(name: str) -> None:
    run, to = PROBLEMS[name][1], lambda x: x.to(GPU)
    assert_close(run(40000, to, "triton"), run(40000, to, "reference"))


FAMILIES = {
    votes: ("token_scores", "page_scores", "soft_vote", "topk", "quantize_keys", "mass_mask"),
    vertical_slash: ("last_window_scores", "line_index"),
    block_scores: ("antidiagonal_scores", "block_means"),
    hierarchy: ("hip_tree", "hip_stage"),
    rotary: ("rotate_to", "list_keys", "gather_moved"),
    lists: ("tile_lists",),
    reuse: ("stale",),
}


def test_every_op_takes_triton_on_a_gpu() -> None:
    like = torch.empty(1, 1, 1, 64, device=GPU)
    assert _dispatch.select("attention", "auto", like, like, like).name == "triton"
    for family, ops in FAMILIES.items():
        for op in ops:
            assert _dispatch.choose(family.BACKENDS, op, "auto", like) == "triton", op


DECODING: list[tuple[str, dict[str, Any]]] = [
    ("streaming_llm", {}),
    ("block_topk", {"budget": 1024}),
    ("quest", {}),
    ("hip", {}),
    ("infinitehip", {}),
    ("tokenselect", {"scoring": "exact"}),
    ("tokenselect", {"scoring": "int8"}),
    ("tokenselect", {"scoring": "int4"}),
    ("tokenselect", {"scoring": "pages"}),
    ("tokenselect", {"cache_threshold": 0.9}),
    ("tokenselect", {"positions": "compact"}),
    ("hip", {"positions": "streaming", "share": "layer"}),
]


def decode(method: Any, layer: LayerContext, q: Tensor, k: Tensor) -> Tensor:
    ((_, _, index),) = method.parts(q, k, layer)
    if isinstance(index, Moved):
        return attention(q, *index.gather(k, k), kv_start=index.first)
    assert index is not None
    return sparse_attention(q, k, k, index)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("method", "options"), DECODING, ids=lambda x: str(x)[:50])
def test_a_decode_step_waits_for_nothing_and_replays_in_a_cuda_graph(
    method: str, options: dict[str, Any]
) -> None:
    chosen = lowcontext.get_method(method, **options)
    k = rand(1, 2, 20000, 128, dtype=BF16).to(GPU)
    q = rand(1, 8, 1, 128, seed=1, dtype=BF16).to(GPU)

    rotation = Rotary((1e6 ** -(torch.arange(64) / 64)).to(GPU))

    def layer() -> LayerContext:
        return LayerContext(layer_idx=5, num_layers=32, scale=128**-0.5, rotary=rotation)

    used = layer()
    for _ in range(2):
        decode(chosen, used, q, k)  # compiles, and keeps what it keeps of the keys
    with no_waiting():
        decode(chosen, used, q, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(chosen, used, q, k)
    q.copy_(-q)  # a cosine of -1: nothing is reused
    graph.replay()
    assert torch.equal(captured, decode(chosen, layer(), q, k))


@pytest.mark.ops("attend", "scores", "topk", "window")
def test_offsets_beyond_31_bits() -> None:
    # 17M keys of 128 channels: the last ones lie behind 2^31 numbers.
    Lk, last, D = 17_000_000, 640, 128
    gen = torch.Generator(GPU).manual_seed(0)
    k = torch.randn(1, 1, Lk, D, generator=gen, dtype=BF16, device=GPU)
    q = rand(1, 4, 130, D, dtype=BF16).to(GPU)
    end = k[:, :, -last:]
    first = torch.arange(Lk - last, Lk, 64, dtype=torch.int32, device=GPU)
    for rows, block in ((1, (1, 64)), (130, (128, 64))):
        _, Nq = BlockIndex.query_blocks(rows, Lk, block[0])
        counts = torch.full((1, 1, Nq), len(first), dtype=torch.int32, device=GPU)
        far = BlockIndex(counts, first.expand(1, 1, Nq, -1), block)
        out = sparse_attention(q[:, :, :rows], k, k, far)
        error, allowed = sampled_error(q[:, :, :rows], end, end, out, (0, rows, None), D**-0.5)
        assert error <= allowed
    scores, _ = votes.token_scores(q[:, :, :1].float(), k, scale=0.1)
    plain, _ = votes.token_scores(q[:, :, :1].float(), end, scale=0.1, backend="reference")
    assert_close((scores[..., -last:].contiguous(),), (plain,))
    del plain
    marked = torch.zeros(1, Lk, device=GPU)
    marked[:, -5:] = 1.0
    ids, counts = votes.topk(marked, 5)
    assert ids[0, :5].tolist() == list(range(Lk - 5, Lk))
    # Only the last queries score, and with equal keys every visible one gets the same weight.
    k.zero_()
    vertical, slash = vertical_slash.last_window_scores(q[:, :, -64:], k)
    torch.testing.assert_close(vertical[..., :9], vertical[..., 9:18])
    assert abs(float(vertical[0, 0].double().sum()) - 64) < 1e-2
    assert abs(float(slash[0, 0].double().sum()) - 64) < 1e-2
    assert float(vertical[0, 0, -1]) == pytest.approx(1 / Lk, rel=1e-3)
