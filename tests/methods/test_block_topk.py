"""Block top-k against a loop over blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method


def oracle(q: Tensor, k: Tensor, budget: int, sink: int, local: int, bq: int, bk: int) -> Tensor:
    """Key blocks read by each query block of one head, by the definition; bool [Nq, Nk]."""
    Lq, Lk = len(q), len(k)
    first, rows = (Lk - Lq) // bq, []
    for n in range(first, -(-Lk // bq)):
        row0, row1 = max(n * bq, Lk - Lq), min((n + 1) * bq, Lk)
        mean_q = q[row0 - Lk + Lq : row1 - Lk + Lq].double().mean(0)
        last, low = (row1 - 1) // bk, max(row0 - local, 0) // bk
        forced = set(range(low, last + 1)) | set(range(min(-(-sink // bk), last + 1)))
        past = [m for m in range(low) if m not in forced]
        scores = {m: float(mean_q @ k[m * bk : (m + 1) * bk].double().mean(0)) for m in past}
        best = sorted(past, key=lambda m: (-scores[m], m))[: budget // bk - len(forced)]
        row = torch.zeros(-(-Lk // bk), dtype=torch.bool)
        row[sorted(forced | set(best))] = True
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(("Lq", "Lk"), [(1500, 1500), (700, 1501), (1, 1500), (3, 1537), (9, 1543)])
@pytest.mark.parametrize(("bq", "bk"), [(128, 64), (64, 32)])
def test_index_equals_the_definition(Lq: int, Lk: int, bq: int, bk: int) -> None:
    gen = torch.Generator().manual_seed(Lq)
    q = torch.randn(2, 4, Lq, 16, generator=gen)
    k = torch.randn(2, 2, Lk, 16, generator=gen)
    method = get_method("block_topk", budget=640, sink=40, local=100, block_q=bq, block_k=bk)
    decode = Lq <= 32
    index = (method.decode if decode else method.prefill)(q, k, LayerContext())
    keys = index.key_mask(-(-Lk // bk) * bk)[..., ::bk]
    for b in range(2):
        for h in range(4):
            expected = oracle(q[b, h], k[b, h // 2], 640, 40, 100, 1 if decode else bq, bk)
            assert torch.equal(keys[b, h], expected)


def test_a_planted_needle_block_is_selected() -> None:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 1024, 32, generator=gen) * 0.1
    k = torch.randn(1, 2, 1024, 32, generator=gen) * 0.1
    q[:, :, 896:] += 1.0
    k[:, :, 320:384] += 1.0
    index = get_method("block_topk", budget=512, local=64).prefill(q, k, LayerContext())
    mask = index.to_mask(1024, 1024)
    assert mask[:, :, 896:, 320:384].all()


def test_a_budget_below_the_forced_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="block_topk: budget: expected at least 512"):
        get_method("block_topk", budget=256)
