"""Selection shared by the methods: deterministic top-k and statistics of key blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def top_k_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """Marks the k largest entries of each row; ties go to the lower index.

    Args:
        scores: float [..., N]; -inf entries are never marked.
        k: entries to mark, an int or an int tensor [...].

    Returns:
        bool [..., N] with at most k True in each row.
    """
    N = scores.shape[-1]
    if N == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    limit = k[..., None] if isinstance(k, Tensor) else k
    chosen = (torch.arange(N, device=scores.device) < limit).expand(scores.shape)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, chosen)
    return keep & (scores > -torch.inf)


def block_statistics(
    memory: dict[str, Any], k: Tensor, block: int, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """A statistic of every complete block of keys, computed once per block.

    Kept in `memory` in a buffer that grows geometrically; what is missing there is computed from
    `k`, so dropping the memory changes nothing but time.

    Args:
        memory: the method's memory of this layer; uses the key "blocks".
        k: [B, Hkv, Lk, D].
        block: keys per block.
        reduce: maps fp32 [B, Hkv, n, block, D] to [B, Hkv, n, E].

    Returns:
        fp32 [B, Hkv, Lk // block, E].
    """
    total = k.shape[2] // block
    buffer, done = memory.get("blocks", (None, 0))
    if done < total or buffer is None:
        keys = k[:, :, done * block : total * block].float()
        new = reduce(rearrange(keys, "b h (n s) d -> b h n s d", s=block))
        if buffer is None or buffer.shape[2] < total:
            grown = new.new_empty(*new.shape[:2], max(total + total // 2, 64), new.shape[3])
            if buffer is not None:
                grown[:, :, :done] = buffer[:, :, :done]
            buffer = grown
        buffer[:, :, done:total] = new
        memory["blocks"] = (buffer, total)
    return buffer[:, :, :total]
