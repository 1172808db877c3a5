"""The block scores in PyTorch."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from lowcontext.index import BlockIndex

# Their cost is in matrix products.
FIT_FOR_GPU = True

# Rows of query cells are processed in chunks of at most this many logits (256 MiB).
_CHUNK_ELEMENTS = 2**26


def supports(op: str, like: Tensor) -> str | None:
    """Supports everything."""
    return None


def block_means(x: Tensor, block: int, offset: int) -> Tensor:
    """See `lowcontext.ops.block_scores.block_means`."""
    front = offset % block
    padded = _in_blocks(x, front, block)
    end = front + x.shape[2]
    block_end = (torch.arange(padded.shape[2], device=x.device) + 1) * block
    rows = block_end.clamp(max=end) - (block_end - block).clamp(min=front)
    return padded.sum(dim=3) / rows[:, None]


def antidiagonal_scores(q: Tensor, k: Tensor, *, stride: int, block: int, scale: float) -> Tensor:
    """See `lowcontext.ops.block_scores.antidiagonal_scores`."""
    B, Hq, Lq, _ = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    offset = Lk - Lq
    first, Nq = BlockIndex.query_blocks(Lq, Lk, block)
    cells = block // stride  # of a block
    keys = _in_blocks(k, 0, block).flatten(2, 3)
    Nk = keys.shape[2] // block
    keys = rearrange(keys, "b h (m s) d -> b h m (s d)", s=stride)
    queries = _in_blocks(q, offset % block, block).unflatten(3, (cells, stride))
    queries = rearrange(queries.flip(4), "b (h g) n c s d -> b h g n c (s d)", h=Hkv)
    key_cell = torch.arange(keys.shape[2], device=q.device)
    scores = q.new_zeros(B, Hq, Nq, Nk, dtype=torch.float32)
    step = max(1, _CHUNK_ELEMENTS // max(1, B * Hq * keys.shape[2] * cells))
    for n in range(0, Nq, step):
        stop = min(n + step, Nq)
        visible = min(Nk, first + stop)  # key blocks before the end of the chunk
        rows = rearrange(queries[:, :, :, n:stop], "b h g n c e -> b h (g n c) e")
        logits = rows @ keys[:, :, : visible * cells].transpose(2, 3) * (scale / stride)
        logits = rearrange(logits, "b h (g r) m -> b (h g) r m", g=Hq // Hkv)
        cell = torch.arange((first + n) * cells, (first + stop) * cells, device=q.device)
        future = key_cell[: visible * cells] > cell[:, None]
        weights = torch.softmax(logits.masked_fill(future, -torch.inf), dim=-1)
        exists = ((cell + 1) * stride > offset) & (cell * stride < Lk)
        weights = torch.where(exists[:, None], weights, 0.0)
        sums = rearrange(weights, "b h (n c) (m e) -> b h n m c e", c=cells, e=cells)
        scores[:, :, n:stop, :visible] = sums.sum(dim=(4, 5))
    return scores


def _in_blocks(x: Tensor, front: int, block: int) -> Tensor:
    """x [B, H, L, D] as fp32 [B, H, n, block, D], with `front` zero rows before it."""
    padded = pad(x.float(), (0, 0, front, -(front + x.shape[2]) % block))
    return rearrange(padded, "b h (n s) d -> b h n s d", s=block)
