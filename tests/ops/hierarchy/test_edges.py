"""Edges at which published versions of the searches go wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import BACKENDS, STAGES, TREE, listed, qk

from lowcontext import BlockIndex
from lowcontext.ops.hierarchy import Chunks, Stage, StageOptions, TreeOptions, hip_stages, hip_tree

ALL = pytest.mark.parametrize("backend", BACKENDS)


def needle(Lk: int, at: int, strength: float, D: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """One query that scores 0 everywhere but in the 16 keys from `at` on."""
    q, k = torch.zeros(1, 1, 1, D), torch.zeros(1, 1, Lk, D)
    q[..., 0], k[:, :, at : at + 16, 0] = strength, strength
    return q, k


def found(index: BlockIndex, width: int = 16) -> list[int]:
    return [start // width for start in index.kv_starts[0, 0, 0].tolist()][
        : int(index.kv_num_blocks[0, 0, 0])
    ]


@ALL
def test_scores_beyond_the_range_of_fp16_still_rank(backend: str) -> None:
    # 1000 * 1000 overflows fp16 long before the softmax scale is applied.
    for dtype in (torch.float16, torch.bfloat16):
        q, k = (x.to(dtype) for x in needle(2000, 1008, 1000.0))
        k[:, :, 320:336, 0] = 900.0
        tree = replace(TREE, block_q=1, budget=16, beam=200)
        assert 63 in found(hip_tree(q, k, tree, backend=backend))
        assert 20 not in found(hip_tree(q, k, tree, backend=backend))
        stages = replace(STAGES, block_q=1, budget=16)
        assert 63 in found(hip_stages(q, k, stages, backend=backend)[0])


@ALL
def test_scores_of_zero_and_far_below_zero_are_scores(backend: str) -> None:
    # No number stands for "masked": zero beats -1e6, and -1e6 beats -2e6.
    for best, rest in ((0.0, -1e6), (-1e6, -2e6)):
        q, k = needle(2000, 1008, 1.0)
        k[..., 0] = rest
        k[:, :, 1008:1024, 0] = best
        for index in (
            hip_tree(q, k, replace(TREE, block_q=1, budget=16, beam=200), backend=backend),
            hip_stages(q, k, replace(STAGES, block_q=1, budget=16), backend=backend)[0],
        ):
            assert 63 in found(index)
            assert index.kv_num_blocks.item() == 2 + 1 + (1999 // 16 - (1999 - 39) // 16 + 1)


@ALL
def test_equal_scores_go_to_the_lower_position(backend: str) -> None:
    q, k = torch.ones(1, 2, 1, 8), torch.ones(1, 1, 1000, 8)
    tree = replace(TREE, block_q=1, leaf=16, key_stride=1)
    assert found(hip_tree(q, k, tree, backend=backend))[:6] == [0, 1, 2, 3, 4, 5]
    # Equal halves go left, equal chunks are kept in order.
    index, chunks = hip_stages(q, k, replace(STAGES, block_q=1), backend=backend)
    assert found(index)[:6] == [0, 1, 2, 3, 4, 5]
    assert chunks[0].starts[0, 0, 0].tolist() == [0, 64, 128, 192]


@ALL
def test_a_budget_beyond_the_candidates_lists_no_filler(backend: str) -> None:
    for Lk in range(1, 260, 7):
        q, k = qk(1, Lk)
        tiles = list(range(-(-Lk // 16)))
        tree, stages = replace(TREE, block_q=1, budget=192), replace(STAGES, block_q=1, budget=192)
        assert found(hip_tree(q, k, tree, backend=backend)) == tiles
        index, chunks = hip_stages(q, k, stages, backend=backend)
        assert found(index) == tiles
        candidates = range(32, max(32, (Lk - 40) // 16 * 16))
        count = math.ceil(candidates.stop / 64) if candidates else 0
        assert chunks[0].counts[0, 0, 0] == min(4, count)


@ALL
def test_a_window_smaller_than_the_first_chunk_stays_as_it_is(backend: str) -> None:
    q, k = qk(1, 1000)
    o = StageOptions(
        block_q=1, block_k=1, budget=8, sink=3, window=5, stages=(Stage(256, 512), Stage(1))
    )
    index, _ = hip_stages(q, k, o, backend=backend)
    starts = index.kv_starts[0, 0, 0].tolist()
    assert starts[:3] == [0, 1, 2]
    assert starts[-5:] == [995, 996, 997, 998, 999]
    assert max(starts[3:-5]) < 995


@ALL
def test_the_window_ends_exactly_where_the_candidates_begin(backend: str) -> None:
    # Position p is 0-based: key j is in the window of p iff 0 <= p - j < window.
    for p in range(40, 120):
        q, k = qk(1, p + 1)
        o = TreeOptions(
            block_q=1, block_k=1, leaf=1, key_stride=1, budget=1, beam=4, sink=0, window=20
        )
        starts = hip_tree(q, k, o, backend=backend).kv_starts[0, 0, 0]
        assert starts[1:].tolist() == list(range(p - 19, p + 1))
        assert starts[0] < p - 19


@ALL
def test_a_sink_off_the_chunk_grid_is_listed_once(backend: str) -> None:
    q, k = qk(1, 2000)
    for sink in (1, 15, 16, 17, 33, 65, 100):
        o = replace(STAGES, block_q=1, sink=sink)
        index, chunks = hip_stages(q, k, o, backend=backend)
        index.validate(1, 2000)
        assert index.to_mask(1, 2000)[0, 0, 0, :sink].all()
        assert (chunks[0].starts % 64 == 0).all()


@ALL
def test_a_shared_list_follows_the_best_head_and_is_read_by_all(backend: str) -> None:
    # Two query heads of one KV head look for different needles; a third KV head has its own.
    q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 2000, 8)
    for head, (kv, at) in enumerate([(0, 640), (0, 1280), (1, 320), (1, 960)]):
        q[0, head, 0, head] = 1.0
        k[0, kv, at : at + 16, head] = 1.0 + head
    for o in (replace(TREE, block_q=1, budget=64, beam=200), replace(STAGES, block_q=1)):
        tiles_of = {}
        for share in ("head", "group", "layer"):
            options = replace(o, share=share)
            run = hip_tree if isinstance(o, TreeOptions) else lambda *a, **b: hip_stages(*a, **b)[0]
            index = run(q, k, options, backend=backend)
            tiles_of[share] = [set(tiles) for tiles in listed(index).values()]
        wanted = [640 // 16, 1280 // 16, 320 // 16, 960 // 16]
        assert all(tile in tiles for tile, tiles in zip(wanted, tiles_of["head"], strict=True))
        assert [len(tiles & set(wanted)) for tiles in tiles_of["group"]] == [2, 2]
        assert tiles_of["layer"][0] >= set(wanted)


@ALL
def test_stages_can_be_taken_up_again_without_losing_a_key(backend: str) -> None:
    # Stage 0 ran at 1000 keys; later ones run again as the sequence grows.
    q, k = qk(100, 1100)
    o = replace(STAGES, block_q=1)
    _, kept = hip_stages(q[:, :, :1], k[:, :, :1000], o, backend=backend)
    frozen = (1000 - 1 - o.window + 1) // o.block_k * o.block_k  # first key not a candidate then
    for n in range(1000, 1100, 7):
        for given in (1, 2):
            index, chunks = hip_stages(
                q[:, :, n - 1000 : n - 999], k[:, :, :n], o, kept=kept[:given], behind=n - 1000,
                ahead=10, backend=backend,
            )  # fmt: skip
            index.validate(1, n)
            assert index.to_mask(1, n)[..., frozen:].all()
            assert torch.equal(chunks[0].starts, kept[0].starts)
            if given == 1:
                # Every listed tile lies in a chunk that stage 0 kept.
                for (_, h, _), tiles in listed(index).items():
                    inside = [t * 16 // 64 * 64 for t in tiles if 32 <= t * 16 < frozen]
                    assert set(inside) <= set(kept[0].starts[0, h, 0].tolist())
    again, _ = hip_stages(q[:, :, :1], k[:, :, :1000], o, kept=kept, backend=backend)
    fresh, _ = hip_stages(q[:, :, :1], k[:, :, :1000], o, backend=backend)
    assert torch.equal(again.kv_starts, fresh.kv_starts)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the fakes of the native backend")
def test_what_a_million_tokens_leave_in_memory_is_small() -> None:
    # A chunk of 8192 queries; published code keeps 24 bytes per chunk, block and query head.
    q = torch.empty(1, 32, 8192, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 8, 2**20, 128, device="meta", dtype=torch.bfloat16)
    index, chunks = hip_stages(q, k, StageOptions())
    tensors = [index.kv_starts, index.kv_num_blocks, *(c.starts for c in chunks)]
    tensors.append(hip_tree(q, k, TreeOptions()).kv_starts)
    assert all(x.dtype == torch.int32 for x in tensors)
    assert sum(x.numel() * 4 for x in tensors) < 3 * 2**20


@ALL
def test_garbage_in_kept_chunks_stays_inside_the_keys(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference gathers with torch, which checks")
    q, k = qk(1, 1000)
    counts = torch.tensor([[[7], [-3]]], dtype=torch.int32)
    starts = torch.tensor([2**31 - 1, -(2**31), 5, 990, 64, 64, 1], dtype=torch.int32)
    kept = (Chunks(counts, starts.expand(1, 2, 1, 7).contiguous()),)
    index, _ = hip_stages(q, k, replace(STAGES, block_q=1), kept=kept, backend=backend)
    assert (index.kv_starts >= 0).all()
    assert (index.kv_starts < 1000).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"share": "all"}, ValueError, r"share: expected one of \['head', 'group', 'layer'\]"),
        ({"rows": "max"}, ValueError, "rows: expected one of"),
        ({"budget": 15}, ValueError, "budget: expected at least 16, got 15"),
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"sink": 1.5}, TypeError, "sink: expected an int, got 1.5"),
        ({"leaf": 5}, ValueError, "leaf: expected a divisor of block_k=16, got 5"),
        ({"key_stride": 5}, ValueError, "key_stride: expected at most leaf=4, got 5"),
        ({"beam": 0}, ValueError, "beam: expected at least 1, got 0"),
        ({"stages": ()}, ValueError, "stages: expected at least one"),
        ({"stages": (Stage(48, 96), Stage(32))}, ValueError, r"divide the ones before, got \[48"),
        ({"stages": (Stage(64, 32), Stage(16))}, ValueError, "keep of at least chunk=64, got 32"),
        ({"stages": (Stage(64),)}, ValueError, "a last chunk that divides block_k=16, got 64"),
        ({"stages": (Stage(16, row_stride=0),)}, ValueError, "row_stride: expected at least 1"),
        ({"stages": (Stage(16, blocks=2),)}, ValueError, "blocks: expected 1 in the last, got 2"),
        (
            {"stages": (Stage(64, 64, blocks=3), Stage(32, 32, blocks=2), Stage(16))},
            ValueError,
            r"blocks: expected multiples of the next stage's, got \[3, 2, 1\]",
        ),
        (
            {"stages": (Stage(64, 64, blocks=4), Stage(16))},
            ValueError,
            "window: expected more than the 48 queries before the last of 4 blocks, got 40",
        ),
        ({"chunk_score": "mean"}, ValueError, "chunk_score: expected one of"),
    ],
)
def test_bad_settings_are_named(change: dict, error: type[Exception], message: str) -> None:
    stages = {"stages", "chunk_score"} & set(change)
    with pytest.raises(error, match=message):
        replace(STAGES if stages else TREE, **change)


def test_bad_arguments_are_named() -> None:
    q, k = qk(4, 100)
    with pytest.raises(TypeError, match="options: expected TreeOptions, got StageOptions"):
        hip_tree(q, k, STAGES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ahead: expected 0 or more, got -1"):
        hip_tree(q, k, TREE, ahead=-1)
    with pytest.raises(ValueError, match="q: expected at most Lk=3 queries, got Lq=4"):
        hip_tree(q, k[:, :, :3], TREE)
    with pytest.raises(ValueError, match="q: expected at least one row"):
        hip_tree(q[:, :, :0], k, TREE)
    with pytest.raises(ValueError, match="behind: expected 0 without kept, got 3"):
        hip_stages(q, k, STAGES, behind=3)
    _, kept = hip_stages(q, k, STAGES)
    with pytest.raises(ValueError, match="kept: expected fewer than the 3 stages, got 3"):
        hip_stages(q, k, STAGES, kept=(*kept, kept[0]))
