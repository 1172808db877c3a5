"""Shapes and dtypes of what the ops return, for tracing: the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def token_scores(
    q: Tensor,
    k: Tensor,
    scales: Tensor | None,
    pages: Tensor | None,
    width: int,
    first: int,
    scale: float,
    causal: bool,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes of `lowcontext.ops.votes.token_scores`."""
    N = k.shape[2] if pages is None else pages.shape[2] * width
    scores = q.new_empty(*q.shape[:3], N, dtype=torch.float32)
    return scores, q.new_empty(q.shape[:3], dtype=torch.float32)


def soft_vote(scores: Tensor, lse: Tensor, heads: int, active: Tensor | None) -> Tensor:
    """Shapes of `lowcontext.ops.votes.soft_vote`."""
    return scores.new_empty(scores.shape[0], heads, *scores.shape[2:])


def topk(
    scores: Tensor,
    k: int,
    limits: Tensor | None,
    pages: Tensor | None,
    width: int,
    first: int,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes of `lowcontext.ops.votes.topk`."""
    rows, N = scores.shape
    ids = scores.new_empty((rows, min(k, N)), dtype=torch.int32)
    return ids, scores.new_empty((rows,), dtype=torch.int32)


def mass_mask(weights: Tensor, share: int, forced: Tensor | None) -> Tensor:
    """Shapes of `lowcontext.ops.votes.mass_mask`."""
    return weights.new_empty(weights.shape, dtype=torch.bool)


def page_scores(
    q: Tensor, bounds: Tensor, scale: float, normalize: bool, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes of the scores of pages and of their LSE, which is empty if not asked for."""
    scores = q.new_empty(*q.shape[:3], bounds.shape[2], dtype=torch.float32)
    return scores, scores.new_empty(q.shape[:3] if normalize else 0)


def quantize_keys(k: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Shapes of `lowcontext.ops.votes.quantize_keys`."""
    small = k.new_empty(k.shape, dtype=torch.int8)
    if bits == 4:
        small = k.new_empty(*k.shape[:3], k.shape[3] // 2, dtype=torch.uint8)
    return small, k.new_empty(k.shape[:3], dtype=torch.float32)
