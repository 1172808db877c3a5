"""Cases of the Triton score ops; `test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowcontext.ops import votes
from lowcontext.ops.votes import triton as vote_kernels

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_a_query_counts(dtype: torch.dtype) -> None:
    # Keys are single ones: a score is one element of q, and must come back with all its 24 bits.
    q = poisoned(rand(1, 4, 3, 16) * torch.logspace(-9, 9, 16))
    k = torch.eye(16, device=DEVICE).to(dtype)[None, None]
    scores, _ = votes.token_scores(q, k, causal=False, backend="triton")
    assert torch.equal(scores, q)


@pytest.mark.parametrize(("batches", "heads"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("quantised", [False, True])
def test_scores_of_pages_equal_the_scores_of_their_keys(
    batches: int, heads: int, quantised: bool
) -> None:
    G, width, N = 3, 24, 200
    q, k = rand(2, 2 * G, 2, 32).to(DEVICE), poisoned(rand(2, 2, N, 32, seed=1))
    scales = None
    if quantised:
        k, scales = votes.quantize_keys(k, backend="reference")
    gen = torch.Generator().manual_seed(2)
    starts = torch.randint(0, N - width + 1, (batches, heads, 9, 2), generator=gen)
    starts = starts.to(DEVICE, torch.int32)[..., 0]  # stride 2
    options = {"pages": (starts, width), "scales": scales}
    scores, lse = votes.token_scores(q, k, **options, backend="triton")
    plain, plain_lse = votes.token_scores(q, k, **options, backend="reference")
    keys = (starts[..., None] + torch.arange(width, device=DEVICE)).flatten(2).long()
    keys = keys.expand(2, 2, -1).repeat_interleave(G, 1)[:, :, None].expand(-1, -1, 2, -1)
    wide = k.double() if scales is None else k.double() * scales.double()[..., None]
    exact = exact_scores(q, wide, 1.0, False).gather(3, keys)
    check(scores, plain, exact, "scores")
    check(lse, plain_lse, exact.logsumexp(-1), "lse")


def test_a_row_that_sees_no_key_has_no_lse() -> None:
    q, k = rand(1, 2, 5, 16).to(DEVICE), rand(1, 1, 3, 16).to(DEVICE)
    _, lse = votes.token_scores(q, k, backend="triton")
    assert lse.isneginf().tolist() == [[[True, True, False, False, False]] * 2]
    scores, lse = votes.token_scores(q, k[:, :, :0], backend="triton")
    assert scores.shape == (1, 2, 5, 0)
    assert bool(lse.isneginf().all())


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(130, 40), (1, 256), (70, 64)])
def test_quantised_keys_are_those_of_the_reference(dtype: torch.dtype, N: int, D: int) -> None:
    k = rand(2, 3, N, D)
    k[:, 1, N // 2] = 0
    k[:, 2, N // 2] = (torch.arange(D) % 21 - 10) / 2.0  # halves: ties of the rounding
    k[:, 2, N // 2, 0] = 63.5
    ours = votes.quantize_keys(poisoned(k, dtype), backend="triton")
    plain = votes.quantize_keys(poisoned(k, dtype), backend="reference")
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_topk_is_left_to_the_reference() -> None:
    with pytest.raises(RuntimeError, match="triton: it does not have this op"):
        votes.topk(rand(3), 2, backend="triton")


def test_the_vote_ops_trace_into_one_graph() -> None:
    q, k = rand(1, 4, 2, 16).to(DEVICE), rand(1, 2, 40, 16).to(DEVICE)

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        small, scales = vote_kernels.quantize_keys(k)
        scores, lse = vote_kernels.token_scores(q, small, scales, None, 1, 0.5, True)
        pages = vote_kernels.page_scores(q, votes.page_bounds(k, 8))
        return vote_kernels.soft_vote(scores, lse, 2), pages

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(q, k), both(q, k), strict=True):
        assert torch.equal(a, b)


def test_the_fake_vote_ops_agree_with_the_real_ones() -> None:
    q, k = rand(1, 4, 2, 16).to(DEVICE), rand(1, 2, 40, 16).to(DEVICE)
    small, scales = votes.quantize_keys(k, backend="reference")
    starts = torch.tensor([[[0, 8, 32]]], dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros(1, 4, 2, 9, device=DEVICE)
    ops = torch.ops.lowcontext_triton
    calls = [
        (ops.token_scores, (q, k, None, None, 1, 1.0, True)),
        (ops.token_scores, (q, small, scales, starts, 8, 1.0, False)),
        (ops.soft_vote, (zeros, zeros[..., 0].clone(), 2)),
        (ops.page_scores, (q, torch.zeros(1, 2, 5, 32, device=DEVICE))),
        (ops.quantize_keys, (k.transpose(1, 2).contiguous().transpose(1, 2),)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
