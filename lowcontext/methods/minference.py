"""MInference (Jiang et al., arXiv 2407.02490): a pattern per layer and query head in prefill."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.methods._patterns import HeadPattern, Layer, read_patterns
from lowcontext.methods._select import diagonal_sums, join_heads, on_device, top_k_mask
from lowcontext.methods.base import LayerContext, Method, Part, is_decoding
from lowcontext.ops.block_scores import pooled_scores
from lowcontext.ops.vertical_slash import last_window_scores, line_index

BLOCK = 64
WINDOW = 64  # last queries, which score the lines
SINK, LOCAL = 30, 100  # verticals and slashes that are always chosen, as published
BLOCK_BUDGET = 100  # key blocks of the block-sparse pattern, as published
# An index part has at most this many entries (256 MiB) and this many queries.
_PART_ENTRIES = 2**26
_PART_QUERIES = 8192


@dataclass(frozen=True)
class MInference(Method):
    """Reads vertical and slash lines that the last queries of the prompt attend to.

    Decode is dense, as published. Without `patterns` every head chooses its lines by what they
    cost: a vertical line costs one key per query, a slash line a tile of 64; lines are kept whose
    attention per key read is at least `gain` times the mean, up to `vertical` and `slash` keys per
    query. For slash lines both halves of the window must agree (the smaller sum counts): a vertical
    line crosses 64 of them, each once. With `patterns`, each head of each layer has the pattern of
    a file in the published schema, selected as published.

    Where the published code differs, this is ours: at least 100 slash lines and distance 0 among
    them; the block-sparse pattern always reads block 0 and the diagonal, averages the last block
    over its own tokens and rounds its budget up. The recent window of the A-shape is rounded up to
    whole tiles. A prompt in chunks scores each chunk with its own last queries.

    Args:
        patterns: a JSON file in the published schema, or its contents; None chooses by `gain`.
        gain: without patterns, attention per key read that a line must have, in units of the mean.
        vertical: without patterns, most keys per query read as vertical lines.
        slash: without patterns, most keys per query read in tiles of slash lines.
        ratio: with patterns, factor of the sizes of vertical_and_slash and of A-shape.
        tri_last: last queries that the tri-shape pattern leaves dense.
        parity: "lowcontext", or "minference" for the published budgets, forced entries, means and
            default of missing heads.
        min_length: leave contexts of fewer keys dense.
    """

    name: ClassVar[str] = "minference"
    query_chunk: ClassVar[int] = 0

    patterns: str | Path | Sequence[Any] | None = None
    gain: float = 0.25
    vertical: int = 4096
    slash: int = 16384
    ratio: float = 1.0
    tri_last: int = 100
    parity: str = "lowcontext"
    min_length: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_ints(vertical=0, slash=BLOCK, tri_last=0)
        self._expect_choice("parity", ("lowcontext", "minference"))
        self._expect_numbers("gain", "ratio")
        table = None
        if self.patterns is not None:
            table = read_patterns(self.patterns, fill=self._published)
        object.__setattr__(self, "_table", table)

    @property
    def _published(self) -> bool:
        return self.parity == "minference"

    def prefill(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """Index of the whole prompt; `parts` gives it in pieces."""
        return Selection(self, q, k, layer).index(0, q.shape[2])

    def decode(self, q: Tensor, k: Tensor, layer: LayerContext) -> BlockIndex | None:
        """None: MInference reads densely in decode."""
        return None

    def parts(self, q: Tensor, k: Tensor, layer: LayerContext) -> Iterator[Part]:
        """Lines chosen once for the prompt, the index of some query blocks at a time."""
        Lq, Lk = q.shape[2], k.shape[2]
        dense = layer.layer_idx < self.dense_layers or Lk < self.min_length
        if dense or is_decoding(Lq, Lk):
            yield 0, Lq, None
            return
        selection = Selection(self, q, k, layer)
        row = 0
        while row < Lq:
            end = min(row + selection.rows - (Lk - Lq + row) % selection.rows, Lq)
            yield row, end, selection.index(row, end)
            row = end

    def layer_patterns(self, layer: LayerContext, heads: int) -> Layer:
        """The pattern of each query head of a layer.

        Raises:
            ValueError: the pattern file has other layers or heads than the model.
        """
        table: tuple[Layer, ...] | None = self._table  # type: ignore[attr-defined]
        if table is None:
            return (HeadPattern("gain", self.vertical, self.slash),) * heads
        if layer.layer_idx >= len(table) or len(table) < layer.num_layers:
            raise ValueError(
                f"patterns: {self._place}: expected {layer.num_layers} layers as in the model, got "
                f"{len(table)}; layer {len(table)} is missing"
            )
        found = table[layer.layer_idx]
        if len(found) != heads:
            raise ValueError(
                f"patterns: {self._place}: layer {layer.layer_idx}: expected {heads} query heads "
                f"as in the model, got {len(found)}"
            )
        return found

    @property
    def _place(self) -> str:
        return str(self.patterns) if isinstance(self.patterns, (str, Path)) else "the given list"

    def _shown(self, name: str) -> Any:
        if name != "patterns" or self.patterns is None:
            return super()._shown(name)
        table = self._table  # type: ignore[attr-defined]
        place = f"<{len(table)} layers of {len(table[0])} heads>"
        if isinstance(self.patterns, (str, Path)):
            place = str(self.patterns)
        # A file may hold something else the next time.
        return f"{place} #{hashlib.sha1(repr(table).encode()).hexdigest()[:8]}"


class Selection:
    """The lines and blocks of one prompt, for every head of a layer.

    Args:
        method: the settings.
        q: [B, Hq, Lq, D], the last Lq positions; k: [B, Hkv, Lk, D].
        layer: its index and scale; names the patterns of the heads.

    Raises:
        ValueError: the pattern file has other layers or heads than the model.
    """

    def __init__(self, method: MInference, q: Tensor, k: Tensor, layer: LayerContext) -> None:
        self.q, self.k, self.method, self.layer = q, k, method, layer
        B, H, Lq, _ = q.shape
        self.Lk = k.shape[2]
        self.offset = self.Lk - Lq
        self.heads: dict[str, list[int]] = {}
        self.patterns = method.layer_patterns(layer, H)
        for h, pattern in enumerate(self.patterns):
            self.heads.setdefault(pattern.kind, []).append(h)
        self.blocks = self.heads.pop("block_sparse", [])
        self.lined = [h for h in range(H) if h not in set(self.blocks)]
        # Rows of `lined` heads below; a head's row is its place in `lined`.
        self.place = {h: i for i, h in enumerate(self.lined)}
        shape = (B, len(self.lined), self.Lk)
        self.vertical = torch.zeros(shape, dtype=torch.bool, device=q.device)
        self.slash = torch.zeros(shape, dtype=torch.bool, device=q.device)
        self.dense_from: Tensor | None = None
        self.most_vertical = 1
        self._choose()
        entries = B * H * (-(-self.Lk // BLOCK) + self.most_vertical)
        blocks = max(1, min(_PART_ENTRIES // entries, _PART_QUERIES // BLOCK))
        self.rows = blocks * BLOCK

    def index(self, row: int, end: int) -> BlockIndex:
        """The index of rows [row, end) and the keys up to the last of them."""
        keys = self.offset + end
        parts = []
        if self.lined:
            lines = line_index(
                self.vertical,
                self.slash,
                end - row,
                keys,
                block=BLOCK,
                most_vertical=min(self.most_vertical, keys),
                dense_from=self.dense_from,
            )
            parts.append((self.lined, lines))
        if self.blocks:
            parts.append((self.blocks, self._block_index(row, end)))
        return join_heads(parts)

    def _choose(self) -> None:
        published = self._sized("vertical_and_slash")
        if published:
            self._choose_published(published)
        if "gain" in self.heads:
            self._choose_by_gain(self.heads["gain"])
        shapes = {**self._sized("stream_llm"), **self._sized("tri_shape")}
        for h, (first, recent) in shapes.items():
            self.vertical[:, self.place[h], :first] = True
            self.slash[:, self.place[h], :recent:BLOCK] = True
            self.slash[:, self.place[h], min(recent, self.Lk) - 1] = True
            self.most_vertical = max(self.most_vertical, first)
        dense, tri = self.heads.get("dense", []), self.heads.get("tri_shape", [])
        if dense or tri:
            start = dict.fromkeys(dense, 0)
            start |= dict.fromkeys(tri, max(0, self.Lk - self.method.tri_last))
            rows = self._numbers([start.get(h, self.Lk) for h in self.lined])
            self.dense_from = rows.to(torch.int32).expand(self.vertical.shape[:2])

    def _sized(self, kind: str) -> dict[int, tuple[int, int]]:
        """(a, b) of each head of a kind, times the ratio."""
        ratio = self.method.ratio
        return {
            h: (int(self.patterns[h].a * ratio), max(1, int(self.patterns[h].b * ratio)))
            for h in self.heads.get(kind, [])
        }

    def _numbers(self, values: list[int]) -> Tensor:
        return on_device(values, self.q.device)

    def _scores(self, drop: int, window: int) -> tuple[Tensor, Tensor]:
        """Line scores of `window` queries, without the last `drop` tokens."""
        return last_window_scores(
            self.q[:, :, : self.q.shape[2] - drop],
            self.k[:, :, : self.Lk - drop],
            window=window,
            scale=self.layer.scale,
            softcap=self.layer.softcap,
        )

    def _choose_published(self, sizes: dict[int, tuple[int, int]]) -> None:
        heads = list(sizes)
        own = self._numbers(heads)
        vertical, slash = (x[:, own] for x in self._scores(0, WINDOW))
        vertical[..., :SINK] = torch.inf
        slash[..., :LOCAL] = torch.inf
        least = 50 if self.method._published else LOCAL
        most_v = [min(self.Lk, max(sizes[h][0], SINK)) for h in heads]
        most_s = [min(self.Lk, max(sizes[h][1], least)) for h in heads]
        self.most_vertical = max(self.most_vertical, *most_v)
        rows = self._numbers([self.place[h] for h in heads])
        self.vertical[:, rows] = self._best(vertical, most_v)
        self.slash[:, rows] = self._best(slash, most_s)

    def _choose_by_gain(self, heads: list[int]) -> None:
        Lk = self.Lk
        window = min(WINDOW, self.q.shape[2])
        half = window // 2
        rows, own = self._numbers([self.place[h] for h in heads]), self._numbers(heads)
        vertical, slash = (x[:, own] for x in self._scores(0, window - half))
        if half:
            drop = window - half
            early_vertical, early_slash = (
                torch.nn.functional.pad(x[:, own], (0, drop)) for x in self._scores(drop, half)
            )
            vertical = vertical + early_vertical
            # Weight per query of the half that gives less.
            slash = window * torch.minimum(slash / drop, early_slash / half)
        vertical, slash = vertical / window, slash / window
        # The tiles of distances 0 and 64 are always read, and with them the last keys.
        vertical[..., max(0, Lk - 2 * BLOCK - window) :] = 0.0
        slash[..., : BLOCK + 1] = 0.0
        tiles = diagonal_sums(slash, BLOCK) / BLOCK  # [B, h, ceil(Lk / 64)]
        least = self.method.gain / Lk
        most_v = [min(Lk, self.patterns[h].a) for h in heads]
        most_t = [min(tiles.shape[2], self.patterns[h].b // BLOCK) for h in heads]
        chosen = self._best(vertical.masked_fill(vertical < least, -torch.inf), most_v)
        chosen[..., :SINK] = True
        self.vertical[:, rows] = chosen
        chosen = self._best(tiles.masked_fill(tiles < least, -torch.inf), most_t)
        chosen[..., :2] = True
        self.slash[:, rows, ::BLOCK] = chosen
        self.most_vertical = max(self.most_vertical, min(Lk, max(most_v) + SINK))

    def _best(self, scores: Tensor, most: list[int]) -> Tensor:
        """The `most[h]` best entries of head h."""
        return top_k_mask(scores, self._numbers(most), max(most))

    def _block_index(self, row: int, end: int) -> BlockIndex:
        heads, keys = self._numbers(self.blocks), self.offset + end
        q, k = self.q[:, :, row:end], self.k[:, :, :keys]
        scores = pooled_scores(q, k, block=BLOCK, scale=1.0)[:, heads]
        first, Nq = BlockIndex.query_blocks(end - row, keys, BLOCK)
        n = torch.arange(first, first + Nq, device=q.device)[:, None]
        m = torch.arange(scores.shape[3], device=q.device)
        scores = scores.masked_fill(m > n, -torch.inf)
        if self.method._published:
            # Zeros that fill the last block count in its mean.
            last = torch.where((m + 1) * BLOCK > keys, keys % BLOCK / BLOCK, 1.0)
            scores = torch.where(m > n, scores, scores * last)
            limit = max(1, min(BLOCK_BUDGET, self.Lk // BLOCK))
        else:
            scores = scores.masked_fill((m == 0) | (m == n), torch.inf)
            limit = max(2, min(BLOCK_BUDGET, -(-self.Lk // BLOCK)))
        keep = top_k_mask(scores, torch.full((), limit, device=q.device), limit)
        return BlockIndex.from_blocks(keep, (BLOCK, BLOCK), limit)
