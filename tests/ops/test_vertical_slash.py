"""The vertical-slash ops against golden vectors and a brute-force fp64 oracle."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowcontext import sparse_attention
from lowcontext.ops import native
from lowcontext.ops.vertical_slash import last_window_scores, line_index

BACKENDS = ["reference", "native"] if native.status() is None else ["reference"]
FIRST = ([0, 1, 5, 30, 200, 300], [500, 130, 70, 2, 1, 0])
BAND = (FIRST[0], [*range(100), 130, 500])
# Vertical keys, slash distances, block, tiles, columns: the published index, worked out by hand.
GOLDEN = [
    (*FIRST, 0, [0], []),
    (*FIRST, 1, [0, 64], []),
    (*FIRST, 2, [0, 64, 128], []),
    (*FIRST, 5, [190, 254, 318, 382], [0, 1, 5, 30]),
    (*FIRST, 8, [12, 382, 446, 510, 574], [0, 1, 5, 200, 300]),
    ([3, 64, 100, 250], [200, 199, 10, 0], 3, [0, 182, 246], [64, 100]),
    ([3, 64, 100, 250], [200, 199, 10, 0], 4, [56, 120, 246, 310], [3]),
    (*BAND, 5, [190, 254, 318, 382], [0, 1, 5, 30]),
    (*BAND, 9, [76, 446, 510, 574, 638], [0, 1, 5, 30, 200, 300]),
    ([0, 127, 130], [129, 64, 0], 3, [63, 128, 192], [0, 127]),
    ([0, 127, 130], [128, 64, 0], 3, [64, 128, 192], [0]),
    ([0], [30, 0], 2, [98, 162], [0]),
    ([0, 7, 90], [300, 5], 1, [59], [0, 7]),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if native.status() is not None:
        pytest.skip(f"native backend: {native.status()}")
    try:
        torch.ops.lowcontext._set_cpu_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.lowcontext._set_cpu_isa("auto")


def mask_of(positions: list[int], N: int) -> Tensor:
    mask = torch.zeros(1, 1, N, dtype=torch.bool)
    mask[..., positions] = True
    return mask


def lists(index, h: int, n: int, b: int = 0) -> tuple[list[int], list[int]]:
    tiles = index.kv_starts[b, h, n, : int(index.kv_num_blocks[b, h, n])]
    columns = index.kv_columns[b, h, n, : int(index.kv_num_columns[b, h, n])]
    return tiles.tolist(), columns.tolist()


def brute_scores(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Vertical and slash sums of one head from the dense fp64 softmax, entry by entry."""
    N, n = len(k), len(q)
    vertical, slash = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for r, i in enumerate(range(N - n, N)):
        p = torch.softmax(k[: i + 1].double() @ q[r].double() * scale, dim=0)
        vertical[: i + 1] += p
        slash[: i + 1] += p.flip(0)
    return vertical, slash


def brute_lists(V: list[int], S: list[int], m: int, block: int) -> tuple[list[int], list[int]]:
    """Tiles and columns of one block from the rule as written: windows, merged left to right."""
    end = block * (m + 1)
    ranges: list[list[int]] = []
    for e in sorted(max(end - d, block) for d in S if d < end):
        if not ranges or e - block > ranges[-1][1]:
            ranges.append([e - block, e])
        elif e > ranges[-1][1]:
            ranges[-1][1] += block
    tiles = [t for a, b in ranges for t in range(a, b, block)]
    last = ranges[-1][1] if ranges else 0
    columns = [j for j in sorted(V) if j < last and not any(a <= j < b for a, b in ranges)]
    return tiles, columns


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"S{len(c[1])}-m{c[2]}")
def test_golden_vectors(backend: str, case: tuple) -> None:
    V, S, m, tiles, columns = case
    N = 700
    index = line_index(mask_of(V, N), mask_of(S, N), N, N, backend=backend)
    assert lists(index, 0, m) == (tiles, columns)
    assert brute_lists(V, S, m, 64) == (tiles, columns)


def decided(scores: Tensor, want: int) -> int:
    """A budget near `want` at which the cut is wider than any fp32 error of the scores."""
    ranked = scores.sort(descending=True).values
    for k in sorted(range(1, len(ranked) + 1), key=lambda k: abs(k - want)):
        if k == len(ranked) or ranked[k - 1] - ranked[k] > 1e-4 * ranked[k - 1]:
            return k
    raise AssertionError("no cut is decided")


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_random_prompts_give_the_tiles_and_columns_of_the_oracle(
    backend: str, seed: int
) -> None:
    draw = random.Random(seed)
    for case in range(100):
        gen = torch.Generator().manual_seed(100 * seed + case)
        N = draw.choice([draw.randint(1, 200), draw.randint(1, 1000), draw.randint(1, 3000)])
        G, D = draw.choice([(1, 8), (2, 16), (3, 8)])
        Lq = draw.choice([N, N, draw.randint(1, N)])
        q = 2 * torch.randn(1, G, Lq, D, generator=gen)
        k = torch.randn(1, 1, N, D, generator=gen)
        vertical, slash = last_window_scores(q, k, backend=backend)
        chosen = torch.zeros(2, 1, G, N, dtype=torch.bool)
        expected = []
        for h in range(G):
            exact = brute_scores(q[0, h, -64:], k[0, 0], D**-0.5)
            kept = []
            for which, (ours, theirs) in enumerate(zip((vertical, slash), exact, strict=True)):
                budget = decided(theirs, draw.randint(1, 60))
                chosen[which, 0, h, ours[0, h].topk(budget).indices] = True
                kept.append(theirs.topk(budget).indices.tolist())
            expected.append(kept)
        index = line_index(*chosen, Lq, N, backend=backend)
        index.validate(Lq, N)
        first = (N - Lq) // 64
        for h in range(G):
            for n in range(index.kv_starts.shape[2]):
                assert lists(index, h, n) == brute_lists(*expected[h], first + n, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "N", "D", "window"),
    [(1, 1, 64, 64), (7, 7, 96, 64), (64, 1024, 128, 64), (300, 2113, 256, 128), (33, 1025, 8, 64)],
)
def test_native_scores_match_fp64_on_every_instruction_set(
    isa: str, dtype: torch.dtype, n: int, N: int, D: int, window: int
) -> None:
    gen = torch.Generator().manual_seed(N)
    room = torch.full((2, N + 3, 7, D + 8), torch.nan, dtype=dtype)
    k = room[:, 2 : N + 2, 2:4, :D].transpose(1, 2)
    k.copy_(torch.randn(2, 2, N, D, generator=gen))
    q = torch.randn(2, 6, n, D, generator=gen).to(dtype)
    for softcap in (None, 3.0):
        options = {"window": window, "scale": 0.3, "softcap": softcap}
        ours = last_window_scores(q, k, backend="native", **options)
        exact = last_window_scores(q.double(), k.double(), backend="reference", **options)
        plain = last_window_scores(q, k, backend="reference", **options)
        for a, b, c in zip(ours, exact, plain, strict=True):
            assert float((a - b).abs().max()) <= 2 * float((c - b).abs().max()) + 1e-5
            assert torch.allclose(a.sum(-1), torch.tensor(float(min(n, window))), rtol=1e-4)


def test_native_scores_do_not_depend_on_threads_or_on_keeping_the_logits(isa: str) -> None:
    gen = torch.Generator().manual_seed(0)
    # Up to 256 MiB of logits are kept: 671 MB of 512 heads are not, 168 MB of 128 heads are.
    q, k = torch.randn(1, 512, 64, 8, generator=gen), torch.randn(1, 2, 4097, 8, generator=gen)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(last_window_scores(q, k, backend="native"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    kept = last_window_scores(q[:, :128], k[:, :1], backend="native")
    assert all(torch.equal(a[:, :128], b) for a, b in zip(results[0], kept, strict=True))


def test_lists_are_the_same_on_both_backends_for_chunks_batches_and_dense_rows() -> None:
    if native.status() is not None:
        pytest.skip(f"native backend: {native.status()}")
    gen = torch.Generator().manual_seed(1)
    for Lq, Lk, block in ((1000, 1000, 64), (130, 777, 64), (65, 3000, 128), (1, 40, 16)):
        shares = torch.tensor([0.02, 0.2]).view(2, 1, 1, 1)
        masks = torch.rand(2, 3, 4, Lk, generator=gen) < shares
        masks[1, ..., 0] = True
        dense_from = torch.randint(0, 2 * Lk, (3, 4), generator=gen, dtype=torch.int32)
        most = {"most_vertical": int(masks[0].sum(-1).max()), "most_slash": Lk}
        for options in ({}, {"dense_from": dense_from}, most):
            ours, plain = (
                line_index(*masks, Lq, Lk, block=block, backend=name, **options)
                for name in ("native", "reference")
            )
            ours.validate(Lq, Lk)
            assert ours.kv_starts.shape == plain.kv_starts.shape
            for b in range(3):
                for h in range(4):
                    for n in range(ours.kv_starts.shape[2]):
                        assert lists(ours, h, n, b) == lists(plain, h, n, b)


def test_lines_of_a_chunk_are_the_rows_of_the_whole_index(backend: str) -> None:
    gen = torch.Generator().manual_seed(2)
    masks = torch.rand(2, 1, 2, 1000, generator=gen) < 0.05
    masks[1, ..., 0] = True
    whole = line_index(*masks, 1000, 1000, backend=backend)
    for Lq, Lk in ((300, 1000), (100, 500), (37, 640), (1, 64)):
        part = line_index(*masks, Lq, Lk, backend=backend)
        first = (Lk - Lq) // 64
        for h in range(2):
            for n in range(part.kv_starts.shape[2]):
                assert lists(part, h, n) == lists(whole, h, first + n)


def test_without_distance_zero_rows_read_nothing_or_less_and_are_zero_not_nan(backend: str) -> None:
    N, gen = 400, torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, N, 8, generator=gen) for _ in range(3))
    for V, S in (([], []), ([5, 90], []), ([], [300]), ([5, 90], [300])):
        index = line_index(mask_of(V, N), mask_of(S, N), N, N, backend=backend)
        for m in range(index.kv_starts.shape[2]):
            assert lists(index, 0, m) == brute_lists(V, S, m, 64)
        out = sparse_attention(q, k, v, index)
        assert torch.isfinite(out).all()
        unread = ~index.to_mask(N, N)[0, 0].any(1)
        assert unread[:256].all()
        assert unread[256:].all() == (not S)
        assert not out[0, 0, unread].any()


def test_lists_that_do_not_fit_are_cut_at_the_right(backend: str) -> None:
    V, S = mask_of([0, 1, 5, 30], 700), mask_of([500, 130, 70, 2, 1, 0], 700)
    index = line_index(V, S, 700, 700, most_vertical=2, most_slash=3, backend=backend)
    assert index.kv_starts.shape[-1] == 3
    assert lists(index, 0, 8) == ([12, 382, 446], [0, 1])


def test_wrong_arguments_are_named() -> None:
    mask = torch.zeros(1, 2, 100, dtype=torch.bool)
    q, k = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 100, 8)
    with pytest.raises(TypeError, match="slash: expected a bool tensor, got torch.float32"):
        line_index(mask, mask.float(), 10, 100)
    with pytest.raises(ValueError, match=r"vertical: expected shape \[B, H, >= 101\]"):
        line_index(mask, mask, 10, 101)
    with pytest.raises(ValueError, match="slash: expected shape"):
        line_index(mask, mask[:, :1], 10, 100)
    with pytest.raises(ValueError, match="Lq: expected 1 to Lk=100"):
        line_index(mask, mask, 101, 100)
    with pytest.raises(ValueError, match="dense_from: expected int32"):
        line_index(mask, mask, 10, 100, dense_from=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="window: expected 1 to 256, got 0"):
        last_window_scores(q, k, window=0)
    with pytest.raises(ValueError, match="q: expected at least one row"):
        last_window_scores(q[:, :, :0], k)
