"""Selections that outlive a decode step: reuse while the query keeps its direction.

The Selection Cache of TokenSelect (Wu et al., arXiv 2411.02886, algorithm 1), with one state for
each sequence and layer and without its hole: keys that leave the local window after a selection
were not candidates of it, so they stay attended until the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowcontext.methods._candidates import Tokens
from lowcontext.methods.base import LayerContext
from lowcontext.ops.reuse import stale


@dataclass(frozen=True, eq=False)
class Kept:
    """The selection of each row of the batch and the query that made it.

    Args:
        query: [B, Hq * D].
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
    choose: Callable[[slice | Tensor], Tokens],
) -> tuple[Tokens, Tensor]:
    """The kept selection of rows that may reuse it, a new one for the others.

    A row reuses while the cosine between its query and the query of its last selection is at least
    `threshold`, in every head or with all heads as one vector, and at most `tail` keys are read
    besides. Under tensor parallel the heads of all ranks count, so that the ranks agree.

    On a CPU the decision is read, and rows that reuse are not scored: that is the gain. On another
    device reading it would stall the queue; the kernels read it, and return at once where a row
    reuses.

    Args:
        q: [B, Hq, 1, D].
        Lk: keys.
        layer: where this runs; keeps the state in `memory["kept"]`.
        threshold: least cosine.
        by_head: every head must reach it.
        tail: most keys behind `low`.
        choose: makes a selection for a slice of the batch, or for the rows that bool [B] marks.

    Returns:
        The selection, and int32 [B], where the keys begin that are read besides.
    """
    B, query = q.shape[0], q.flatten(1)
    kept: Kept | None = layer.memory.get("kept")
    if kept is None or kept.query.shape != query.shape or kept.query.dtype != query.dtype:
        tokens = choose(slice(0, B))
        low = torch.full((B,), tokens.low, dtype=torch.int32, device=q.device)
        # A copy: a caller may write its next query into the same memory.
        layer.memory["kept"] = Kept(query.clone(), tokens, low)
        _observe(layer, torch.ones(B, device=q.device), tokens)
        return tokens, low
    oldest = Lk - tail
    options: dict[str, Any] = {"threshold": threshold, "by_head": by_head, "reduce": layer.reduce}
    missed = stale(q, kept.query, kept.low, oldest, **options)
    if q.device.type == "cpu":
        tokens, low = _branch(missed.tolist(), kept, choose)
    else:
        new = choose(missed)
        tokens = _where(missed, new, kept.tokens)
        low = torch.where(missed, new.low, kept.low)
    if low is not kept.low:
        query = torch.where(missed[:, None], query, kept.query)
        layer.memory["kept"] = Kept(query, tokens, low)
    _observe(layer, missed, tokens)
    return tokens, low


def _branch(
    missed: list[bool], kept: Kept, choose: Callable[[slice | Tensor], Tokens]
) -> tuple[Tokens, Tensor]:
    if not any(missed):
        return kept.tokens, kept.low
    if all(missed):
        tokens = choose(slice(0, len(missed)))
        return tokens, torch.full_like(kept.low, tokens.low)
    tokens, low = kept.tokens, kept.low.clone()
    ids, counts = tokens.ids.clone(), tokens.counts.clone()
    for b, missing in enumerate(missed):
        if missing:
            new = choose(slice(b, b + 1))
            ids[b : b + 1], counts[b : b + 1], low[b] = new.ids, new.counts, new.low
    return replace(tokens, ids=ids, counts=counts, mass=None), low


def _where(missed: Tensor, new: Tokens, kept: Tokens) -> Tokens:
    rows = missed[:, None, None]
    return replace(
        new,
        ids=torch.where(rows[..., None], new.ids, kept.ids),
        counts=torch.where(rows, new.counts, kept.counts),
    )


def _observe(layer: LayerContext, missed: Tensor, tokens: Tokens) -> None:
    if layer.observe is None:
        return
    figures = {"cache_hits": 1 - missed.float()}
    if tokens.mass is not None:
        # A hit keeps the mass of its selection, which is not that of its query.
        figures["selected_mass"] = tokens.mass[missed == 1]
    layer.observe(figures)
