"""InfiniteHiP: settings and the stages' own intervals. What it shares with hip is in test_hip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext import LayerContext, get_method
from lowcontext.methods import _hierarchy
from lowcontext.ops.hierarchy import Stage, StageOptions, hip_stages

SMALL = {
    "stages": "64:512/4 16:384/2 4/1",
    "budget": 256,
    "window": 100,
    "sink": 20,
    "block_k": 16,
    "wide_layers": 0,
}


def qk(Lq: int, Lk: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, Lq, 16, generator=gen), torch.randn(1, 2, Lk, 16, generator=gen)


def options(**changes: object) -> StageOptions:
    values = {
        "block_k": 16,
        "budget": 256,
        "sink": 20,
        "window": 100,
        "stages": (Stage(64, 512, 4), Stage(16, 384, 2), Stage(4, 0, 1)),
    }
    return StageOptions(**{**values, **changes})


def test_the_settings_are_those_of_the_search() -> None:
    q, k = qk(300, 3000)
    changes = {"share": "layer", "representative": "first", "chunk_score": "last", "block_q": 32}
    method = get_method("infinitehip", **SMALL, **changes, dense_last=0)
    index = method.prefill(q, k, LayerContext())
    expected, _ = hip_stages(q, k, options(**changes))
    assert torch.equal(index.kv_starts, expected.kv_starts)
    assert torch.equal(index.kv_num_blocks, expected.kv_num_blocks)


def test_the_first_layers_list_more() -> None:
    q, k = qk(64, 4096)
    method = get_method(
        "infinitehip", **{**SMALL, "stages": "64:2048 16:1024 4", "wide_layers": 2}, wide=3
    )
    tiles = [
        int(method.prefill(q, k, LayerContext(layer_idx=layer)).kv_num_blocks[0, 0, 0])
        for layer in (0, 1, 2)
    ]
    assert tiles[0] == tiles[1] == tiles[2] + 2 * 256 // 16


def test_each_stage_runs_again_at_its_own_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk(1100, 1100)
    ran = []

    def spy(q: Tensor, k: Tensor, o: StageOptions, **kwargs: object) -> object:
        ran.append((k.shape[2], len(kwargs["kept"]), kwargs["behind"]))
        return hip_stages(q, k, o, **kwargs)

    monkeypatch.setattr("lowcontext.methods.infinitehip.hip_stages", spy)
    method, layer = get_method("infinitehip", **SMALL, refresh="16/8/4"), LayerContext()
    for n in range(1000, 1034):
        method.decode(q[:, :, n - 1 : n], k[:, :, :n], layer)
    # (keys, first stage that runs, steps since stage 0)
    assert ran == [
        (1000, 0, 0), (1004, 2, 4), (1008, 1, 8), (1012, 2, 12),
        (1016, 0, 0), (1020, 2, 4), (1024, 1, 8), (1028, 2, 12), (1032, 0, 0),
    ]  # fmt: skip
    assert list(layer.memory) == [_hierarchy._KEY]


def test_the_last_interval_stands_for_the_stages_behind_it() -> None:
    for given, expected in ((5, (5, 5, 5)), ("16/4", (16, 4, 4)), ("9/8/7", (9, 8, 7))):
        assert get_method("infinitehip", **SMALL, refresh=given)._intervals == expected


def test_blocks_share_a_stage_in_prefill_where_the_window_covers_them() -> None:
    for window, block_q, expected in ((49, 16, (4, 2)), (48, 16, (2, 2)), (49, 1, (1, 1))):
        method = get_method(
            "infinitehip", block_q=16, window=window, stages="64:512/8x4 32:256/8x2 4"
        )
        stages = method._options(9, block_q).stages
        assert tuple(stage.blocks for stage in stages) == (*expected, 1)


def test_intervals_that_do_not_nest_run_when_due() -> None:
    q, k = qk(1100, 1100)
    method, layer = get_method("infinitehip", **SMALL, refresh="7/5/3"), LayerContext()
    made = []
    for n in range(1000, 1020):
        method.decode(q[:, :, n - 1 : n], k[:, :, :n], layer)
        made.append(layer.memory[_hierarchy._KEY].made)
        for keys, every in zip(made[-1], (7, 5, 3), strict=True):
            assert n - keys < every
    assert made[-1][0] <= made[-1][1] <= made[-1][2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"stages": "64:512;8"},
            ValueError,
            "infinitehip: stages: expected 'chunk:keep ... chunk'",
        ),
        ({"stages": "48:512 32"}, ValueError, "infinitehip: stages: expected chunks that divide"),
        ({"stages": "64:32 8"}, ValueError, "infinitehip: stages: expected keep of at least"),
        ({"refresh": "9/8/7/6"}, ValueError, "refresh: expected at most 3 positive numbers"),
        ({"refresh": "0/8/4"}, ValueError, "refresh: expected at most 3 positive numbers"),
        ({"refresh": "often"}, ValueError, "infinitehip: refresh: expected numbers as '16/4'"),
        ({"wide": 0}, ValueError, "infinitehip: wide: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_method("infinitehip", **{**SMALL, **change})
