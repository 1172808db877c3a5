"""Plain PyTorch: the ground truth of the vertical-slash ops."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from lowcontext.index import BlockIndex, compact

# Blocks are processed in chunks: one chunk of key masks holds at most this many entries.
_CHUNK_ELEMENTS = 2**24


def supports(op: str, like: Tensor) -> str | None:
    """Supports everything."""
    return None


def last_window_scores(
    q: Tensor, k: Tensor, *, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.vertical_slash.last_window_scores`; q is the window [B, Hq, n, D]."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    n, Lk = q.shape[2], k.shape[2]
    grouped = rearrange(q.to(dtype) * scale, "b (h g) n d -> b h (g n) d", h=k.shape[1])
    logits = grouped @ k.to(dtype).transpose(2, 3)
    logits = rearrange(logits, "b h (g n) s -> b (h g) n s", n=n)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    positions = torch.arange(Lk - n, Lk, device=q.device)[:, None]
    future = torch.arange(Lk, device=q.device) > positions
    weights = torch.softmax(logits.masked_fill(future, -torch.inf), dim=-1)  # [B, Hq, n, Lk]
    # Row r reversed has distance d at place d + n - 1 - r. Read as a matrix whose rows are one
    # entry shorter than they are stored, each row starts one place earlier than the one before.
    stored = pad(weights.flip(-1), (0, n)).flatten(2)[..., n - 1 :]
    skewed = stored[..., : n * (Lk + n - 1)].unflatten(-1, (n, Lk + n - 1))
    return weights.sum(2), skewed[..., :Lk].sum(2)


def line_index(
    vertical: Tensor,
    slash: Tensor,
    Lq: int,
    dense_from: Tensor | None,
    *,
    block: int,
    tiles: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lowcontext.ops.vertical_slash.line_index`; returns the four tensors of the index."""
    B, H, Lk = vertical.shape
    first, Nq = BlockIndex.query_blocks(Lq, Lk, block)
    device = vertical.device
    # before[x] = the largest chosen distance below x, or -1.
    distance = torch.arange(Lk, device=device)
    before = torch.where(slash, distance, -1).cummax(-1).values
    # A distance of at least Lk is never chosen, and x may be as large as the padded Lk.
    before = pad(before, (1, block), value=-1)
    before[..., Lk + 1 :] = before[..., Lk : Lk + 1]

    end = (torch.arange(first, first + Nq, device=device) + 1) * block  # [Nq]
    end = end.expand(B, H, Nq)
    dense = torch.zeros_like(end, dtype=torch.bool)
    if dense_from is not None:
        dense = end > dense_from[..., None]
    reach = torch.zeros(B, H, Nq, dtype=torch.long, device=device)  # end of the last range
    counts = torch.zeros_like(reach)
    starts = torch.zeros(B, H, Nq, tiles, dtype=torch.int32, device=device)
    for s in range(tiles):
        d = before.gather(2, (end - reach).clamp(min=0))
        live = (reach < end) & (d >= 0)
        start = (torch.maximum(end - d, torch.full_like(d, block)) - block).maximum(reach)
        live, start = live | (dense & (reach < end)), torch.where(dense, reach, start)
        starts[..., s] = torch.where(live, start, 0)
        counts += live
        reach = torch.where(live, start + block, reach)

    num_columns = torch.zeros(B, H, Nq, dtype=torch.int32, device=device)
    listed = torch.zeros(B, H, Nq, columns, dtype=torch.int32, device=device)
    index = BlockIndex(counts.to(torch.int32), starts, (block, block))
    step = max(1, _CHUNK_ELEMENTS // max(1, B * H * Lk))
    for n in range(0, Nq, step):
        rows = slice(n, n + step)
        outside = vertical[:, :, None] & ~index.key_mask(Lk, rows)
        keep = outside & (distance < reach[:, :, rows, None])
        keep &= keep.cumsum(-1) <= columns
        places, found = compact(keep, columns)
        listed[:, :, rows], num_columns[:, :, rows] = places.to(torch.int32), found
    return index.kv_num_blocks, starts, num_columns, listed
