"""Both searches in plain PyTorch, fp32, vectorised over heads and query blocks: the ground truth.

Candidates are the whole tiles [low, high) between sink and window, so that every query of a block
sees every candidate key. score(key) = max over the scored rows of the block of row . key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.index import BlockIndex, compact
from lowcontext.ops.hierarchy.options import SearchOptions, StageOptions, TreeOptions

# Each level or stage is a few gathers, products and sorts over all heads and blocks.
FIT_FOR_GPU = True

# Query blocks are searched in groups whose gathered keys hold at most this many numbers (256 MiB).
_GATHER_ELEMENTS = 2**26


def supports(op: str, like: Tensor) -> str | None:
    """Supports everything."""
    return None


def hip_tree(q: Tensor, k: Tensor, options: TreeOptions, ahead: int) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.hierarchy.hip_tree`; returns (kv_num_blocks, kv_starts)."""
    keys = 2 * options.beam * (options.leaf // options.key_stride)
    return _joined(
        [
            _list(part, options, 0, ahead, *_leaves(part, options))
            for part in _parts(q, k, options, options.share, options.row_stride, keys)
        ]
    )


def hip_stage(
    q: Tensor,
    k: Tensor,
    options: StageOptions,
    number: int,
    kept: tuple[Tensor, Tensor] | None,
    behind: int,
    ahead: int,
) -> tuple[Tensor, Tensor]:
    """One stage of `lowcontext.ops.hierarchy.hip_stages`.

    Args:
        q, k, options, behind, ahead: as there.
        number: the stage, from 0.
        kept: (counts, starts) of the chunks that the stage before kept; None for stage 0.

    Returns:
        (counts int32 [B, H, Nq], starts int32 [B, H, Nq, n]) of the chunks kept, ascending; of the
        last stage (kv_num_blocks, kv_starts).
    """
    stage, before = options.stages[number], options.chunks[number - 1]
    total = -(-k.shape[2] // stage.chunk)
    width = total if kept is None else kept[1].shape[3] * (before // stage.chunk)
    keep = options.kept_width(number, k.shape[2], None if kept is None else kept[1].shape[3])
    lists = []
    for part in _parts(q, k, options, "head", stage.row_stride, 2 * width):
        starts, valid = _chunks(part, options, number, kept, behind, total)
        scores = _chunk_scores(part, options, number, starts, valid, behind)
        scores = scores.unflatten(1, (starts.shape[1], -1)).amax(dim=2)
        scores = scores.masked_fill(~valid, -torch.inf)
        if number + 1 == len(options.stages):
            lists.append(_list(part, options, behind, ahead, starts, scores))
        else:
            places, counts = compact(_top(scores, keep), keep)
            used = torch.arange(keep, device=q.device) < counts[..., None]
            lists.append((counts, torch.where(used, starts.gather(3, places), 0).int()))
    return _joined(lists)


def _joined(lists: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    counts, starts = zip(*lists, strict=True)
    return torch.cat(counts, dim=2), torch.cat(starts, dim=2)


@dataclass(frozen=True)
class _Part:
    """Some consecutive query blocks.

    rows: fp32 [B, H, C, N, R, D], the scored rows of each list that read KV head c.
    valid: bool [N, R], whether a row holds a query.
    k: [B, H, C, Lk, D].
    kv_heads: KV heads of the call.
    blocks: slice of the blocks of the call.
    row0: position of the first query of each block, whether or not it is in this call.
    """

    rows: Tensor
    valid: Tensor
    k: Tensor
    kv_heads: int
    blocks: slice
    row0: range

    def scores(self, positions: Tensor) -> Tensor:
        """Largest row . key at positions int64 [B, H, N, P]: fp32 [B, H, N, P]."""
        B, H, N, P = positions.shape
        C, D = self.k.shape[2], self.k.shape[4]
        index = positions.reshape(B, H, 1, N * P, 1).expand(B, H, C, N * P, D)
        keys = self.k.gather(3, index).float().view(B, H, C, N, P, D)
        scores = torch.einsum("bhcnrd,bhcnpd->bhcnrp", self.rows, keys)
        return scores.masked_fill(~self.valid[..., None], -torch.inf).amax(dim=(2, 4))

    def candidates(self, options: SearchOptions, behind: int) -> tuple[int, Tensor]:
        """Tiles [low, high) that the search may list: low, and high as int64 [N]."""
        low, _ = options.candidates(self.row0[0], behind)
        high = (self.first_rows() - behind - options.window + 1) // options.block_k
        return low, high.clamp(min=low)

    def first_rows(self) -> Tensor:
        """`row0` as int64 [N]."""
        rows = self.row0
        return torch.arange(rows.start, rows.stop, rows.step, device=self.k.device)


def _parts(
    q: Tensor, k: Tensor, options: SearchOptions, share: str, stride: int, keys: int
) -> Iterator[_Part]:
    """Cuts the query blocks so that `keys` gathered keys of each fit the memory set aside."""
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    first, Nq = BlockIndex.query_blocks(Lq, Lk, options.block_q)
    rows, valid = _scored_rows(q, Lk - Lq, options.block_q, stride, options.rows)
    if share == "head":
        rows, heads = rows[:, :, None], k.repeat_interleave(Hq // Hkv, dim=1)[:, :, None]
    else:
        rows = rearrange(rows, "b (h g) n r d -> b h n (g r) d", h=Hkv)
        valid = valid.repeat(1, Hq // Hkv)
        lists = 2 if share == "group" else 1
        rows, heads = rows.unsqueeze(lists), k.unsqueeze(lists)
    step = max(1, _GATHER_ELEMENTS // max(1, keys * D * B * heads.shape[1] * heads.shape[2]))
    for n in range(0, Nq, step):
        blocks = slice(n, min(n + step, Nq))
        begin, end = ((first + m) * options.block_q for m in (n, blocks.stop))
        row0 = range(begin, end, options.block_q)
        yield _Part(rows[:, :, :, blocks], valid[blocks], heads, Hkv, blocks, row0)


def _scored_rows(
    q: Tensor, offset: int, block_q: int, stride: int, how: str
) -> tuple[Tensor, Tensor]:
    """Rows fp32 [B, H, Nq, R, D] of the blocks anchored at position 0, and bool [Nq, R]."""
    B, H, Lq, D = q.shape
    Lk = offset + Lq
    first, Nq = BlockIndex.query_blocks(Lq, Lk, block_q)
    R = -(-block_q // stride)
    begin = torch.arange(first, first + Nq, device=q.device)[:, None] * block_q
    group = begin + torch.arange(R, device=q.device) * stride  # first position of each row
    end = torch.minimum(group + stride, begin + block_q).clamp(max=Lk)
    begin = group.clamp(min=offset)
    valid = begin < end
    if how == "last":
        last = (end - 1 - offset).clamp(min=0)
        return q[:, :, last.flatten()].float().view(B, H, Nq, R, D), valid
    position = torch.arange(offset, Lk, device=q.device)
    block = position // block_q
    place = (block - first) * R + (position - block * block_q) // stride
    sums = q.new_zeros(B, H, Nq * R, D, dtype=torch.float32).index_add_(2, place, q.float())
    return sums.view(B, H, Nq, R, D) / (end - begin).clamp(min=1)[..., None], valid


def _representative(left: Tensor, right: Tensor, which: str) -> Tensor:
    if which == "center":
        return left + (right - left) // 2
    return left if which == "first" else (right - 1).clamp(min=0)


def _leaves(part: _Part, options: TreeOptions) -> tuple[Tensor, Tensor]:
    """Leaves that the beam search keeps: first keys int64 [B, H, N, beam], scores (-inf: none)."""
    low, high = part.candidates(options, 0)
    B, H = part.k.shape[:2]
    per_tile = options.block_k // options.leaf
    n = ((high - low) * per_tile)[:, None]
    widest = (options.candidates(part.row0[-1])[1] - low) * per_tile
    halvings = max(0, -(-widest // (2 * options.beam)) - 1).bit_length()
    node = torch.ones_like(n)  # leaves of a whole node
    for _ in range(halvings):
        node = torch.where(n > 2 * options.beam * node, 2 * node, node)
    left = torch.arange(2 * options.beam, device=n.device) * node
    left, right = (x.clamp(max=n).expand(B, H, -1, -1) for x in (left, left + node))
    offsets = torch.arange(
        options.key_stride - 1, options.leaf, options.key_stride, device=n.device
    )

    def score(left: Tensor, right: Tensor) -> Tensor:
        if options.representative == "spread":
            middles = 2 * torch.arange(len(offsets), device=n.device) + 1
            keys = left[..., None] * options.leaf
            keys = keys + (right - left)[..., None] * options.leaf * middles // (2 * len(offsets))
        else:
            leaf = _representative(left, right, options.representative)
            keys = leaf[..., None] * options.leaf + offsets
        keys = low * options.block_k + keys
        keys = torch.where((left < right)[..., None], keys, 0)
        best = part.scores(keys.flatten(3)).unflatten(3, (-1, len(offsets))).amax(dim=-1)
        return best.masked_fill(left >= right, -torch.inf)

    scores = score(left, right)
    for level in range(halvings + 1):
        if level:
            node = (node + 1) // 2
            middle = torch.minimum(left + node, right)
            left = torch.stack([left, middle], dim=-1).flatten(3)
            right = torch.stack([middle, right], dim=-1).flatten(3)
            scores = score(left, right)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : options.beam]
        best = best.sort(dim=-1).values
        left, right, scores = (x.gather(3, best) for x in (left, right, scores))
    return low * options.block_k + left * options.leaf, scores


def _chunks(
    part: _Part,
    options: StageOptions,
    number: int,
    kept: tuple[Tensor, Tensor] | None,
    behind: int,
    total: int,
) -> tuple[Tensor, Tensor]:
    """Chunks that a stage scores: first keys int64 [B, H, N, n] on the grid, and which exist."""
    chunk = options.chunks[number]
    low, high = part.candidates(options, behind)
    if kept is None:
        starts = (torch.arange(total, device=high.device) * chunk).expand(
            part.k.shape[0], options.lists(part.k.shape[1], part.kv_heads), len(high), total
        )
        exists = torch.ones_like(starts, dtype=torch.bool)
    else:
        counts, old = kept[0][:, :, part.blocks], kept[1][:, :, part.blocks].long()
        parts = torch.arange(0, options.chunks[number - 1], chunk, device=high.device)
        starts = (old[..., None] + parts).flatten(3)
        exists = torch.arange(old.shape[3], device=high.device) < counts[..., None]
        exists = exists.repeat_interleave(len(parts), dim=3)
    begin = starts.clamp(min=low * options.block_k)
    end = torch.minimum(starts + chunk, (high * options.block_k)[:, None])
    return starts, exists & (begin < end)


def _chunk_scores(
    part: _Part,
    options: StageOptions,
    number: int,
    starts: Tensor,
    valid: Tensor,
    behind: int,
) -> Tensor:
    """SelectRep, chunk by chunk, for every query head: fp32 [B, Hq, N, n]."""
    low, high = part.candidates(options, behind)
    chunk, bound = options.chunks[number], (high * options.block_k)[:, None]
    left = starts.clamp(min=low * options.block_k)
    right = torch.minimum(starts + chunk, bound)
    heads = part.k.shape[1] // starts.shape[1]
    left, right = (torch.where(valid, x, 0).repeat_interleave(heads, dim=1) for x in (left, right))
    best = torch.full(left.shape, -torch.inf, device=left.device)
    for _ in range(max(1, (chunk - 1).bit_length())):
        middle = left + (right - left + 1) // 2
        first = _representative(left, middle, options.representative)
        second = torch.where(
            middle < right, _representative(middle, right, options.representative), first
        )
        a, b = part.scores(torch.cat([first, second], dim=3)).chunk(2, dim=3)
        go_left = a >= b
        left, right = torch.where(go_left, left, middle), torch.where(go_left, middle, right)
        winner = torch.maximum(a, b)
        best = torch.maximum(best, winner) if options.chunk_score == "max" else winner
    return best


def _top(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` largest of each row, ties to the lower index; never an entry of -inf."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return chosen & (scores > -torch.inf)


def _list(
    part: _Part, options: SearchOptions, behind: int, ahead: int, keys: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Sink, window and the best tiles; a tile scores as the best of the `keys` found in it."""
    Lk, width = part.k.shape[3], options.block_k
    geometry = options.geometry(Lk, behind, ahead)
    low, high = part.candidates(options, behind)
    last = (part.first_rows() + options.block_q).clamp(max=Lk) - 1
    total = -(-(Lk + ahead) // width)
    votes = torch.full((*scores.shape[:3], total), -torch.inf, device=scores.device)
    votes.scatter_reduce_(3, (keys // width).clamp(max=total - 1), scores, "amax")
    tile = torch.arange(total, device=high.device)
    candidate = (tile >= low) & (tile < high[:, None])
    everything = candidate & (high - low <= geometry.picks)[:, None]
    votes = torch.where(everything, torch.inf, votes.masked_fill(~candidate, -torch.inf))
    forced = (tile < low) | (tile >= high[:, None])
    forced = forced & (tile <= (last[:, None] + ahead) // width)
    written = _top(votes, geometry.picks) | forced
    blocks, _ = compact(written, geometry.width)
    counts = (written & (tile <= (last // width)[:, None])).sum(dim=-1)
    listed = torch.arange(geometry.width, device=tile.device) < written.sum(-1, keepdim=True)
    return counts.int(), torch.where(listed, blocks * width, 0).int()
