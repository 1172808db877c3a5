"""Lists of tiles against lists of keys, written out row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext.ops.lists import tile_lists


def keys(width: int, counts: Tensor, starts: Tensor) -> list[int]:
    """The keys of one row, tile after tile."""
    return [p + i for p in starts[: int(counts)].tolist() for i in range(width)]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("per_row_of_the_batch", [False, True])
@pytest.mark.parametrize(
    ("Lk", "width", "low", "sink", "align", "pages"),
    [
        (100, 16, 70, 0, 1, False),
        (100, 16, 70, 37, 1, False),  # two tiles, and five keys that are no tile
        (100, 16, 99, 32, 16, True),
        (97, 8, 60, 8, 4, True),
        (64, 64, 3, 0, 1, False),
        (40, 4, 10, 20, 2, False),  # recent keys begin in the sink
        (12, 16, 0, 0, 1, True),
    ],
)
def test_a_row_lists_sink_pages_and_recent_keys(
    Lk: int, width: int, low: int, sink: int, align: int, pages: bool, rows: int,
    per_row_of_the_batch: bool,
) -> None:  # fmt: skip
    B, H = 2, 3
    k = torch.empty(B, H, Lk, 8)
    lows = [max(low - 3 * b, 0) if per_row_of_the_batch else low for b in range(B)]
    begins = {
        (b, r): max(lows[b] - (rows - 1 - r), sink) // align * align
        for b in range(B)
        for r in range(rows)
    }
    chosen = None
    if pages:
        free = max(min(begins.values()) // width - sink // width, 0)
        gen = torch.Generator().manual_seed(Lk)
        counts = torch.randint(0, free + 1, (B, H, rows), generator=gen)
        ids = torch.full((B, H, rows, 7), 2**30, dtype=torch.int32)  # not read beyond the count
        counts = counts.clamp(max=7)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, rows))).tolist():
            some = torch.randperm(free, generator=gen)[: counts[tuple(place)]].sort().values
            ids[tuple(place)][: len(some)] = some + sink // width
        chosen = ids, counts.int()
    given = torch.tensor(lows, dtype=torch.int32) if per_row_of_the_batch else low
    span = Lk - min(begins.values()) if per_row_of_the_batch else None
    counts, starts = tile_lists(
        k, rows, width=width, low=given, sink=sink, align=align, span=span, pages=chosen
    )
    assert counts.shape == starts.shape[:3]
    assert counts.dtype == starts.dtype == torch.int32
    for b in range(counts.shape[0]):
        for h in range(counts.shape[1]):
            for r in range(rows):
                expected = list(range(sink // width * width))
                if chosen is not None:
                    for page in chosen[0][b, h, r, : int(chosen[1][b, h, r])].tolist():
                        expected += range(page * width, (page + 1) * width)
                begin, end = begins[b, r], Lk - (rows - 1 - r)
                expected += range(begin, begin + -(-max(end - begin, 0) // width) * width)
                assert keys(width, counts[b, h, r], starts[b, h, r]) == expected


def test_arguments_are_checked_by_name() -> None:
    k, ids = torch.zeros(2, 2, 64, 8), torch.zeros(2, 2, 1, 3, dtype=torch.int32)
    low = torch.zeros(2, dtype=torch.int32)
    for name, error, options in [
        ("rows", ValueError, {"rows": 0}),
        ("width", ValueError, {"width": 0}),
        ("sink", ValueError, {"sink": -1}),
        ("align", ValueError, {"sink": 6, "align": 4}),
        ("low", TypeError, {"low": low.long()}),
        ("low", ValueError, {"low": low[:1], "span": 5}),
        ("span", ValueError, {"low": low}),
        ("pages", TypeError, {"pages": (ids.long(), ids[..., 0])}),
        ("pages", ValueError, {"rows": 2, "pages": (ids, ids[..., 0])}),
        ("counts of pages", ValueError, {"pages": (ids, ids[:1, ..., 0])}),
    ]:
        arguments = {"rows": 1, "width": 16, "low": 20, **options}
        with pytest.raises(error, match=f"^{name}: expected"):
            tile_lists(k, **arguments)
