"""Two methods as one: the prefill of the first, the decode of the second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods.base import LayerContext, Method, Part, is_decoding


@dataclass(frozen=True)
class Phases(Method):
    """Prompts go to `prefill_method`, decode steps to `decode_method`, each with its own memory."""

    name: ClassVar[str] = "phases"

    prefill_method: Method = field(kw_only=True)
    decode_method: Method = field(kw_only=True)

    @property
    def moves_keys(self) -> bool:
        """Whether one of the two methods moves keys."""
        return self.prefill_method.moves_keys or self.decode_method.moves_keys

    def check_layers(self, layers: Sequence[int]) -> None:
        """Asks both methods."""
        self.prefill_method.check_layers(layers)
        self.decode_method.check_layers(layers)

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the prefill method."""
        return self.prefill_method.prefill(q, k, self._context("prefill", layer))

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the decode method."""
        return self.decode_method.decode(q, k, self._context("decode", layer))

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """Parts of the method whose phase this is, with its own dense layers and lengths."""
        decoding = is_decoding(q.shape[2], k.shape[2])
        method = self.decode_method if decoding else self.prefill_method
        phase = "decode" if decoding else "prefill"
        yield from method.parts(q, k, self._context(phase, layer))

    @property
    def settings(self) -> dict[str, Any]:
        """Those of both methods."""
        return {
            "name": self.name,
            "prefill": self.prefill_method.settings,
            "decode": self.decode_method.settings,
        }

    @staticmethod
    def _context(phase: str, layer: LayerContext) -> LayerContext:
        memory = layer.memory.setdefault(phase, {})
        return replace(layer, memory=memory, shared=layer.shared.setdefault(phase, {}))

    def __str__(self) -> str:
        return f"prefill={self.prefill_method}, decode={self.decode_method}"
