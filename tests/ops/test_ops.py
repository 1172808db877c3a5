"""The public ops: reference against torch SDPA, properties on every usable backend, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowcontext import BlockIndex, attention, sparse_attention
from lowcontext.ops import _dispatch

# On CPU tensors; test_triton.py and test_gpu.py run the others.
BACKENDS = [name for name in ("native", "reference") if _dispatch.unusable(name) is None]


def qkv(Lq: int, Lk: int, Hq: int = 4, Hkv: int = 2, D: int = 64, B: int = 2) -> list[Tensor]:
    gen = torch.Generator().manual_seed(Lq * 1000 + Lk)
    shapes = [(B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D)]
    return [torch.randn(s, generator=gen) for s in shapes]


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """fp64 attention by torch over a bool mask [B, H, Lq, Lk] whose rows are not empty."""
    G = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(G, 1) for x in (k, v))
    if mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scale).float()


def block_index(seed: int, Lq: int, Lk: int, bq: int, bk: int, B: int, H: int) -> BlockIndex:
    gen = torch.Generator().manual_seed(seed)
    first, Nq = BlockIndex.query_blocks(Lq, Lk, bq)
    keep = torch.rand(B, H, Nq, -(-Lk // bk), generator=gen) < 0.3
    row = torch.arange(first, first + Nq)[:, None]
    tile = torch.arange(-(-Lk // bk))
    # The tile of every query of the block, so that no row is empty.
    keep |= (tile * bk < (row + 1) * bq) & ((tile + 1) * bk > row * bq)
    return BlockIndex.from_blocks(keep, (bq, bk))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (1, 65), (63, 63), (64, 130), (130, 257)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_sparse_attention_equals_masked_sdpa(backend: str, Lq: int, Lk: int, heads: int) -> None:
    q, k, v = qkv(Lq, Lk)
    bq, bk = (1, 16) if Lq == 1 else (32, 16)
    index = block_index(Lq, Lq, Lk, bq, bk, 2, heads)
    out = sparse_attention(q, k, v, index, scale=0.2, backend=backend)
    expected = masked_sdpa(q, k, v, index.to_mask(Lq, Lk), 0.2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 17, 500])
@pytest.mark.parametrize("start", [None, [0, 40]])
def test_attention_equals_masked_sdpa(
    backend: str, window: int | None, start: list[int] | None
) -> None:
    q, k, v = qkv(50, 90)
    kv_start = None if start is None else torch.tensor(start)
    out, lse = attention(
        q, k, v, window=window, kv_start=kv_start, return_lse=True, backend=backend
    )
    p, j = torch.arange(40, 90)[:, None], torch.arange(90)
    mask = (j <= p) & (p - j < (window or 10**6))
    mask = mask[None, None].expand(2, 1, -1, -1)
    if start is not None:
        mask = mask & (j >= torch.tensor(start)[:, None, None, None])
    expected = masked_sdpa(q, k, v, mask, 64**-0.5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) / 8
    logits = logits.masked_fill(~mask, -math.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_visible_key_give_zeros_and_minus_infinity(backend: str) -> None:
    q, k, v = qkv(40, 40)
    out, lse = attention(q, k, v, kv_start=torch.tensor([0, 30]), return_lse=True, backend=backend)
    assert torch.equal(out[1, :, :30], torch.zeros(4, 30, 64))
    assert (lse[1, :, :30] == -math.inf).all()
    assert out.isfinite().all()
    empty = BlockIndex(
        torch.zeros(1, 1, 2, dtype=torch.int32),
        torch.zeros(1, 1, 2, 1, dtype=torch.int32),
        (32, 16),
    )
    out, lse = sparse_attention(q, k, v, empty, return_lse=True, backend=backend)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    Lq=st.integers(1, 70),
    past=st.integers(0, 70),
    block=st.sampled_from([(1, 16), (16, 16), (32, 64), (24, 8)]),
    G=st.sampled_from([1, 4, 7]),
    seed=st.integers(0, 1000),
)
def test_future_and_unlisted_keys_do_not_change_output(
    backend: str, Lq: int, past: int, block: tuple[int, int], G: int, seed: int
) -> None:
    Lk = Lq + past
    q, k, v = qkv(Lq, Lk, 2 * G, 2, 64, 1)
    index = block_index(seed, Lq, Lk, *block, 1, 2)
    out = sparse_attention(q, k, v, index, backend=backend)
    unread = ~index.to_mask(Lq, Lk).any(dim=2)[..., None]  # [1, 2, Lk, 1]
    other = sparse_attention(
        q, torch.where(unread, 1e4, k), torch.where(unread, math.nan, v), index, backend=backend
    )
    torch.testing.assert_close(other, out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    Lq=st.integers(1, 100),
    past=st.integers(0, 100),
    block=st.sampled_from([(1, 64), (64, 64), (128, 64), (48, 40)]),
)
def test_a_full_index_equals_dense_attention(
    backend: str, Lq: int, past: int, block: tuple[int, int]
) -> None:
    Lk = Lq + past
    q, k, v = qkv(Lq, Lk)
    full = BlockIndex.from_mask(torch.ones(1, 1, Lq, Lk, dtype=torch.bool), block)
    out = sparse_attention(q, k, v, full, backend=backend)
    mask = torch.ones(Lq, Lk, dtype=torch.bool).tril(past)[None, None]
    torch.testing.assert_close(out, masked_sdpa(q, k, v, mask, 64**-0.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_listed_tiles_does_not_matter(backend: str) -> None:
    q, k, v = qkv(128, 512)
    starts = torch.tensor([3, 70, 150, 231, 320, 400, 448], dtype=torch.int32)
    outs = []
    for order in (torch.arange(7), torch.tensor([4, 0, 6, 2, 5, 1, 3])):
        index = BlockIndex(
            torch.full((1, 1, 2), 7, dtype=torch.int32),
            starts[order].expand(1, 1, 2, 7).contiguous(),
            (64, 64),
        )
        outs.append(sparse_attention(q, k, v, index, backend=backend))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_twice_that_of_rounding(
    backend: str, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in qkv(100, 200))
    out = attention(q, k, v, backend=backend)
    exact = attention(*(x.double() for x in (q, k, v)), backend="reference")
    rounding = (exact.to(dtype).double() - exact).abs().max()
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 2 * rounding + 1e-5


def test_gradients_go_through_the_reference_and_are_refused_elsewhere() -> None:
    q, k, v = (x[:1, :, :8].requires_grad_() for x in qkv(8, 8))
    attention(q, k, v).sum().backward()
    assert q.grad is not None
    expected = torch.autograd.grad(
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum(), q
    )[0]
    torch.testing.assert_close(q.grad, expected, atol=1e-5, rtol=1e-5)
    if "native" in BACKENDS:
        with pytest.raises(NotImplementedError, match=r"backend 'native' is for inference"):
            attention(q, k, v, backend="native")


def test_what_the_kernels_do_not_take_runs_on_the_reference_with_a_warning() -> None:
    q, k, v = qkv(10, 20)
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference"):
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference"):
        attention(q[..., :20], k[..., :20], v[..., :20])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 8)}, ValueError, "q: expected a multiple of 2 heads"),
        ({"q": torch.zeros(2, 4, 9, 8)}, ValueError, "q: expected at most Lk=6 queries, got Lq=9"),
        ({"k": torch.zeros(2, 2, 6, 7)}, ValueError, r"k: expected shape \[2, 'Hkv', 'Lk', 8\]"),
        ({"v": torch.zeros(2, 2, 5, 8)}, ValueError, r"v: expected shape \[2, 2, 6, 'Dv'\]"),
        ({"v": torch.zeros(2, 6, 8)}, ValueError, "v: expected 4 dimensions"),
        ({"k": torch.zeros(2, 2, 6, 8).half()}, TypeError, "k: expected dtype torch.float32 of q"),
        ({"q": torch.zeros(2, 4, 4, 8, dtype=torch.int32)}, TypeError, "q: expected a floating"),
        ({"q": [1]}, TypeError, "q: expected a tensor, got list"),
        ({"k": torch.zeros(2, 2, 8, 6).mT}, ValueError, "k: expected a contiguous last dim"),
        ({"scale": "x"}, TypeError, "scale: expected a float or None, got str"),
        ({"scale": math.nan}, ValueError, "scale: expected a finite number or None, got nan"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive number or None, got -1.0"),
        ({"softcap": math.inf}, ValueError, "softcap: expected a positive number or None, got inf"),
        ({"softcap": math.nan}, ValueError, "softcap: expected a positive number or None, got nan"),
        ({"window": 0}, ValueError, "window: expected at least 1 or None, got 0"),
        ({"window": 0.5}, TypeError, "window: expected an int or None, got 0.5"),
        ({"q": torch.zeros(2, 4, 4, 0)}, ValueError, "q: expected a head_dim of at least 1"),
        ({"kv_start": torch.zeros(3, dtype=torch.long)}, ValueError, r"kv_start: expected shape"),
        ({"kv_start": torch.zeros(2)}, TypeError, r"kv_start: expected an int tensor \[B\]"),
        ({"kv_start": torch.zeros(2).bool()}, TypeError, "kv_start: .*, got torch.bool"),
        ({"backend": "cuda"}, ValueError, "backend: expected 'auto' or one of .*, got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "q": torch.zeros(2, 4, 4, 8),
        "k": torch.zeros(2, 2, 6, 8),
        "v": torch.zeros(2, 2, 6, 8),
    }
    attention(**good)
    with pytest.raises(error, match=message):
        attention(**{**good, **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kv_start_beyond_int32_hides_every_key(backend: str) -> None:
    q, k, v = qkv(3, 70)
    starts = torch.tensor([2**32 + 5, -(2**32) - 5])
    out, lse = attention(q, k, v, kv_start=starts, return_lse=True, backend=backend)
    assert not out[0].any()
    assert (lse[0] == -math.inf).all()
    torch.testing.assert_close(out[1], attention(q, k, v, backend=backend)[1])


def test_an_index_that_does_not_fit_is_named() -> None:
    q, k, v = qkv(64, 64)
    make = lambda B, H, N: BlockIndex(  # noqa: E731
        torch.ones(B, H, N, dtype=torch.int32), torch.zeros(B, H, N, 1, dtype=torch.int32), (64, 64)
    )
    sparse_attention(q, k, v, make(1, 1, 1))
    with pytest.raises(ValueError, match="index: expected batch 1 or 2, got 3"):
        sparse_attention(q, k, v, make(3, 1, 1))
    with pytest.raises(ValueError, match="index: expected 1, 2 or 4 heads, got 3"):
        sparse_attention(q, k, v, make(1, 3, 1))
    with pytest.raises(ValueError, match="index: expected 1 query blocks for Lq=64, Lk=64"):
        sparse_attention(q, k, v, make(1, 1, 2))
    with pytest.raises(TypeError, match="index: expected a BlockIndex, got int"):
        sparse_attention(q, k, v, 3)
    starts = torch.zeros(1, 1, 1, 1, dtype=torch.int32).expand(-1, -1, -1, 2)
    strided = BlockIndex(torch.ones(1, 1, 1, dtype=torch.int32), starts, (64, 64))
    with pytest.raises(ValueError, match="kv_starts: expected a contiguous last dim, got stride 0"):
        sparse_attention(q, k, v, strided)


def test_a_missing_extension_warns_once_that_the_reference_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_dispatch, "_status", lambda name: None if name == "reference" else "gone")
    q, k, v = qkv(4, 4)
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference, native cannot run: gone"):
        attention(q, k, v)
    with pytest.raises(RuntimeError, match="backend 'native' cannot run attention: gone"):
        attention(q, k, v, backend="native")
