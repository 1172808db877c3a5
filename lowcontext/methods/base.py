"""Method: decides which keys each query reads. Knows tensors and a LayerContext, no model."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops.rotary import Positions, gather_moved, rotate_to

# At most this many new queries behind a longer cache count as decoding (speculative steps are
# short); more are a chunk of a prompt.
MAX_DECODE_QUERIES = 32


def is_decoding(Lq: int, Lk: int) -> bool:
    """Whether `Lq` new queries on `Lk` keys are decode steps rather than a prompt or its chunk."""
    return Lq < Lk and Lq <= MAX_DECODE_QUERIES


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the model of a layer rotates queries and keys.

    Args:
        inv_freq: fp32 [P], frequencies of the pairs; the first 2 * P channels of a head are
            rotated. They do not depend on the length of the sequence.
        interleaved: pairs are channels (2i, 2i + 1) instead of (i, i + P).
    """

    inv_freq: Tensor
    interleaved: bool = False

    def move(
        self, x: Tensor, old: Positions, new: Positions, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [..., L, D], rotated for the positions `old`, as rotated for `new`: see `rotate_to`."""
        return rotate_to(x, old, new, self.inv_freq, interleaved=self.interleaved, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Moved:
    """One list of keys for all rows of a part, read at consecutive positions up to the last key.

    Attention runs over a copy of the listed keys, rotated from where they are to where they shall
    be, and is causal at the end of the list: its last entries are the keys of the part's queries,
    which keep their positions.

    Args:
        keys: int32 [B, H, M], H 1 or Hkv.
        first: int32 [B], entries before it do not count.
        rotary: how the model rotates.
    """

    keys: Tensor
    first: Tensor
    rotary: Rotary

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The listed keys at their new positions, and their values: [B, Hkv, M, D] from Lk."""
        rotary = self.rotary
        return gather_moved(
            k, v, self.keys, self.first, rotary.inv_freq, interleaved=rotary.interleaved
        )

    def key_mask(self, Lk: int) -> Tensor:
        """Keys in the list, before the causal mask: bool [B, H, Lk]."""
        entries = torch.arange(self.keys.shape[2], device=self.keys.device)
        keys = torch.where(entries >= self.first[:, None, None], self.keys.long(), Lk)
        mask = torch.zeros(*keys.shape[:2], Lk + 1, dtype=torch.bool, device=keys.device)
        return mask.scatter_(2, keys, torch.ones_like(keys, dtype=torch.bool))[..., :Lk]

    def density(self, Lq: int, Lk: int) -> float:
        """Share of the causal (query, key) pairs that are read. Reads tensors on the host."""
        read = Lq * (self.keys.shape[2] - self.first.double()) - Lq * (Lq - 1) / 2
        return float(read.mean()) / (Lq * (Lk - Lq) + Lq * (Lq + 1) // 2)


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
        rotary: how the model rotates, or None where it does not, or in a way with no fixed
            frequencies.
        observe: takes named figures of a selection, while someone measures; else None.
        reduce: sums a tensor, in place, over the ranks that hold the other heads of this layer
            (tensor parallel); None where one rank has them all. Every rank must call it alike.
    """

    layer_idx: int = 0
    num_layers: int = 1
    scale: float = 1.0
    softcap: float | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    rotary: Rotary | None = None
    observe: Callable[[dict[str, Tensor]], None] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None


Part = tuple[int, int, BlockIndex | Moved | None]


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

    @property
    def moves_keys(self) -> bool:
        """Whether `parts` may give `Moved` lists, so that `LayerContext.rotary` is needed."""
        return False

    def check_layers(self, layers: Sequence[int]) -> None:  # noqa: B027 most have nothing to check
        """Raises unless the method can work in a model; called when it is patched.

        Args:
            layers: indices of its layers with full attention, ascending.

        Raises:
            ValueError: a hyper-parameter names layers that the method will not see.
        """

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

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """What attention runs: (first row, end row, index) for consecutive rows of q.

        An index is a BlockIndex, None for dense attention, or a `Moved` list of keys.

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

    def _expect_numbers(self, *names: str, above_0: bool = False) -> None:
        """Raises unless each named field is a number of at least 0, or above it."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{self.name}: {name}: expected a number, got {value!r}")
            if not (value > 0 if above_0 else value >= 0):  # NaN is neither
                least = "more than" if above_0 else "at least"
                raise ValueError(f"{self.name}: {name}: expected {least} 0, got {value}")

    def __str__(self) -> str:
        changed = [
            f"{f.name}={self._shown(f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @property
    def settings(self) -> dict[str, Any]:
        """The name and every hyper-parameter, those at their defaults too, as JSON values.

        `str(method)` is short: it names what differs from the defaults of this version. What
        outlives a version, such as a row of measurements, needs all of them.
        """
        values = {f.name: self._shown(f.name) for f in fields(self)}
        found: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return {"name": self.name, **found}

    def _shown(self, name: str) -> Any:
        """A field in `str(method)` and in `settings`, which tell apart what selects differently."""
        return getattr(self, name)
