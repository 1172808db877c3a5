"""Queries and keys whose attention has the structure that long-context heads show.

logit(i, j) = sink[j = 0] + vertical strength of key j + sum_k a_k bump(i - j - offset_k)
              + needles + noise,        bump(x) = mean_f cos(theta_f x),

built as dot products: rotated features (one set of rotary frequencies) for the distances, one
direction each for the sink and the verticals, random directions for needles and noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FREQUENCIES = 48
NOISE = 30
D = 2 * FREQUENCIES + 2 + NOISE  # 128


@dataclass(frozen=True)
class Head:
    """What one query head looks for; strengths are logits.

    Args:
        sink: the first key.
        vertical: the keys that this KV head marks as important; strengths vary with the key.
        local: distance 0 and its neighbourhood.
        slashes: (offset as a share of the length, strength) of far diagonals.
        needle: keys that single queries look for, two of a hundred queries, anywhere in the past.
        noise: standard deviation.
    """

    sink: float = 6.0
    vertical: float = 0.0
    local: float = 0.0
    slashes: tuple[tuple[float, float], ...] = ()
    needle: float = 0.0
    noise: float = 1.0


# Two KV heads of four query heads.
HEADS = (
    Head(local=14.0),
    Head(vertical=9.0, local=6.0),
    Head(local=8.0, slashes=((0.13, 13.0), (0.31, 12.0))),
    Head(sink=4.0, vertical=7.0, local=8.0, slashes=((0.07, 12.0),), noise=1.5),
    Head(sink=10.0, local=10.0),
    Head(vertical=8.0, noise=1.5),
    Head(local=10.0, needle=12.0),
    Head(sink=3.0, local=4.0, noise=2.0),
)


def structured(
    N: int,
    seed: int = 0,
    heads: tuple[Head, ...] = HEADS,
    *,
    group: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(q [1, H, N, 128], k [1, H / group, N, 128]), to be used with scale 1."""
    gen = torch.Generator(device).manual_seed(seed)
    form = {"generator": gen, "device": device}
    position = torch.arange(N, dtype=torch.float64, device=device)
    theta = 10000.0 ** (-torch.arange(FREQUENCIES, dtype=torch.float64) / FREQUENCIES)
    theta = theta.to(device)

    def rotated(at: Tensor) -> Tensor:
        angle = at[:, None] * theta
        return torch.cat([angle.cos(), angle.sin()], dim=1).float() / FREQUENCIES**0.5

    k = torch.empty(1, len(heads) // group, N, D, device=device, dtype=dtype)
    q = torch.empty(1, len(heads), N, D, device=device, dtype=dtype)
    noise = slice(2 * FREQUENCIES + 2, D)
    for g in range(k.shape[1]):
        row = torch.zeros(N, D, device=device)
        row[:, : 2 * FREQUENCIES] = rotated(position)
        row[0, 2 * FREQUENCIES] = 1.0
        marked = torch.randperm(N, **form)[: max(1, N // 128)]
        row[marked, 2 * FREQUENCIES + 1] = 0.6 + 0.4 * torch.rand(len(marked), **form)
        row[:, noise] = torch.randn(N, NOISE, **form) / NOISE**0.5
        k[0, g] = row
    for h, head in enumerate(heads):
        row = torch.zeros(N, D, device=device)
        row[:, : 2 * FREQUENCIES] = head.local * rotated(position)
        for share, strength in head.slashes:
            row[:, : 2 * FREQUENCIES] += strength * rotated(position - int(share * N))
        row[:, 2 * FREQUENCIES] = head.sink
        row[:, 2 * FREQUENCIES + 1] = head.vertical
        row[:, noise] = head.noise * torch.randn(N, NOISE, **form)
        if head.needle:
            looking = (torch.rand(N, **form) < 0.02).nonzero()[:, 0]
            found = (torch.rand(len(looking), **form) * looking).long()
            content = k[0, h // group, found, noise].float()
            row[looking, noise] += head.needle * content / content.square().sum(-1, keepdim=True)
        q[0, h] = row
    return q, k
