"""What every list of the searches must keep, whatever the problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BACKENDS, integers, qk
from torch import Tensor

from lowcontext import BlockIndex
from lowcontext.ops.hierarchy import Stage, StageOptions, TreeOptions, hip_stages, hip_tree


@st.composite
def options(draw: st.DrawFn) -> TreeOptions | StageOptions:
    block_k = draw(st.sampled_from([1, 2, 8, 16, 64]))
    shared = {
        "block_q": draw(st.sampled_from([1, 5, 16, 64])),
        "block_k": block_k,
        "budget": draw(st.integers(1, 12)) * block_k + draw(st.integers(0, block_k - 1)),
        "sink": draw(st.integers(0, 80)),
        "window": draw(st.integers(1, 90)),
        "share": draw(st.sampled_from(["head", "group", "layer"])),
        "rows": draw(st.sampled_from(["mean", "last"])),
        "representative": draw(st.sampled_from(["center", "first", "last"])),
    }
    if draw(st.booleans()):
        if draw(st.booleans()):
            shared["representative"] = "spread"
        leaf = draw(st.sampled_from([x for x in (1, 2, 4, 8, 16, 64) if block_k % x == 0]))
        beam, rows = draw(st.integers(1, 40)), draw(st.integers(1, 20))
        return TreeOptions(
            leaf=leaf, beam=beam, row_stride=rows, key_stride=draw(st.integers(1, leaf)), **shared
        )
    chunk = draw(st.sampled_from([x for x in (1, 2, 4, 16) if block_k % x == 0]))
    stages = [Stage(chunk, row_stride=draw(st.integers(1, 20)))]
    while len(stages) < 3 and draw(st.booleans()):
        chunk *= draw(st.sampled_from([1, 2, 3, 8]))
        stages.insert(0, Stage(chunk, draw(st.integers(1, 6)) * chunk, draw(st.integers(1, 20))))
    return StageOptions(stages=tuple(stages), **shared)


def search(
    q: Tensor, k: Tensor, o: TreeOptions | StageOptions, backend: str, ahead: int = 0
) -> BlockIndex:
    if isinstance(o, TreeOptions):
        return hip_tree(q, k, o, backend=backend, ahead=ahead)
    return hip_stages(q, k, o, backend=backend, ahead=ahead)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(o=options(), Lk=st.integers(1, 700), short=st.integers(0, 699), ahead=st.integers(0, 99))
def test_lists_are_valid_and_hold_sink_window_and_diagonal(
    backend: str, o: TreeOptions | StageOptions, Lk: int, short: int, ahead: int
) -> None:
    Lq = max(1, Lk - short)
    q, k = qk(Lq, Lk)
    index = search(q, k, o, backend, ahead=ahead)
    index.validate(Lq, Lk)  # ascending, disjoint, in range
    mask = index.to_mask(Lq, Lk)
    p, j = torch.arange(Lk - Lq, Lk)[:, None], torch.arange(Lk)
    assert mask[:, :, (j <= p) & ((p - j < o.window) | (j < o.sink))].all()
    counts, starts = index.kv_num_blocks, index.kv_starts
    listed = torch.arange(starts.shape[3]) < counts[..., None]
    assert (starts % o.block_k == 0).all()  # whole tiles of the grid, in the unused part too
    assert (starts[listed] < Lk).all()
    # The search adds at most its budget to the tiles of sink and window.
    low = -(-o.sink // o.block_k)
    first = torch.arange((Lk - Lq) // o.block_q, -(-Lk // o.block_q)) * o.block_q
    high = ((first - o.window + 1).div(o.block_k, rounding_mode="floor")).clamp(min=low)
    tile = starts // o.block_k
    found = listed & (tile >= low) & (tile < high[:, None])
    assert found.sum(-1).max() <= o.budget // o.block_k
    # What is behind the counts continues the window.
    last = (first + o.block_q).clamp(max=Lk) - 1
    more = (last + ahead) // o.block_k - last // o.block_k
    for extra in range(int(more.max()) + 1):
        at = (counts + extra - 1).clamp(max=starts.shape[3] - 1)[..., None].long()
        expected = (last // o.block_k + extra) * o.block_k
        got = starts.gather(3, at)[..., 0]
        assert (got == expected)[..., extra <= more].all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(o=options(), Lk=st.integers(1, 600), short=st.integers(0, 599))
def test_a_budget_that_covers_the_context_lists_everything(
    backend: str, o: TreeOptions | StageOptions, Lk: int, short: int
) -> None:
    Lq = max(1, Lk - short)
    q, k = qk(Lq, Lk)
    o = replace(o, budget=10**6)
    assert search(q, k, o, backend).density(Lq, Lk) == 1.0
    assert o.covers(Lk)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(o=options(), Lk=st.integers(2, 600), cut=st.integers(1, 599))
def test_prefill_chunks_that_end_at_a_block_find_what_one_call_finds(
    backend: str, o: TreeOptions | StageOptions, Lk: int, cut: int
) -> None:
    q, k = qk(Lk, Lk)
    cut = min(cut, Lk - 1) // o.block_q * o.block_q
    if cut == 0:
        return
    whole = search(q, k, o, backend).to_mask(Lk, Lk)
    head = search(q[:, :, :cut], k[:, :, :cut], o, backend).to_mask(cut, cut)
    tail = search(q[:, :, cut:], k, o, backend).to_mask(Lk - cut, Lk)
    assert torch.equal(whole[:, :, :cut, :cut], head)
    assert torch.equal(whole[:, :, cut:], tail)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(o=options(), Lk=st.integers(2, 600), first=st.integers(1, 599))
def test_future_keys_and_queries_change_nothing(
    backend: str, o: TreeOptions | StageOptions, Lk: int, first: int
) -> None:
    q, k = qk(Lk, Lk)
    block = min(first, Lk - 1) // o.block_q
    rows = slice(block * o.block_q, (block + 1) * o.block_q)
    before = search(q, k, o, backend).to_mask(Lk, Lk)[:, :, rows]
    q[:, :, rows.stop :], k[:, :, rows.stop :] = torch.nan, torch.nan
    k[:, :, max(0, rows.start) : rows.stop] = 77.0  # the block's own keys are window, not scored
    assert torch.equal(before, search(q, k, o, backend).to_mask(Lk, Lk)[:, :, rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_share_a_stage_depend_on_no_other_block(backend: str) -> None:
    o = StageOptions(
        block_q=16, block_k=16, budget=64, sink=20, window=50,
        stages=(Stage(64, 128, 4, blocks=4), Stage(4, row_stride=1)),
    )  # fmt: skip
    q, k = qk(650, 650)
    whole = search(q, k, o, backend).to_mask(650, 650)
    for cut in (320, 448, 640):
        tail = search(q[:, :, cut:], k, o, backend).to_mask(650 - cut, 650)
        assert torch.equal(whole[:, :, cut:], tail)
        q[:, :, cut:], k[:, :, cut:] = torch.nan, torch.nan
        assert torch.equal(
            whole[:, :, :cut], search(q, k, o, backend).to_mask(650, 650)[:, :, :cut]
        )
        q, k = qk(650, 650)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beam", [2, 7, 16])
@pytest.mark.parametrize("Lk", [150, 213, 386])
def test_every_leaf_can_be_reached(backend: str, beam: int, Lk: int) -> None:
    # Scores fall with the distance from one key: the search must end at that key, wherever it is.
    o = TreeOptions(
        block_q=1, block_k=1, leaf=1, key_stride=1, budget=1, beam=beam, sink=3, window=10
    )
    stages = StageOptions(
        block_q=1, block_k=1, budget=1, sink=3, window=10, stages=(Stage(64, 64, 1), Stage(1))
    )
    low, high = 3, Lk - 10
    target = torch.arange(low, high)
    k = torch.zeros(len(target), 1, Lk, 8)
    k[..., 0] = -(torch.arange(Lk) - target[:, None]).abs()[:, None]
    q = torch.zeros(len(target), 1, 1, 8)
    q[..., 0] = 1.0
    for options in (o, stages):
        starts = search(q, k, options, backend).kv_starts
        assert torch.equal(starts[:, 0, 0, 3], target.int())


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_are_distinct_and_as_many_as_the_beam(backend: str) -> None:
    for Lk in (1284, 1999, 4097):
        for leaf, beam in ((1, 4), (2, 16), (8, 37)):
            q, k = qk(1, Lk)
            o = TreeOptions(
                block_q=1, block_k=leaf, leaf=leaf, key_stride=1, budget=beam * leaf, beam=beam,
                sink=8, window=30,
            )  # fmt: skip
            index = hip_tree(q, k, o, backend=backend)
            index.validate(1, Lk)
            tile = index.kv_starts[0, 0, 0, : int(index.kv_num_blocks[0, 0, 0])] // leaf
            candidate = (tile >= -(-8 // leaf)) & (tile < (Lk - 1 - 30 + 1) // leaf)
            assert int(candidate.sum()) == beam


def test_integers_make_ties() -> None:
    # The exact comparisons with the definition rest on this.
    scores = (integers(1, 200, 8, seed=1) @ integers(1, 8, 200, seed=2)).flatten()
    assert len(scores.unique()) < len(scores) // 10
