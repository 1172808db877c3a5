"""Sink and window, pair by pair."""

from __future__ import annotations

import pytest
import torch

from lowcontext import LayerContext, get_method


@pytest.mark.parametrize(("sink", "window", "block_k"), [(4, 64, 64), (0, 1, 16), (5, 100, 48)])
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1000), (7, 1000)])
def test_decode_reads_exactly_sink_and_window(
    sink: int, window: int, block_k: int, Lq: int, Lk: int
) -> None:
    method = get_method("streaming_llm", sink=sink, window=window, block_k=block_k)
    q, k = torch.empty(1, 2, Lq, 8), torch.empty(1, 2, Lk, 8)
    mask = method.decode(q, k, LayerContext()).to_mask(Lq, Lk)[0, 0]
    p, j = torch.arange(Lk - Lq, Lk)[:, None], torch.arange(Lk)
    assert torch.equal(mask, (j <= p) & ((j < sink) | (p - j < window)))


@pytest.mark.parametrize(("Lq", "Lk"), [(1000, 1000), (333, 1000)])
@pytest.mark.parametrize("block_q", [32, 64])
def test_prefill_reads_the_window_of_the_first_query_of_each_block(
    Lq: int, Lk: int, block_q: int
) -> None:
    method = get_method("streaming_llm", sink=4, window=100, block_q=block_q)
    q, k = torch.empty(1, 2, Lq, 8), torch.empty(1, 2, Lk, 8)
    mask = method.prefill(q, k, LayerContext()).to_mask(Lq, Lk)[0, 0]
    p, j = torch.arange(Lk - Lq, Lk)[:, None], torch.arange(Lk)
    first = (p // block_q * block_q).clamp(min=Lk - Lq)
    assert torch.equal(mask, (j <= p) & ((j < 4) | (j > first - 100)))


def test_a_needle_between_sink_and_window_is_not_read() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 4096, 8)
    method = get_method("streaming_llm")
    mask = method.decode(q, k, LayerContext()).to_mask(1, 4096)[0, 0, 0]
    assert mask[:4].all()
    assert mask[-1024:].all()
    assert not mask[4:-1024].any()
