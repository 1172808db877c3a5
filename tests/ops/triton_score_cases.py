"""Cases of the Triton score ops; `test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowcontext.ops import votes
from lowcontext.ops.block_scores import antidiagonal_scores, pooled_scores
from lowcontext.ops.block_scores import triton as block_kernels
from lowcontext.ops.vertical_slash import last_window_scores
from lowcontext.ops.vertical_slash import triton as window_kernels
from lowcontext.ops.votes import triton as vote_kernels
from lowcontext.ops.votes.reference import round_queries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so an element that no kernel writes fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same values on the device, as a view of a larger buffer that holds NaN elsewhere."""
    big = torch.full([n + 3 for n in x.shape], torch.nan, dtype=dtype, device=DEVICE)
    view = big[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def check(ours: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """err(ours) <= 2 * err(reference) + 1e-5 against fp64, and infinities in the same places."""
    assert ours.shape == exact.shape
    assert ours.dtype == torch.float32
    assert torch.equal(ours == -torch.inf, exact == -torch.inf), f"{name}: infinities differ"
    finite = exact > -torch.inf
    error = (ours.double() - exact)[finite].abs()
    bound = 2 * (plain.double() - exact)[finite].abs().max() + 1e-5 if finite.any() else 0.0
    assert bool((error <= bound).all()), f"{name}: {error.max()} > {bound}"


def exact_scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """fp64 [B, Hq, R, N]."""
    R, N, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    scores = scale * q.double() @ k.double().repeat_interleave(G, dim=1).transpose(2, 3)
    future = torch.arange(N, device=DEVICE) > torch.arange(N - R, N, device=DEVICE)[:, None]
    return scores.masked_fill(future, -torch.inf) if causal else scores


def whole(k: Tensor) -> Tensor:
    """fp64 integers of quantised keys, unpacked by arithmetic on their bytes."""
    if k.dtype == torch.int8:
        return k.double()
    low, high = k.double() % 16, (k.double() / 16).floor()
    both = torch.cat([low, high], dim=-1)
    return torch.where(both < 8, both, both - 16)


@pytest.mark.ops("scores")
@pytest.mark.parametrize(("G", "R", "N", "D"), [(4, 1, 130, 64), (7, 3, 70, 22), (2, 2, 9, 256)])
@pytest.mark.parametrize("bits", [8, 4])
def test_scores_of_quantised_keys_equal_fp64(G: int, R: int, N: int, D: int, bits: int) -> None:
    q, k = poisoned(rand(2, 2 * G, R, D)), poisoned(rand(2, 2, N, D, seed=1))
    small, scales = votes.quantize_keys(k, bits=bits, backend="reference")
    options = {"scale": 0.3, "scales": scales}
    ours = votes.token_scores(q, small, **options, backend="triton")
    plain = votes.token_scores(q, small, **options, backend="reference")
    rounded = round_queries(q)
    exact = exact_scores(rounded, whole(small) * scales.double()[..., None], 0.3, True)
    for name, a, b, c in zip(
        ("scores", "lse"), ours, plain, (exact, exact.logsumexp(-1)), strict=True
    ):
        check(a, b, c, name)


@pytest.mark.ops("scores")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("G", "R", "N", "D", "causal"),
    [
        (4, 1, 300, 64, True),
        (7, 3, 129, 20, True),
        (2, 9, 9, 128, True),
        (1, 1, 1, 7, True),
        (5, 5, 70, 80, False),
        (1, 3, 140, 256, True),
        (3, 2, 1, 32, False),
    ],
)
def test_scores_and_their_lse_equal_fp64(
    dtype: torch.dtype, G: int, R: int, N: int, D: int, causal: bool
) -> None:
    q, k = poisoned(rand(2, 2 * G, R, D)), poisoned(rand(2, 2, N, D, seed=1), dtype)
    options = {"scale": 0.3, "causal": causal}
    scores, lse = votes.token_scores(q, k, **options, backend="triton")
    plain, plain_lse = votes.token_scores(q, k, **options, backend="reference")
    exact = exact_scores(q, k, 0.3, causal)
    check(scores, plain, exact, "scores")
    check(lse, plain_lse, exact.logsumexp(-1), "lse")


@pytest.mark.ops("scores")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_a_query_counts(dtype: torch.dtype) -> None:
    # Keys are single ones: a score is one element of q, and must come back with all its 24 bits.
    q = poisoned(rand(1, 4, 3, 16) * torch.logspace(-9, 9, 16))
    k = torch.eye(16, device=DEVICE).to(dtype)[None, None]
    scores, _ = votes.token_scores(q, k, causal=False, backend="triton")
    assert torch.equal(scores, q)


@pytest.mark.ops("scores")
@pytest.mark.parametrize(("batches", "heads"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_scores_of_pages_equal_the_scores_of_their_keys(
    batches: int, heads: int, bits: int | None
) -> None:
    G, width, N = 3, 24, 200
    q, k = rand(2, 2 * G, 2, 32).to(DEVICE), poisoned(rand(2, 2, N, 32, seed=1))
    wide, scales = k.double(), None
    if bits is not None:
        k, scales = votes.quantize_keys(k, bits=bits, backend="reference")
        wide = whole(k) * scales.double()[..., None]
    gen = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 8, (batches, heads, 9, 2), generator=gen)
    ids = ids.to(DEVICE, torch.int32)[..., 0]  # stride 2
    options = {"pages": votes.Pages(ids, width, first=5), "scales": scales}
    scores, lse = votes.token_scores(q, k, **options, backend="triton")
    plain, plain_lse = votes.token_scores(q, k, **options, backend="reference")
    keys = (5 + width * ids[..., None] + torch.arange(width, device=DEVICE)).flatten(2).long()
    keys = keys.expand(2, 2, -1).repeat_interleave(G, 1)[:, :, None].expand(-1, -1, 2, -1)
    exact = exact_scores(q, wide, 1.0, False).gather(3, keys)
    check(scores, plain, exact, "scores")
    check(lse, plain_lse, exact.logsumexp(-1), "lse")


@pytest.mark.ops("scores")
def test_a_row_that_sees_no_key_has_no_lse() -> None:
    q, k = rand(1, 2, 5, 16).to(DEVICE), rand(1, 1, 3, 16).to(DEVICE)
    _, lse = votes.token_scores(q, k, backend="triton")
    assert lse.isneginf().tolist() == [[[True, True, False, False, False]] * 2]
    scores, lse = votes.token_scores(q, k[:, :, :0], backend="triton")
    assert scores.shape == (1, 2, 5, 0)
    assert bool(lse.isneginf().all())


@pytest.mark.ops("scores")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("G", "R", "P", "D"), [(4, 1, 150, 64), (7, 3, 20, 24), (1, 1, 1, 128)])
def test_page_scores_equal_the_formula(dtype: torch.dtype, G: int, R: int, P: int, D: int) -> None:
    q, k = poisoned(rand(2, 2 * G, R, D)), rand(2, 2, 4 * P, D, seed=1).to(DEVICE, dtype)
    bounds = poisoned(votes.page_bounds(k, 4), dtype)
    low, high = bounds.double().repeat_interleave(G, 1)[:, :, None].chunk(2, dim=-1)
    query = q.double()[:, :, :, None]
    exact = torch.maximum(query * low, query * high).sum(-1)
    scores = votes.page_scores(q, bounds, backend="triton")
    check(scores, votes.page_scores(q, bounds, backend="reference"), exact, "bounds")


@pytest.mark.ops("scores")
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_page_votes_equal_the_votes_on_scaled_page_scores(heads: int) -> None:
    q, k = rand(2, 4, 3, 24).to(DEVICE), rand(2, 2, 600, 24, seed=1).to(DEVICE)
    bounds = votes.page_bounds(k, 4)
    ours = votes.page_votes(q, bounds, scale=0.3, heads=heads, backend="triton")
    plain = votes.page_votes(q, bounds, scale=0.3, heads=heads, backend="reference")
    scores = 0.3 * votes.page_scores(q.double(), bounds, backend="reference").double()
    exact = scores.softmax(-1).unflatten(1, (heads, 4 // heads)).sum(2)
    check(ours, plain, exact, "votes of pages")


@pytest.mark.ops("scores")
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_any_dtype_are_read_as_fp32(dtype: torch.dtype) -> None:
    q, k = poisoned(rand(2, 4, 3, 40), dtype), poisoned(rand(2, 2, 90, 40, seed=1))
    small, scales = votes.quantize_keys(k, backend="reference")
    for keys, options in ((k, {}), (small, {"scales": scales})):
        ours = votes.token_scores(q, keys, **options, backend="triton")
        wide = votes.token_scores(q.float(), keys, **options, backend="triton")
        for a, b in zip(ours, wide, strict=True):
            assert torch.equal(a, b)
    bounds = votes.page_bounds(k, 4)
    ours, wide = (votes.page_scores(x, bounds, backend="triton") for x in (q, q.float()))
    assert torch.equal(ours, wide)


@pytest.mark.ops("scores")
def test_rows_that_are_not_active_are_left_out() -> None:
    q, k = rand(3, 4, 2, 24).to(DEVICE), rand(3, 2, 90, 24, seed=1).to(DEVICE)
    bounds = votes.page_bounds(k, 8)
    active = torch.tensor([True, False, True], device=DEVICE)

    def steps(**options: Tensor) -> list[Tensor]:
        scores, lse = votes.token_scores(q, k, scale=0.3, **options, backend="triton")
        ballot = votes.soft_vote(scores, lse, heads=2, **options, backend="triton")
        pages = votes.page_votes(q, bounds, heads=2, **options, backend="triton")
        return [scores, lse, ballot, pages, *votes.topk(ballot, 9, **options, backend="triton")]

    unwritten = torch.empty(1, device=DEVICE), torch.empty(1, dtype=torch.int32, device=DEVICE)
    for some, every in zip(steps(active=active), steps(), strict=True):
        assert torch.equal(some[active], every[active])
        expected = unwritten[some.dtype == torch.int32].expand_as(some[1])
        assert torch.equal(some[1].nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.ops("scores")
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_votes_sum_probabilities_over_the_heads_of_a_list(heads: int) -> None:
    exact = exact_scores(3 * rand(2, 6, 5, 16).to(DEVICE), rand(2, 2, 1100, 16).to(DEVICE), 1, True)
    exact[1, :, 2] = -torch.inf
    lse = exact.logsumexp(-1)
    scores = exact.float().transpose(2, 3).contiguous().transpose(2, 3)  # not contiguous
    out = votes.soft_vote(scores, lse.float(), heads=heads, backend="triton")
    plain = votes.soft_vote(scores, lse.float(), heads=heads, backend="reference")
    expected = (exact - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    expected = expected.unflatten(1, (heads, 6 // heads)).sum(2)
    expected = expected.masked_fill(exact[:, :1] == -torch.inf, -torch.inf)
    check(out, plain, expected, "votes")


@pytest.mark.ops("scores")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(130, 40), (1, 256), (70, 64)])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_keys_are_those_of_the_reference(
    dtype: torch.dtype, N: int, D: int, bits: int
) -> None:
    k = rand(2, 3, N, D)
    k[:, 1, N // 2] = 0
    # Halves are ties of the rounding where the largest is the number of levels.
    k[:, 2, N // 2] = (torch.arange(D) % 13 - 6) / 2.0
    k[:, 2, N // 2, 0] = 127.0 if bits == 8 else 7.0
    ours = votes.quantize_keys(poisoned(k, dtype), bits=bits, backend="triton")
    plain = votes.quantize_keys(poisoned(k, dtype), bits=bits, backend="reference")
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.ops("scores")
def test_the_vote_ops_trace_into_one_graph() -> None:
    q, k = rand(1, 4, 2, 16).to(DEVICE), rand(1, 2, 40, 16).to(DEVICE)

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        small, scales = vote_kernels.quantize_keys(k, 8)
        scores, lse = vote_kernels.token_scores(q, small, scales, None, 1, 0, 0.5, True, None)
        pages, _ = vote_kernels.page_scores(q, votes.page_bounds(k, 8), 0.5, True, None)
        return vote_kernels.soft_vote(scores, lse, 2, None), pages

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(q, k), both(q, k), strict=True):
        assert torch.equal(a, b)


@pytest.mark.ops("scores")
def test_the_fake_vote_ops_agree_with_the_real_ones() -> None:
    q, k = rand(1, 4, 2, 16).to(DEVICE), rand(1, 2, 40, 16).to(DEVICE)
    small, scales = votes.quantize_keys(k, backend="reference")
    pages = torch.tensor([[[0, 1, 4]]], dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros(1, 4, 2, 9, device=DEVICE)
    flags = torch.ones(1, dtype=torch.bool, device=DEVICE)
    ops = torch.ops.lowcontext_triton
    calls = [
        (ops.token_scores, (q, k, None, None, 1, 0, 1.0, True, None)),
        (ops.token_scores, (q.half(), small, scales, pages, 8, 0, 1.0, False, flags)),
        (ops.token_scores, (q, *votes.quantize_keys(k, bits=4), None, 1, 0, 1.0, True, None)),
        (ops.soft_vote, (zeros, zeros[..., 0].clone(), 2, flags)),
        (ops.page_scores, (q, torch.zeros(1, 2, 5, 32, device=DEVICE), 1.0, False, None)),
        (ops.page_scores, (q, torch.zeros(1, 2, 5, 32, device=DEVICE), 0.5, True, flags)),
        (ops.quantize_keys, (k.transpose(1, 2).contiguous().transpose(1, 2), 8)),
        (ops.quantize_keys, (k, 4)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.ops("window")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("G", "Lq", "Lk", "D", "window", "softcap"),
    [
        (1, 1, 1, 64, 64, None),
        (7, 5, 70, 20, 64, None),
        (2, 70, 200, 64, 64, 3.0),
        (1, 65, 65, 128, 65, None),
        (3, 17, 131, 32, 3, None),
        (1, 130, 150, 256, 130, 5.0),
    ],
)
def test_window_scores_equal_fp64(
    dtype: torch.dtype, G: int, Lq: int, Lk: int, D: int, window: int, softcap: float | None
) -> None:
    q, k = poisoned(rand(2, 2 * G, Lq, D), dtype), poisoned(rand(2, 2, Lk, D, seed=1), dtype)
    options = {"window": window, "scale": 0.3, "softcap": softcap}
    ours = last_window_scores(q, k, **options, backend="triton")
    plain = last_window_scores(q, k, **options, backend="reference")
    exact = last_window_scores(q.double(), k.double(), **options, backend="reference")
    for name, a, b, c in zip(("vertical", "slash"), ours, plain, exact, strict=True):
        check(a, b, c, name)
        assert torch.allclose(a.sum(-1), torch.full_like(a[..., 0], min(window, Lq)), rtol=1e-4)


@pytest.mark.ops("window")
def test_the_window_op_traces_into_one_graph_with_its_fake() -> None:
    q, k = rand(1, 4, 20, 16).to(DEVICE), rand(1, 2, 40, 16).to(DEVICE)

    def scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return window_kernels.last_window_scores(q, k, scale=0.25, softcap=0.0)

    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(q, k), scores(q, k), strict=True):
        assert torch.equal(a, b)
    op = torch.ops.lowcontext_triton.last_window_scores.default
    options = {"scale": 0.25, "softcap": 0.0}
    torch.library.opcheck(op, (q, k), options, test_utils=("test_schema", "test_faketensor"))


BLOCK_SHAPES = [(1, 1), (64, 64), (30, 130), (33, 190)]


@pytest.mark.ops("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Lq", "Lk"), BLOCK_SHAPES)
@pytest.mark.parametrize(("block", "D"), [(64, 40), (24, 128)])
def test_pooled_scores_equal_fp64(dtype: torch.dtype, Lq: int, Lk: int, block: int, D: int) -> None:
    q, k = poisoned(rand(2, 4, Lq, D), dtype), poisoned(rand(2, 2, Lk, D, seed=1), dtype)
    ours, plain = (
        pooled_scores(q, k, block=block, scale=0.3, backend=name)
        for name in ("triton", "reference")
    )
    exact = exact_pooled(q, k, block, 0.3)
    check(ours, plain, exact, "pooled")


def exact_pooled(q: Tensor, k: Tensor, block: int, scale: float) -> Tensor:
    """fp64 products of the means over the tokens that exist, block by block."""
    offset, Lk = k.shape[2] - q.shape[2], k.shape[2]
    ends = range(offset // block * block + block, Lk + block, block)
    means = [q[:, :, max(0, e - block - offset) : e - offset].double().mean(2) for e in ends]
    keys = torch.stack([x.double().mean(2) for x in k.split(block, dim=2)], dim=2)
    keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return scale * torch.stack(means, dim=2) @ keys.transpose(2, 3)


def exact_antidiagonal(q: Tensor, k: Tensor, S: int, block: int, scale: float) -> Tensor:
    """fp64: the softmax over visible key cells of antidiagonal sums of the logits, in blocks."""
    Lq, Lk, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    offset, side = Lk - Lq, -(-Lk // block) * block
    logits = torch.zeros(*q.shape[:2], side, side, dtype=torch.float64, device=q.device)
    keys = k.double().repeat_interleave(G, 1).transpose(2, 3)
    logits[:, :, offset:Lk, :Lk] = scale / S * q.double() @ keys
    tiles = logits.unflatten(3, (-1, S)).unflatten(2, (-1, S)).transpose(3, 4)  # [.., a, b, S, S]
    cells = tiles.flip(4).diagonal(dim1=4, dim2=5).sum(-1)
    cell = torch.arange(side // S, device=q.device)
    weights = cells.masked_fill(cell > cell[:, None], -torch.inf).softmax(-1)
    exists = ((cell + 1) * S > offset) & (cell * S < Lk)
    weights = torch.where(exists[:, None], weights, 0.0)
    blocks = weights.unflatten(3, (-1, block // S)).sum(-1).unflatten(2, (-1, block // S)).sum(3)
    return blocks[:, :, offset // block :]


@pytest.mark.ops("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Lq", "Lk"), BLOCK_SHAPES)
@pytest.mark.parametrize(("stride", "block", "D"), [(4, 32, 32), (8, 24, 20), (1, 130, 16)])
def test_antidiagonal_scores_equal_fp64(
    dtype: torch.dtype, Lq: int, Lk: int, stride: int, block: int, D: int
) -> None:
    q, k = poisoned(rand(2, 4, Lq, D), dtype), poisoned(rand(2, 2, Lk, D, seed=1), dtype)
    options = {"stride": stride, "block": block, "scale": 0.7}
    ours = antidiagonal_scores(q, k, **options, backend="triton")
    plain = antidiagonal_scores(q, k, **options, backend="reference")
    exact = exact_antidiagonal(q, k, stride, block, 0.7)
    # A score is a sum of up to 130 weights, and 1e-5 less than one ulp of 130: compare their mean.
    cells = block // stride
    check(ours / cells, plain / cells, exact / cells, "antidiagonal")


@pytest.mark.ops("blocks")
def test_the_block_ops_trace_into_one_graph_with_their_fakes() -> None:
    q, k = rand(1, 4, 20, 16).to(DEVICE), rand(1, 2, 40, 16).to(DEVICE)

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        means = block_kernels.block_means(q, 16, 20)
        return means, block_kernels.antidiagonal_scores(q, k, stride=4, block=16, scale=0.5)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(q, k), both(q, k), strict=True):
        assert torch.equal(a, b)
    ops, tests = torch.ops.lowcontext_triton, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.block_means.default, (q, 16, 20), test_utils=tests)
    options = {"stride": 4, "block": 16, "scale": 0.5}
    torch.library.opcheck(ops.antidiagonal_scores.default, (q, k), options, test_utils=tests)
