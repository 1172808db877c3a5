"""Cases of the Triton kernels of moved keys; `test_triton.py` runs them in their own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowcontext.ops.rotary import triton as kernels
from tests.ops.rotary_checks import (
    LAYOUTS,
    check_gather,
    check_lists,
    check_rotation,
    check_staying,
    frequencies,
    rand,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts fp32 to bf16 where a GPU rounds.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
pytestmark = pytest.mark.ops("rotary")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest int32, so what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("largest", [1000, 2**24, 2**31 - 1])
def test_a_rotation_equals_fp64(
    layout: tuple[int, int, bool], dtype: torch.dtype, largest: int
) -> None:
    check_rotation(layout, dtype, largest, "triton", DEVICE)


def test_rows_that_stay_come_back_bit_for_bit() -> None:
    check_staying("triton", DEVICE)


def test_lists_are_those_that_python_joins() -> None:
    check_lists("triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2])
def test_gathered_keys_equal_fp64_and_nothing_else_is_read(
    layout: tuple[int, int, bool], dtype: torch.dtype, heads: int
) -> None:
    check_gather(layout, dtype, heads, "triton", DEVICE)


def test_a_key_outside_the_context_reads_no_foreign_memory() -> None:
    k = rand(1, 1, 40, 16).to(DEVICE)
    keys = torch.tensor([[[-5, 3, 2**30, 39]]], dtype=torch.int32, device=DEVICE)
    first = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    moved, values = kernels.gather_moved(k, k, keys, first, frequencies(8, DEVICE), False)
    assert torch.equal(values[0, 0, 1::2], k[0, 0, [3, 39]])
    assert not values[0, 0, ::2].any()
    assert not moved[0, 0, ::2].any()


def test_empty_tensors_give_empty_tensors() -> None:
    x, ints = rand(0, 2, 9, 16).to(DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE)
    f, lists = frequencies(8, DEVICE), ints.view(0, 2, 0)
    assert kernels.rotate_to(x, 0, 5, f, False, x.dtype).shape == x.shape
    assert [a.shape for a in kernels.list_keys(lists, ints, 3, 9, 12, 1, 0)] == [(0, 2, 12), (0,)]
    assert kernels.gather_moved(x, x, lists, ints, f, False)[0].shape == (0, 2, 0, 16)


def test_moved_keys_trace_into_one_graph_with_their_fakes() -> None:
    x, f = rand(2, 2, 60, 16).to(DEVICE), frequencies(8, DEVICE)
    starts = torch.arange(5, 20, dtype=torch.int32, device=DEVICE).expand(2, 1, 15)
    counts = torch.tensor([4, 9], dtype=torch.int32, device=DEVICE)

    def moved(x: Tensor) -> tuple[Tensor, ...]:
        keys, first = kernels.list_keys(starts, counts, 50, 60, 40, 1, 2)
        turned = kernels.rotate_to(x, range(60), 0, f, False, torch.float16)
        return (turned, *kernels.gather_moved(x, x, keys, first, f, True))

    compiled = torch.compile(moved, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x), moved(x), strict=True):
        assert torch.equal(a, b)
    ops, tests = torch.ops.lowcontext_triton, ("test_schema", "test_faketensor")
    place = torch.arange(60, device=DEVICE)
    for old in (place, None):
        args = (x, old, None, [3, 1, 0, 0], f, True, torch.bfloat16)
        torch.library.opcheck(ops.rotate_to.default, args, test_utils=tests)
    for low in (counts, None):
        args = (starts, counts, low, [50, 60], 40, 1, 2)
        torch.library.opcheck(ops.list_keys.default, args, test_utils=tests)
    lists = (starts, counts, f, False)
    torch.library.opcheck(ops.gather_moved.default, (x, x[..., :8], *lists), test_utils=tests)
