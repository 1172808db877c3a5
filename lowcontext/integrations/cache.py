"""SparseCacheLayer: a cache layer that grows in place and carries what the methods remember."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from lowcontext.methods import LayerContext, Method
from lowcontext.ops.native import prefer_huge_pages

# A row of the batch as `LayerContext`s see it: None for the whole unpadded batch, else (row, first
# valid key).
Row = tuple[int, int] | None

# Before transformers 5, `crop(0)` empties a layer; since then it removes nothing.
_CROP_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters

# Tokens of free room at least. With 256 the buffers of a prompt of 128 tokens are three times its
# keys, and malloc hands out fresh pages for them: 0.3 ms per layer.
_MIN_GROWTH = 64


class SharedMemory:
    """The `shared` memory of the sequences of one cache; all its layers hold this same object."""

    def __init__(self) -> None:
        self._rows: dict[Row, dict[str, Any]] = {}
        self._method: Method | None = None

    def of(self, row: Row, method: Method) -> dict[str, Any]:
        """The memory of one row; emptied when another method takes over."""
        if self._method is not method:
            self.clear()
            self._method = method
        return self._rows.setdefault(row, {})

    def clear(self) -> None:
        """Forgets everything, in place: contexts that hold a row's memory see it emptied."""
        for memory in self._rows.values():
            memory.clear()


class SparseCacheLayer(CacheLayerMixin):
    """Keys and values of one layer in a buffer that grows by a share, so that appending is O(1).

    Takes the place of a `DynamicLayer`, which concatenates the whole layer at every token. `keys`
    and `values` are views of the valid part of the buffer; assigning to them replaces the buffer.
    The layer owns the `LayerContext` of each sequence and drops it when the cached tokens change
    other than by appending: reset, crop, reorder, select, repeat or assignment.

    Args:
        shared: memory common to the layers of one cache; a new one if not given.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, shared: SharedMemory | None = None) -> None:
        self._buffer: tuple[Tensor, Tensor] | None = None
        self._length = 0
        # Tensors made in inference mode cannot be written outside it.
        self._inference = False
        self.shared = SharedMemory() if shared is None else shared
        self._contexts: dict[Row, LayerContext] = {}
        self._method: Method | None = None
        # Not by the base class: it assigns keys and values, which a graph compiled by torch 2.11
        # does to the layer it makes before that has a memory to drop.
        self.is_initialized = False

    # -- what transformers calls ----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Fixes dtype, device and shape from the first keys and values [B, Hkv, L, D]."""
        self._initialise(key_states, key_states if value_states is None else value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, Hkv, L, D]; returns views of all of them so far."""
        key_states = in_autocast(key_states, value_states)
        keys, values = self._buffer or self._initialise(key_states, value_states)
        batch, _, capacity, _ = keys.shape
        new_batch, _, new, _ = key_states.shape
        if new_batch != batch:
            raise ValueError(f"key_states: expected batch {batch} as cached, got {new_batch}")
        start = self._length
        self._length = end = start + new
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Autograd needs the old tensors untouched.
            keys = torch.cat([keys[:, :, :start], key_states], dim=2)
            values = torch.cat([values[:, :, :start], value_states], dim=2)
            self._buffer = keys, values
            return keys, values
        frozen = self._inference and not torch.is_inference_mode_enabled()
        if end > capacity or frozen or keys.requires_grad:
            keys, values = self._grow(keys, values, start, end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(keys after `query_length` more tokens, 0); before 5.4 the argument is a tensor."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self._length + new, 0

    def get_seq_length(self, *args: Any) -> int:
        """Cached tokens."""
        return self._length

    def get_max_cache_shape(self) -> int:
        """-1: no maximum."""
        return -1

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Frees the buffers and the memory."""
        self._buffer = None
        self._length = 0
        self.is_initialized = False
        self.drop_memory()

    def crop(self, max_length: int) -> None:
        """Keeps the first `max_length` tokens; a negative number removes that many from the end."""
        if max_length < 0:
            length = self._length + max_length
        elif max_length > 0 or _CROP_TO_LENGTH:
            length = max_length
        else:
            return
        if length < self._length:
            self._length = max(length, 0)
            self.drop_memory()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row b what row `beam_idx[b]` was."""
        # The whole buffer is copied, its free part too, so that the next append has room.
        self._replace(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self._replace(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        self._replace(lambda x: x[indices, ...])

    def offload(self) -> None:
        """Does nothing: sparse attention reads keys that it chooses late, so they stay in place."""

    def prefetch(self) -> None:
        """Does nothing, as `offload`."""

    @property
    def keys(self) -> Tensor | None:
        """View of the cached keys [B, Hkv, L, D], or None before the first append."""
        return None if self._buffer is None else self._buffer[0][:, :, : self._length]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(0, value)

    @property
    def values(self) -> Tensor | None:
        """View of the cached values [B, Hkv, L, Dv], or None before the first append."""
        return None if self._buffer is None else self._buffer[1][:, :, : self._length]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(1, value)

    # -- what the integration calls -------------------------------------------------------------

    @classmethod
    def adopt(cls, layer: CacheLayerMixin, shared: SharedMemory) -> SparseCacheLayer:
        """A SparseCacheLayer with the contents of a `DynamicLayer`."""
        new = cls(shared)
        keys, values = layer.keys, layer.values
        if layer.is_initialized and keys is not None and values is not None and keys.numel():
            new.lazy_initialization(keys, values)
            new.update(keys, values)
        return new

    def context(
        self, method: Method, row: Row, layer_idx: int, num_layers: int, scale: float, softcap: Any
    ) -> LayerContext:
        """The context of one row, or of the whole batch, with what `method` left there."""
        if self._method is not method:
            # What another method left in memory means nothing to this one.
            self._contexts.clear()
            self._method = method
        found = self._contexts.get(row)
        if found is None:
            shared = self.shared.of(row, method)
            found = LayerContext(layer_idx, num_layers, scale, softcap, {}, shared)
            self._contexts[row] = found
        return found

    def drop_memory(self) -> None:
        """Forgets what methods keep for this layer, and for all layers in `shared`."""
        self._contexts.clear()
        self.shared.clear()

    @property
    def capacity(self) -> int:
        """Tokens that the buffer holds before it must grow."""
        return 0 if self._buffer is None else self._buffer[0].shape[2]

    def _initialise(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.dtype, self.device = keys.dtype, keys.device
        self._buffer = (
            keys.new_empty(*keys.shape[:2], 0, keys.shape[3]),
            values.new_empty(*values.shape[:2], 0, values.shape[3]),
        )
        self._length = 0
        self.is_initialized = True
        return self._buffer

    def _grow(
        self, old_keys: Tensor, old_values: Tensor, used: int, length: int
    ) -> tuple[Tensor, Tensor]:
        # Untouched memory costs nothing on a CPU, and copying into fresh pages is slow (0.11 ms per
        # token at 64K when growing by an eighth); on a GPU it is the other way round.
        share = 4 if old_keys.device.type == "cpu" else 8
        capacity = length + max(_MIN_GROWTH, length // share)
        keys = old_keys.new_empty(*old_keys.shape[:2], capacity, old_keys.shape[3])
        values = old_values.new_empty(*old_values.shape[:2], capacity, old_values.shape[3])
        prefer_huge_pages(keys, values)
        if used:
            keys[:, :, :used] = old_keys[:, :, :used]
            values[:, :, :used] = old_values[:, :, :used]
        self._buffer = keys, values
        self._inference = _made_in_inference_mode(self._buffer[0])
        return keys, values

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if self._buffer is not None:
            self._buffer = change(self._buffer[0]), change(self._buffer[1])
            self._inference = _made_in_inference_mode(self._buffer[0])
        self.drop_memory()

    def _assign(self, which: int, value: Tensor | None) -> None:
        if value is None:
            self._buffer = None
            self._length = 0
        else:
            other = value if self._buffer is None else self._buffer[1 - which]
            self._buffer = (value, other) if which == 0 else (other, value)
            self._length = value.shape[2]
            self._inference = value.is_inference()
        self.drop_memory()


def in_autocast(x: Tensor, values: Tensor) -> Tensor:
    """Queries or keys in the dtype of the values inside an autocast region, else x itself.

    RoPE leaves them in fp32 there, and transformers' sdpa is an op that casts.
    """
    if x.dtype == values.dtype or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(values.dtype)


def _made_in_inference_mode(buffer: Tensor) -> bool:
    # A compiled graph cannot ask; it is not entered in one mode and left in the other.
    return not torch.compiler.is_compiling() and buffer.is_inference()
