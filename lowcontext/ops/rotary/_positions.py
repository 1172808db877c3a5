"""Positions of rows, as callers give them and as kernels take them."""

from __future__ import annotations

from torch import Tensor

# Of rows [..., L]: a tensor, one number for all of them, or a range of L numbers.
Positions = Tensor | int | range


def kernel_positions(*given: Positions) -> tuple[list[Tensor | None], list[int]]:
    """Each as a tensor or None, and then its first number and its step along L."""
    tensors, steps = [], []
    for positions in given:
        tensors.append(positions if isinstance(positions, Tensor) else None)
        if isinstance(positions, range):
            steps += [positions.start, positions.step]
        else:
            steps += [positions if isinstance(positions, int) else 0, 0]
    return tensors, steps
