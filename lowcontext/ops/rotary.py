"""Rotary position embedding moved to other positions: R(new) k = R(new - old) R(old) k."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_to(
    x: Tensor, old: Tensor, new: Tensor, inv_freq: Tensor, *, interleaved: bool = False
) -> Tensor:
    """Rotates vectors that carry the rotation of one position to another.

    The pair of channels i turns by `new * inv_freq[i] - old * inv_freq[i]`. A model makes each of
    these products in fp32, so their difference is taken between the rounded products and not as
    `(new - old) * inv_freq[i]`: that is what the model itself would have made at the new position.
    Vectors whose position does not change come back bit for bit. A scaling that the model applies
    to its rotation (YaRN) is in `x` already and stays.

    Args:
        x: [..., D], any floating dtype; the arithmetic is fp32.
        old, new: int [...], broadcast to x without its last dim.
        inv_freq: fp32 [P]; the first 2 * P channels are rotated, the others pass.
        interleaved: pairs are channels (2i, 2i + 1) instead of (i, i + P).

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: more than D channels would be rotated.

    Example:
        >>> import torch
        >>> x, f = torch.tensor([1.0, 0.0]), torch.tensor([torch.pi / 2])
        >>> rotate_to(x, torch.tensor(4), torch.tensor(5), f).round(decimals=4).tolist()
        [0.0, 1.0]
    """
    P = inv_freq.shape[0]
    if x.shape[-1] < 2 * P:
        raise ValueError(f"inv_freq: expected at most {x.shape[-1] // 2} pairs, got {P}")
    angle = _angle(new, inv_freq) - _angle(old, inv_freq)
    cos, sin = angle.cos().float(), angle.sin().float()
    turned = x[..., : 2 * P].float()
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :P], turned[..., P:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    turned = turned.to(x.dtype)
    return turned if x.shape[-1] == 2 * P else torch.cat([turned, x[..., 2 * P :]], dim=-1)


def _angle(position: Tensor, inv_freq: Tensor) -> Tensor:
    return (position.float()[..., None] * inv_freq).double()
