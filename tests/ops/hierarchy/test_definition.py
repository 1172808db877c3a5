"""Both searches against their definitions, list by list."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import BACKENDS, STAGES, TREE, expected_lists, integers, listed, qk

from lowcontext.ops.hierarchy import Stage, hip_stages, hip_tree

LENGTHS = [(64, 700), (61, 701), (1, 650), (3, 333), (100, 100), (5, 5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", ["head", "group", "layer"])
@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS)
def test_the_tree_lists_what_the_beam_search_finds(
    backend: str, share: str, Lq: int, Lk: int
) -> None:
    q, k = qk(Lq, Lk, B=2)
    for rows in ("mean", "last"):
        for which in ("center", "first", "last", "spread"):
            o = replace(TREE, share=share, rows=rows, representative=which)
            assert listed(hip_tree(q, k, o, backend=backend)) == expected_lists(q, k, o)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {"leaf": 16, "key_stride": 1},
        {"leaf": 2, "block_k": 2, "key_stride": 1, "budget": 20},
        {"leaf": 1, "key_stride": 1},
        {"leaf": 8, "key_stride": 3, "representative": "spread"},
        {"leaf": 16, "key_stride": 1, "share": "layer", "beam": 3},
        {"leaf": 64, "block_k": 64, "key_stride": 4, "budget": 128, "beam": 2},
        {"beam": 1},
        {"beam": 1000},
        {"row_stride": 1},
        {"row_stride": 7},
        {"row_stride": 16},
        {"block_q": 1},
        {"sink": 0, "window": 1},
    ],
    ids=str,
)
def test_tree_options_mean_what_they_say(backend: str, change: dict) -> None:
    o = replace(TREE, **change)
    for Lq, Lk in ((64, 640), (2, 640)):
        q, k = qk(Lq, Lk)
        q = 14 * q  # means of 7 and of 2 are whole numbers, too
        assert listed(hip_tree(q, k, o, backend=backend)) == expected_lists(q, k, o)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", ["head", "group", "layer"])
@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS)
def test_the_stages_list_what_select_rep_finds(backend: str, share: str, Lq: int, Lk: int) -> None:
    q, k = qk(Lq, Lk, B=2)
    for which in ("center", "first", "last"):
        for score in ("max", "last"):
            o = replace(STAGES, share=share, representative=which, chunk_score=score)
            index, _ = hip_stages(q, k, o, backend=backend)
            assert listed(index) == expected_lists(q, k, o)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {"stages": (Stage(16),)},
        {"stages": (Stage(1, row_stride=1),), "budget": 16},
        {"stages": (Stage(128, 128), Stage(16))},
        {"stages": (Stage(48, 144), Stage(8))},
        {"stages": (Stage(48, 144), Stage(2))},
        {"stages": (Stage(24, 96), Stage(1))},
        {"stages": (Stage(64, 256), Stage(2)), "share": "layer", "chunk_score": "last"},
        {"stages": (Stage(64, 256), Stage(2)), "block_k": 2, "budget": 20},
        {"rows": "last"},
        {"block_q": 1},
        {"sink": 0, "window": 1},
        {"stages": (Stage(64, 256, 4, 2), Stage(2, row_stride=1)), "sink": 0},
        {"stages": (Stage(48, 192, 8, 6), Stage(24, 96, 8, 3), Stage(8)), "window": 100},
    ],
    ids=str,
)
def test_stage_options_mean_what_they_say(backend: str, change: dict) -> None:
    o = replace(STAGES, **change)
    for Lq, Lk in ((64, 640), (2, 640)):
        q, k = qk(Lq, Lk)
        assert listed(hip_stages(q, k, o, backend=backend)[0]) == expected_lists(q, k, o)


@pytest.mark.skipif("native" not in BACKENDS, reason="the native backend is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [8, 24, 40, 128])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_native_equals_reference_on_every_instruction_set(
    dtype: torch.dtype, D: int, isa: str
) -> None:
    try:
        torch.ops.lowcontext._set_cpu_isa(isa)
    except RuntimeError:
        pytest.skip(f"this machine has no {isa}")
    try:
        for G, Lq in ((1, 1), (2, 1), (3, 1), (7, 2), (4, 64)):
            room = torch.full((1, 2, 700, D + 8), torch.nan, dtype=dtype)
            k = room[:, :, 30:670, :D].copy_(integers(1, 2, 640, D, seed=D))
            q = integers(1, 2 * G, Lq, D, seed=G).to(dtype)
            tree = replace(TREE, block_q=1 if Lq < 16 else 16)
            stages = replace(STAGES, block_q=tree.block_q)
            for o in (tree, replace(tree, leaf=16, key_stride=1)):
                ours, exact = (hip_tree(q, k, o, backend=b) for b in ("native", "reference"))
                assert listed(ours) == listed(exact)
            ours, exact = (hip_stages(q, k, stages, backend=b)[0] for b in ("native", "reference"))
            assert listed(ours) == listed(exact)
    finally:
        torch.ops.lowcontext._set_cpu_isa("auto")


@pytest.mark.skipif("native" not in BACKENDS, reason="the native backend is not built")
@pytest.mark.parametrize("share", ["group", "layer"])
def test_blocks_searched_together_need_not_have_nodes_of_one_size(share: str) -> None:
    # 92 blocks with nodes of 1, 2 and 4 leaves; a stretch has more leaves than panels fit.
    q, k = integers(1, 4, 1466, 256, seed=1), integers(1, 2, 1500, 256, seed=2)
    o = replace(TREE, leaf=16, key_stride=1, beam=12, row_stride=16, share=share)
    ours, exact = (hip_tree(16 * q, k, o, backend=b) for b in ("native", "reference"))
    assert listed(ours) == listed(exact)


@pytest.mark.skipif("native" not in BACKENDS, reason="the native backend is not built")
def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    q, k = torch.randn(1, 4, 256, 16), torch.randn(1, 2, 5000, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            index, chunks = hip_stages(q, k, STAGES, backend="native")
            results.append([index.kv_starts, *(chunk.starts for chunk in chunks)])
            for leaf in (4, 16):
                tree = replace(TREE, leaf=leaf, key_stride=1)
                results[-1].append(hip_tree(q, k, tree, backend="native").kv_starts)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
