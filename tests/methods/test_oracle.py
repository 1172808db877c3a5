"""Oracle top-k against the softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method
from lowcontext.methods import oracle


def weights(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Softmax weights of causal attention: fp64 [B, Hq, Lq, Lk]."""
    G, Lq, Lk = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    logits = scale * q.double() @ k.double().repeat_interleave(G, dim=1).transpose(2, 3)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.arange(Lk) > torch.arange(Lk - Lq, Lk)[:, None]
    return logits.masked_fill(future, -torch.inf).softmax(dim=-1)


def make(Lq: int, Lk: int, B: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, H, L, 32, generator=gen) for H, L in ((6, Lq), (2, Lk)))
    return 2 * q, k


@pytest.mark.parametrize(("Lq", "Lk"), [(300, 300), (70, 301), (1, 300), (3, 300)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_list_holds_the_keys_with_the_most_mass(Lq: int, Lk: int, softcap: float | None) -> None:
    q, k = make(Lq, Lk, B=2)
    budget, block_q = 48, 32
    method = get_method("oracle", budget=budget, block_q=block_q)
    layer = LayerContext(scale=0.2, softcap=softcap)
    ((_, _, index),) = method.parts(q, k, layer)
    block_q = block_q if Lq > 3 else 1
    mass = weights(q, k, 0.2, softcap).unflatten(1, (2, 3)).sum(dim=2)  # [B, Hkv, Lq, Lk]
    keys = index.key_mask(Lk)
    for n, start in enumerate(range((Lk - Lq) // block_q * block_q, Lk, block_q)):
        rows = slice(max(0, start - (Lk - Lq)), start + block_q - (Lk - Lq))
        best = mass[:, :, rows, :start].sum(dim=2).topk(min(start, budget - block_q)).indices
        expected = torch.zeros(2, 2, Lk, dtype=torch.bool).scatter_(2, best, True)
        expected[:, :, start : start + block_q] = True
        assert torch.equal(keys[:, :, n], expected)


def test_a_planted_key_is_read_by_the_queries_that_look_for_it() -> None:
    q, k = make(512, 512)
    k[0, 1, 77] = 8 * torch.nn.functional.normalize(q[0, 4, 400], dim=0)
    method = get_method("oracle", budget=64, block_q=32)
    mask = method.prefill(q, k, LayerContext(scale=1.0)).to_mask(512, 512)
    assert mask[0, 1, 400, 77]
    assert mask.sum(dim=-1).max() <= 64


def test_no_list_of_its_size_holds_more_mass() -> None:
    q, k = make(256, 256)
    budget = 64
    layer = LayerContext(scale=0.3)
    exact = weights(q, k, 0.3)

    def kept(mask: Tensor) -> float:
        return float((exact * mask.repeat_interleave(6 // mask.shape[1], dim=1)).sum())

    best = kept(
        get_method("oracle", budget=budget, block_q=32).prefill(q, k, layer).to_mask(256, 256)
    )
    gen = torch.Generator().manual_seed(1)
    for _ in range(20):
        mask = torch.zeros(1, 2, 256, 256, dtype=torch.bool)
        for start in range(0, 256, 32):
            others = torch.rand(2, start, generator=gen).argsort(dim=-1)[:, : budget - 32]
            block = mask[0, :, start : start + 32]
            block.scatter_(2, others[:, None].expand(-1, 32, -1), True)
            block[:, :, start : start + 32] = True
        assert kept(mask.tril()) < best


def test_scores_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = make(200, 200)
    method, layer = get_method("oracle", budget=96), LayerContext(scale=0.2)
    whole = method.prefill(q, k, layer)
    sizes = []
    score = oracle.votes.token_scores

    def watched(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        scores, lse = score(q, k, scale=scale)
        sizes.append(scores.numel())
        return scores, lse

    monkeypatch.setattr(oracle.votes, "token_scores", watched)
    monkeypatch.setattr(oracle, "_SCORES", 6 * 200 * 5)
    parts = method.prefill(q, k, layer)
    assert max(sizes) <= 6 * 200 * 5
    assert torch.equal(parts.to_mask(200, 200), whole.to_mask(200, 200))


def test_a_budget_that_has_no_room_for_the_block_is_refused() -> None:
    with pytest.raises(ValueError, match="oracle: budget: expected at least 64, got 63"):
        get_method("oracle", budget=63)
