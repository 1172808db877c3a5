"""The mask function: what transformers knows about padding, in the form attention needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


@dataclass(frozen=True)
class Padding:
    """The valid keys of each row of a padded batch.

    Args:
        length: keys of the batch, padding included.
        spans: row b has the keys [start, end) of `spans[b]`.
        kv_start: int32 [B], the starts, where every row ends with the last key; else None.
    """

    length: int
    spans: tuple[tuple[int, int], ...]
    kv_start: Tensor | None

    def contiguous(self) -> Padding:
        """Refuses: generate() asks for this where it makes masks ahead, for a static cache."""
        raise NotImplementedError(
            "cache_implementation: expected a dynamic cache, got a static one, whose buffer is "
            "longer than the sequence; leave cache_implementation out"
        )


def mask_function(
    *,
    kv_length: int,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Padding | Tensor | None:
    """The mask that transformers passes on to `attention_function`, once per forward and kind.

    Returns:
        None without padding; a `Padding` with it; under torch.compile, where its contents cannot
        be read, the bool [B, kv_length] padding mask; for bidirectional attention the mask that
        transformers' sdpa uses.

    Raises:
        NotImplementedError: the mask is not causal with padding at the ends.
    """
    if "allow_is_bidirectional_skip" in kwargs:
        return sdpa_mask(
            kv_length=kv_length,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            mask_function=mask_function,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    if not allow_is_causal_skip and not _plain(mask_function, kv_length, attention_mask, kwargs):
        raise NotImplementedError(
            "attention_mask: expected causal attention with padding at the ends, got packed "
            "sequences (position_ids that restart), an overlay of the model (image blocks) or a "
            "static cache; pad instead of packing, leave cache_implementation at 'dynamic', or "
            "unpatch_model(model)"
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if mask.shape[1] != kv_length:
        raise ValueError(
            f"attention_mask: expected {kv_offset + kv_length} columns, one for each cached and "
            f"new token, got {attention_mask.shape[1]}; give the mask of the whole sequence, and "
            "leave cache_implementation out: a static cache is longer than its sequence"
        )
    if torch.compiler.is_compiling():
        return mask
    if bool(mask.all()):
        return None
    return _read_padding(mask)


def _read_padding(mask: Tensor) -> Padding:
    """Spans of valid keys of bool [B, L], with one read on the host."""
    L = mask.shape[1]
    numbers = mask.to(torch.int32)
    first = numbers.argmax(1)
    last = L - 1 - numbers.flip(1).argmax(1)
    spans = []
    for b, (start, end, valid) in enumerate(
        torch.stack([first, last, numbers.sum(1)], dim=1).tolist()
    ):
        if valid and end + 1 - start != valid:
            raise NotImplementedError(
                f"attention_mask: expected the valid tokens of row {b} in one run, got {valid} in "
                f"[{start}, {end + 1}), with padding between them; pad on the left. To go on "
                "after rows that ended early, give all tokens so far as one left-padded batch "
                "without past_key_values, or go on with each row alone"
            )
        spans.append((start, end + 1) if valid else (0, 0))
    left = all(end == L for _, end in spans)
    return Padding(L, tuple(spans), first.to(torch.int32) if left else None)


def _plain(
    mask: Callable[..., Any], length: int, padding: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether a mask that transformers marks as special is causal after all.

    Without a cache, older versions mark every forward as packed: its mask is plain if the last
    query sees every key, every query the first one, and none the key after it.
    """
    if padding is not None or torch.compiler.is_compiling():
        return False
    position = kwargs.get("cache_position")
    if position is None or position.shape[0] != length:
        return False
    device = position.device
    keys = torch.arange(length, device=device)
    window = kwargs.get("local_size") or length
    zero = torch.zeros((), dtype=torch.long, device=device)
    plain = []
    for row in range(int(kwargs.get("batch_size", 1))):
        b = zero + row
        plain.append((mask(b, zero, zero + length - 1, keys[-window:]) != 0).all())
        plain.append((mask(b, zero, keys[:window], zero) != 0).all())
        plain.append(~((mask(b, zero, keys[:-1], keys[1:]) != 0).any()))
    return bool(torch.stack(plain).all())
