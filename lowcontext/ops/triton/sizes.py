"""Sizes of grids and blocks. triton's own functions of this kind take microseconds on the host."""

from __future__ import annotations


def ceil_div(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n; 1 for n below 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
