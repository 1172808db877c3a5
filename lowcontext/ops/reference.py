"""Plain PyTorch, fp32: the ground truth of every op. Slow, differentiable, any device.

p = softmax(cap(scale * q k^T) + mask),  o = p v,  lse = log sum exp
cap(x) = softcap * tanh(x / softcap)
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.index import BlockIndex

# Rows are processed in chunks: one chunk of logits holds at most this many numbers (256 MiB).
_CHUNK_ELEMENTS = 2**26


def status() -> str | None:
    """Always usable."""
    return None


def supports(op: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None) -> str | None:
    """Supports everything."""
    return None


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float,
    softcap: float,
    kv_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.sparse_attention`; returns (out, lse)."""
    B, Hq, Lq, _ = q.shape
    Lk = k.shape[2]
    offset, block_q = Lk - Lq, index.block_q
    first, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
    step = max(1, _CHUNK_ELEMENTS // max(1, B * Hq * Lk * block_q))
    outs, lses = [], []
    for n in range(0, max(1, Nq), step):  # once also without rows
        rows = range(max((first + n) * block_q, offset), min((first + n + step) * block_q, Lk))
        positions = torch.arange(rows.start, rows.stop, device=q.device)
        mask = index.key_mask(Lk, slice(n, n + step))[:, :, positions // block_q - first - n]
        mask = mask & _visible(positions, Lk, 0, kv_start)
        out, lse = _attend(
            q[:, :, rows.start - offset : rows.stop - offset], k, v, mask, scale, softcap
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int,
    kv_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.attention`; returns (out, lse)."""
    B, Hq, Lq, _ = q.shape
    Lk = k.shape[2]
    step = max(1, _CHUNK_ELEMENTS // max(1, B * Hq * Lk))
    outs, lses = [], []
    for r in range(0, max(1, Lq), step):
        positions = torch.arange(Lk - Lq + r, Lk - Lq + min(r + step, Lq), device=q.device)
        mask = _visible(positions, Lk, window, kv_start)
        out, lse = _attend(q[:, :, r : r + step], k, v, mask, scale, softcap)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _visible(positions: Tensor, Lk: int, window: int, kv_start: Tensor | None) -> Tensor:
    keys = torch.arange(Lk, device=positions.device)
    mask = (keys <= positions[:, None])[None, None]
    if window:
        mask = mask & (keys > positions[:, None] - window)
    if kv_start is not None:
        mask = mask & (keys >= kv_start[:, None, None, None])
    return mask  # [1 or B, 1, L, Lk]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    Hq, Hkv = q.shape[1], k.shape[1]
    grouped = rearrange(q.to(dtype) * scale, "b (h g) l d -> b h g l d", h=Hkv)
    logits = torch.einsum("bhgld,bhsd->bhgls", grouped, k.to(dtype))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    heads = mask.shape[1]  # 1, Hkv or Hq
    mask = (
        mask.expand(-1, Hq, -1, -1) if heads in (1, Hq) else mask.repeat_interleave(Hq // heads, 1)
    )
    mask = rearrange(mask, "b (h g) l s -> b h g l s", h=Hkv)
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    # A row without keys has lse -inf: subtract 0 there, so that its weights are exp(-inf) = 0.
    base = torch.where(lse == -torch.inf, 0.0, lse)
    weights = torch.exp(logits - base[..., None])
    # Masked keys may hold anything (NaN in unused memory): 0 * NaN must not reach the output.
    used = mask.any(dim=3).any(dim=2)[..., None]
    out = torch.einsum("bhgls,bhsd->bhgld", weights, torch.where(used, v.to(dtype), 0.0))
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2).to(torch.float32)
