"""SparseCacheLayer against transformers' DynamicLayer, operation by operation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lowcontext.integrations.cache import SharedMemory, SparseCacheLayer
from lowcontext.methods import get_method

B, H, D, DV = 3, 2, 8, 8


def states(
    length: int, *, seed: int = 0, batch: int = B, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, H, length, D, generator=generator).to(dtype)
    v = torch.randn(batch, H, length, DV, generator=generator).to(dtype)
    return k, v


def pair() -> tuple[SparseCacheLayer, DynamicLayer]:
    return SparseCacheLayer(), DynamicLayer()


def expect_equal(ours: SparseCacheLayer, theirs: DynamicLayer) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_appending_returns_what_concatenation_returns(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    for step, length in enumerate([5, 1, 1, 300, 1, 700, 1]):
        k, v = states(length, seed=step, dtype=dtype)
        got, expected = ours.update(k, v), theirs.update(k, v)
        assert got[0].dtype == dtype
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        expect_equal(ours, theirs)


def test_unused_room_of_the_buffer_is_never_returned() -> None:
    layer = SparseCacheLayer()
    k, v = states(4)
    layer.update(k, v)
    for buffer in layer._buffer or ():
        buffer[:, :, 4:] = torch.nan
    keys, values = layer.update(*states(1))
    assert not keys.isnan().any()
    assert not values.isnan().any()
    assert keys.shape[2] == 5


OPERATIONS: dict[str, Callable[[SparseCacheLayer | DynamicLayer], None]] = {
    "reorder": lambda x: x.reorder_cache(torch.tensor([2, 0, 2])),
    "select": lambda x: x.batch_select_indices(torch.tensor([0, 2])),
    "select one": lambda x: x.batch_select_indices(torch.tensor([1])),
    "repeat": lambda x: x.batch_repeat_interleave(2),
    "crop": lambda x: x.crop(-3),
    "crop all": lambda x: x.crop(-6),
}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_an_operation_and_what_follows_equal_the_dynamic_layer(name: str) -> None:
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.update(*states(5))
        layer.update(*states(1, seed=1))
        OPERATIONS[name](layer)
    if theirs.get_seq_length():
        expect_equal(ours, theirs)
    batch = 3 if name == "crop all" else theirs.keys.shape[0]
    for seed in (2, 3):
        k, v = states(2, seed=seed, batch=batch)
        got, expected = ours.update(k, v), theirs.update(k, v)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_repeated_reorders_do_not_mix_rows() -> None:
    """Beam search: append and reorder in turn."""
    ours, theirs = pair()
    generator = torch.Generator().manual_seed(7)
    for step in range(20):
        k, v = states(1, seed=step)
        order = torch.randint(0, B, (B,), generator=generator)
        for layer in (ours, theirs):
            layer.update(k, v)
            layer.reorder_cache(order)
        expect_equal(ours, theirs)


def test_reordering_keeps_the_free_room() -> None:
    layer = SparseCacheLayer()
    layer.update(*states(5))
    capacity = layer.capacity
    layer.reorder_cache(torch.tensor([0, 0, 1]))
    assert layer.capacity == capacity > 5


def test_mask_sizes_equal_those_of_the_dynamic_layer() -> None:
    ours, theirs = pair()
    for length in (5, 1):
        try:
            expected = theirs.get_mask_sizes(length)
            got = ours.get_mask_sizes(length)
        except AttributeError:  # before transformers 5.4 the argument is a tensor of positions
            expected = theirs.get_mask_sizes(torch.arange(length))
            got = ours.get_mask_sizes(torch.arange(length))
        assert got == expected
        k, v = states(length)
        ours.update(k, v)
        theirs.update(k, v)
    assert ours.get_max_cache_shape() == -1


def test_reset_empties_the_layer_and_it_can_be_filled_again() -> None:
    layer = SparseCacheLayer()
    layer.update(*states(5))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    assert not layer.is_initialized
    k, v = states(2, batch=1)
    assert torch.equal(layer.update(k, v)[0], k)


def test_offload_and_prefetch_leave_the_layer_as_it_is() -> None:
    layer = SparseCacheLayer()
    k, v = states(5)
    layer.update(k, v)
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, k)


def test_buffers_are_reallocated_a_logarithmic_number_of_times() -> None:
    layer = SparseCacheLayer()
    tokens, addresses = 20_000, set()
    k, v = states(1, batch=1)
    for _ in range(tokens):
        keys, _ = layer.update(k, v)
        addresses.add((keys.untyped_storage().data_ptr(), layer.capacity))
    reallocations = len(addresses)
    # 64 at a time up to 256 tokens, then by a quarter: log(20000 / 256) / log(5 / 4) = 19.5.
    assert reallocations <= 4 + 20
    assert layer.capacity <= tokens * 1.25 + 64


def test_a_prompt_is_stored_with_one_allocation_and_little_slack() -> None:
    layer = SparseCacheLayer()
    layer.update(*states(8000))
    assert 8000 < layer.capacity <= 10000


def test_assigning_keys_and_values_replaces_the_buffer() -> None:
    layer = SparseCacheLayer()
    layer.update(*states(5))
    k, v = states(9, seed=4)
    layer.keys, layer.values = k, v
    assert layer.get_seq_length() == 9
    new_k, new_v = states(1, seed=5)
    keys, values = layer.update(new_k, new_v)
    assert torch.equal(keys, torch.cat([k, new_k], dim=2))
    assert torch.equal(values, torch.cat([v, new_v], dim=2))


def test_a_batch_that_does_not_fit_is_refused() -> None:
    layer = SparseCacheLayer()
    layer.update(*states(5))
    with pytest.raises(ValueError, match="expected batch 3"):
        layer.update(*states(1, batch=1))


def test_a_cache_filled_in_inference_mode_goes_on_outside_it() -> None:
    layer = SparseCacheLayer()
    k, v = states(5)
    with torch.inference_mode():
        layer.update(k, v)
    new_k, new_v = states(1, seed=1)
    keys, _ = layer.update(new_k, new_v)
    assert torch.equal(keys, torch.cat([k, new_k], dim=2))


def test_gradients_flow_through_appended_keys() -> None:
    layer = SparseCacheLayer()
    layer.update(*states(5))
    k, v = (x.requires_grad_() for x in states(2, seed=1))
    keys, values = layer.update(k, v)
    more_k, more_v = (x.requires_grad_() for x in states(1, seed=2))
    all_keys, _ = layer.update(more_k, more_v)
    (keys.square().sum() + values.sum() + all_keys.sum()).backward()
    torch.testing.assert_close(k.grad, 2 * k + 1)
    assert torch.equal(v.grad, torch.ones_like(v))


def test_adopting_copies_a_dynamic_layer_and_leaves_it_alone() -> None:
    theirs = DynamicLayer()
    k, v = states(5)
    theirs.update(k, v)
    ours = SparseCacheLayer.adopt(theirs, SharedMemory())
    ours.update(*states(1, seed=1))
    assert torch.equal(theirs.keys, k)
    assert torch.equal(ours.keys[:, :, :5], k)


def test_a_copy_of_a_cache_is_independent() -> None:
    cache = DynamicCache()
    cache.layers.append(SparseCacheLayer())
    k, v = states(5)
    cache.update(k, v, 0)
    twin = copy.deepcopy(cache)
    cache.update(*states(1, seed=1), 0)
    other = states(1, seed=2)
    keys, _ = twin.update(*other, 0)
    assert torch.equal(keys, torch.cat([k, other[0]], dim=2))
    assert torch.equal(cache.layers[0].keys[:, :, :5], k)


# -- memory ------------------------------------------------------------------------------------


def two_layers() -> tuple[SparseCacheLayer, SparseCacheLayer]:
    shared = SharedMemory()
    layers = SparseCacheLayer(shared), SparseCacheLayer(shared)
    for layer in layers:
        layer.update(*states(6))
    return layers


METHOD = get_method("dense")


def remember(layer: SparseCacheLayer, index: int = 0) -> None:
    context = layer.context(METHOD, None, index, 2, 1.0, None)
    context.memory["seen"] = 1
    context.shared["seen"] = 1


def memories(layer: SparseCacheLayer, index: int = 0) -> tuple[bool, bool]:
    context = layer.context(METHOD, None, index, 2, 1.0, None)
    return "seen" in context.memory, "seen" in context.shared


DROPPING: dict[str, Callable[[SparseCacheLayer], object]] = {
    **OPERATIONS,
    "reset": lambda x: x.reset(),
    "assign": lambda x: setattr(x, "keys", states(6)[0]),
}


@pytest.mark.parametrize("name", sorted(DROPPING))
def test_what_changes_cached_tokens_drops_memory(name: str) -> None:
    first, second = two_layers()
    remember(first)
    remember(second, 1)
    DROPPING[name](first)
    assert memories(first) == (False, False)
    # The other layer keeps its own memory until the same is done to it; what is shared is gone.
    assert memories(second, 1) == (True, False)


@pytest.mark.parametrize("name", ["append", "crop nothing"])
def test_memory_survives_appending(name: str) -> None:
    layer, _ = two_layers()
    remember(layer)
    if name == "append":
        layer.update(*states(1000))
    else:
        layer.crop(layer.get_seq_length())
    assert memories(layer) == (True, True)


def test_rows_have_memories_of_their_own_and_layers_share_one_per_row() -> None:
    first, second = two_layers()
    row = first.context(METHOD, (0, 3), 0, 2, 1.0, None)
    other = first.context(METHOD, (1, 0), 0, 2, 1.0, None)
    assert row.memory is not other.memory
    assert row.shared is not other.shared
    assert second.context(METHOD, (0, 3), 1, 2, 1.0, None).shared is row.shared
    assert second.context(METHOD, (0, 3), 1, 2, 1.0, None).memory is not row.memory


def test_another_method_starts_without_memory() -> None:
    layer, _ = two_layers()
    remember(layer)
    context = layer.context(get_method("quest"), None, 0, 2, 1.0, None)
    assert context.memory == {}
    assert context.shared == {}


def test_a_sequence_of_crops_equals_the_dynamic_layer() -> None:
    """Assisted decoding: append a few, take some back."""
    ours, theirs = pair()
    for step in range(12):
        k, v = states(4, seed=step)
        ours.update(k, v)
        theirs.update(k, v)
        for layer in (ours, theirs):
            layer.crop(-1 - step % 3)
        expect_equal(ours, theirs)
    assert ours.get_seq_length() == 12 * 4 - 12 - 12
