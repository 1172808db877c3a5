"""The native CPU kernels against an fp64 oracle, on every instruction set of the machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from instruction_sets import machine_isas
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import native, reference

pytestmark = pytest.mark.skipif(
    native.status() is not None, reason=f"native backend: {native.status()}"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = machine_isas() or ["portable"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.ops.lowcontext._set_cpu_isa(request.param)
    yield request.param
    torch.ops.lowcontext._set_cpu_isa("auto")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def qkv(
    B: int, Hq: int, Hkv: int, Lq: int, Lk: int, D: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D))
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return q, k, v


def poisoned(x: Tensor, margin: int = 3) -> Tensor:
    """The same values, inside a larger buffer of NaN and with other strides."""
    B, H, L, D = x.shape
    room = torch.full((B, L + 2 * margin, H + 1, D + 8), torch.nan, dtype=x.dtype)
    view = room[:, margin : margin + L, :H, :D].transpose(1, 2)
    return view.copy_(x)


def random_index(
    B: int, H: int, Lq: int, Lk: int, block: tuple[int, int], S: int, C: int, seed: int = 0
) -> BlockIndex:
    """Unaligned tiles from before the first key to past the last; garbage past the counts."""
    g = generator(seed)
    _, Nq = BlockIndex.query_blocks(Lq, Lk, block[0])
    counts = torch.randint(0, S + 1, (B, H, Nq), generator=g, dtype=torch.int32)
    starts = torch.full((B, H, Nq, S), 2**31 - 1, dtype=torch.int32)
    num_columns = torch.randint(0, C + 1, (B, H, Nq), generator=g, dtype=torch.int32)
    columns = torch.full((B, H, Nq, C), -(2**31), dtype=torch.int32)
    for b, h, n in itertools.product(range(B), range(H), range(Nq)):
        free = torch.ones(Lk + 4, dtype=torch.bool)
        at = int(torch.randint(-block[1], 3, (1,), generator=g))
        for i in range(int(counts[b, h, n])):
            starts[b, h, n, i] = at
            free[max(at, 0) : max(at + block[1], 0)] = False
            at += block[1] + int(torch.randint(0, max(1, Lk // S), (1,), generator=g))
        single = free.nonzero().flatten()
        picked = single[torch.randperm(len(single), generator=g)[: int(num_columns[b, h, n])]]
        num_columns[b, h, n] = len(picked)
        columns[b, h, n, : len(picked)] = picked.sort().values.int()
    return (
        BlockIndex(counts, starts, block, num_columns, columns)
        if C
        else BlockIndex(counts, starts, block)
    )


def listed_mask(index: BlockIndex, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
    """bool [B, Hq, Lq, Lk]: what the index lists, read entry by entry."""
    batch, H, Nq = index.kv_num_blocks.shape
    block_q, block_k = index.block_size
    blocks = torch.zeros(batch, H, Nq, Lk, dtype=torch.bool)
    for at in itertools.product(range(batch), range(H), range(Nq)):
        for start in index.kv_starts[at][: int(index.kv_num_blocks[at])].tolist():
            blocks[at][max(start, 0) : max(start + block_k, 0)] = True
        if index.kv_columns is not None and index.kv_num_columns is not None:
            columns = index.kv_columns[at][: int(index.kv_num_columns[at])]
            blocks[at][columns[(columns >= 0) & (columns < Lk)].long()] = True
    rows = torch.arange(Lk - Lq, Lk) // block_q - (Lk - Lq) // block_q
    return blocks[:, :, rows].expand(B, -1, -1, -1).repeat_interleave(Hq // H, 1)


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    listed: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
    kv_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """fp64 (out, lse), straight from the definition."""
    G, Lq, Lk = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.double().repeat_interleave(G, 1) for x in (k, v))
    logits = q.double() @ k.mT * q.shape[3] ** -0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    rows, keys = torch.arange(Lk - Lq, Lk)[:, None], torch.arange(Lk)
    mask = ((keys <= rows) & (keys > rows - (window or Lk)))[None, None].expand(logits.shape)
    if listed is not None:
        mask = mask & listed
    if kv_start is not None:
        mask = mask & (keys >= kv_start[:, None, None, None])
    logits = logits.masked_fill(~mask, -math.inf)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ v, torch.logsumexp(logits, -1)


def check(
    run: Callable[[], tuple[Tensor, Tensor]],
    theirs: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
) -> None:
    """On every instruction set, err(ours) <= 2 * err(reference in the same dtype) + 1e-5."""
    for isa in ISAS:
        torch.ops.lowcontext._set_cpu_isa(isa)
        ours = run()
        torch.ops.lowcontext._set_cpu_isa("auto")
        for got, other, truth in zip(ours, theirs, exact, strict=True):
            assert got.shape == truth.shape
            assert got.dtype == other.dtype
            none = truth == -math.inf
            assert torch.equal(got == -math.inf, none)
            clean = [x.double().masked_fill(none, 0.0) for x in (got, other, truth)]
            error, allowed = ((x - clean[2]).abs().max() for x in clean[:2])
            assert error <= 2 * allowed + 1e-5, isa


def check_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    softcap: float = 0.0,
    kv_start: Tensor | None = None,
) -> None:
    options = {"scale": q.shape[3] ** -0.5, "softcap": softcap, "kv_start": kv_start}
    hidden = [poisoned(x) for x in (q, k, v)]
    listed = listed_mask(index, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    check(
        lambda: native.sparse_attention(*hidden, index, **options),
        reference.sparse_attention(q, k, v, index, **options),
        oracle(q, k, v, listed, softcap, 0, kv_start),
    )


def check_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softcap: float = 0.0,
    window: int = 0,
    kv_start: Tensor | None = None,
) -> None:
    options = {
        "scale": q.shape[3] ** -0.5,
        "softcap": softcap,
        "window": window,
        "kv_start": kv_start,
    }
    hidden = [poisoned(x) for x in (q, k, v)]
    check(
        lambda: native.attention(*hidden, **options),
        reference.attention(q, k, v, **options),
        oracle(q, k, v, None, softcap, window, kv_start),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [8, 64, 72, 80, 96, 128, 256])
def test_every_head_dim_and_dtype_matches_the_oracle(D: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 4, 2, 65, 90, D, dtype)
    check_sparse(q, k, v, random_index(1, 2, 65, 90, (16, 16), 4, 9))
    check_dense(q, k, v)
    check_dense(q[:, :, :1], k, v)


@pytest.mark.parametrize("G", [1, 4, 7, 8])
@pytest.mark.parametrize("Lq", [1, 2, 63, 64, 65, 130, 257])
def test_every_group_size_and_length_matches_the_oracle(G: int, Lq: int) -> None:
    for Lk, heads in ((Lq, 2 * G), (Lq + 37, 2), (Lq + 200, 1)):
        q, k, v = qkv(1, 2 * G, 2, Lq, Lk, 64, torch.float32, seed=Lq)
        check_sparse(q, k, v, random_index(1, heads, Lq, Lk, (64, 16), 5, 20, seed=G))
        check_dense(q, k, v)


@pytest.mark.parametrize(
    "block", [(1, 1), (1, 64), (5, 7), (32, 32), (64, 64), (128, 16), (256, 300)]
)
def test_every_block_size_matches_the_oracle(block: tuple[int, int]) -> None:
    q, k, v = qkv(2, 8, 2, 130, 167, 64, torch.float32)
    for heads, batch in ((1, 1), (2, 2), (8, 1)):
        check_sparse(q, k, v, random_index(batch, heads, 130, 167, block, 3, 30))


@pytest.mark.parametrize("Lq", [1, 3, 70])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 50.0])
def test_softcap_padding_and_window_match_the_oracle(Lq: int, softcap: float) -> None:
    q, k, v = qkv(2, 8, 2, Lq, 300, 64, torch.float32)
    q = q * 4
    for dtype in (torch.int32, torch.int64):
        kv_start = torch.tensor([17, 290], dtype=dtype)
        check_sparse(q, k, v, random_index(2, 2, Lq, 300, (16, 64), 3, 40), softcap, kv_start)
        for window in (0, 1, 5, 64, 299, 1000):
            check_dense(q, k, v, softcap, window, kv_start)


@pytest.mark.parametrize("Lq", [1, 4, 12])
def test_a_long_list_split_over_items_matches_the_oracle(Lq: int) -> None:
    for dtype, G in itertools.product(DTYPES, (1, 4)):
        q, k, v = qkv(1, 2 * G, 2, Lq, 3000, 64, dtype)
        check_dense(q, k, v)
        check_sparse(q, k, v, random_index(1, 2, Lq, 3000, (16, 16), 60, 700))


def test_a_row_without_a_visible_key_is_zero_with_lse_minus_infinity(isa: str) -> None:
    q, k, v = qkv(1, 4, 2, 64, 64, 64, torch.float32)
    starts = torch.full((1, 1, 1, 2), 32, dtype=torch.int32)
    for count in (0, 1):
        index = BlockIndex(torch.full((1, 1, 1), count, dtype=torch.int32), starts, (64, 8))
        out, lse = native.sparse_attention(q, k, v, index, scale=0.1, softcap=0.0, kv_start=None)
        empty = 32 if count else 64
        assert out[:, :, :empty].abs().max() == 0
        assert (lse[:, :, :empty] == -math.inf).all()
        assert torch.isfinite(lse[:, :, empty:]).all()


def test_wild_index_contents_are_masked(isa: str) -> None:
    wild = torch.tensor([-(2**31), -65, -64, -1, 61, 90, 2**31 - 1], dtype=torch.int32)
    for Lq in (1, 40):
        q, k, v = qkv(1, 2, 1, Lq, 90, 64, torch.float32)
        _, Nq = BlockIndex.query_blocks(Lq, 90, 16)
        for count in (-5, 7, 2**31 - 1):
            counts = torch.full((1, 1, Nq), count, dtype=torch.int32)
            lists = wild.expand(1, 1, Nq, 7)
            index = BlockIndex(counts, lists, (16, 64), counts, lists)
            out, lse = native.sparse_attention(
                poisoned(q), poisoned(k), poisoned(v), index, scale=1.0, softcap=0.0, kv_start=None
            )
            assert not out.isnan().any()
            assert not lse.isnan().any()
            assert (lse > -math.inf).any() == (count > 0)


def test_nan_in_a_visible_key_reaches_the_rows_that_see_it_and_no_other(isa: str) -> None:
    q, k, v = qkv(1, 2, 1, 100, 100, 64, torch.float32)
    k[0, 0, 40] = torch.nan
    out, _ = native.attention(q, k, v, scale=0.1, softcap=0.0, window=0, kv_start=None)
    assert not out[:, :, :40].isnan().any()
    assert out[:, :, 40:].isnan().all()


def test_large_logits_do_not_overflow() -> None:
    q, k, v = qkv(1, 4, 2, 70, 200, 64, torch.float32)
    check_dense(q * 100, k, v)
    check_dense(q[:, :, :1] * 100, k, v)


@pytest.mark.parametrize("Lq", [1, 100])
def test_the_result_does_not_depend_on_the_number_of_threads(Lq: int) -> None:
    q, k, v = qkv(1, 8, 2, Lq, 2000, 64, torch.float32)
    index = random_index(1, 2, Lq, 2000, (32, 64), 12, 300)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4, 4):
        torch.set_num_threads(threads)
        results.append(
            native.sparse_attention(q, k, v, index, scale=0.1, softcap=0.0, kv_start=None)
            + native.attention(q, k, v, scale=0.1, softcap=0.0, window=0, kv_start=None)
        )
    torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


def op_arguments(optional: bool) -> tuple[tuple[object, ...], tuple[object, ...]]:
    q, k, v = qkv(2, 4, 2, 20, 50, 64, torch.float32)
    index = random_index(1, 2, 20, 50, (16, 16), 2, 5)
    kv_start = torch.tensor([3, 0]) if optional else None
    columns = (index.kv_num_columns, index.kv_columns) if optional else (None, None)
    sparse = (q, k, v, index.kv_num_blocks, index.kv_starts, *columns, 16, 16, 0.1, 0.0, kv_start)
    return sparse, (q, k, v, 0.1, 0.0, 7, kv_start)


@pytest.mark.parametrize("optional", [False, True])
def test_ops_pass_opcheck(optional: bool) -> None:
    sparse, dense = op_arguments(optional)
    torch.library.opcheck(torch.ops.lowcontext.sparse_attention.default, sparse)
    torch.library.opcheck(torch.ops.lowcontext.attention.default, dense)


def test_ops_compile_without_a_graph_break() -> None:
    q, k, v = qkv(1, 4, 2, 20, 50, 64, torch.float32)
    index = random_index(1, 2, 20, 50, (16, 16), 2, 5)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, _ = native.sparse_attention(q, k, v, index, scale=0.1, softcap=0.0, kv_start=None)
        b, _ = native.attention(q, k, v, scale=0.1, softcap=0.0, window=0, kv_start=None)
        return a + 1, b * 2

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, v), both(q, k, v), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 20, 60)}, "q: expected a head_dim that is a multiple of 8"),
        ({"k": torch.zeros(1, 2, 50, 32)}, r"k: expected shape \[1, Hkv, Lk, 64\]"),
        ({"v": torch.zeros(1, 2, 49, 64)}, r"v: expected shape \[1, 2, 50, 64\]"),
        ({"k": torch.zeros(1, 2, 50, 64).half()}, "k: expected the dtype of q"),
        ({"q": torch.zeros(1, 3, 20, 64)}, "q: expected a multiple of 2 heads, got 3"),
        ({"q": torch.zeros(1, 4, 60, 64)}, "k: expected at least Lq = 60 keys, got 50"),
        ({"q": torch.zeros(1, 4, 64, 20).mT}, "q: expected a contiguous last dimension"),
        ({"kv_start": torch.zeros(3, dtype=torch.int32)}, r"kv_start: expected shape \[1\]"),
        ({"block_q": 0}, "block_q: expected a positive int32, got 0"),
        ({"block_q": 8}, r"kv_num_blocks: expected shape \[1 or 1, 1, 4\], got \[1, 1, 3\]"),
        ({"kv_num_blocks": torch.zeros(1, 3, 3).int()}, "kv_num_blocks: expected 1, 2 or 4 heads"),
        ({"kv_starts": torch.zeros(1, 1, 3, 2)}, "kv_starts: expected dtype int32"),
        ({"kv_columns": torch.zeros(1, 1, 3, 2).int()}, "kv_columns: expected given together"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    q, k, v = qkv(1, 4, 2, 20, 50, 64, torch.float32)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "kv_num_blocks": torch.zeros(1, 1, 3, dtype=torch.int32),
        "kv_starts": torch.zeros(1, 1, 3, 2, dtype=torch.int32),
        "kv_num_columns": None,
        "kv_columns": None,
        "block_q": 16,
        "block_k": 16,
        "scale": 0.1,
        "softcap": 0.0,
        "kv_start": None,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lowcontext.sparse_attention(**(arguments | change))


def test_supports_gives_the_reason() -> None:
    q, k, v = qkv(1, 4, 2, 20, 50, 64, torch.float32)
    assert native.supports("attention", q, k, v, None) is None
    assert "float64" in str(native.supports("attention", q.double(), k, v, None))
    assert "60" in str(native.supports("attention", q[..., :60], k, v[..., :60], None))
    assert "v has 32" in str(native.supports("attention", q, k, v[..., :32], None))


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(RuntimeError, match="isa: expected auto, or an instruction set"):
        torch.ops.lowcontext._set_cpu_isa("sse9")


def test_huge_pages_are_a_hint_that_changes_no_value() -> None:
    fresh = torch.empty(3, 1024, 1024)
    native.prefer_huge_pages(fresh, torch.empty(0), torch.empty(5, dtype=torch.bfloat16))
    fresh.fill_(2.0)
    assert fresh.sum() == 2.0 * fresh.numel()
    native.prefer_huge_pages(fresh)
    assert fresh.sum() == 2.0 * fresh.numel()


@pytest.mark.parametrize("Lq", [1, 16])
def test_the_error_does_not_grow_with_the_length_of_the_list(isa: str, Lq: int) -> None:
    """32,768 nearly equal weights on values far from zero, in items that are not split."""
    Lk, heads, D = 32768, 128, 64
    q, k, v = qkv(1, 1, 1, Lq, Lk, D, torch.float32)
    q, v = q * 0.02, v + 8.0
    mask = torch.arange(Lk) <= torch.arange(Lk - Lq, Lk)[:, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    exact = sdpa(q.double(), k.double(), v.double(), attn_mask=mask)
    plain = (sdpa(q, k, v, attn_mask=mask) - exact).abs().max()
    shared = [x.expand(1, heads, -1, -1) for x in (q, k, v)]
    out, _ = native.attention(*shared, scale=D**-0.5, softcap=0.0, window=0, kv_start=None)
    assert (out[:, :1] - exact).abs().max() <= 2 * plain + 1e-5
    assert torch.equal(out[:, :1].expand_as(out), out)
