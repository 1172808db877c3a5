"""Shared selection against sorting with a tie rule."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowcontext.methods._select import block_statistics, top_k_mask
from lowcontext.ops.block_scores import block_means


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=30),
    st.integers(0, 35),
)
def test_top_k_takes_the_largest_and_the_lower_index_of_equals(values: list, k: int) -> None:
    keep = top_k_mask(torch.tensor([values]), torch.tensor(k), k)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    expected = sorted(i for i in order[:k] if values[i] > -math.inf)
    assert keep[0].nonzero().flatten().tolist() == expected


def test_each_row_has_its_own_k() -> None:
    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    keep = top_k_mask(scores, torch.tensor([0, 7, 50]), 50)
    assert keep.sum(-1).tolist() == [0, 7, 50]
    assert scores[1][keep[1]].min() > scores[1][~keep[1]].max()


def test_statistics_are_computed_once_per_block_and_survive_growth() -> None:
    keys = torch.randn(1, 2, 3000, 4, generator=torch.Generator().manual_seed(0))
    memory: dict = {}
    seen = []

    def mean(x: torch.Tensor, block: int) -> torch.Tensor:
        seen.append(x.shape[2] // block)
        return block_means(x, block)

    for n in range(0, 3001, 7):
        got = block_statistics(memory, keys[:, :, :n], 16, mean)
        expected = keys[:, :, : n // 16 * 16].view(1, 2, -1, 16, 4).mean(3)
        torch.testing.assert_close(got, expected)
    assert sum(seen) == 3000 // 16


def test_statistics_made_in_inference_mode_grow_outside_it() -> None:
    keys = torch.randn(1, 2, 160, 4, generator=torch.Generator().manual_seed(0))
    memory: dict = {}
    with torch.inference_mode():
        block_statistics(memory, keys[:, :, :80], 16, block_means)
    got = block_statistics(memory, keys, 16, block_means)
    assert torch.equal(got, block_statistics({}, keys, 16, block_means))
    with torch.inference_mode():
        assert torch.equal(block_statistics(memory, keys, 16, block_means), got)
