"""BlockIndex against plain loops over pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowcontext import BlockIndex
from lowcontext.index import compact


def int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_index(
    seed: int, Lq: int, Lk: int, block_q: int, block_k: int, B: int = 1, H: int = 1
) -> BlockIndex:
    """Disjoint tiles at any start, columns outside them, garbage beyond the counts."""
    gen = torch.Generator().manual_seed(seed)
    _, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
    S, C = Lk // block_k + 1, 5
    starts = torch.full((B, H, Nq, S), -(10**6), dtype=torch.int32)
    columns = torch.full((B, H, Nq, C), 10**6, dtype=torch.int32)
    num, num_columns = int32([[[0] * Nq] * H] * B), int32([[[0] * Nq] * H] * B)
    for b in range(B):
        for h in range(H):
            for n in range(Nq):
                position, tiles = 0, []
                while position < Lk:
                    position += int(torch.randint(0, 2 * block_k, (1,), generator=gen))
                    if position < Lk and len(tiles) < S:
                        tiles.append(position)
                    position += block_k
                covered = {t + i for t in tiles for i in range(block_k)}
                free = [j for j in range(Lk) if j not in covered]
                picks = torch.randperm(len(free), generator=gen)[:C].sort().values.tolist()
                picks = [free[i] for i in picks]
                num[b, h, n], num_columns[b, h, n] = len(tiles), len(picks)
                starts[b, h, n, : len(tiles)] = int32(tiles)
                columns[b, h, n, : len(picks)] = int32(picks)
    return BlockIndex(num, starts, (block_q, block_k), num_columns, columns)


def loop_mask(index: BlockIndex, Lq: int, Lk: int) -> Tensor:
    B, H, _ = index.kv_num_blocks.shape
    mask = torch.zeros(B, H, Lq, Lk, dtype=torch.bool)
    first = (Lk - Lq) // index.block_q
    for b in range(B):
        for h in range(H):
            for r in range(Lq):
                p = Lk - Lq + r
                n = p // index.block_q - first
                keys = set()
                for s in index.kv_starts[b, h, n, : index.kv_num_blocks[b, h, n]].tolist():
                    keys |= set(range(s, s + index.block_k))
                if index.kv_columns is not None:
                    keys |= set(index.kv_columns[b, h, n, : index.kv_num_columns[b, h, n]].tolist())
                for j in keys:
                    if 0 <= j <= p:
                        mask[b, h, r, j] = True
    return mask


SHAPES = [(1, 1), (1, 100), (63, 63), (65, 130), (40, 97), (128, 128)]


@pytest.mark.parametrize(("Lq", "Lk"), SHAPES)
@pytest.mark.parametrize("block", [(1, 16), (16, 16), (64, 32), (24, 10)])
def test_mask_and_density_equal_a_loop_over_pairs(Lq: int, Lk: int, block: tuple[int, int]) -> None:
    index = random_index(Lq + Lk, Lq, Lk, *block, B=2, H=3)
    index.validate(Lq, Lk)
    expected = loop_mask(index, Lq, Lk)
    assert torch.equal(index.to_mask(Lq, Lk), expected)
    causal = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq).sum() * 6
    assert index.density(Lq, Lk) == pytest.approx(float(expected.sum() / causal), abs=1e-6)


def test_padding_hides_the_keys_before_kv_start() -> None:
    index = random_index(0, 20, 50, 8, 8, B=2)
    mask = index.to_mask(20, 50, kv_start=int32([0, 33]))
    plain = index.to_mask(20, 50)
    assert torch.equal(mask[0], plain[0])
    assert not mask[1, ..., :33].any()
    assert torch.equal(mask[1, ..., 33:], plain[1, ..., 33:])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 70),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 10**6),
)
def test_from_mask_covers_the_mask_and_is_exact_on_its_own_result(
    Lq: int, past: int, block_q: int, block_k: int, seed: int
) -> None:
    Lk = Lq + past
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, 2, Lq, Lk, generator=gen) < 0.1
    index = BlockIndex.from_mask(mask, (block_q, block_k))
    index.validate(Lq, Lk)
    covered = index.to_mask(Lq, Lk)
    causal = torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq)
    assert not (mask & causal & ~covered).any()
    again = BlockIndex.from_mask(covered, (block_q, block_k))
    assert torch.equal(again.to_mask(Lq, Lk), covered)


def test_compact_lists_the_true_positions_in_order() -> None:
    keep = torch.rand(4, 5, 33, generator=torch.Generator().manual_seed(1)) < 0.3
    positions, counts = compact(keep, 20)
    for row, got, n in zip(
        keep.view(-1, 33), positions.view(-1, 20), counts.view(-1).tolist(), strict=True
    ):
        assert got[:n].tolist() == row.nonzero().flatten().tolist()


def test_full_index_has_density_one() -> None:
    mask = torch.ones(1, 1, 100, 300, dtype=torch.bool)
    assert BlockIndex.from_mask(mask, (32, 16)).density(100, 300) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_starts": [[[[0, 8]]]]}, "kv_starts: expected ascending, disjoint tiles, got 8"),
        ({"kv_starts": [[[[32, 0]]]]}, "kv_starts: expected ascending, disjoint tiles, got 0"),
        ({"kv_starts": [[[[-4, 16]]]]}, "kv_starts: expected positions >= 0, got -4"),
        ({"kv_num_blocks": [[[3]]]}, r"kv_starts: expected a count in \[0, 2\], got 3"),
        ({"kv_columns": [[[[40, 40]]]]}, "kv_columns: expected ascending, distinct columns"),
        ({"kv_columns": [[[[40, 64]]]]}, "kv_columns: expected columns < Lk=64, got 64"),
        ({"kv_columns": [[[[20, 40]]]]}, "kv_columns: expected columns outside every listed tile"),
    ],
)
def test_validate_names_the_broken_rule(change: dict, message: str) -> None:
    fields = {
        "kv_num_blocks": [[[2]]],
        "kv_starts": [[[[0, 16]]]],
        "kv_num_columns": [[[2]]],
        "kv_columns": [[[[40, 50]]]],
    }
    good = BlockIndex(**{k: int32(v) for k, v in fields.items()}, block_size=(64, 16))
    good.validate(64, 64)
    bad = BlockIndex(**{k: int32(v) for k, v in {**fields, **change}.items()}, block_size=(64, 16))
    with pytest.raises(ValueError, match=message):
        bad.validate(64, 64)


def test_construction_refuses_shapes_and_dtypes_that_do_not_fit() -> None:
    counts, starts = int32([[[1, 1]]]), int32([[[[0], [0]]]])
    with pytest.raises(TypeError, match="kv_starts: expected an int32 tensor, got torch"):
        BlockIndex(counts, starts.long(), (64, 64))
    with pytest.raises(ValueError, match=r"kv_starts: expected shape \[1, 1, 2, 'S'\]"):
        BlockIndex(counts, starts[:, :, :1], (64, 64))
    for size in ((64, 0), 64, (64.0, 64.0), (64, 64, 64)):
        with pytest.raises(ValueError, match="block_size: expected two positive ints"):
            BlockIndex(counts, starts, size)
        with pytest.raises(ValueError, match="block_size: expected two positive ints"):
            BlockIndex.from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), size)
    for Lq, Lk in ((8, 4), (0, 4)):
        with pytest.raises(ValueError, match=f"mask: expected 0 < Lq <= Lk, got Lq={Lq}, Lk={Lk}"):
            BlockIndex.from_mask(torch.ones(1, 1, Lq, Lk, dtype=torch.bool), (2, 2))
    with pytest.raises(ValueError, match="kv_columns: expected together with kv_num_columns"):
        BlockIndex(counts, starts, (64, 64), kv_columns=starts)
    with pytest.raises(ValueError, match="index: expected 3 query blocks for Lq=130, Lk=130"):
        BlockIndex(counts, starts, (64, 64)).density(130, 130)


@pytest.mark.parametrize(("Lq", "Lk"), [(256, 256), (128, 384), (200, 200)])
def test_flex_attention_gives_the_same_output(Lq: int, Lk: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    from lowcontext import sparse_attention

    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, Lq, 32, generator=gen)
    k, v = (torch.randn(1, 4, Lk, 32, generator=gen) for _ in range(2))
    nq, nk = -(-Lq // 64), -(-Lk // 32)
    keep = torch.rand(1, 4, nq, nk, generator=gen) < 0.4
    keep[..., 0] = True
    index = BlockIndex.from_blocks(keep, (64, 32))
    out = flex_attention(q, k, v, block_mask=index.to_flex(Lq, Lk))
    expected = sparse_attention(q, k, v, index, backend="reference")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_flex_form_is_refused_where_it_does_not_exist() -> None:
    columns = BlockIndex(
        int32([[[1]]]), int32([[[[0]]]]), (64, 32), int32([[[1]]]), int32([[[[40]]]])
    )
    with pytest.raises(ValueError, match="to_flex: expected an index without columns"):
        columns.to_flex(64, 64)
    unaligned = BlockIndex(int32([[[1]]]), int32([[[[5]]]]), (64, 32))
    with pytest.raises(ValueError, match="to_flex: expected tile starts that are multiples of 32"):
        unaligned.to_flex(64, 64)
