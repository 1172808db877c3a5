"""Positions of hip and infinitehip for contexts beyond the trained length, as InfiniteHiP has them.

Search: queries and keys are scored at distances of the search's choosing, on a copy of the keys
that is rotated once. Attention: the listed keys are read at consecutive positions that end at the
window, which keeps its own, so that no distance exceeds sink, budget and window together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._select import grown
from lowcontext.methods.base import Moved, Rotary
from lowcontext.ops.rotary import list_keys


def search_keys(memory: dict[str, Any], k: Tensor, rotary: Rotary, chunk: int) -> Tensor:
    """A copy of the keys with key j at position `j // chunk`, or all at 0 where chunk is 0.

    Kept in `memory` in a buffer that grows geometrically, and made again where it is missing; it
    takes as much memory as the keys.

    Args:
        memory: the method's memory of this layer.
        k: [B, Hkv, Lk, D], rotated by the model.
        rotary: how.
        chunk: keys that share a position, 0 for all of them.

    Returns:
        [B, Hkv, Lk, D] in the dtype of k.
    """

    def make(first: int, end: int) -> tuple[Tensor]:
        new = torch.arange(first, end, device=k.device) // chunk if chunk else 0
        return (rotary.move(k[:, :, first:end], range(first, end), new),)

    return grown(memory, "search_keys", k.shape[2], make)[0]


def search_queries(q: Tensor, Lk: int, rotary: Rotary, chunk: int, window: int) -> Tensor:
    """Queries at the position from which `search_keys` are scored.

    With all keys at 0 that is `window + 1`, the distance at which candidates begin; with keys at
    the index of their chunk it is as far behind the last of them, and never behind the query.
    """
    old = range(Lk - q.shape[2], Lk)
    if not chunk:
        return rotary.move(q, old, window + 1)
    position = torch.arange(old.start, old.stop, device=q.device)
    return rotary.move(q, old, torch.minimum(position, position // chunk + window))


def streamed(index: BlockIndex, block: int, front: int, recent: range, r: Rotary) -> Moved:
    """The list of one block of queries, its found tiles moved up to the window.

    Args:
        index: one list for all heads: tiles before the window, then those of the window.
        block: block of the index.
        front: most tiles before the window.
        recent: keys from the window's first tile to the last that the block sees.
        r: how the model rotates.

    Returns:
        Moved list that ends at the block's last query.
    """
    width = index.block_k
    keys, first = list_keys(
        index.kv_starts[:, :1, block],
        index.kv_num_blocks[:, 0, block],
        recent.stop + -recent.stop % width,  # the last tile, of the window as well, is cut
        recent.stop,
        front * width + len(recent),
        width=width,
    )
    return Moved(keys, first, r)
