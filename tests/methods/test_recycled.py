"""Recycled Attention: when a step is full, and what is read between full steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method
from lowcontext.methods.recycled import Recycled


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**options: object) -> Recycled:
    return get_method("recycled", **{"k": 40, "stride": 8, "threshold": None, **options})


def oracle(q: Tensor, k: Tensor, count: int, scale: float) -> set[int]:
    """The keys that the query heads q [G, D] of a KV head weigh most, together."""
    weights = (scale * q.double() @ k.double().T).softmax(-1).sum(0).tolist()
    return set(sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:count])


@pytest.mark.parametrize("G", [1, 2, 4, 7, 8])
def test_steps_between_read_the_largest_weights_of_the_full_step_and_what_is_new(G: int) -> None:
    method, layer = make(), LayerContext(scale=0.25)
    q, k = rand(1, 2 * G, 40, 16), rand(1, 2, 340, 16, seed=1)
    lists: list[set[int]] = []
    for step in range(40):
        n = 300 + step + 1
        index = method.decode(q[:, :, step : step + 1], k[:, :, :n], layer)
        index.validate(1, n)
        mask = index.to_mask(1, n)[0, :, 0]
        if step % 8 == 0:
            assert mask.all()
            heads = q[0, :, step].unflatten(0, (2, G))
            lists = [oracle(heads[h], k[0, h, :n], 40, 0.25) for h in range(2)]
            last = n
            continue
        for h in range(2):
            assert set(mask[h].nonzero().flatten().tolist()) == lists[h] | set(range(last, n))


@pytest.mark.parametrize(("cosine", "full"), [("head", True), ("layer", False)])
def test_a_turned_query_makes_the_step_full(cosine: str, full: bool) -> None:
    method = make(threshold=0.8, cosine=cosine)
    q, k, layer = rand(1, 4, 1, 16), rand(1, 2, 300, 16, seed=1), LayerContext(scale=0.25)
    q[:, 3] *= 0.1
    assert method.decode(q, k[:, :, :298], layer).to_mask(1, 298).all()
    assert not method.decode(2 * q, k[:, :, :299], layer).to_mask(1, 299).all()
    turned = q.clone()
    turned[:, 3] *= -1
    assert bool(method.decode(turned, k, layer).to_mask(1, 300).all()) == full


def test_rows_of_a_batch_take_full_steps_on_their_own() -> None:
    method = make(threshold=0.8, stride=100)
    k = rand(3, 2, 330, 16, seed=1)
    together = LayerContext(scale=0.25)
    alone = [LayerContext(scale=0.25) for _ in range(3)]
    base = rand(3, 4, 1, 16)
    kinds = set()
    for step in range(12):
        for b in range(3):
            if step % (b + 2) == 0:
                base[b] = rand(4, 1, 16, seed=100 * step + b)
        keys = k[:, :, : 301 + step]
        mask = method.decode(base, keys, together).to_mask(1, 301 + step)
        kinds.add(tuple(bool(mask[b].all()) for b in range(3)))
        for b in range(3):
            row = slice(b, b + 1)
            expected = method.decode(base[row], keys[row], alone[b]).to_mask(1, 301 + step)
            assert torch.equal(mask[row], expected)
    assert len(kinds) > 3


def test_prefill_short_contexts_and_several_queries_are_dense() -> None:
    method, layer = make(), LayerContext(scale=0.25)
    q, k = rand(1, 4, 200, 16), rand(1, 2, 200, 16)
    assert [p[2] for p in method.parts(q, k, layer)] == [None]
    assert method.decode(q[:, :, :2], k, layer) is None
    assert method.decode(q[:, :, :1], k[:, :, :40], layer) is None


def test_hyper_parameters_are_checked() -> None:
    for option, value in [("k", 0), ("stride", 0), ("threshold", 2.0), ("cosine", "row")]:
        with pytest.raises(ValueError, match=f"recycled: {option}: expected"):
            make(**{option: value})
