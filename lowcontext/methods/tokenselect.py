"""TokenSelect (Wu et al., arXiv 2411.02886): the heads of a layer vote for single tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._candidates import Tokens, Vote, join_rows
from lowcontext.methods._reuse import reuse
from lowcontext.methods._select import listed
from lowcontext.methods._streaming import search_keys
from lowcontext.methods.base import (
    MAX_DECODE_QUERIES,
    LayerContext,
    Method,
    Moved,
    Part,
    Rotary,
    is_decoding,
)
from lowcontext.ops.rotary import Positions, list_keys

TILE = 64
# Numbers in the scores of one call (64 MiB).
_SCORES = 2**24


@dataclass(frozen=True)
class TokenSelect(Method):
    """Reads sink, local window and the k tokens that the heads of the layer vote for.

    Each head gives each token between sink and window its softmax probability there; a token's vote
    is the sum over the heads (section 5.1). Nothing is evicted. In decode every query selects, or,
    if asked to, reuses the last selection while its direction has hardly changed (Algorithm 1); in
    prefill each chunk of queries selects once, with the mean of its queries. That mean sees the
    queries of the whole chunk, so the chunk size changes what is selected; what is attended stays
    causal.

    A mean of 512 queries hardly knows what the last one asks, and the answer starts there: the last
    `tail` queries of a prompt, or of each call that brings a piece of it, select one by one.

    A chunk reads the `local` keys up to its first query, and itself. For prefill as published,
    whose window is the chunk itself, take `prefill=get_method("tokenselect", local=1, tail=0)`.

    Args:
        k: tokens selected, besides sink and local window.
        sink: keys at the start that are always read; scoring="pages" rounds it up to whole pages.
        local: recent keys that a query always reads, itself included.
        chunk: queries that share a selection in prefill.
        tail: last queries of a prompt that select for themselves, at most 32.
        scope: "kv_head" selects one list for each KV head, by the votes of its query heads; "layer"
            one for all heads (as published). The first keeps more attention mass at the same bytes.
        vote_scale: "1/sqrt(d)" votes with the scaled logits that attention uses, 1 with unscaled
            ones (as published). The first keeps more attention mass.
        pool: odd width of a maximum over neighbouring votes, 0 for none.
        scoring: "exact" votes with all keys, half of what dense attention reads; "int8" and "int4"
            with a copy of the keys in 8 or 4 bits; "pages" with the keys of the best pages by their
            bounds, which needs neighbouring keys that are alike (docs/token-selection.md). A
            prefill chunk always votes exactly.
        page: keys per page of scoring="pages".
        coarse: tokens in those pages, in multiples of k.
        cache_threshold: reuse the last selection while the cosine with its query is at least this
            (0.9 as published); None selects at every step. Reuse loses answers where what a query
            asks for is a small part of its direction (docs/token-selection.md).
        cache_cosine: "head" asks it of every head; "layer" of all heads as one vector (as
            published), which reuses more often, and also when a single head looks elsewhere.
        cache_steps: most steps that reuse a selection.
        select_layers: layers that select in decode, the others take the list of the last of them;
            None lets every layer select. Layers before the first select for themselves.
        positions: "original" reads keys at their positions; "compact" moves sink and selected keys
            up to the local window, so that no distance exceeds the budget (length extrapolation),
            and lets all candidates vote at distance `local`. It keeps a second copy of the keys.
    """

    name: ClassVar[str] = "tokenselect"

    k: int = 2048
    sink: int = 128
    local: int = 512
    chunk: int = 512
    tail: int = 32
    scope: str = "kv_head"
    vote_scale: str | int = "1/sqrt(d)"
    pool: int = 0
    scoring: str = "pages"
    page: int = 16
    coarse: int = 8
    cache_threshold: float | None = None
    cache_cosine: str = "head"
    cache_steps: int = 64
    select_layers: tuple[int, ...] | None = None
    positions: str = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(k=1, sink=0, local=1, chunk=1, pool=0, page=1, coarse=1, cache_steps=1)
        self._expect_ints(tail=0)
        if self.tail > MAX_DECODE_QUERIES:
            raise ValueError(
                f"tokenselect: tail: expected at most {MAX_DECODE_QUERIES}, got {self.tail}"
            )
        self._expect_choice("cache_cosine", ("head", "layer"))
        self._expect_choice("scope", ("layer", "kv_head"))
        self._expect_choice("vote_scale", ("1/sqrt(d)", 1))
        self._expect_choice("scoring", ("exact", "int8", "int4", "pages"))
        self._expect_choice("positions", ("original", "compact"))
        if self.pool and self.pool % 2 == 0:
            raise ValueError(f"tokenselect: pool: expected 0 or an odd width, got {self.pool}")
        threshold = self.cache_threshold
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(
                f"tokenselect: cache_threshold: expected None or a cosine, got {threshold!r}"
            )
        if self.select_layers is not None:
            # A list from a configuration file; the fields of a method are hashable.
            object.__setattr__(self, "select_layers", tuple(self.select_layers))

    @property
    def moves_keys(self) -> bool:
        """Whether keys are moved up to the local window."""
        return self.positions == "compact"

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """One part for decode; for a prompt a dense one, then one for each chunk."""
        Lq, Lk = q.shape[2], k.shape[2]
        offset = Lk - Lq
        if layer.layer_idx < self.dense_layers or Lk < self.min_length:
            yield 0, Lq, None
        elif is_decoding(Lq, Lk):
            yield from self._decode_parts(q, k, layer)
        else:
            row = 0
            if offset < self._budget:
                row = min(-(-self._budget // self.chunk) * self.chunk - offset, Lq)
                yield 0, row, None
            last = max(row, Lq - self.tail)
            while row < last:
                end = min(row + self.chunk - (offset + row) % self.chunk, last)
                yield row, end, self._chunk_part(q[:, :, row:end], k[:, :, : offset + end], layer)
                row = end
            if row < Lq:
                for start, end, part in self._decode_parts(q[:, :, row:], k, layer):
                    yield row + start, row + end, part

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of one chunk of a prompt: queries of one block of `chunk` positions."""
        start = k.shape[2] - q.shape[2]
        if start < self._budget:
            return None
        tokens = self._select_chunk(q, k, layer)
        columns = tokens.ids, tokens.counts
        return listed(k, 1, (self.chunk, TILE), tokens.low, tokens.sink, columns=columns)

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the tokens that each query selects or reuses."""
        if k.shape[2] <= self._budget:
            return None
        tokens, low = self._tokens(q, k, layer)
        span = self._longest_tail if isinstance(low, Tensor) else None
        columns = tokens.ids, tokens.counts
        return listed(k, q.shape[2], (1, TILE), low, tokens.sink, span, columns)

    @property
    def _budget(self) -> int:
        return self._sink + self.k + self.local

    @property
    def _sink(self) -> int:
        # Before there are pages enough to vote on, keys vote, and a later step may keep their
        # choice: both must read the same sink.
        return -(-self.sink // self.page) * self.page if self.scoring == "pages" else self.sink

    def _vote(self, layer: LayerContext) -> Vote:
        return Vote(
            k=self.k,
            sink=self._sink,
            lists=self.scope,
            scale=1.0 if self.vote_scale == 1 else layer.scale,
            pool=self.pool,
            page=self.page,
            coarse=self.coarse,
        )

    def _select_chunk(self, q: Tensor, k: Tensor, layer: LayerContext) -> Tokens:
        low = k.shape[2] - q.shape[2] + 1 - self.local
        return self._vote(layer).exact(q.float().mean(dim=2, keepdim=True), k, low, layer)

    def _tokens(self, q: Tensor, k: Tensor, layer: LayerContext) -> tuple[Tokens, int | Tensor]:
        """The tokens of decode queries, and the first of the recent keys, int32 [B] with reuse."""
        Lk = k.shape[2]
        low = Lk - self.local
        selects = self.select_layers is None or layer.layer_idx in self.select_layers
        step = (Lk, q.shape[0], q.shape[2])
        if not selects and layer.shared.get("step") == step:
            tokens, start = layer.shared["tokens"]
            start = start.to(k.device) if isinstance(start, Tensor) else start
            return tokens.to(k.device), start
        vote = self._vote(layer)
        # Rows of one call begin their recent keys one after another, and pages would round that.
        scorings: dict[str, Callable[..., Tokens]] = {
            "exact": vote.exact,
            "int8": partial(vote.quantized, 8),
            "int4": partial(vote.quantized, 4),
            "pages": vote.pages if q.shape[2] == 1 else vote.exact,
        }
        score = scorings[self.scoring]
        found: tuple[Tokens, int | Tensor]
        if q.shape[2] == 1 and self.cache_threshold is not None:
            found = reuse(
                q,
                Lk,
                layer,
                self.cache_threshold,
                self.cache_cosine == "head",
                self._longest_tail,
                lambda rows: score(q, k, low, layer, rows),
            )
        else:
            # Scores of many rows are as large as the keys: a few rows at a time.
            at_once = max(1, _SCORES // (q.shape[0] * q.shape[1] * Lk))
            rows = range(0, q.shape[2], at_once)
            behind = [max(0, q.shape[2] - r - at_once) for r in rows]
            tokens = join_rows(
                [
                    score(q[:, :, r : r + at_once], k, low - b, layer)
                    for r, b in zip(rows, behind, strict=True)
                ]
            )
            found = tokens, tokens.low
            if layer.observe is not None and tokens.mass is not None:
                layer.observe({"selected_mass": tokens.mass})
        if selects and self.select_layers is not None:
            layer.shared["step"], layer.shared["tokens"] = step, found
        return found

    @property
    def _longest_tail(self) -> int:
        rounding = self.page if self.scoring == "pages" else 0
        return self.local + rounding + (0 if self.cache_threshold is None else self.cache_steps)

    def _decode_parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        Lq, Lk = q.shape[2], k.shape[2]
        if self.positions == "original" or Lk <= self._budget:
            yield 0, Lq, self.decode(q, k, layer)
            return
        rotary = self._rotary(layer)
        tokens, low = self._tokens(*self._level(q, k, layer, rotary, self.local), layer)
        for r in range(Lq):
            behind = Lq - 1 - r
            start = low - behind if behind else low
            yield r, r + 1, self._moved(tokens, r, start, Lk - behind, self._longest_tail, rotary)

    def _chunk_part(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | Moved | None:
        if self.positions == "original":
            return self.prefill(q, k, layer)
        rotary, Lk = self._rotary(layer), k.shape[2]
        at = range(self.local, self.local + q.shape[2])
        tokens = self._select_chunk(*self._level(q, k, layer, rotary, at), layer)
        return self._moved(tokens, 0, tokens.low, Lk, Lk - tokens.low, rotary)

    def _rotary(self, layer: LayerContext) -> Rotary:
        if layer.rotary is None:
            raise NotImplementedError(
                'tokenselect: positions: "compact" moves rotated keys and needs a model with '
                'rotary embeddings of fixed frequencies; use positions="original"'
            )
        return layer.rotary

    def _level(
        self, q: Tensor, k: Tensor, layer: LayerContext, rotary: Rotary, at: Positions
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as they vote: all keys at position 0 and the queries `local` behind.

        A candidate's distance is one that the model knows, and the same for all of them.

        Args:
            q, k: as the model rotated them.
            layer: keeps the keys at position 0.
            rotary: how the model rotates.
            at: positions of the queries.
        """
        Lq, Lk = q.shape[2], k.shape[2]
        queries = rotary.move(q, range(Lk - Lq, Lk), at, torch.float32)
        return queries, search_keys(layer.memory, k, rotary, 0)

    def _moved(
        self, tokens: Tokens, row: int, low: Tensor | int, Lk: int, span: int, rotary: Rotary
    ) -> Moved:
        """Sink, tokens and recent keys as one list that ends at the last key, without gaps.

        Args:
            tokens: the tokens; row: of this query.
            low: int32 [B or 1], or an int: first of the recent keys.
            Lk: keys that the part sees.
            span: most recent keys.
            rotary: how the model rotates.
        """
        ids, sink = tokens.ids[:, :, row], tokens.sink
        size = sink + ids.shape[2] + span
        keys, first = list_keys(ids, tokens.counts[:, 0, row], low, Lk, size, sink=sink)
        return Moved(keys, first, rotary)
