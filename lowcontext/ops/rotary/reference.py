"""The ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.rotary._positions import Positions


def supports(op: str, like: Tensor) -> str | None:
    """None: any device, any floating dtype."""
    return None


def rotate_to(
    x: Tensor,
    old: Positions,
    new: Positions,
    inv_freq: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `lowcontext.ops.rotary.rotate_to`."""
    P = inv_freq.shape[0]
    old, new = _tensor(old, x.device), _tensor(new, x.device)
    angle = _angle(new, inv_freq) - _angle(old, inv_freq)
    cos, sin = angle.cos().float(), angle.sin().float()
    turned = x[..., : 2 * P].float()
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :P], turned[..., P:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    x = x.to(dtype)
    # A product with 0 or 1 changes the sign of a zero and makes NaN of infinity.
    turned = torch.where((old == new)[..., None], x[..., : 2 * P], turned.to(dtype))
    return turned if x.shape[-1] == 2 * P else torch.cat([turned, x[..., 2 * P :]], dim=-1)


def list_keys(
    starts: Tensor, counts: Tensor, low: Tensor | int, Lk: int, size: int, width: int, sink: int
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.rotary.list_keys`."""
    B, H, S = starts.shape
    recent = torch.as_tensor(low, device=starts.device).clamp(min=sink).view(-1, 1)
    front = sink + counts[:, None] * width
    first = size - (front + Lk - recent)  # [B, 1]
    slot = torch.arange(size, dtype=torch.int32, device=starts.device) - first  # [B, size]
    listed = (slot - sink).clamp(0, max(S * width - 1, 0))[:, None].expand(B, H, size)
    keys = recent + slot - front
    keys = keys[:, None].expand(B, H, size)
    if S:
        tiles = starts.gather(2, (listed // width).long()) + listed % width
        keys = torch.where((slot < front)[:, None], tiles, keys)
    keys = torch.where((slot < sink)[:, None], slot.clamp(min=0)[:, None], keys)
    return keys.to(torch.int32), first[:, 0].to(torch.int32)


def gather_moved(
    k: Tensor, v: Tensor, keys: Tensor, first: Tensor, inv_freq: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.rotary.gather_moved`."""
    Lk, M = k.shape[2], keys.shape[2]
    absent = torch.arange(M, device=k.device) < first[:, None, None]  # [B, 1, M]
    rows = keys.long().masked_fill(absent, 0).expand(-1, k.shape[1], -1)[..., None]
    values = v.gather(2, rows.expand(-1, -1, -1, v.shape[3]))
    moved = k.gather(2, rows.expand(-1, -1, -1, k.shape[3]))
    moved = rotate_to(moved, keys, range(Lk - M, Lk), inv_freq, interleaved, k.dtype)
    absent = absent[..., None]
    return moved.masked_fill(absent, 0.0), values.masked_fill(absent, 0.0)


def _tensor(positions: Positions, device: torch.device) -> Tensor:
    if isinstance(positions, Tensor):
        return positions
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, positions.step, device=device)
    return torch.full((), positions, device=device)


def _angle(position: Tensor, inv_freq: Tensor) -> Tensor:
    return (position.float()[..., None] * inv_freq).double()
