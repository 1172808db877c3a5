"""Pooled and antidiagonal block scores against their definitions, entry by entry, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowcontext.ops.block_scores import antidiagonal_scores, pooled_scores, reference

SHAPES = [(1, 1), (64, 64), (130, 130), (100, 333), (33, 290), (256, 512)]


def qk(Lq: int, Lk: int, D: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(Lk)
    room = torch.full((2, Lk, 4, D + 3), torch.nan, dtype=dtype)
    k = room[:, :, 1:3, :D].transpose(1, 2)
    k.copy_(torch.randn(2, 2, Lk, D, generator=gen))
    return torch.randn(2, 4, Lq, D, generator=gen).to(dtype), k


@pytest.mark.parametrize(("Lq", "Lk"), SHAPES)
@pytest.mark.parametrize("block", [16, 64])
def test_pooled_scores_are_products_of_means_over_the_tokens_that_exist(
    Lq: int, Lk: int, block: int
) -> None:
    q, k = qk(Lq, Lk)
    scores = pooled_scores(q, k, block=block, scale=0.3)
    offset = Lk - Lq
    first = offset // block
    assert scores.shape == (2, 4, -(-Lk // block) - first, -(-Lk // block))
    for n in range(scores.shape[2]):
        low, high = (first + n) * block, (first + n + 1) * block
        rows = q[:, :, max(0, low - offset) : high - offset].double().mean(2)
        for m in range(scores.shape[3]):
            keys = k[:, :, m * block : (m + 1) * block].double().mean(2).repeat_interleave(2, 1)
            exact = 0.3 * (rows * keys).sum(-1)
            assert torch.allclose(scores[:, :, n, m].double(), exact, atol=1e-5)


def exact_antidiagonal(q: Tensor, k: Tensor, S: int, block: int, scale: float) -> Tensor:
    """Scores of one head, cell by cell: q [Lq, D], k [Lk, D]."""
    Lq, Lk = len(q), len(k)
    offset = Lk - Lq
    first, Nk = offset // block, -(-Lk // block)
    scores = torch.zeros(Nk - first, Nk, dtype=torch.float64)
    for a in range(offset // S, -(-Lk // S)):
        logits = []
        for b in range(a + 1):
            total = 0.0
            for t in range(S):
                i, j = S * a + S - 1 - t, S * b + t
                if offset <= i < Lk and j < Lk:
                    total += float(q[i - offset].double() @ k[j].double())
            logits.append(total * scale / S)
        for b, p in enumerate(torch.tensor(logits, dtype=torch.float64).softmax(0)):
            scores[a * S // block - first, b * S // block] += p
    return scores


@pytest.mark.parametrize(("Lq", "Lk"), SHAPES)
@pytest.mark.parametrize(("stride", "block"), [(8, 64), (16, 64), (16, 128)])
def test_antidiagonal_scores_match_their_definition(
    Lq: int, Lk: int, stride: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = qk(Lq, Lk)
    scores = antidiagonal_scores(q, k, stride=stride, block=block, scale=0.7)
    for h in (0, 3):
        exact = exact_antidiagonal(q[1, h], k[1, h // 2], stride, block, 0.7)
        assert torch.allclose(scores[1, h].double(), exact, atol=1e-5)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1)
    again = antidiagonal_scores(q, k, stride=stride, block=block, scale=0.7)
    assert torch.allclose(scores, again, atol=1e-6)


def test_a_chunk_of_queries_scores_as_in_the_whole_prompt() -> None:
    q, k = qk(512, 512)
    whole = antidiagonal_scores(q, k, stride=16, block=128)
    part = antidiagonal_scores(q[:, :, 128:384], k[:, :, :384], stride=16, block=128)
    assert torch.allclose(part, whole[:, :, 1:3, :3], atol=1e-5)


def test_zeros_that_fill_the_last_cells_take_no_weight() -> None:
    # All logits are negative: a padded key, with logit 0, would draw most of the weight.
    q, k = torch.full((1, 1, 130, 8), 3.0), torch.full((1, 1, 130, 8), -3.0)
    scores = antidiagonal_scores(q, k, stride=8, block=64)
    assert torch.allclose(scores.sum(-1), torch.tensor([8.0, 8.0, 1.0]), atol=1e-5)
    assert float(scores[0, 0, 1, 0]) == pytest.approx(sum(8 / (9 + a) for a in range(8)), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_fp32(dtype: torch.dtype) -> None:
    q, k = qk(256, 512, dtype=dtype)
    for op in (pooled_scores, antidiagonal_scores):
        scores = op(q, k, block=64)
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, op(q.float(), k.float(), block=64), atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    q, k = qk(10, 20)
    with pytest.raises(ValueError, match="block: expected a multiple of stride=16, got 24"):
        antidiagonal_scores(q, k, stride=16, block=24)
    with pytest.raises(ValueError, match="stride: expected at least 1, got 0"):
        antidiagonal_scores(q, k, stride=0)
    with pytest.raises(TypeError, match="block: expected an int, got 64.0"):
        pooled_scores(q, k, block=64.0)
    assert math.isfinite(float(pooled_scores(q, k).sum()))
