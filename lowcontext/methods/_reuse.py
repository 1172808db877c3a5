"""Selections that outlive a decode step: reuse while the query keeps its direction.

The Selection Cache of TokenSelect (Wu et al., arXiv 2411.02886, algorithm 1), with one state for
each sequence and layer and without its hole: keys that leave the local window after a selection
were not candidates of it, so they stay attended until the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowcontext.methods._candidates import Tokens
from lowcontext.methods.base import LayerContext


@dataclass(frozen=True, eq=False)
class Kept:
    """The selection of each row of the batch and the query that made it.

    Args:
        query: fp32 [B, Hq * D].
        tokens: the chosen tokens, R = 1.
        low: int32 [B], first of the keys that are read besides, as of that selection.
    """

    query: Tensor
    tokens: Tokens
    low: Tensor


def reuse(
    q: Tensor,
    Lk: int,
    layer: LayerContext,
    threshold: float,
    by_head: bool,
    tail: int,
    choose: Callable[[slice], Tokens],
) -> tuple[Tokens, Tensor]:
    """The kept selection of rows that may reuse it, a new one for the others.

    A row reuses while the cosine between its query and the query of its last selection is at least
    `threshold`, in every head or with all heads as one vector, and at most `tail` keys are read
    besides. Under tensor parallel the heads of all ranks count, so that the ranks agree.

    On a CPU the decision is read, and rows that reuse are not scored: that is the gain. On another
    device reading it would stall the queue, so all rows are scored and the result is chosen there.

    Args:
        q: fp32 [B, Hq, 1, D].
        Lk: keys.
        layer: where this runs; keeps the state in `memory["kept"]`.
        threshold: least cosine.
        by_head: every head must reach it.
        tail: most keys behind `low`.
        choose: makes a selection for a slice of the batch.

    Returns:
        The selection, and int32 [B], where the keys begin that are read besides.
    """
    B = q.shape[0]
    # A copy: a caller may write its next query into the same memory.
    query = q.flatten(1).clone()
    kept: Kept | None = layer.memory.get("kept")
    if kept is None or kept.query.shape != query.shape:
        tokens = choose(slice(0, B))
        low = torch.full((B,), tokens.low, dtype=torch.int32, device=q.device)
        layer.memory["kept"] = Kept(query, tokens, low)
        _observe(layer, torch.zeros(B, device=q.device), tokens)
        return tokens, low

    near = _near(q[:, :, 0], kept.query.view_as(q[:, :, 0]), threshold, by_head, layer)
    hit = near & (Lk - kept.low <= tail)
    if q.device.type == "cpu":
        tokens, low = _branch(hit.tolist(), kept, choose)
    else:
        new = choose(slice(0, B))
        tokens = _where(hit, kept.tokens, new)
        low = torch.where(hit, kept.low, new.low)
    if low is not kept.low:
        layer.memory["kept"] = Kept(torch.where(hit[:, None], kept.query, query), tokens, low)
    _observe(layer, hit, tokens)
    return tokens, low


def _near(q: Tensor, kept: Tensor, threshold: float, by_head: bool, layer: LayerContext) -> Tensor:
    """bool [B]: the cosine of q and kept [B, Hq, D] is at least the threshold."""
    dot, size, other = (q * kept).sum(2), q.square().sum(2), kept.square().sum(2)  # [B, Hq]
    if by_head:
        turned = (dot < threshold * (size * other).sqrt()).sum(1).float()
        return (turned if layer.reduce is None else layer.reduce(turned)) == 0
    sums = torch.stack([dot.sum(1), size.sum(1), other.sum(1)])
    if layer.reduce is not None:
        sums = layer.reduce(sums)
    return sums[0] >= threshold * (sums[1] * sums[2]).sqrt()


def _branch(
    hits: list[bool], kept: Kept, choose: Callable[[slice], Tokens]
) -> tuple[Tokens, Tensor]:
    if all(hits):
        return kept.tokens, kept.low
    if not any(hits):
        tokens = choose(slice(0, len(hits)))
        return tokens, torch.full_like(kept.low, tokens.low)
    tokens, low = kept.tokens, kept.low.clone()
    ids, counts = tokens.ids.clone(), tokens.counts.clone()
    for b, hit in enumerate(hits):
        if not hit:
            new = choose(slice(b, b + 1))
            ids[b : b + 1], counts[b : b + 1], low[b] = new.ids, new.counts, new.low
    return replace(tokens, ids=ids, counts=counts, mass=None), low


def _where(hit: Tensor, kept: Tokens, new: Tokens) -> Tokens:
    rows = hit[:, None, None]
    return replace(
        new,
        ids=torch.where(rows[..., None], kept.ids, new.ids),
        counts=torch.where(rows, kept.counts, new.counts),
    )


def _observe(layer: LayerContext, hit: Tensor, tokens: Tokens) -> None:
    if layer.observe is None:
        return
    figures = {"cache_hits": hit.float()}
    if tokens.mass is not None:
        # A hit keeps the mass of its selection, which is not that of its query.
        figures["selected_mass"] = tokens.mass[hit == 0]
    layer.observe(figures)
