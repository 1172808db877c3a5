"""Keys at other positions: rotation, lists and gathered rows."""

from __future__ import annotations

import pytest
import torch

from tests.ops.rotary_checks import (
    DTYPES,
    LAYOUTS,
    check_errors,
    check_gather,
    check_lists,
    check_rotation,
    check_staying,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("largest", [1000, 2**24, 2**31 - 1])
def test_a_rotation_equals_fp64(
    layout: tuple[int, int, bool], dtype: torch.dtype, largest: int
) -> None:
    check_rotation(layout, dtype, largest, "reference", "cpu")


def test_rows_that_stay_come_back_bit_for_bit() -> None:
    check_staying("reference", "cpu")


def test_lists_are_those_that_python_joins() -> None:
    check_lists("reference", "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 2])
def test_gathered_keys_equal_fp64_and_nothing_else_is_read(
    layout: tuple[int, int, bool], dtype: torch.dtype, heads: int
) -> None:
    check_gather(layout, dtype, heads, "reference", "cpu")


def test_what_does_not_fit_is_refused_by_name() -> None:
    check_errors()
