"""Attention heads and MLPs that are written down: linear readings of a residual stream.

A *reading* is a matrix [n, hidden] that gives n figures of the residual stream. Heads compare
readings (query with key) and copy readings (value); every projection is scaled by the known divisor
of RMSNorm, so that figures mean the same before and after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and what RoPE leaves of a head.

    Attributes:
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of a head.
        intermediate: Width of the MLPs.
        theta: RoPE's base.
        first_slow: First pair of dims that turns too little to matter within the positions.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    theta: float
    first_slow: int

    @property
    def pairs(self) -> int:
        """Pairs of dims that turn together: dims i and i + pairs."""
        return self.head_dim // 2

    @property
    def slow_dims(self) -> list[int]:
        """Dims that carry content."""
        slow = range(self.first_slow, self.pairs)
        return [*slow, *(pair + self.pairs for pair in slow)]

    def frequencies(self) -> Tensor:
        """Returns the rotation per token of each pair of dims, float64."""
        return self.theta ** (-torch.arange(self.pairs, dtype=torch.float64) / self.pairs)


class Attention:
    """The four projections of a layer, filled head by head.

    Args:
        shape: Sizes.
        rms: What RMSNorm divides the layer's input by.
        constant: A reading [1, hidden] that is 1 at every token.
    """

    def __init__(self, shape: Shape, rms: float, constant: Tensor) -> None:
        self.shape, self.rms, self.constant = shape, rms, constant
        size = shape.head_dim
        self.q = torch.zeros(shape.heads, size, shape.hidden)
        self.k = torch.zeros(shape.kv_heads, size, shape.hidden)
        self.v = torch.zeros(shape.kv_heads, size, shape.hidden)
        self.o = torch.zeros(shape.hidden, shape.heads, size)
        # What BOS shall show: nothing, but for what a sink asks of it.
        self.bos_key = torch.zeros(shape.kv_heads, size)
        self.bos_value = torch.zeros(shape.kv_heads, size)

    def key(self, head: int, dims: Sequence[int], reading: Tensor) -> None:
        """Lets a key head show a reading on some dims."""
        self.k[head, list(dims)] += reading * self.rms

    def ask(self, head: int, dims: Sequence[int], reading: Tensor, logit: float) -> None:
        """Lets a query head add ``logit * reading . key`` on some dims."""
        self.q[head, list(dims)] += reading * (logit * self.rms * math.sqrt(self.shape.head_dim))

    def ask_distance(self, head: int, logits: dict[int, float], offset: int = 0) -> None:
        """Lets a query head add ``a_i cos(w_i (distance - offset))`` for each pair i.

        The key head must show distances (``show_distance``).
        """
        frequencies = self.shape.frequencies()
        for pair, logit in logits.items():
            angle = -offset * float(frequencies[pair])
            self.ask(head, [pair], self.constant, logit * math.cos(angle))
            self.ask(head, [pair + self.shape.pairs], self.constant, logit * math.sin(angle))

    def show_distance(self, head: int) -> None:
        """Gives every key the constant that distances are read from."""
        fast = range(self.shape.first_slow)
        self.key(head, fast, self.constant.expand(len(fast), -1))

    def sink(self, head: int, logit: float, reading: Tensor | None = None) -> None:
        """Lets a query head see BOS with this logit; its last dim is kept for that."""
        last = self.shape.head_dim - 1
        self.bos_key[head * self.shape.kv_heads // self.shape.heads, last] = 1.0
        self.ask(head, [last], self.constant if reading is None else reading, logit)

    def value(self, head: int, dims: Sequence[int], reading: Tensor) -> None:
        """Lets a value head carry a reading on some dims."""
        self.v[head, list(dims)] += reading * self.rms

    def write(self, head: int, dims: Sequence[int], columns: Sequence[int], factor: float) -> None:
        """Adds what a head read on some dims to columns of the residual stream."""
        self.o[list(columns), head, list(dims)] += factor

    def state(self) -> dict[str, Tensor]:
        """Returns the projections as a Llama layer holds them."""
        return {
            "q_proj": self.q.flatten(0, 1),
            "k_proj": self.k.flatten(0, 1),
            "v_proj": self.v.flatten(0, 1),
            "o_proj": self.o.flatten(1, 2),
        }

    def pin_bos(self, residual: Tensor, flag: int, eps: float) -> Tensor:
        """Makes BOS show exactly what it shall, and returns its residual behind the layer.

        Args:
            residual: [hidden], that of BOS before the layer.
            flag: The column that only BOS has.
            eps: RMSNorm's.
        """
        x = normed(residual, eps)
        for matrix, shown in ((self.k, self.bos_key), (self.v, self.bos_value)):
            matrix[..., flag] += (shown - matrix @ x) / x[flag]
        value = self.bos_value.repeat_interleave(self.shape.heads // self.shape.kv_heads, dim=0)
        return residual + torch.einsum("chd,hd->c", self.o, value)


class Mlp:
    """A SwiGLU layer used as hinges: ``slope * relu(reading - kink)`` each.

    ``silu(s z) / s`` stands for ``relu(z)``: they differ by under 0.28 / s.
    """

    def __init__(self, shape: Shape, rms: float, constant: Tensor) -> None:
        self.rms, self.constant = rms, constant[0]
        self.gate = torch.zeros(shape.intermediate, shape.hidden)
        self.up = torch.zeros(shape.intermediate, shape.hidden)
        self.down = torch.zeros(shape.hidden, shape.intermediate)
        # Unit 0 is always on: silu(32) is 32.
        self.gate[0] = 32.0 * rms * self.constant
        self.up[0] = rms * self.constant
        self.used = 1

    def hinge(
        self, reading: Tensor, kink: float, slope: float, column: int, sharpness: float = 8.0
    ) -> None:
        """Adds one hinge of a reading [hidden] to a column of the residual stream."""
        row, self.used = self.used, self.used + 1
        self.gate[row] = sharpness * self.rms * (reading - kink * self.constant)
        self.up[row] = self.constant * self.rms
        self.down[column, row] = slope / sharpness

    def parity(self, readings: Sequence[Tensor], column: int) -> None:
        """Writes the product of readings that are +1 or -1, exactly.

        The product is a zigzag of their sum, with its kinks on values that the sum can take.
        """
        total, count = sum(readings, torch.zeros_like(readings[0])), len(readings)
        sign = float((-1) ** count)
        self.down[column, 0] += sign / 32.0
        for step in range(count):
            slope = -sign if step == 0 else 2.0 * sign * (-1) ** (step + 1)
            self.hinge(total, float(2 * step - count), slope, column)

    def state(self) -> dict[str, Tensor]:
        """Returns the projections as a Llama layer holds them."""
        return {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}

    def run(self, residual: Tensor, eps: float) -> Tensor:
        """Returns one residual [hidden] behind the layer."""
        x = normed(residual, eps)
        return residual + self.down @ (silu(self.gate @ x) * (self.up @ x))


def normed(residual: Tensor, eps: float) -> Tensor:
    """Returns RMSNorm, with weight 1, of one residual."""
    return residual / math.sqrt(float(residual.square().mean()) + eps)
