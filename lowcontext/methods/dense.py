"""Dense attention behind the same interface: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods.base import LayerContext, Method


@dataclass(frozen=True)
class Dense(Method):
    """Reads every key; exact."""

    name: ClassVar[str] = "dense"
    query_chunk: ClassVar[int] = 0

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: dense attention."""
        return None

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: dense attention."""
        return None
