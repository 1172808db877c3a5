"""Pooled and antidiagonal block scores against their definitions, entry by entry, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowcontext.ops import native
from lowcontext.ops.block_scores import antidiagonal_scores, block_means, pooled_scores, reference

needs_native = pytest.mark.skipif(
    native.status() is not None, reason=f"native backend: {native.status()}"
)
SHAPES = [(1, 1), (64, 64), (130, 130), (100, 333), (33, 290), (256, 512)]


def qk(Lq: int, Lk: int, D: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(Lk)
    room = torch.full((2, Lk, 4, D + 3), torch.nan, dtype=dtype)
    k = room[:, :, 1:3, :D].transpose(1, 2)
    k.copy_(torch.randn(2, 2, Lk, D, generator=gen))
    return torch.randn(2, 4, Lq, D, generator=gen).to(dtype), k


@pytest.mark.parametrize(("Lq", "Lk"), SHAPES)
@pytest.mark.parametrize("block", [16, 64])
def test_pooled_scores_are_products_of_means_over_the_tokens_that_exist(
    backend: str, Lq: int, Lk: int, block: int
) -> None:
    q, k = qk(Lq, Lk)
    scores = pooled_scores(q, k, block=block, scale=0.3, backend=backend)
    offset = Lk - Lq
    first = offset // block
    assert scores.shape == (2, 4, -(-Lk // block) - first, -(-Lk // block))
    for n in range(scores.shape[2]):
        low, high = (first + n) * block, (first + n + 1) * block
        rows = q[:, :, max(0, low - offset) : high - offset].double().mean(2)
        for m in range(scores.shape[3]):
            keys = k[:, :, m * block : (m + 1) * block].double().mean(2).repeat_interleave(2, 1)
            exact = 0.3 * (rows * keys).sum(-1)
            assert torch.allclose(scores[:, :, n, m].double(), exact, atol=1e-5)


def exact_antidiagonal(q: Tensor, k: Tensor, S: int, block: int, scale: float) -> Tensor:
    """Scores of one head, cell by cell: q [Lq, D], k [Lk, D]."""
    Lq, Lk = len(q), len(k)
    offset = Lk - Lq
    first, Nk = offset // block, -(-Lk // block)
    scores = torch.zeros(Nk - first, Nk, dtype=torch.float64)
    for a in range(offset // S, -(-Lk // S)):
        logits = []
        for b in range(a + 1):
            total = 0.0
            for t in range(S):
                i, j = S * a + S - 1 - t, S * b + t
                if offset <= i < Lk and j < Lk:
                    total += float(q[i - offset].double() @ k[j].double())
            logits.append(total * scale / S)
        for b, p in enumerate(torch.tensor(logits, dtype=torch.float64).softmax(0)):
            scores[a * S // block - first, b * S // block] += p
    return scores


@pytest.mark.parametrize(("Lq", "Lk"), SHAPES)
@pytest.mark.parametrize(("stride", "block"), [(8, 64), (16, 64), (16, 128)])
def test_antidiagonal_scores_match_their_definition(
    backend: str, Lq: int, Lk: int, stride: int, block: int
) -> None:
    q, k = qk(Lq, Lk)
    scores = antidiagonal_scores(q, k, stride=stride, block=block, scale=0.7, backend=backend)
    for h in (0, 3):
        exact = exact_antidiagonal(q[1, h], k[1, h // 2], stride, block, 0.7)
        assert torch.allclose(scores[1, h].double(), exact, atol=1e-5)


def test_the_reference_gives_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk(100, 333)
    whole = antidiagonal_scores(q, k, stride=8, block=64, backend="reference")
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)
    again = antidiagonal_scores(q, k, stride=8, block=64, backend="reference")
    assert torch.allclose(whole, again, atol=1e-6)


def poisoned(x: Tensor) -> Tensor:
    """The same values as rows of a token-major buffer that holds NaN elsewhere."""
    B, H, L, D = x.shape
    room = torch.full((B, L + 3, H + 2, D + 8), torch.nan, dtype=x.dtype)
    view = room[:, 2 : L + 2, 1 : H + 1, :D].transpose(1, 2)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("G", "Lq", "Lk", "D", "stride", "block"),
    [
        (1, 700, 700, 64, 8, 128),
        (4, 515, 1543, 128, 16, 128),  # both ends inside a cell, three softmax steps
        (7, 129, 1000, 96, 16, 64),
        (8, 65, 65, 8, 16, 16),  # one cell per block
        (2, 300, 301, 256, 1, 32),  # one token per cell
        (2, 90, 900, 40, 12, 300),
        (3, 1, 5000, 24, 16, 128),
    ],
)
def test_scores_are_as_near_to_fp64_as_the_reference(
    backend: str, dtype: torch.dtype, G: int, Lq: int, Lk: int, D: int, stride: int, block: int
) -> None:
    gen = torch.Generator().manual_seed(Lk)
    q = poisoned(torch.randn(2, 2 * G, Lq, D, generator=gen).to(dtype))
    k = poisoned(torch.randn(2, 2, Lk, D, generator=gen).to(dtype))
    for op, options in (
        (pooled_scores, {"block": block}),
        # Logits with a standard deviation of 4.
        (antidiagonal_scores, {"block": block, "stride": stride, "scale": 4 * (stride / D) ** 0.5}),
    ):
        ours = op(q, k, backend=backend, **options)
        plain = op(q, k, backend="reference", **options)
        exact = fp64(op, q, k, **options)
        assert ours.dtype == torch.float32
        assert ours.shape == plain.shape
        assert float((ours - exact).abs().max()) <= 2 * float((plain - exact).abs().max()) + 1e-5


def fp64(op, q: Tensor, k: Tensor, block: int, stride: int = 1, scale: float = 0.0) -> Tensor:
    """Both ops for all heads, as matrices over whole cells."""
    B, Hq, Lq, D = q.shape
    G, Lk, size = Hq // k.shape[1], k.shape[2], -(-k.shape[2] // block) * block
    first, blocks = (Lk - Lq) // block, size // block
    queries = torch.zeros(B, Hq, size, D, dtype=torch.float64)
    keys = torch.zeros_like(queries)
    queries[:, :, Lk - Lq : Lk] = q.double()
    keys[:, :, :Lk] = k.double().repeat_interleave(G, 1)
    at = torch.arange(size)
    is_query, is_key = (at >= Lk - Lq) & (at < Lk), at < Lk
    if op is pooled_scores:
        rows, columns = (
            x.unflatten(2, (blocks, block)).sum(3) / n.view(blocks, block).sum(1)[:, None]
            for x, n in ((queries, is_query), (keys, is_key))
        )
        return (D**-0.5 * rows @ columns.transpose(2, 3))[:, :, first:]
    cells = queries.unflatten(2, (-1, stride)).flip(3).flatten(3)
    logits = cells @ keys.unflatten(2, (-1, stride)).flatten(3).transpose(2, 3) * scale / stride
    n = torch.arange(size // stride)
    weights = logits.masked_fill(n > n[:, None], -torch.inf).softmax(-1)
    weights = weights * is_query.view(-1, stride).any(1)[:, None]
    return weights.unflatten(2, (blocks, -1)).unflatten(4, (blocks, -1)).sum((3, 5))[:, :, first:]


@needs_native
def test_native_scores_do_not_depend_on_the_number_of_threads() -> None:
    q, k = qk(1500, 2000)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((antidiagonal_scores(q, k), pooled_scores(q, k)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_offsets_beyond_2_to_the_31_elements_are_addressed(backend: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch addresses tensors itself")
    # 65 rows, 2^25 elements apart; only their pages are ever touched.
    room = torch.empty(2**31 + 64, dtype=torch.float16)
    far = room.as_strided((1, 1, 65, 8), (2**31, 2**31, 2**25, 1))
    near = torch.randn(1, 1, 65, 8, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    for op in (pooled_scores, antidiagonal_scores):
        assert torch.equal(op(far, far, block=16), op(near, near, block=16))


@needs_native
def test_native_scores_of_logits_far_apart_are_finite() -> None:
    # 1e4 between the logits of the first and the last softmax step, in either order.
    q, k = torch.ones(1, 1, 2048, 8), torch.ones(1, 1, 2048, 8)
    for ramp in (torch.linspace(-5e3, 5e3, 2048), torch.linspace(5e3, -5e3, 2048)):
        scores = antidiagonal_scores(q, k * ramp[:, None], scale=1.0, backend="native")
        assert torch.allclose(scores.sum(-1), torch.tensor(8.0))


@needs_native
def test_the_fake_ops_agree_with_the_real_ones() -> None:
    q, k = qk(40, 300)
    pooled_scores(q, k)  # registers the fakes
    ops = torch.ops.lowcontext
    calls = [
        (ops.antidiagonal_scores, (q, k, 16, 128, 0.5)),
        (ops.block_means, (q, 64, 260)),
        (ops.block_means, (k, 64, 0)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_a_chunk_of_queries_scores_as_in_the_whole_prompt(backend: str) -> None:
    q, k = qk(512, 512)
    options = {"stride": 16, "block": 128, "backend": backend}
    whole = antidiagonal_scores(q, k, **options)
    part = antidiagonal_scores(q[:, :, 128:384], k[:, :, :384], **options)
    assert torch.allclose(part, whole[:, :, 1:3, :3], atol=1e-5)


def test_zeros_that_fill_the_last_cells_take_no_weight(backend: str) -> None:
    # All logits are negative: a padded key, with logit 0, would draw most of the weight.
    q, k = torch.full((1, 1, 130, 8), 3.0), torch.full((1, 1, 130, 8), -3.0)
    scores = antidiagonal_scores(q, k, stride=8, block=64, backend=backend)
    assert torch.allclose(scores.sum(-1), torch.tensor([8.0, 8.0, 1.0]), atol=1e-5)
    assert float(scores[0, 0, 1, 0]) == pytest.approx(sum(8 / (9 + a) for a in range(8)), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_fp32(backend: str, dtype: torch.dtype) -> None:
    q, k = qk(256, 512, dtype=dtype)
    for op in (pooled_scores, antidiagonal_scores):
        scores = op(q, k, block=64, backend=backend)
        assert scores.dtype == torch.float32
        exact = op(q.float(), k.float(), block=64, backend=backend)
        assert torch.allclose(scores, exact, atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    q, k = qk(10, 20)
    with pytest.raises(ValueError, match="block: expected a multiple of stride=16, got 24"):
        antidiagonal_scores(q, k, stride=16, block=24)
    with pytest.raises(ValueError, match="stride: expected at least 1, got 0"):
        antidiagonal_scores(q, k, stride=0)
    with pytest.raises(TypeError, match="block: expected an int, got 64.0"):
        pooled_scores(q, k, block=64.0)
    with pytest.raises(TypeError, match="x: expected a floating dtype, got torch.int64"):
        block_means(k.long(), 16)
    with pytest.raises(ValueError, match="offset: expected at least 0, got -1"):
        block_means(k, 16, offset=-1)
    assert math.isfinite(float(pooled_scores(q, k).sum()))
