"""Which tokens the heads vote for: the exact vote, and others that read fewer bytes of keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowcontext.methods._select import block_statistics, grown
from lowcontext.methods.base import LayerContext
from lowcontext.ops import votes

_ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Chosen tokens of each row.

    Args:
        ids: int32 [B, H, R, k], ascending; counts: int32 [B, H, R].
        sink: keys [0, sink) are read besides.
        low: keys from here on are read besides, for the last row; row r starts R - 1 - r earlier.
        mass: fp32 [B], the share of the candidates' votes that the chosen tokens have; None unless
            someone measures.
    """

    ids: Tensor
    counts: Tensor
    sink: int
    low: int
    mass: Tensor | None = None

    def to(self, device: torch.device) -> Tokens:
        """The same on another device, for a layer that lies there."""
        mass = None if self.mass is None else self.mass.to(device)
        return replace(self, ids=self.ids.to(device), counts=self.counts.to(device), mass=mass)


@dataclass(frozen=True)
class Vote:
    """How candidates are scored and counted.

    Args:
        k: tokens chosen for each row and list.
        sink: first candidate; where pages vote, a multiple of `page`.
        lists: "layer" (H = 1) or "kv_head" (H = Hkv).
        scale: factor of the scores before the softmax.
        pool: odd width of a maximum over neighbouring votes, or 0.
        page: keys per page of the coarse stage.
        coarse: candidates that the coarse stage leaves, in multiples of k.
    """

    k: int
    sink: int
    lists: str
    scale: float
    pool: int = 0
    page: int = 16
    coarse: int = 4

    def exact(
        self, q: Tensor, k: Tensor, low: int, layer: LayerContext, rows: slice | Tensor = _ALL
    ) -> Tokens:
        """Votes with the keys themselves. Reads all of K: half of what dense attention reads.

        Args:
            q: [B, Hq, R, D]; k: [B, Hkv, Lk, D].
            low: end of the last row's candidates.
            layer: where this runs.
            rows: the rows of the batch that select, or bool [B]; what it leaves out is undefined.
        """
        batch, active = _parted(rows)
        keys = k[batch, :, self.sink : low]
        scores, lse = votes.token_scores(q[batch], keys, scale=self.scale, active=active)
        return self._choose(scores, lse, k, low, layer, active)

    def quantized(
        self,
        bits: int,
        q: Tensor,
        k: Tensor,
        low: int,
        layer: LayerContext,
        rows: slice | Tensor = _ALL,
    ) -> Tokens:
        """Votes with keys in 8 or 4 bits: a quarter or an eighth of the bytes of fp32 keys."""

        def make(first: int, end: int) -> tuple[Tensor, ...]:
            return votes.quantize_keys(k[:, :, first:end], bits=bits)

        batch, active = _parted(rows)
        found = grown(layer.memory, f"int{bits}", low, make)
        keys, scales = (x[batch, :, self.sink : low] for x in found)
        options: dict[str, Any] = {"scale": self.scale, "scales": scales, "active": active}
        scores, lse = votes.token_scores(q[batch], keys, **options)
        return self._choose(scores, lse, k, low, layer, active)

    def pages(
        self, q: Tensor, k: Tensor, low: int, layer: LayerContext, rows: slice | Tensor = _ALL
    ) -> Tokens:
        """Votes with the keys of the pages whose bounds win a vote before: 2/page of K and a few k.

        Pages lie at multiples of `page`, and recent keys are rounded out to whole pages. Takes one
        row.
        """
        page = self.page
        sink, end = self.sink, low // page * page
        if end - sink <= self.k:
            return self.exact(q, k, low, layer, rows)
        batch, active = _parted(rows)
        bounds = block_statistics(layer.memory, k, page, votes.page_bounds)
        bounds = bounds[batch, :, sink // page : end // page]
        heads = self._heads(k)
        options: dict[str, Any] = {"scale": self.scale, "active": active}
        rough = self._summed(votes.page_votes(q[batch], bounds, heads=heads, **options), layer)
        chosen, _ = votes.topk(rough, -(-self.coarse * self.k // page), active=active)
        pages = votes.Pages(chosen[:, :, 0], page, sink)
        scores, lse = votes.token_scores(q[batch], k[batch], pages=pages, **options)
        return self._choose(scores, lse, k, end, layer, active, pages)

    def _choose(
        self,
        scores: Tensor,
        lse: Tensor,
        k: Tensor,
        low: int,
        layer: LayerContext,
        active: Tensor | None,
        pages: votes.Pages | None = None,
    ) -> Tokens:
        """The tokens of scores over the keys from the sink on, or over these pages."""
        heads = self._heads(k)
        ballot = self._summed(votes.soft_vote(scores, lse, heads=heads, active=active), layer)
        first = self.sink if pages is None else 0
        pooled = self._pooled(ballot)
        ids, counts = votes.topk(pooled, self.k, first=first, pages=pages, active=active)
        return Tokens(ids, counts, self.sink, low, self._mass(ballot, pooled, layer))

    def _heads(self, k: Tensor) -> int:
        return k.shape[1] if self.lists == "kv_head" else 1

    def _summed(self, ballot: Tensor, layer: LayerContext) -> Tensor:
        # Ranks hold different heads of the same tokens: the sum of their votes is the vote.
        if self.lists == "kv_head" or layer.reduce is None:
            return ballot
        return layer.reduce(ballot)

    def _pooled(self, ballot: Tensor) -> Tensor:
        if not self.pool:
            return ballot
        flat = ballot.flatten(0, 2)[:, None]
        pooled = torch.nn.functional.max_pool1d(flat, self.pool, 1, self.pool // 2)
        return pooled[:, 0].view_as(ballot).masked_fill(ballot == -torch.inf, -torch.inf)

    def _mass(self, ballot: Tensor, pooled: Tensor, layer: LayerContext) -> Tensor | None:
        if layer.observe is None:
            return None
        # Once more, as entries of the ballot: only a run that is measured pays for it.
        entries, counts = votes.topk(pooled, self.k)
        listed = torch.arange(entries.shape[3], device=entries.device) < counts[..., None]
        chosen = ballot.gather(3, entries.long()).masked_fill(~listed, 0.0).sum(dim=3)
        total = ballot.clamp(min=0).sum(dim=3)
        return chosen.sum(dim=(1, 2)) / total.sum(dim=(1, 2))


def _parted(rows: slice | Tensor) -> tuple[slice, Tensor | None]:
    """A slice of the batch, and which rows of it are active."""
    return (rows, None) if isinstance(rows, slice) else (_ALL, rows)


def join_rows(parts: list[Tokens]) -> Tokens:
    """Selections of consecutive rows, with one sink, as one; recent keys begin as in the last."""
    if len(parts) == 1:
        return parts[0]
    masses = [part.mass for part in parts if part.mass is not None]
    return Tokens(
        torch.cat([part.ids for part in parts], dim=2),
        torch.cat([part.counts for part in parts], dim=2),
        parts[-1].sink,
        parts[-1].low,
        torch.cat(masses) if masses else None,
    )
