"""Cases of the Triton backend; `test_triton.py` runs this file in a process of its own.

Triton decides at the import of a kernel whether it is interpreted or compiled, so the interpreter
(TRITON_INTERPRET=1, CPU tensors) must not be switched on in a process that runs other tests.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowcontext import BlockIndex, attention, sparse_attention
from lowcontext.ops import triton as backend
from lowcontext.ops.triton import launch

pytestmark = pytest.mark.ops("attend")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT32 = torch.iinfo(torch.int32)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so an element that no kernel writes fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """A sparse problem; `index_heads` counts the index's heads, `extra` scales what is listed."""

    Lq: int
    Lk: int
    block: tuple[int, int]
    D: int = 64
    G: int = 2
    Hkv: int = 1
    B: int = 1
    index_heads: int = 1
    index_batch: int = 1
    columns: int = 0
    softcap: float | None = None
    kv_start: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32


SPARSE = [
    Case(1, 1, (1, 16)),
    Case(1, 65, (1, 16), G=7),
    Case(1, 130, (1, 32), G=4, Hkv=2, index_heads=8, D=80),
    Case(1, 130, (1, 64), columns=20, G=4, Hkv=2, index_heads=2, B=2, kv_start=(0, 100)),
    Case(1, 130, (1, 1), columns=20, G=1, softcap=5.0),
    Case(5, 65, (1, 16), G=1, D=128),
    Case(5, 64, (8, 32), G=4, columns=10, kv_start=(7,)),
    Case(5, 130, (64, 64), G=7, Hkv=2, index_heads=14, softcap=20.0),
    Case(5, 130, (3, 20), G=4, Hkv=2, index_heads=1, B=2, index_batch=2),
    Case(63, 63, (16, 16), G=1),
    Case(63, 130, (32, 32), G=2, Hkv=2, index_heads=4, B=2, index_batch=2, kv_start=(90, 3)),
    Case(64, 64, (64, 64), D=128, columns=9),
    Case(64, 130, (16, 48), D=80, softcap=3.0, columns=15),
    Case(65, 65, (64, 96), G=4, index_heads=4),
    Case(65, 130, (48, 64), G=1, kv_start=(70,)),
    Case(130, 130, (64, 64), B=2, index_batch=2, columns=30, kv_start=(0, 131)),
    Case(130, 130, (160, 32), G=1, D=80),
    Case(130, 130, (100, 64), Hkv=2, index_heads=2, softcap=10.0),
    Case(130, 130, (128, 24), G=1, columns=40, D=128),
    Case(63, 65, (32, 16), dtype=torch.float16, D=80),
    Case(65, 130, (64, 64), dtype=torch.float16, columns=10),
    Case(130, 130, (128, 64), dtype=torch.float16, D=128, G=1),
    Case(1, 130, (1, 64), dtype=torch.float16, G=7, columns=20),
    Case(65, 130, (64, 64), dtype=torch.bfloat16, columns=10),
    Case(1, 130, (1, 64), dtype=torch.bfloat16, G=7, columns=20),
]


def draw(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as slices of [B, L, H, D] buffers that hold NaN outside the slice."""
    gen = torch.Generator().manual_seed(case.Lq * 1000 + case.Lk)
    tensors = []
    for heads, length in ((case.G * case.Hkv, case.Lq), (case.Hkv, case.Lk), (case.Hkv, case.Lk)):
        buffer = torch.full((case.B, length + 64, heads + 1, case.D + 8), torch.nan)
        x = buffer[:, 32 : 32 + length, :heads, : case.D]
        x.copy_(torch.randn(x.shape, generator=gen))
        tensors.append(buffer.to(DEVICE, case.dtype)[:, 32 : 32 + length, :heads, : case.D])
    q, k, v = (x.transpose(1, 2) for x in tensors)
    for b, start in enumerate(case.kv_start or ()):
        k[b, :, :start] = torch.nan
        v[b, :, :start] = torch.nan
    return q, k, v


def lists(case: Case) -> BlockIndex:
    """Ascending unaligned tiles, some before key 0, in the future or past the end; empty rows.

    What lies beyond a count is garbage. Counts may exceed the width of the list.
    """
    gen = torch.Generator().manual_seed(case.Lq + case.Lk)
    block_q, block_k = case.block
    _, Nq = BlockIndex.query_blocks(case.Lq, case.Lk, block_q)
    S = case.Lk // block_k + 2
    shape = (case.index_batch, case.index_heads, Nq)
    gaps = torch.randint(0, 2 + block_k // 2, (*shape, S), generator=gen)
    starts = (gaps + block_k).cumsum(-1) - block_k - torch.randint(0, 9, (*shape, 1), generator=gen)
    counts = torch.randint(0, S + 3, shape, generator=gen)
    beyond = torch.arange(S) >= counts[..., None]
    garbage = torch.randint(INT32.min, INT32.max, starts.shape, generator=gen)
    starts = torch.where(beyond, garbage, starts).to(torch.int32)
    index = BlockIndex(counts.to(torch.int32), starts, case.block)
    if not case.columns:
        return to_device(index)
    free = ~index.key_mask(case.Lk) & (torch.rand((*shape, case.Lk), generator=gen) < 0.5)
    keys = torch.where(free, torch.arange(case.Lk), INT32.max).sort(-1).values[..., : case.columns]
    listed = (keys < INT32.max).sum(-1)
    column_counts = torch.minimum(listed, torch.randint(0, 99, shape, generator=gen))
    return to_device(
        BlockIndex(
            index.kv_num_blocks,
            index.kv_starts,
            case.block,
            column_counts.to(torch.int32),
            keys.to(torch.int32),
        )
    )


def to_device(index: BlockIndex) -> BlockIndex:
    fields = [index.kv_num_blocks, index.kv_starts, index.kv_num_columns, index.kv_columns]
    counts, starts, column_counts, columns = (x if x is None else x.to(DEVICE) for x in fields)
    return BlockIndex(counts, starts, index.block_size, column_counts, columns)


def check(actual: Tensor, same_dtype: Tensor, exact: Tensor, name: str) -> None:
    """err(actual) <= 2 err(same arithmetic in torch) + 1e-5, and infinities in the same places."""
    assert torch.equal(actual.isinf(), exact.isinf()), f"{name}: rows without keys differ"
    finite = ~exact.isinf()
    ours = (actual.double() - exact)[finite].abs()
    theirs = (same_dtype.double() - exact)[finite].abs()
    assert not ours.isnan().any(), f"{name}: NaN"
    if finite.any():
        assert ours.max() <= 2 * theirs.max() + 1e-5, f"{name}: {ours.max()} > {theirs.max()}"


def rounded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch SDPA in q's dtype, zeros in rows without keys."""
    G = q.shape[1] // k.shape[1]
    k, v = (x.nan_to_num().repeat_interleave(G, 1) for x in (k, v))
    if mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: f"{case.Lq}-{case.Lk}-{case.block}")
def test_sparse_attention_equals_the_reference(case: Case) -> None:
    q, k, v = draw(case)
    if DEVICE == "cpu" and case.dtype == torch.bfloat16:
        pytest.skip(str(backend.supports("sparse_attention", q, k, v, None)))
    index = lists(case)
    kv_start = None if case.kv_start is None else torch.tensor(case.kv_start, device=DEVICE)
    options = {"softcap": case.softcap, "kv_start": kv_start, "return_lse": True}
    out, lse = sparse_attention(q, k, v, index, backend="triton", **options)
    exact_inputs = (q.double(), k.double(), v.double(), index)
    exact, exact_lse = sparse_attention(*exact_inputs, backend="reference", **options)
    same, same_lse = sparse_attention(q, k, v, index, backend="reference", **options)
    if case.dtype != torch.float32:
        same = rounded_attention(q, k, v, index.to_mask(case.Lq, case.Lk, kv_start))
    assert out.dtype == case.dtype
    assert out.shape == q.shape
    check(out, same, exact, "out")
    check(lse, same_lse, exact_lse, "lse")


@pytest.mark.parametrize(
    ("Lq", "Lk", "window", "kv_start", "softcap", "D", "G"),
    [
        (1, 1, None, None, None, 64, 1),
        (1, 130, 17, (5, 120), None, 80, 7),
        (5, 65, None, (0, 63), 5.0, 128, 4),
        (5, 1100, 900, None, None, 64, 4),
        (40, 70, None, (0, 10), None, 64, 1),
        (63, 130, 64, None, None, 64, 1),
        (64, 64, 1, (0, 10), None, 64, 1),
        (65, 65, 33, (64, 0), 2.0, 80, 2),
        (130, 130, None, (0, 130), None, 64, 1),
        (130, 130, 100, None, None, 128, 1),
        (130, 257, 1000, None, None, 64, 1),
    ],
)
def test_dense_attention_equals_the_reference(
    Lq: int,
    Lk: int,
    window: int | None,
    kv_start: tuple[int, int] | None,
    softcap: float | None,
    D: int,
    G: int,
) -> None:
    q, k, v = draw(Case(Lq, Lk, (1, 1), D=D, G=G, B=2 if kv_start else 1, kv_start=kv_start))
    starts = None if kv_start is None else torch.tensor(kv_start, device=DEVICE)
    options = {"window": window, "kv_start": starts, "softcap": softcap, "return_lse": True}
    out, lse = attention(q, k, v, backend="triton", **options)
    same, same_lse = attention(q, k, v, backend="reference", **options)
    wide = (q.double(), k.double(), v.double())
    exact, exact_lse = attention(*wide, backend="reference", **options)
    check(out, same, exact, "out")
    check(lse, same_lse, exact_lse, "lse")


@pytest.mark.parametrize("kv_start", [0, 32, 33, 34])
@pytest.mark.parametrize("last", [-1, 0, 1, 15, 16])
def test_tiles_at_the_edge_of_the_unmasked_range_are_masked_where_needed(
    last: int, kv_start: int
) -> None:
    # One tile per query block, whose last key lies `last` positions after the block's first query.
    L, block_q, block_k = 96, 16, 32
    q, k, v = draw(Case(L, L, (block_q, block_k), G=1, kv_start=(kv_start,)))
    starts = torch.arange(0, L, block_q) + last - block_k + 1
    index = BlockIndex(
        torch.ones(1, 1, L // block_q, dtype=torch.int32),
        starts.to(torch.int32).view(1, 1, -1, 1),
        (block_q, block_k),
    )
    options = {"kv_start": torch.tensor([kv_start], device=DEVICE), "return_lse": True}
    out, lse = sparse_attention(q, k, v, to_device(index), backend="triton", **options)
    same, same_lse = sparse_attention(q, k, v, to_device(index), backend="reference", **options)
    wide = (q.double(), k.double(), v.double(), to_device(index))
    exact, exact_lse = sparse_attention(*wide, backend="reference", **options)
    check(out, same, exact, "out")
    check(lse, same_lse, exact_lse, "lse")


@pytest.mark.parametrize("keys", ["tiles", "pages", "columns", "nothing", "dense"])
def test_a_decode_step_split_over_programs_equals_the_reference(keys: str) -> None:
    Lk, Hkv, G = 1400, 2, 4
    q, k, v = draw(Case(2, Lk, (1, 64), G=G, Hkv=Hkv))
    widths = {"tiles": (64, 20), "pages": (16, 80), "columns": (16, 0), "nothing": (64, 20)}
    block_k, count = widths.get(keys, (64, 0))
    starts = (torch.arange(count) * (block_k + 1)).to(torch.int32)
    counts = torch.tensor([[[count, count - 3], [5, 0]]]).clamp(min=0).to(torch.int32)
    counts = counts * 0 if keys == "nothing" else counts
    columns = torch.arange(0, Lk, 2, dtype=torch.int32).expand(1, Hkv, 2, -1)
    column_counts = torch.tensor([[[700, 3], [0, 699]]], dtype=torch.int32)
    index = BlockIndex(
        counts,
        starts.expand(1, Hkv, 2, count),
        (1, block_k),
        column_counts if keys == "columns" else None,
        columns if keys == "columns" else None,
    )
    index = None if keys == "dense" else to_device(index)
    problem = launch.Problem(q, k, v, index, 0.1, 0.0, 0, None)
    steps, _, _ = launch.plan(problem, launch.Target(capability=80, processors=8))
    assert [step.kernel.__name__ for step in steps] == ["decode_kernel", "combine_kernel"]

    def run(name: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if index is None:
            return attention(*inputs, scale=0.1, return_lse=True, backend=name)
        return sparse_attention(*inputs, index, scale=0.1, return_lse=True, backend=name)

    out, lse = run("triton", q, k, v)
    same, same_lse = run("reference", q, k, v)
    exact, exact_lse = run("reference", q.double(), k.double(), v.double())
    check(out, same, exact, "out")
    check(lse, same_lse, exact_lse, "lse")


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("Lq", [2, 70])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_scale_that_is_not_positive_equals_the_reference(
    scale: float, Lq: int, softcap: float | None
) -> None:
    q, k, v = draw(Case(Lq, 150, (16, 16)))
    options = {"scale": scale, "softcap": softcap, "return_lse": True}
    out, lse = attention(q, k, v, backend="triton", **options)
    same, same_lse = attention(q, k, v, backend="reference", **options)
    wide = q.double(), k.double(), v.double()
    exact, exact_lse = attention(*wide, backend="reference", **options)
    check(out, same, exact, "out")
    check(lse, same_lse, exact_lse, "lse")


def fenced(x: Tensor, at_end: bool) -> Tensor:
    """A copy of x whose first (or last) byte borders on a page that must not be touched."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    pages = -(-size // page)
    region = mmap.mmap(-1, (pages + 2) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(region))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for fence in (base, base + (pages + 1) * page):
        assert protect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    copy = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
    return copy.copy_(x)


@pytest.mark.skipif(DEVICE != "cpu", reason="page protection guards host memory only")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("Lq", "block"), [(70, (64, 32)), (70, (64, 16)), (1, (1, 32)), (2, (1, 8))]
)
@pytest.mark.parametrize("ascending", [True, False])
def test_no_list_makes_a_kernel_read_outside_its_inputs(
    Lq: int, block: tuple[int, int], at_end: bool, ascending: bool
) -> None:
    # A read on a fenced page kills this process, which fails the test that started it.
    Lk, D = 70, 64
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, n, D, generator=gen) for n in (Lq, Lk, Lk))
    _, Nq = BlockIndex.query_blocks(Lq, Lk, block[0])
    starts = [INT32.min, -40, -3, 30, 62, 94, 10**6, INT32.max]
    columns = [INT32.min, -1, 29, 70, INT32.max]
    if not ascending:
        starts, columns = starts[3:] + starts[:3], columns[::-1]
    rows = (1, 1, Nq)
    index = BlockIndex(
        torch.full(rows, 10**9, dtype=torch.int32),
        fenced(torch.tensor(starts, dtype=torch.int32).expand(*rows, -1).contiguous(), at_end),
        block,
        torch.full(rows, 10**9, dtype=torch.int32),
        fenced(torch.tensor(columns, dtype=torch.int32).expand(*rows, -1).contiguous(), at_end),
    )
    q, k, v = (fenced(x, at_end) for x in (q, k, v))
    out = sparse_attention(q, k, v, index, backend="triton")
    assert not out.isnan().any()
    if ascending:
        torch.testing.assert_close(out, sparse_attention(q, k, v, index, backend="reference"))


def test_the_op_traces_into_one_graph() -> None:
    q, k, v = draw(Case(20, 40, (16, 16)))
    keep = torch.ones(1, 1, 2, 3, dtype=torch.bool, device=DEVICE)
    index = BlockIndex.from_blocks(keep, (16, 16))

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sparse = sparse_attention(q, k, v, index, backend="triton")
        return sparse + attention(q, k, v, window=9, backend="triton")

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), both(q, k, v))


def test_the_fake_op_has_the_shapes_and_strides_of_the_real_one() -> None:
    q, k, v = draw(Case(20, 40, (16, 16)))
    arguments = (q, k, v, None, None, None, None, 1, 1, 0.1, 0.0, 0, None)
    torch.library.opcheck(
        backend._attend_op, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_no_queries_give_an_empty_result() -> None:
    q, k, v = draw(Case(0, 5, (1, 1)))
    assert attention(q, k, v, backend="triton").shape == (1, 2, 0, 64)


def test_lengths_do_not_change_the_compiled_signature() -> None:
    def signature(Lk: int) -> set[str]:
        q, k, v = draw(Case(1, Lk, (1, 1)))
        problem = launch.Problem(q, k, v, None, 0.1, 0.0, 0, None)
        step = launch.plan(problem, launch.Target(capability=80, processors=1))[0][0]
        changing = set(launch.attend.UNSPECIALIZED)
        return {f"{name}={x}" for name, x in step.args.items() if name not in changing}

    different = {item.split("=")[0] for item in signature(64) ^ signature(65)}
    assert different <= {"q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "stride_kb", "stride_vb"}
