"""Chosen pages of keys, and the keys that entries of them stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pages:
    """Pages of `width` keys each; page n begins at key `first + n * width`.

    Entry i of scores over M pages is key i % width of page `ids[i // width]`.

    Args:
        ids: int32 [B or 1, Hkv or 1, M].
        width: keys per page.
        first: key where page 0 begins.
    """

    ids: Tensor
    width: int
    first: int = 0


def keys_of(ids: Tensor, counts: Tensor, pages: Tensor | None, width: int, first: int) -> Tensor:
    """The keys that entries stand for: int32 [rows, n], 0 beyond the counts.

    Args:
        ids: int32 [rows, n]; counts: int32 [rows], entries of a row.
        pages, width, first: pages [rows, M] of the entries; where None, entry 0 is key `first`.
    """
    if pages is None:
        if not first:
            return ids
        keys = ids + first
    else:
        keys = pages.gather(1, (ids // width).long()) * width + (ids % width + first)
    return torch.where(torch.arange(ids.shape[1], device=ids.device) < counts[:, None], keys, 0)
