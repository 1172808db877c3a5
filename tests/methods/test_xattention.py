"""XAttention: the selection against the rule, and the traps of the published code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method
from lowcontext.ops.block_scores import antidiagonal_scores


def qk(Lq: int, Lk: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, 4, Lq, 16, generator=gen), torch.randn(2, 2, Lk, 16, generator=gen)


def wanted(row: list[float], n: int, threshold: float, before: int) -> set[int]:
    """Block 0, the diagonal and the blocks before it, then the best ones until the threshold."""
    forced = {0, *range(max(0, n - before), n + 1)}
    order = sorted(range(n + 1), key=lambda m: (m not in forced, -row[m], m))
    chosen, mass = set(), 0.0
    for m in order:
        if m in forced or mass < threshold * sum(row[: n + 1]):
            chosen.add(m)
            mass += row[m]
    return chosen


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(("local", "before"), [(0, 0), (64, 1), (65, 2)])
@pytest.mark.parametrize(("Lq", "Lk"), [(1024, 1024), (300, 1111), (64, 64), (1, 1)])
def test_index_equals_the_rule(threshold: float, local: int, before: int, Lq: int, Lk: int) -> None:
    q, k = qk(Lq, Lk)
    sizes = {"stride": 8, "block": 64, "local": local, "min_length": 0}
    method = get_method("xattention", threshold=threshold, **sizes)
    layer = LayerContext(scale=0.25)
    index = method.prefill(q, k, layer)
    index.validate(Lq, Lk)
    scores = antidiagonal_scores(q, k, stride=8, block=64, scale=0.25)
    first = (Lk - Lq) // 64
    blocks = index.key_mask(scores.shape[3] * 64)[..., ::64]
    for b in range(2):
        for h in range(4):
            for n in range(scores.shape[2]):
                row = scores[b, h, n].double().tolist()
                got = set(blocks[b, h, n].nonzero()[:, 0].tolist())
                assert got == wanted(row, first + n, threshold, before)


def test_a_head_that_looks_two_tokens_back_is_read_across_the_edge_of_a_block() -> None:
    # Each query matches the key two places before it: never on an antidiagonal of an even stride.
    gen = torch.Generator().manual_seed(2)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1024, 32, generator=gen), dim=-1)
    q = torch.cat([k[:, :, :2], k[:, :, :-2]], dim=2)
    layer = LayerContext(scale=30.0)
    rows = torch.arange(2, 1024)
    read = {}
    for local in (0, 128):
        method = get_method("xattention", threshold=0.5, local=local, min_length=0)
        mask = method.prefill(q, k, layer).to_mask(1024, 1024)[0, 0]
        read[local] = mask[rows, rows - 2]
    assert read[128].all()
    lost = rows[~read[0]]
    assert len(lost) > 0
    assert set((lost % 128).tolist()) <= {0, 1}


def test_a_prompt_of_many_whole_chunks_still_sees_its_early_keys() -> None:
    # 16384 tokens are two parts without padding; a needle block in the first draws the second.
    gen = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 16384, 16, generator=gen), torch.randn(1, 1, 16384, 16, generator=gen)
    q[..., 0] += 4.0
    k[:, :, 3000:3128, 0] += 4.0
    method = get_method("xattention", min_length=0, threshold=0.5, dense_last=0)
    parts = list(method.parts(q, k, LayerContext(scale=0.25)))
    assert [p[:2] for p in parts] == [(0, 8192), (8192, 16384)]
    for _, end, index in parts:
        rows = index.key_mask(end)[0, 0]
        last = rows[-32:]
        assert last[:, 3000:3072].all()
        assert last[:, 0].all()
        assert rows.float().mean() < 0.4


def test_the_last_queries_are_dense_in_whole_blocks() -> None:
    q, k = qk(1000, 1200)
    method = get_method("xattention", min_length=0, dense_last=70)
    parts = list(method.parts(q, k, LayerContext(scale=0.25)))
    assert [(a, b, i is None) for a, b, i in parts] == [(0, 824, False), (824, 1000, True)]
    short = method.parts(q[:, :, :100], k, LayerContext(scale=0.25))
    assert [(a, b, i is None) for a, b, i in short] == [(0, 100, True)]
    dense = get_method("xattention", min_length=1201).parts(q, k, LayerContext(scale=0.25))
    assert [(a, b, i is None) for a, b, i in dense] == [(0, 1000, True)]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="xattention: block: expected a multiple of stride=12"):
        get_method("xattention", stride=12)
    with pytest.raises(ValueError, match="xattention: threshold: expected more than 0, got 0"):
        get_method("xattention", threshold=0)
    with pytest.raises(ValueError, match="xattention: local: expected at least 0, got -1"):
        get_method("xattention", local=-1)
    with pytest.raises(TypeError, match="xattention: threshold: expected a number, got 'high'"):
        get_method("xattention", threshold="high")
