"""When a kept selection is stale, against cosines in fp64."""

from __future__ import annotations

import pytest
import torch

from lowcontext.ops.reuse import stale


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stale_is_turned_or_old(by_head: bool, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(3)
    q = torch.randn(40, 4, 1, 32, generator=gen)
    noise = torch.linspace(0, 1.5, 40).view(40, 1, 1, 1) * torch.randn(40, 4, 1, 32, generator=gen)
    kept = (q + noise).to(dtype)
    q, lows = q.to(dtype), torch.arange(100, 140, dtype=torch.int32)
    a, b = q[:, :, 0].double(), kept[:, :, 0].double()
    if not by_head:
        a, b = a.flatten(1)[:, None], b.flatten(1)[:, None]
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=2).amin(dim=1)
    given = q, kept.flatten(1), lows
    expected = (cosine < 0.9) | (lows < 105)
    assert 5 < int(expected.sum()) < 35
    assert torch.equal(stale(*given, 105, threshold=0.9, by_head=by_head), expected)
    # Ranks with the other heads: each brings its own sums.
    calls = []

    def reduce(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x

    options = {"threshold": 0.9, "by_head": by_head, "reduce": reduce}
    assert torch.equal(stale(*given, 105, **options), expected)
    assert len(calls) == 1


def test_arguments_are_checked_by_name() -> None:
    q, kept, lows = torch.zeros(2, 3, 1, 8), torch.zeros(2, 24), torch.zeros(2, dtype=torch.int32)
    for name, given in [
        ("q", (q.expand(2, 3, 2, 8), kept, lows)),
        ("kept", (q, kept[:, :8], lows)),
        ("lows", (q, kept, lows[:1])),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            stale(*given, 5, threshold=0.5)
