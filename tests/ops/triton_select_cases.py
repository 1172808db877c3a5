"""Cases of the Triton select ops; `test_triton.py` runs this file in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import votes
from lowcontext.ops.hierarchy import (
    SearchOptions,
    Stage,
    StageOptions,
    TreeOptions,
    hip_stages,
    hip_tree,
)
from lowcontext.ops.hierarchy import triton as search_kernels
from lowcontext.ops.lists import tile_lists
from lowcontext.ops.reuse import stale
from lowcontext.ops.triton import mass, select
from lowcontext.ops.vertical_slash import line_index
from lowcontext.ops.vertical_slash import triton as line_kernels
from lowcontext.ops.votes import triton as vote_kernels
from tests.ops.hierarchy.problems import STAGES, TREE, qk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives the largest int32, so an entry that no kernel writes is out of range."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows_of(kind: str, N: int) -> Tensor:
    """fp32 [4, N] on the device."""
    gen = torch.Generator().manual_seed(N)
    x = torch.randn(4, N, generator=gen)
    if kind == "ties":
        x = x.round()
    elif kind == "signs":
        x = torch.where(x > 0, 0.0, -0.0)
        x[:, ::5] = 1e-44  # subnormal
    elif kind == "few":
        x = x.masked_fill(torch.rand(x.shape, generator=gen) < 0.9, -torch.inf)
        x[0, ::3] = torch.nan
        x[1] = -torch.nan
        x[2, :2] = torch.inf
    return x.to(DEVICE)


@pytest.mark.ops("topk")
@pytest.mark.parametrize("kind", ["normal", "ties", "signs", "few"])
@pytest.mark.parametrize(
    ("N", "long"), [(1, False), (33, False), (700, False), (65, True), (192, True), (700, True)]
)
def test_topk_equals_the_reference(
    N: int, long: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long and DEVICE == "cpu":
        monkeypatch.setattr(select, "ROW", 64)
        monkeypatch.setattr(select, "CHUNK", 64 if N < 700 else 256)
    x = rows_of(kind, N if DEVICE == "cpu" or not long else 100 * N)
    N = x.shape[1]
    # Of a long row a small k is found among the best of its parts.
    for k in (1, 5, N // 2, N + 5) if long else (0, 1, N // 2, N, N + 5):
        limits = torch.tensor([k, k // 3, -1, N + 9], device=DEVICE)
        ours = votes.topk(x, k, limits=limits, backend="triton")
        plain = votes.topk(x, k, limits=limits, backend="reference")
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b), k


@pytest.mark.ops("topk")
def test_topk_of_a_row_longer_than_a_program_holds_equals_the_reference() -> None:
    x = rows_of("ties", 20000)[:1]
    for k in (700, 5000):
        ours = votes.topk(x, k, backend="triton")
        plain = votes.topk(x, k, backend="reference")
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.ops("topk")
@pytest.mark.parametrize("k", [3, 9, 40])
@pytest.mark.parametrize("heads", [1, 2])
def test_topk_of_pages_gives_keys(heads: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(select, "ROW", 64)  # N is 132: parts for the small k, digits for 40
        monkeypatch.setattr(select, "CHUNK", 64)
    scores = torch.cat([rows_of("few", 132)[None, :2, None], rows_of("ties", 132)[None, 2:, None]])
    gen = torch.Generator().manual_seed(k)
    ids = torch.rand(2, heads, 50, generator=gen).topk(12).indices.sort().values
    pages = votes.Pages(ids.to(DEVICE, torch.int32), 11, first=7)
    ours = votes.topk(scores, k, pages=pages, backend="triton")
    plain = votes.topk(scores, k, pages=pages, backend="reference")
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)
    behind = votes.topk(scores, k, first=1000, backend="triton")
    for a, b in zip(behind, votes.topk(scores, k, first=1000, backend="reference"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.ops("topk")
def test_topk_takes_rows_that_lie_apart() -> None:
    x = rows_of("normal", 300)
    ours = votes.topk(x[1::2, 40:260], 20, backend="triton")
    plain = votes.topk(x[1::2, 40:260], 20, backend="reference")
    assert torch.equal(ours[0], plain[0])


@pytest.mark.ops("topk")
def test_topk_traces_into_one_graph_with_its_fake() -> None:
    x = rows_of("normal", 100)
    limits = torch.tensor([3, 9, 0, 20], dtype=torch.int32, device=DEVICE)

    def chosen(x: Tensor) -> tuple[Tensor, Tensor]:
        return vote_kernels.topk(x, 9, limits, None, 1, 0, None)

    compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x), chosen(x), strict=True):
        assert torch.equal(a, b)
    op = torch.ops.lowcontext_triton.topk.default
    pages = torch.zeros(4, 10, dtype=torch.int32, device=DEVICE)
    for args in (
        (x, 9, limits, None, 1, 0, None),
        (x, 200, None, None, 1, 5, None),
        (x, 0, None, None, 1, 0, None),
        (x, 9, None, pages, 10, 3, torch.ones(2, dtype=torch.bool, device=DEVICE)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


LISTS = [
    {"rows": 1, "width": 16, "low": 70, "sink": 37},
    {"rows": 5, "width": 16, "low": 99, "sink": 32, "align": 16, "paged": True},
    {"rows": 3, "width": 8, "low": [60, 55], "sink": 8, "align": 4, "span": 60, "paged": True},
    {"rows": 2, "width": 1, "low": [0, 90], "span": 2500},
    {"rows": 40, "width": 4, "low": 10, "sink": 20},
]


def lists_of(given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Keys [2, 3, 100, 8] and the other arguments of `tile_lists`, on the device."""
    options = dict(given)
    if isinstance(options["low"], list):
        options["low"] = torch.tensor(options["low"], dtype=torch.int32, device=DEVICE)
    if options.pop("paged", False):
        ids = torch.arange(4, dtype=torch.int32).expand(2, 3, options["rows"], 4) + 2
        counts = torch.arange(6 * options["rows"], dtype=torch.int32).view(2, 3, -1) % 5
        options["pages"] = ids.to(DEVICE), counts.to(DEVICE)
    return torch.zeros(2, 3, 100, 8, device=DEVICE), options


@pytest.mark.ops("lists")
@pytest.mark.parametrize("given", LISTS, ids=str)
def test_tile_lists_are_those_of_the_reference(given: dict[str, Any]) -> None:
    k, options = lists_of(given)
    ours = tile_lists(k, **options, backend="triton")
    plain = tile_lists(k, **options, backend="reference")
    assert torch.equal(ours[0], plain[0])
    listed = torch.arange(plain[1].shape[3], device=DEVICE) < plain[0][..., None]
    assert torch.equal(ours[1].where(listed, 0), plain[1].where(listed, 0))
    assert ours[1].shape == plain[1].shape


@pytest.mark.ops("lists")
def test_tile_lists_trace_into_one_graph_with_their_fake() -> None:
    for given in LISTS[:3]:
        k, options = lists_of(given)

        def lists(k: Tensor, options: dict[str, Any] = options) -> tuple[Tensor, Tensor]:
            return tile_lists(k, **options, backend="triton")

        compiled = torch.compile(lists, backend="aot_eager", fullgraph=True)
        for a, b in zip(compiled(k), lists(k), strict=True):
            assert torch.equal(a, b)
    op = torch.ops.lowcontext_triton.tile_lists.default
    low = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(2, 3, 1, 5, dtype=torch.int32, device=DEVICE)
    for tensors in ((None, None, None), (low, None, None), (low, ids, ids[..., 0].clone())):
        arguments = (k, *tensors, 1, 16, 9, 4, 2, 7)
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.ops("topk")
def test_topk_of_a_long_row_leaves_out_what_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(select, "ROW", 64)
    scores = rows_of("ties", 700).view(2, 2, 700)
    active = torch.tensor([False, True], device=DEVICE)
    ids, counts = votes.topk(scores, 9, active=active, backend="triton")
    plain = votes.topk(scores, 9, backend="reference")
    assert torch.equal(ids[1], plain[0][1])
    assert torch.equal(counts[1], plain[1][1])
    assert torch.equal(counts[0], torch.empty(2, dtype=torch.int32, device=DEVICE))  # unwritten


@pytest.mark.ops("lists")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize(("H", "D"), [(1, 64), (7, 20), (8, 128)])
def test_a_selection_goes_stale_as_in_the_reference(
    H: int, D: int, by_head: bool, dtype: torch.dtype
) -> None:
    gen = torch.Generator().manual_seed(H)
    q = torch.randn(6, H, 2, D, generator=gen)[:, :, :1]
    other = q + torch.tensor([0.0, 0.1, 0.4, 0.6, 2.0, 0.0]).view(6, 1, 1, 1) * torch.randn(
        6, H, 1, D, generator=gen
    )
    other[5] = 0
    q, kept = q.to(DEVICE, dtype), other.flatten(1).to(DEVICE, dtype)
    lows = torch.tensor([9, 10, 11, 10, 10, 12], dtype=torch.int32, device=DEVICE)
    found = set()
    for threshold in (0.5, 0.9, 0.99):
        options = {"threshold": threshold, "by_head": by_head}
        ours = stale(q, kept, lows, 10, **options, backend="triton")
        assert torch.equal(ours, stale(q, kept, lows, 10, **options, backend="reference"))
        found |= set(ours.tolist())
    assert found == {True, False}
    op = torch.ops.lowcontext_triton.stale.default
    arguments = (q, kept, lows, 10, 0.9, by_head)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def weights_of(kind: str, N: int) -> Tensor:
    """fp32 [6, N] on the device: rows of every kind in one call."""
    gen = torch.Generator().manual_seed(N)
    x = torch.rand(6, N, generator=gen)
    if kind == "ties":
        x = (4 * x).floor() / 4
    elif kind == "steep":
        x = torch.exp(-60.0 * x)  # many entries below a unit of mass
        x[0] *= 2.0**-126  # subnormal, some of them 0
    elif kind == "few":
        x = x.masked_fill(torch.rand(x.shape, generator=gen) < 0.8, -torch.inf)
        x[0, ::3] = torch.nan
        x[1] = -torch.inf
        x[2] = 0.0
        x[3, ::2] = -0.0
        x[4] = torch.where(torch.arange(N) % 7 == 3, 0.125, -1.0)
        x[5, :2] = torch.inf
    return x.to(DEVICE)


@pytest.mark.ops("mass")
@pytest.mark.parametrize("kind", ["uniform", "ties", "steep", "few"])
@pytest.mark.parametrize(
    ("N", "long"), [(1, False), (33, False), (700, False), (65, True), (700, True)]
)
def test_mass_masks_equal_the_reference(
    N: int, long: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long and DEVICE == "cpu":
        monkeypatch.setattr(mass, "ROW", 64)
        monkeypatch.setattr(mass, "CHUNK", 64 if N < 700 else 256)
    x = weights_of(kind, N if DEVICE == "cpu" or not long else 100 * N)
    forced = torch.rand(2, x.shape[1], generator=torch.Generator().manual_seed(9)) < 0.1
    forced = forced.to(DEVICE).t().contiguous().t()  # heads vary faster than keys
    weights = x.view(3, 2, -1)
    if long and kind != "few":  # whose rows differ; an interpreted row of 700 takes a second
        weights = weights[:1]
    calls = [(0.9, forced), (0.5, None), (0.25, forced[0]), (1e-9, None), (1 - 2**-30, forced)]
    for share, flags in calls[: (1 if N >= 700 or kind == "few" else 2) if long else None]:
        ours = votes.mass_mask(weights, share, forced=flags, backend="triton")
        plain = votes.mass_mask(weights, share, forced=flags, backend="reference")
        assert torch.equal(ours, plain), share


@pytest.mark.ops("mass")
def test_a_mass_mask_of_a_row_longer_than_a_program_holds_equals_the_reference() -> None:
    x = weights_of("ties", 20000)[1:4:2, 3:]  # rows that lie apart, at an odd address
    ours = votes.mass_mask(x, 0.6, backend="triton")
    assert torch.equal(ours, votes.mass_mask(x, 0.6, backend="reference"))


@pytest.mark.ops("mass")
def test_mass_masks_trace_into_one_graph_with_their_fake() -> None:
    x = weights_of("uniform", 100)
    forced = torch.zeros(2, 100, dtype=torch.bool, device=DEVICE)

    def marked(x: Tensor) -> Tensor:
        return vote_kernels.mass_mask(x, 2**29, forced)

    compiled = torch.compile(marked, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), marked(x))
    op = torch.ops.lowcontext_triton.mass_mask.default
    for args in ((x, 2**29, forced), (x[:, :0], 1, None)):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def masks(N: int, vertical: float, slash: float) -> tuple[Tensor, Tensor]:
    """bool [2, 3, N] with these shares of True; heads vary faster than keys."""
    gen = torch.Generator().manual_seed(N)
    drawn = (torch.rand(2, N, 3, generator=gen) < share for share in (vertical, slash))
    keys, distances = (x.to(DEVICE).transpose(1, 2) for x in drawn)
    return keys, distances


def assert_same(ours: BlockIndex, plain: BlockIndex) -> None:
    """Equal counts, and equal entries before them."""
    pairs = [
        (ours.kv_num_blocks, plain.kv_num_blocks, ours.kv_starts, plain.kv_starts),
        (ours.kv_num_columns, plain.kv_num_columns, ours.kv_columns, plain.kv_columns),
    ]
    for counts, expected, entries, plain_entries in pairs:
        if counts is None:
            assert expected is None
            continue
        assert torch.equal(counts, expected)
        listed = torch.arange(entries.shape[-1], device=DEVICE) < counts[..., None]
        assert torch.equal(entries[listed], plain_entries[listed])


@pytest.mark.ops("lines")
@pytest.mark.parametrize(
    ("Lq", "Lk", "block", "shares", "widths"),
    [
        (1, 1, 64, (1.0, 1.0), (0, 0)),
        (200, 200, 64, (0.1, 0.05), (0, 0)),
        (77, 333, 16, (0.2, 0.02), (5, 3)),
        (130, 1500, 32, (0.6, 0.002), (1000, 0)),
        (50, 300, 64, (0.0, 0.0), (0, 0)),
        (30, 2100, 21, (0.05, 0.3), (0, 9)),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_the_index_of_lines_equals_the_reference(
    Lq: int,
    Lk: int,
    block: int,
    shares: tuple[float, float],
    widths: tuple[int, int],
    dense: bool,
) -> None:
    chosen = masks(Lk + 9, *shares)
    gen = torch.Generator().manual_seed(Lk)
    start = torch.randint(0, Lk + 1, (3, 2), generator=gen, dtype=torch.int32).t().to(DEVICE)
    ours, plain = (
        line_index(
            *chosen,
            Lq,
            Lk,
            block=block,
            most_vertical=widths[0],
            most_slash=widths[1],
            dense_from=start if dense else None,
            backend=backend,
        )
        for backend in ("triton", "reference")
    )
    assert_same(ours, plain)


@pytest.mark.ops("lines")
def test_the_index_of_lines_traces_into_one_graph_with_its_fake() -> None:
    vertical, slash = masks(100, 0.2, 0.1)
    start = torch.full((2, 3), 90, dtype=torch.int32, device=DEVICE)
    sizes = {"block": 16, "tiles": 7, "columns": 20}

    def counts(vertical: Tensor, slash: Tensor) -> tuple[Tensor, Tensor]:
        index = line_kernels.line_index(vertical, slash, 40, start, **sizes)
        return index[0], index[2]

    compiled = torch.compile(counts, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(vertical, slash), counts(vertical, slash), strict=True):
        assert torch.equal(a, b)
    op = torch.ops.lowcontext_triton.line_index.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (vertical, slash, 40, start), sizes, test_utils=tests)


# Few scored rows and rounds: an interpreted program takes up to 0.1 s.
FEW = replace(STAGES, stages=(Stage(32, 128, 8), Stage(8, 64, 4), Stage(4, row_stride=8)))


def searched(
    Lq: int, Lk: int, D: int, options: SearchOptions, dtype: torch.dtype, backend: str
) -> tuple[Tensor, ...]:
    """Every tensor that a search of integers returns: small ones, so that scores are exact."""
    # One sequence where every head has lists of its own.
    q, k = (x.to(DEVICE, dtype) for x in qk(Lq, Lk, D=D, B=1 if options.share == "head" else 2))
    if isinstance(options, TreeOptions):
        index = hip_tree(q, k, options, ahead=20, backend=backend)
        return index.kv_num_blocks, index.kv_starts
    assert isinstance(options, StageOptions)
    index, chunks = hip_stages(q, k, options, ahead=20, backend=backend)
    again, _ = hip_stages(q, k, options, kept=chunks[:1], behind=3, backend=backend)
    kept = [x for each in chunks for x in (each.counts, each.starts)]
    both = (index.kv_num_blocks, index.kv_starts, again.kv_num_blocks, again.kv_starts)
    return (*both, *kept)


@pytest.mark.ops("search")
@pytest.mark.parametrize(
    ("Lq", "Lk", "D", "options", "dtype"),
    [
        (1, 1, 8, TREE, torch.float32),
        (40, 40, 8, replace(TREE, representative="spread"), torch.float32),
        (20, 700, 20, replace(TREE, share="head", representative="last"), torch.float16),
        (30, 333, 8, replace(TREE, share="layer", rows="last", row_stride=5), torch.bfloat16),
        (1, 900, 136, replace(TREE, block_q=1, representative="first"), torch.bfloat16),
        (1, 300, 8, replace(TREE, block_q=1, row_stride=1, beam=3, leaf=16), torch.float32),
        (1, 1, 8, STAGES, torch.float32),
        (40, 40, 8, replace(FEW, chunk_score="last"), torch.float32),
        (18, 450, 20, replace(FEW, share="head", representative="last"), torch.float16),
        (20, 400, 8, replace(FEW, share="layer", rows="last"), torch.bfloat16),
        (1, 900, 136, replace(FEW, block_q=1, representative="first"), torch.bfloat16),
        (20, 333, 8, replace(STAGES, stages=(Stage(64, 128, 4, 3), Stage(8))), torch.float32),
    ],
)
def test_a_search_finds_what_the_reference_finds(
    Lq: int, Lk: int, D: int, options: SearchOptions, dtype: torch.dtype
) -> None:
    ours = searched(Lq, Lk, D, options, dtype, "triton")
    plain = searched(Lq, Lk, D, options, dtype, "reference")
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.ops("search")
@pytest.mark.parametrize("options", [TREE, replace(FEW, stages=FEW.stages[1:])])
def test_a_search_in_groups_of_query_blocks_finds_the_same(
    options: SearchOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowcontext.ops.triton import searches

    problem = 20, 200, 8, options, torch.float32, "triton"
    whole = searched(*problem)
    monkeypatch.setattr(searches, "_SCORES", 100)
    for a, b in zip(searched(*problem), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.ops("search")
def test_the_searches_trace_into_one_graph_with_their_fakes() -> None:
    q, k = (x.to(DEVICE) for x in qk(1, 300))
    tree = replace(TREE, block_q=1, row_stride=1)
    stages = replace(STAGES, block_q=1)

    def counts(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        first = search_kernels.hip_stage(q, k, stages, 0, None, 0, 0)
        return (*search_kernels.hip_tree(q, k, tree, 5), *first)

    compiled = torch.compile(counts, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(q, k), counts(q, k), strict=True):
        assert torch.equal(a, b)
    ops, tests = torch.ops.lowcontext_triton, ("test_schema", "test_faketensor")
    shared = search_kernels._shared(tree)
    torch.library.opcheck(
        ops.hip_tree.default, (q, k, [*shared, 4, 10, 1, 2, 0], 5), test_utils=tests
    )
    settings = [*shared, 0, 0, 64, 256, 4, 16, 0, 1]
    starts = torch.zeros(1, 2, 1, 4, dtype=torch.int32, device=DEVICE)
    for number, kept in ((0, (None, None)), (1, (starts[..., 0] + 4, starts))):
        arguments = (q, k, settings, number, *kept, 0, 0)
        torch.library.opcheck(ops.hip_stage.default, arguments, test_utils=tests)
