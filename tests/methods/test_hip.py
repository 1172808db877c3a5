"""HiP: the settings reach the search, and lists kept in decode never lose a key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowcontext import BlockIndex, LayerContext, Method, get_method
from lowcontext.ops.hierarchy import TreeOptions, hip_tree

SMALL = {"budget": 256, "window": 100, "sink": 20, "block_k": 16, "dense_layers": 0}
BOTH = [
    ("hip", {**SMALL, "refresh": 8, "leaf": 8, "beam": 256, "row_stride": 4}),
    (
        "infinitehip",
        {**SMALL, "stages": "64:512/4 16:384/4 4/4", "refresh": "8/4/2", "wide_layers": 0},
    ),
]


def qk(Lq: int, Lk: int, G: int = 2, D: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2 * G, Lq, D, generator=gen), torch.randn(1, 2, Lk, D, generator=gen)


def step(method: Method, q: Tensor, k: Tensor, n: int, layer: LayerContext) -> BlockIndex:
    ((_, _, index),) = method.parts(q[:, :, n - 1 : n], k[:, :, :n], layer)
    assert index is not None
    index.validate(1, n)
    return index


def mask(index: BlockIndex, n: int) -> Tensor:
    return index.to_mask(1, n)[:, :, 0]


def test_the_settings_are_those_of_the_search() -> None:
    q, k = qk(300, 3000)
    method = get_method(
        "hip", budget=320, window=70, sink=33, block_q=32, block_k=16, share="head", dense_last=0,
        leaf=4, beam=99, key_stride=2, row_stride=3, rows="last", representative="first",
    )  # fmt: skip
    index = method.prefill(q, k, LayerContext(layer_idx=3))
    options = TreeOptions(
        block_q=32, block_k=16, budget=320, sink=33, window=70, share="head", rows="last",
        leaf=4, beam=99, row_stride=3, key_stride=2, representative="first",
    )  # fmt: skip
    expected = hip_tree(q, k, options)
    assert torch.equal(index.kv_starts, expected.kv_starts)
    assert torch.equal(index.kv_num_blocks, expected.kv_num_blocks)
    assert index.block_size == (32, 16)


def test_decode_has_a_stride_of_its_own() -> None:
    q, k = qk(1, 3000)
    method = get_method("hip", budget=256, window=64, key_stride=64, decode_stride=2)
    index = method.decode(q, k, LayerContext(layer_idx=3))
    options = TreeOptions(block_q=1, budget=256, window=64, key_stride=2)
    assert torch.equal(index.kv_starts, hip_tree(q, k, options, ahead=7).kv_starts)


def test_the_published_setting_reads_the_leaves_themselves() -> None:
    q, k = qk(128, 4096)
    method = get_method(
        "hip", block_k=2, leaf=2, key_stride=1, beam=256, budget=512, window=256, sink=16,
        rows="last", row_stride=2, share="head", dense_last=0,
    )  # fmt: skip
    index = method.prefill(q, k, LayerContext(layer_idx=3))
    assert index.kv_starts.shape[1] == 4
    keys = index.kv_num_blocks * 2
    assert (keys[..., 0] == 512 + 16 + 256 + 64).all()  # and one more where the window is cut


def test_dense_layers_are_three_as_published() -> None:
    q, k = qk(1, 9000)
    for layer, dense in ((0, True), (2, True), (3, False)):
        ((_, _, index),) = get_method("hip").parts(q, k, LayerContext(layer_idx=layer))
        assert (index is None) == dense


@pytest.mark.parametrize(("name", "options"), BOTH)
def test_a_planted_needle_is_selected(name: str, options: dict) -> None:
    gen = torch.Generator().manual_seed(0)
    for at in (500, 3000, 7000):
        q, k = qk(64, 8192, D=64, seed=at)
        # A needle as long as a sentence, half a chunk of the first stage.
        k[:, 0, at : at + 32] += 3 * q[:, 0, 17]
        found = get_method(name, **options).prefill(q, k, LayerContext(layer_idx=3))
        assert found.to_mask(64, 8192)[0, 0, 17, at : at + 32].any()
        line = torch.randn(1, 4, 1, 64, generator=gen)
        k[:, 1, at : at + 32] += 3 * line[:, 3]
        decoded = get_method(name, **options).decode(line, k, LayerContext(layer_idx=3))
        assert decoded.to_mask(1, 8192)[0, 1, 0, at : at + 32].any()


@pytest.mark.parametrize(("name", "options"), BOTH)
def test_no_key_is_lost_between_a_kept_list_and_the_window(name: str, options: dict) -> None:
    q, k = qk(1100, 1100)
    method, layer = get_method(name, **options), LayerContext(layer_idx=3)
    frozen = None
    for n in range(1000, 1100):
        now = mask(step(method, q, k, n, layer), n)
        made = n - (n - 1000) % 8
        if made == n:
            frozen = (n - 1 - 100 + 1) // 16 * 16  # the first key that was no candidate
        assert now[..., :20].all()
        assert now[..., frozen:].all()
        assert now[..., n - 100 :].all()
        fresh = mask(step(method, q, k, n, LayerContext(layer_idx=3)), n)
        if made == n:
            assert torch.equal(now, fresh)


@pytest.mark.parametrize(("name", "options"), BOTH)
def test_between_searches_the_query_does_not_matter(name: str, options: dict) -> None:
    q, k = qk(1100, 1100)
    other = torch.randn(q.shape, generator=torch.Generator().manual_seed(9))
    method = get_method(name, **{**options, "refresh": 8})
    one, two = LayerContext(layer_idx=3), LayerContext(layer_idx=3)
    step(method, q, k, 1000, one)
    step(method, q, k, 1000, two)
    for n in range(1001, 1008):
        a, b = step(method, q, k, n, one), step(method, other, k, n, two)
        assert torch.equal(mask(a, n), mask(b, n))
    a, b = step(method, q, k, 1008, one), step(method, other, k, 1008, two)
    assert not torch.equal(mask(a, 1008), mask(b, 1008))


@pytest.mark.parametrize(("name", "options"), BOTH)
@pytest.mark.parametrize("event", ["crop", "prompt", "several", "dropped"])
def test_a_sequence_that_changes_is_searched_anew(name: str, options: dict, event: str) -> None:
    q, k = qk(1100, 1100)
    method, layer = get_method(name, **options), LayerContext(layer_idx=3)
    for n in (1000, 1001, 1002):
        step(method, q, k, n, layer)
    if event == "crop":
        n = 950  # fewer keys than before
    elif event == "prompt":
        # A chunk of prompt through the same method, which then stands at 1060 keys.
        list(method.parts(q[:, :, 1002:1060], k[:, :, :1060], layer))
        n = 1061
    elif event == "several":
        list(method.parts(q[:, :, 1002:1006], k[:, :, :1006], layer))
        n = 1007
    else:
        layer.memory.clear()
        n = 1003
    now = mask(step(method, q, k, n, layer), n)
    assert torch.equal(now, mask(step(method, q, k, n, LayerContext(layer_idx=3)), n))


@pytest.mark.parametrize(("name", "options"), BOTH)
def test_another_prefill_method_in_between_is_noticed(name: str, options: dict) -> None:
    # In a pair of methods a prompt does not pass through the decode method.
    q, k = qk(1100, 1100)
    method, layer = get_method(name, **options), LayerContext(layer_idx=3)
    step(method, q, k, 1000, layer)
    now = mask(step(method, q, k, 1003, layer), 1003)
    assert torch.equal(now, mask(step(method, q, k, 1003, LayerContext(layer_idx=3)), 1003))


@pytest.mark.parametrize(("name", "options"), BOTH)
def test_counters_are_those_of_a_sequence(name: str, options: dict) -> None:
    # Two sequences in different states, step by step in turn, as each would go alone.
    q, k = qk(1100, 1100)
    q2, k2 = qk(1100, 1100, seed=5)
    method = get_method(name, **options)
    layers = [LayerContext(layer_idx=3) for _ in range(4)]
    alone = [step(method, q, k, n, layers[0]) for n in range(1000, 1020)]
    alone2 = [step(method, q2, k2, n + 3, layers[1]) for n in range(1000, 1020)]
    for i, n in enumerate(range(1000, 1020)):
        assert torch.equal(mask(step(method, q, k, n, layers[2]), n), mask(alone[i], n))
        m = n + 3
        assert torch.equal(mask(step(method, q2, k2, m, layers[3]), m), mask(alone2[i], m))


@pytest.mark.parametrize(("name", "options"), BOTH)
def test_the_last_queries_of_a_prompt_are_dense(name: str, options: dict) -> None:
    q, k = qk(3000, 3000)
    method = get_method(name, **{**options, "dense_last": 70, "block_q": 64})
    parts = list(method.parts(q, k, LayerContext(layer_idx=3)))
    assert [(r0, r1, index is None) for r0, r1, index in parts] == [
        (0, 2880, False),
        (2880, 3000, True),
    ]
    short = list(method.parts(q[:, :, :100], k, LayerContext(layer_idx=3)))
    assert [(r0, r1, index is None) for r0, r1, index in short] == [(0, 100, True)]
    off = get_method(name, **{**options, "dense_last": 0})
    assert [p[:2] for p in off.parts(q, k, LayerContext(layer_idx=3))] == [(0, 3000)]


@pytest.mark.parametrize("name", ["hip", "infinitehip"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "heads"}, "{}: share: expected one of"),
        ({"window": 0}, "{}: window: expected at least 1, got 0"),
        ({"budget": 63}, "{}: budget: expected at least 64, got 63"),
        ({"dense_last": -1}, "{}: dense_last: expected at least 0, got -1"),
    ],
)
def test_bad_settings_are_named_with_the_method(name: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(name)):
        get_method(name, **change)


def test_bad_settings_of_hip_are_named() -> None:
    with pytest.raises(ValueError, match="hip: leaf: expected a divisor of block_k=64, got 7"):
        get_method("hip", leaf=7)
    with pytest.raises(ValueError, match="hip: refresh: expected at least 1, got 0"):
        get_method("hip", refresh=0)
    with pytest.raises(ValueError, match="hip: decode_stride: expected at most leaf=4, got 8"):
        get_method("hip", leaf=4, decode_stride=8)
    with pytest.raises(ValueError, match="hip: key_stride: expected at most leaf=4, got 8"):
        get_method("hip", leaf=4, key_stride=8)
