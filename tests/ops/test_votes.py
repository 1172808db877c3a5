"""Scores, votes and top-k against fp64 oracles, on every backend and instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext.ops import native, votes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(x: Tensor) -> Tensor:
    """The same values as a view of a larger buffer that holds NaN elsewhere."""
    big = torch.full([n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
    view = big[tuple(slice(1, 1 + n) for n in x.shape)]
    view.copy_(x)
    return view


def oracle_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """fp64 [B, Hq, R, N]; query head h against key head h // G, -inf after the row's last key."""
    R, N, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    scores = scale * q.double() @ k.double().repeat_interleave(G, dim=1).transpose(2, 3)
    future = torch.arange(N) > torch.arange(N - R, N)[:, None]
    return scores.masked_fill(future, -torch.inf)


def oracle_topk(row: list[float], k: int) -> list[int]:
    ids = [i for i, x in enumerate(row) if x == x and x > -torch.inf]
    return sorted(sorted(ids, key=lambda i: (-row[i], i))[: max(k, 0)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("G", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("R", "N", "D"), [(1, 1500, 64), (3, 1025, 20), (9, 9, 128), (1, 1, 7)])
def test_scores_and_their_lse_equal_fp64(
    backend: str, dtype: torch.dtype, G: int, R: int, N: int, D: int
) -> None:
    q, k = poisoned(rand(2, 2 * G, R, D)), poisoned(rand(2, 2, N, D, seed=1).to(dtype))
    scores, lse = votes.token_scores(q, k, scale=0.3, backend=backend)
    expected = oracle_scores(q, k, 0.3)
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("G", [1, 4, 7])
@pytest.mark.parametrize("heads", [1, 2])
def test_scores_of_pages_equal_the_scores_of_their_keys(backend: str, G: int, heads: int) -> None:
    q, k = rand(2, 2 * G, 2, 32), rand(2, 2, 700, 32, seed=1)
    ids = torch.randint(0, 28, (2, heads, 90), generator=torch.Generator().manual_seed(2))
    ids = ids.sort(dim=-1).values.to(torch.int32)
    pages = votes.Pages(ids, 24, first=13)
    scores, lse = votes.token_scores(q, k, pages=pages, backend=backend)
    starts = 13 + 24 * ids[..., None].long()
    keys = (starts + torch.arange(24)).flatten(2).repeat_interleave(2 // heads, 1)
    everything = q.double() @ k.double().repeat_interleave(G, 1).transpose(2, 3)
    expected = everything.gather(3, keys.repeat_interleave(G, 1)[:, :, None].expand(-1, -1, 2, -1))
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected.logsumexp(-1), atol=1e-5, rtol=1e-5)


def unpacked(small: Tensor) -> Tensor:
    """The integers of keys in 8 or 4 bits, channel by channel."""
    if small.dtype == torch.int8:
        return small.long()
    nibbles = torch.cat([small.long() & 15, small.long() >> 4], dim=-1)
    return torch.where(nibbles < 8, nibbles, nibbles - 16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_keys_are_within_half_a_step(backend: str, dtype: torch.dtype, bits: int) -> None:
    k = rand(2, 3, 1100, 40).to(dtype)
    k[:, :, 5] = 0
    small, scales = votes.quantize_keys(poisoned(k), bits=bits, backend=backend)
    error = (unpacked(small) * scales.double()[..., None] - k.double()).abs()
    assert bool((error <= 0.5001 * scales.double()[..., None]).all())
    assert bool((scales == k.float().abs().amax(-1) / (2 ** (bits - 1) - 1)).all())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("G", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("R", "D"), [(1, 128), (1, 256), (3, 40), (2, 6), (1, 1030)])
def test_scores_of_quantised_keys_equal_the_product_of_their_integers(
    backend: str, bits: int, G: int, R: int, D: int
) -> None:
    q, k = rand(2, 2 * G, R, D), rand(2, 2, 333, D, seed=1)
    q[0, 0], k[0, 0, 7] = 0, 0
    # The largest sums that 32 bits must hold.
    q[1, 0, 0], k[1, 0, 5] = q.max(), k.max()
    small, scales = votes.quantize_keys(k, bits=bits, backend="reference")
    wide = torch.empty(2, 2, 333, small.shape[3] + 3, dtype=small.dtype).fill_(99)
    wide[..., : small.shape[3]] = small
    scores, lse = votes.token_scores(
        q, wide[..., : small.shape[3]], scales=scales, scale=0.3, backend=backend
    )
    levels = min(32767, (2**31 - 1) // (127 * D))
    step = (q.abs().amax(-1, keepdim=True) / levels).double()
    rounded = (q.double() / step.where(step > 0, 1)).round() * step
    assert float((rounded - q).abs().max()) <= 0.51 * float(step.max())
    expected = oracle_scores(rounded, unpacked(small) * scales.double()[..., None], 0.3)
    size = 0.3 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    torch.testing.assert_close(scores.double(), expected, atol=1e-6 * size, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected.logsumexp(-1), atol=1e-6 * size, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_votes_sum_probabilities_over_the_heads_of_a_list(backend: str, heads: int) -> None:
    scores = oracle_scores(3 * rand(2, 4, 5, 16), rand(2, 2, 300, 16, seed=1), 1.0)
    out = votes.soft_vote(
        scores.float(), scores.logsumexp(-1).float(), heads=heads, backend=backend
    )
    expected = scores.softmax(-1).unflatten(1, (heads, 4 // heads)).sum(2)
    future = scores[:, :1] == -torch.inf
    assert bool((out[future.expand_as(out)] == -torch.inf).all())
    seen = out.masked_fill(future, 0.0).double()
    torch.testing.assert_close(seen, expected, atol=1e-6, rtol=1e-5)


def test_a_row_without_candidates_has_no_votes(backend: str) -> None:
    scores = torch.full((1, 2, 1, 40), -torch.inf)
    out = votes.soft_vote(scores, torch.full((1, 2, 1), -torch.inf), backend=backend)
    assert bool((out == -torch.inf).all())


@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 300, 5000])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "few", "signs"])
def test_topk_equals_a_stable_sort(backend: str, N: int, kind: str) -> None:
    gen = torch.Generator().manual_seed(N)
    x = torch.randn(6, N, generator=gen)
    if kind == "ties":
        x = (2 * x).round()
    elif kind == "equal":
        x = torch.full_like(x, -3.0)
    elif kind == "few":
        x = x.masked_fill(torch.rand(x.shape, generator=gen) < 0.9, -torch.inf)
        x[0, ::3] = torch.nan
    elif kind == "signs":
        x = torch.where(x > 0, 0.0, -0.0)
        x[:, ::5] = 1e-44  # subnormal
    for k in {0, 1, N // 10, N // 2, N - 1, N, N + 5}:
        limits = torch.tensor([k, k // 2, 0, k, 1, k])
        ids, counts = votes.topk(x, k, limits=limits, backend=backend)
        assert ids.shape == (6, min(k, N))
        for row in range(6):
            expected = oracle_topk(x[row].tolist(), min(int(limits[row]), k))
            assert ids[row, : int(counts[row])].tolist() == expected, (k, row)
            assert not ids[row, int(counts[row]) :].any()


def test_topk_of_clustered_scores_equals_a_stable_sort(backend: str) -> None:
    # The largest entries side by side: the bound of the group maxima is then far below the k-th.
    x = rand(3, 20000)
    x[:, 4000:6000] += 100
    for k in (1, 100, 1999, 2048, 2500):
        ids, counts = votes.topk(x, k, backend=backend)
        assert counts.tolist() == [k] * 3
        for row in range(3):
            assert ids[row].tolist() == oracle_topk(x[row].tolist(), k)


@pytest.mark.parametrize("heads", [1, 3])
def test_topk_of_pages_gives_their_keys(backend: str, heads: int) -> None:
    x = rand(2, 3, 2, 40).masked_fill(rand(2, 3, 2, 40, seed=1) > 0, -torch.inf)
    ids = rand(2, heads, 30, seed=2).topk(8).indices.sort().values.int()
    pages = votes.Pages(ids, 5, first=9)
    for k in (0, 1, 12, 40):
        keys, counts = votes.topk(x, k, pages=pages, backend=backend)
        entries, number = votes.topk(x, k, backend=backend)
        assert torch.equal(counts, number)
        for b, h, r in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2))).tolist():
            n = int(counts[b, h, r])
            expected = [
                9 + 5 * int(ids[b, h % heads, i // 5]) + i % 5
                for i in entries[b, h, r, :n].tolist()
            ]
            assert keys[b, h, r].tolist() == expected + [0] * (k - n)


def test_ids_count_from_the_first(backend: str) -> None:
    x = torch.tensor([[3.0, -torch.inf, 5.0], [-torch.inf, -torch.inf, -torch.inf]])
    ids, counts = votes.topk(x, 2, first=100, backend=backend)
    assert ids.tolist() == [[100, 102], [0, 0]]
    assert counts.tolist() == [2, 0]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_page_votes_equal_the_votes_on_scaled_page_scores(backend: str, heads: int) -> None:
    q, bounds = rand(2, 4, 3, 24), votes.page_bounds(rand(2, 2, 330, 24, seed=1), 16)
    out = votes.page_votes(q, bounds, scale=0.3, heads=heads, backend=backend)
    scores = 0.3 * votes.page_scores(q, bounds, backend="reference").double()
    expected = scores.softmax(-1).unflatten(1, (heads, 4 // heads)).sum(2)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("G", [1, 4, 7])
def test_page_scores_bound_every_key_and_equal_the_formula(backend: str, G: int) -> None:
    q, k = rand(2, 2 * G, 3, 24), rand(2, 2, 330, 24, seed=1)
    bounds = votes.page_bounds(k, 16)
    scores = votes.page_scores(q, bounds, backend=backend)
    pages = k.double()[:, :, :320].unflatten(2, (20, 16)).repeat_interleave(G, 1)
    low, high = pages.amin(3)[:, :, None], pages.amax(3)[:, :, None]  # [B, Hq, 1, P, D]
    query = q.double()[:, :, :, None]
    expected = torch.maximum(query * low, query * high).sum(-1)
    torch.testing.assert_close(scores.double(), expected, atol=2e-5, rtol=1e-5)
    exact = torch.einsum("bhrd,bhpsd->bhrps", q.double(), pages).amax(-1)
    assert bool((expected >= exact - 1e-9).all())


@pytest.mark.skipif(native.status() is not None, reason=f"native backend: {native.status()}")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    q, k = rand(1, 8, 2, 64), rand(1, 2, 9000, 64, seed=1)
    before, outs = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        scores, lse = votes.token_scores(q, k)
        ballot = votes.soft_vote(scores, lse, heads=2)
        outs.append((scores, lse, ballot, *votes.topk(ballot, 700)))
    torch.set_num_threads(before)
    for out in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, outs[0], strict=True))


@pytest.mark.skipif(native.status() is not None, reason=f"native backend: {native.status()}")
def test_the_fake_ops_agree_with_the_real_ones() -> None:
    q, k = rand(1, 4, 2, 16), rand(1, 2, 64, 16)
    votes.topk(votes.soft_vote(*votes.token_scores(q, k)), 4)  # registers the fakes
    ops = torch.ops.lowcontext
    starts = torch.tensor([[[0, 8, 32]]], dtype=torch.int32)
    small, scales = ops.quantize_keys(k, 8)
    calls = [
        (ops.token_scores, (q, k, None, None, 1, 1.0, True)),
        (ops.token_scores, (q, small, scales, starts, 8, 1.0, False)),
        (ops.soft_vote, (torch.zeros(1, 4, 2, 9), torch.zeros(1, 4, 2), 2)),
        (ops.topk, (torch.zeros(3, 9), 4, None)),
        (ops.page_scores, (q, torch.zeros(1, 2, 5, 32))),
        (ops.quantize_keys, (k, 8)),
        (ops.quantize_keys, (k, 4)),
        (ops.token_scores, (q, *ops.quantize_keys(k, 4), None, 1, 1.0, True)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_limits_beyond_int32_are_no_limits(backend: str) -> None:
    scores = rand(2, 50)
    limits = torch.tensor([2**32, -(2**32)])
    ids, counts = votes.topk(scores, 7, limits=limits, backend=backend)
    assert counts.tolist() == [7, 0]
    assert torch.equal(ids[0], votes.topk(scores, 7, backend=backend)[0][0])


def test_arguments_are_checked_by_name() -> None:
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 64, 16)
    ids = torch.zeros(2, 2, 3, dtype=torch.int32)
    for name, error, call in [
        ("q", TypeError, lambda: votes.token_scores(q.int(), k)),
        ("q", ValueError, lambda: votes.token_scores(q[0], k)),
        ("q", ValueError, lambda: votes.token_scores(q[:, :3], k)),
        ("k", ValueError, lambda: votes.token_scores(q, k[..., :8])),
        ("k", TypeError, lambda: votes.token_scores(q, k.long())),
        ("scales", ValueError, lambda: votes.token_scores(q, k.to(torch.int8))),
        ("pages", ValueError, lambda: votes.token_scores(q, k, pages=votes.Pages(k[0], 8))),
        ("pages", ValueError, lambda: votes.token_scores(q, k, pages=votes.Pages(ids, 8))),
        ("pages", ValueError, lambda: votes.token_scores(q, k, pages=votes.Pages(ids[:1], 65))),
        ("pages", ValueError, lambda: votes.token_scores(q, k, pages=votes.Pages(ids[:1], 0))),
        ("pages", ValueError, lambda: votes.topk(q, 2, pages=votes.Pages(ids[:1, :, :2], 8))),
        ("scores", ValueError, lambda: votes.topk(q, 2, pages=votes.Pages(ids[:1], 8))),
        ("first", ValueError, lambda: votes.topk(q, 2, first=3, pages=votes.Pages(ids[:1], 8))),
        ("lse", ValueError, lambda: votes.soft_vote(q, torch.zeros(1, 4, 2))),
        ("heads", ValueError, lambda: votes.soft_vote(q, torch.zeros(1, 4, 1), heads=3)),
        ("scores", TypeError, lambda: votes.topk(q.half(), 2)),
        ("k", ValueError, lambda: votes.topk(q, -1)),
        ("limits", TypeError, lambda: votes.topk(q, 1, limits=torch.zeros(1, 4, 1))),
        ("bounds", ValueError, lambda: votes.page_scores(q, k)),
        ("page", ValueError, lambda: votes.page_bounds(k, 0)),
        ("k", TypeError, lambda: votes.quantize_keys(k.long())),
        ("bits", ValueError, lambda: votes.quantize_keys(k, bits=5)),
        ("k", ValueError, lambda: votes.quantize_keys(k[..., :7], bits=4)),
        ("k", ValueError, lambda: votes.token_scores(q, k.to(torch.uint8), scales=k[..., 0])),
    ]:
        with pytest.raises(error, match=f"^{name}: expected"):
            call()
