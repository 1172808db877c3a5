"""Method: decides which keys each query reads. Knows tensors and a LayerContext, no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from lowcontext.index import BlockIndex

# At most this many new queries behind a longer cache count as decoding (speculative steps are
# short); more are a chunk of a prompt.
MAX_DECODE_QUERIES = 32


def is_decoding(Lq: int, Lk: int) -> bool:
    """Whether `Lq` new queries on `Lk` keys are decode steps rather than a prompt or its chunk."""
    return Lq < Lk and Lq <= MAX_DECODE_QUERIES


@dataclass
class LayerContext:
    """What a method may know about where it runs.

    `memory` and `shared` may be emptied at any time (reset, crop, beam reorder): what a method
    keeps there must be rebuilt from `k` when missing, with the same result.

    Args:
        layer_idx: index of this layer in the model.
        num_layers: layers of the model.
        scale: factor of the logits.
        softcap: softcap of the logits, or None.
        memory: free for the method; lives with this sequence and this layer.
        shared: free for the method; lives with this sequence, common to all layers.
    """

    layer_idx: int = 0
    num_layers: int = 1
    scale: float = 1.0
    softcap: float | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """Base of every method; the fields of a subclass are its hyper-parameters.

    A method sees rows without padding: position 0 is the first token of the sequence, the last
    query is the last key, and keys already carry the rotation that the model gave them. A batch
    with left padding reaches it row by row.

    Args:
        dense_layers: leave the first n layers dense.
        min_length: leave contexts of fewer keys dense.
    """

    name: ClassVar[str]
    # Queries that one call of `prefill` gets, so that the index of a long prompt stays small.
    # 0: the method needs the whole prompt at once, and bounds its own index by overriding `parts`.
    query_chunk: ClassVar[int] = 8192

    dense_layers: int = 0
    min_length: int = 0

    def __post_init__(self) -> None:
        self._expect_ints(dense_layers=0, min_length=0)

    @abstractmethod
    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index for a prompt, or a chunk of one.

        Args:
            q: [B, Hq, Lq, D], the last Lq positions; k: [B, Hkv, Lk, D].
            layer: where this runs.

        Returns:
            BlockIndex for (Lq, Lk), or None for dense attention.
        """

    @abstractmethod
    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index with block_q = 1 for one or a few new queries, without a host synchronisation.

        Args:
            q: [B, Hq, Lq, D], the last Lq <= 32 positions; k: [B, Hkv, Lk, D].
            layer: where this runs.

        Returns:
            BlockIndex for (Lq, Lk), or None for dense attention.
        """

    def parts(
        self, q: Tensor, k: Tensor, layer: LayerContext
    ) -> Iterator[tuple[int, int, BlockIndex | None]]:
        """What attention runs: (first row, end row, index) for consecutive rows of q.

        The keys of a part end at its last query, so the index of rows [r0, r1) fits
        `(r1 - r0, Lk - Lq + r1)`. Decides dense or sparse and prefill or decode, and cuts long
        prompts into chunks of `query_chunk` at multiples of it.
        """
        Lq, Lk = q.shape[2], k.shape[2]
        if layer.layer_idx < self.dense_layers or Lk < self.min_length:
            yield 0, Lq, None
        elif is_decoding(Lq, Lk):
            yield 0, Lq, self.decode(q, k, layer)
        else:
            row = 0
            while row < Lq:
                position = Lk - Lq + row
                step = self.query_chunk - position % self.query_chunk if self.query_chunk else Lq
                end = min(row + step, Lq)
                yield row, end, self.prefill(q[:, :, row:end], k[:, :, : Lk - Lq + end], layer)
                row = end

    def _expect_ints(self, **lowest: int) -> None:
        """Raises unless each named field is an int of at least the given value."""
        for name, low in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{self.name}: {name}: expected an int, got {value!r}")
            if value < low:
                raise ValueError(f"{self.name}: {name}: expected at least {low}, got {value}")

    def _expect_choice(self, field_name: str, choices: tuple[Any, ...]) -> None:
        """Raises unless the named field is one of `choices`."""
        value = getattr(self, field_name)
        if value not in choices:
            raise ValueError(
                f"{self.name}: {field_name}: expected one of {list(choices)}, got {value!r}"
            )

    def _expect_share(self, field_name: str) -> None:
        """Raises unless the named field is a number above 0."""
        value = getattr(self, field_name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.name}: {field_name}: expected a number, got {value!r}")
        if value <= 0:
            raise ValueError(f"{self.name}: {field_name}: expected more than 0, got {value}")

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name
