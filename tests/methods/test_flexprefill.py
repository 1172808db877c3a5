"""FlexPrefill: the selection against the paper's steps in fp64, and its traps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method
from lowcontext.methods._select import diagonal_sums


def qk(Lq: int, Lk: int, seed: int = 0, strength: float = 2.0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q = strength * torch.randn(1, 4, Lq, 16, generator=gen)
    return q, torch.randn(1, 2, Lk, 16, generator=gen)


def enough(weights: list[float], gamma: float) -> list[int]:
    """The largest entries that together hold gamma of the sum."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    kept, mass = [], 0.0
    for i in order:
        if mass >= gamma * sum(weights):
            break
        kept.append(i)
        mass += weights[i]
    return kept


def pooled(x: Tensor, block: int, offset: int) -> list[Tensor]:
    """fp64 means of the blocks of x [L, D], whose first row has position `offset`."""
    end = offset + len(x)
    starts = range(offset // block * block, end, block)
    return [x[max(s - offset, 0) : s + block - offset].double().mean(0) for s in starts]


def oracle(
    q: Tensor, k: Tensor, gamma: float, tau: float, low: int, block: int
) -> tuple[list[set[int]], bool]:
    """Blocks of each query block of one head, q [Lq, D], k [Lk, D], and whether it is aware."""
    (Lq, D), Lk = q.shape, len(k)
    Nk, first = -(-Lk // block), (Lk - Lq) // block
    n = min(block, Lq)
    vertical, slash, diagonal = [0.0] * Lk, [0.0] * Lk, [0.0] * (Nk + 1)
    for i in range(Lk - n, Lk):
        p = torch.softmax(k[: i + 1].double() @ q[i - Lk + Lq].double() / D**0.5, 0)
        for j, weight in enumerate(p.tolist()):
            vertical[j] += weight / n
            slash[i - j] += weight / n
    for d, weight in enumerate(slash):  # row 0 .. block - 1 of a block of queries
        for row in range(block):
            diagonal[-((row - d) // block)] += weight / block
    column = [sum(vertical[m * block : (m + 1) * block]) for m in range(Nk)]
    keys = torch.stack(pooled(k, block, 0))
    a = torch.softmax(keys @ q[-n:].double().mean(0) / D**0.5, 0).tolist()
    middle = [(x + y) / 2 for x, y in zip(a, column, strict=True)]
    terms = [x * math.log(x / m) for each in (a, column) for x, m in zip(each, middle, strict=True)]
    aware = math.sqrt(max(0.0, sum(terms) / 2)) < tau
    chosen = []
    for tokens, blocks in ((vertical, column), (slash, diagonal[:Nk])):
        count = low if aware else max(low, -(-len(enough(tokens, gamma)) // block))
        order = sorted(range(1, Nk), key=lambda i: (-blocks[i], i))
        chosen.append({0, *order[: count - 1]})
    rows = []
    for r, mean in enumerate(pooled(q, block, Lk - Lq)):
        m = first + r
        keep = {c for c in chosen[0] if c <= m} | {m - d for d in chosen[1] if d <= m}
        if aware:
            weights = torch.softmax(keys[: m + 1] @ mean / D**0.5, 0).tolist()
            keep |= set(enough(weights, gamma))
        rows.append(keep)
    return rows, aware


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("Lq", "Lk"), [(1024, 1024), (1000, 1000), (200, 777), (40, 40)])
def test_index_equals_the_steps_of_the_paper(tau: float, Lq: int, Lk: int) -> None:
    q, k = qk(Lq, Lk, seed=Lk)
    method = get_method("flexprefill", tau=tau, gamma=0.6, min_budget=64, block=32, min_length=0)
    index = method.prefill(q, k, LayerContext(scale=0.25))
    index.validate(Lq, Lk)
    blocks = index.key_mask(-(-Lk // 32) * 32)[..., ::32]
    kinds = set()
    for h in range(4):
        rows, aware = oracle(q[0, h], k[0, h // 2], 0.6, tau, 2, 32)
        kinds.add(aware)
        for n, keep in enumerate(rows):
            assert set(blocks[0, h, n].nonzero()[:, 0].tolist()) == keep
    assert tau == 0.1 or kinds == {tau == 1.0}


@pytest.mark.parametrize("N", [100, 128, 200, 255])
def test_slash_weight_is_split_between_the_two_diagonals_it_crosses(N: int) -> None:
    for d in range(0, N, 7):
        slash = torch.zeros(N)
        slash[d] = 1.0
        got = diagonal_sums(slash, 64)
        crossed = torch.zeros(N // 64 + 2)
        for row in range(64):
            crossed[(d - row + 63) // 64] += 1 / 64
        assert torch.allclose(got, crossed[: len(got)], atol=1e-6)


def test_budgets_bound_what_each_kind_of_line_reads() -> None:
    q, k = qk(4096, 4096, strength=0.1)  # diffuse: gamma alone would read everything
    options = {"min_length": 0, "tau": 0.0, "block": 64}
    for budget in (256, 1024):
        method = get_method("flexprefill", min_budget=64, max_budget=budget, **options)
        index = method.prefill(q, k, LayerContext(scale=0.25))
        assert int(index.kv_num_blocks.max()) <= 2 * budget // 64
        assert int(index.kv_num_blocks.max()) > budget // 64
    small = get_method("flexprefill", gamma=1e-6, min_budget=640, **options)
    assert int(small.prefill(q, k, LayerContext(scale=0.25)).kv_num_blocks.min()) == 1
    assert int(small.prefill(q, k, LayerContext(scale=0.25)).kv_num_blocks[..., -1].min()) >= 10


def test_parts_are_pieces_of_one_index() -> None:
    q, k = qk(9000, 10000)
    method = get_method("flexprefill", min_length=0, min_budget=512)
    layer = LayerContext(scale=0.25)
    whole = method.prefill(q, k, layer).key_mask(10000)
    parts = list(method.parts(q, k, layer))
    assert [p[:2] for p in parts] == [(0, 7192), (7192, 9000)]
    for row0, row1, index in parts:
        end, n0 = 1000 + row1, (1000 + row0) // 128 - 1000 // 128
        keys = index.key_mask(end)
        assert torch.equal(keys, whole[:, :, n0 : n0 + keys.shape[2], :end])


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="flexprefill: gamma: expected more than 0, got -1"):
        get_method("flexprefill", gamma=-1)
    with pytest.raises(ValueError, match="flexprefill: block: expected at most 256, got 512"):
        get_method("flexprefill", block=512)
    with pytest.raises(TypeError, match="flexprefill: tau: expected a number, got None"):
        get_method("flexprefill", tau=None)
