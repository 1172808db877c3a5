"""Keys at other positions: rotation, lists and gathered rows."""

from __future__ import annotations

import pytest
import torch

from lowcontext.ops.rotary import gather_moved, rotate_to
from tests.ops.rotary_checks import (
    DTYPES,
    LAYOUTS,
    check_errors,
    check_gather,
    check_lists,
    check_rotation,
    check_staying,
    exact,
    frequencies,
    rand,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("largest", [1000, 2**24, 2**31 - 1])
def test_a_rotation_equals_fp64(
    layout: tuple[int, int, bool], dtype: torch.dtype, largest: int, backend: str
) -> None:
    check_rotation(layout, dtype, largest, backend, "cpu")


def test_rows_that_stay_come_back_bit_for_bit(backend: str) -> None:
    check_staying(backend, "cpu")


def test_lists_are_those_that_python_joins() -> None:
    check_lists("reference", "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2])
def test_gathered_keys_equal_fp64_and_nothing_else_is_read(
    layout: tuple[int, int, bool], dtype: torch.dtype, heads: int, backend: str
) -> None:
    check_gather(layout, dtype, heads, backend, "cpu")


def test_a_long_list_does_not_depend_on_the_number_of_threads(backend: str) -> None:
    k, f = rand(2, 2, 3000, 128), frequencies(64, "cpu")
    keys = torch.arange(0, 3000, 2, dtype=torch.int32).expand(2, 2, -1)
    first = torch.tensor([0, 700], dtype=torch.int32)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        moved = gather_moved(k, k, keys, first, f, backend=backend)
        found.append((*moved, rotate_to(k, range(3000), 4, f, backend=backend)))
    torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    # Rows of one position share their angles, and rows of a list do not.
    (moved, values, turned), at = found[0], torch.arange(1500, 3000)
    assert torch.equal(values[1, :, 700:], k[1, :, 1400::2])
    want = exact(k[:, :, ::2], keys[0, 0], at, f, False)
    torch.testing.assert_close(moved[0].double(), want[0], atol=2e-6, rtol=0)
    want = exact(k, torch.arange(3000), torch.tensor(4), f, False)
    torch.testing.assert_close(turned.double(), want, atol=2e-6, rtol=0)


def test_what_does_not_fit_is_refused_by_name() -> None:
    check_errors()


def test_the_kernels_themselves_read_no_foreign_memory() -> None:
    x, f = rand(1, 1, 40, 16), frequencies(8, "cpu")
    keys = torch.tensor([[[-5, 3, 2**30, 39]]], dtype=torch.int32)
    first = torch.zeros(1, dtype=torch.int32)
    moved, values = gather_moved(x, x, keys, first, f, backend="native")
    assert torch.equal(values[0, 0, 1::2], x[0, 0, [3, 39]])
    assert not values[0, 0, ::2].any()
    assert not moved[0, 0, ::2].any()
    ops = torch.ops.lowcontext
    for call, message in (
        (lambda: ops.rotate_to(x, keys, None, 0, 0, 0, 0, f, False), "old: expected shape"),
        (lambda: ops.rotate_to(x, None, None, 0, 0, 5, 0, rand(9), False), "inv_freq: expected at"),
        (lambda: ops.rotate_to(x.mT, None, None, 0, 0, 5, 0, f, False), "x: expected a contiguous"),
        (lambda: ops.gather_moved(x, x[:, :, :9], keys, first, f, False), "v: expected shape"),
        (lambda: ops.gather_moved(x, x, keys.long(), first, f, False), "keys: expected an int32"),
        (lambda: ops.gather_moved(x, x, keys, first[:0], f, False), "first: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
