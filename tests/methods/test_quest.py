"""Quest against the formula of the paper, page by page."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method


def oracle(q: Tensor, k: Tensor, position: int, budget: int, page: int) -> set[int]:
    """Pages read by the queries q [n, D] of one list at `position`: its own, then the best."""
    own = position // page
    bounds = {}
    for p in range(own):
        keys = k[p * page : (p + 1) * page].double()
        low, high = keys.min(0).values, keys.max(0).values
        bounds[p] = max(float(torch.maximum(x * low, x * high).sum()) for x in q.double())
    best = sorted(bounds, key=lambda p: (-bounds[p], p))[: budget // page - 1]
    return {own, *best}


@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
@pytest.mark.parametrize("G", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("Lq", "Lk", "page"), [(1, 1000, 16), (5, 1003, 16), (1, 960, 24)])
def test_index_equals_the_definition(scope: str, G: int, Lq: int, Lk: int, page: int) -> None:
    gen = torch.Generator().manual_seed(G)
    q = torch.randn(2, 2 * G, Lq, 16, generator=gen)
    k = torch.randn(2, 2, Lk, 16, generator=gen)
    method = get_method("quest", budget=160, page=page, scope=scope)
    index = method.decode(q, k, LayerContext())
    pages = index.key_mask(-(-Lk // page) * page)[..., ::page]
    assert index.kv_starts.shape[1] == (2 * G if scope == "query_head" else 2)
    for b in range(2):
        for h in range(pages.shape[1]):
            for r in range(Lq):
                heads = [h] if scope == "query_head" else range(h * G, (h + 1) * G)
                kv = h // G if scope == "query_head" else h
                expected = oracle(q[b, list(heads), r], k[b, kv], Lk - Lq + r, 160, page)
                assert set(pages[b, h, r].nonzero().flatten().tolist()) == expected


def test_bounds_are_updated_as_pages_fill() -> None:
    gen = torch.Generator().manual_seed(3)
    k = torch.randn(1, 1, 600, 8, generator=gen)
    q = torch.randn(1, 2, 600, 8, generator=gen)
    method, layer = get_method("quest", budget=64), LayerContext()
    for n in range(200, 600):
        index = method.decode(q[:, :, n - 1 : n], k[:, :, :n], layer)
        fresh = method.decode(q[:, :, n - 1 : n], k[:, :, :n], LayerContext())
        assert torch.equal(index.to_mask(1, n), fresh.to_mask(1, n))


def test_a_planted_needle_is_selected_among_many_pages() -> None:
    gen = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 8192, 64, generator=gen)
    q = torch.randn(1, 8, 1, 64, generator=gen)
    k[:, 0, 3000] = 4 * q[:, 0, 0]
    mask = get_method("quest", budget=256).decode(q, k, LayerContext()).to_mask(1, 8192)
    assert mask[0, 0, 0, 3000]


def test_prefill_is_dense_and_the_first_two_layers_stay_dense_as_published() -> None:
    q, k = torch.randn(1, 2, 4000, 8), torch.randn(1, 2, 4000, 8)
    method = get_method("quest", budget=64)
    assert [p[2] for p in method.parts(q, k, LayerContext(layer_idx=5))] == [None]
    assert [p[2] for p in method.parts(q[:, :, :1], k, LayerContext(layer_idx=1))] == [None]
    assert [p[2] for p in method.parts(q[:, :, :1], k, LayerContext(layer_idx=2))] != [None]
