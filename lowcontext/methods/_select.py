"""Selection shared by the methods: deterministic top-k and statistics of key blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import votes
from lowcontext.ops.lists import tile_lists


def top_k_mask(scores: Tensor, k: Tensor, most: int) -> Tensor:
    """Marks the k largest entries of each row; ties go to the lower index.

    Args:
        scores: float [..., N]; -inf entries are never marked.
        k: int, broadcast to [...]; entries to mark in each row, 0 to `most`.
        most: the largest `k`, known to the host.

    Returns:
        bool [..., N] with at most k True in each row.
    """
    N = scores.shape[-1]
    keep = torch.zeros(*scores.shape[:-1], N + 1, dtype=torch.bool, device=scores.device)
    limits = k.clamp(max=most).expand(scores.shape[:-1])
    ids, counts = votes.topk(scores.float(), max(0, most), limits=limits)
    listed = torch.arange(ids.shape[-1], device=scores.device) < counts[..., None]
    keep.scatter_(-1, torch.where(listed, ids, N).long(), True)
    return keep[..., :N]


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 tensor of numbers that the host knows.

    A plain copy, and an index that is a list, would wait for all that a GPU has to do.
    """
    host = torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def diagonal_sums(slash: Tensor, block: int) -> Tensor:
    """Weight on each diagonal of blocks, from the weight at each distance.

    Distance block * i + t lies on diagonal i for block - t rows of a block of queries, and on
    diagonal i + 1 for t rows.

    Args:
        slash: float [..., N], by distance.
        block: queries and keys per block.

    Returns:
        [..., ceil(N / block)]; entry i is what the tiles `i` blocks before their rows hold.
    """
    padded = torch.nn.functional.pad(slash, (0, -slash.shape[-1] % block))
    padded = padded.unflatten(-1, (-1, block))
    share = torch.arange(block, device=slash.device, dtype=slash.dtype) / block
    above = (padded * (1 - share)).sum(-1)
    below = (padded * share).sum(-1)
    return above + torch.nn.functional.pad(below, (1, -1))


def grown(
    memory: dict[str, Any],
    name: str,
    total: int,
    make: Callable[[int, int], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Per-entry tensors of which only the entries that are missing in `memory` are computed.

    Kept in buffers that grow geometrically; dropping the memory changes nothing but time.

    Args:
        memory: the method's memory of this layer.
        name: the key in it.
        total: entries wanted.
        make: computes entries [first, end) as tensors [B, H, end - first, ...].

    Returns:
        Tensors [B, H, total, ...].
    """
    buffers, done = memory.get(name, ((), 0))
    if done < total or not buffers:
        new = make(min(done, total), total)
        if not buffers or buffers[0].shape[2] < total or _frozen(buffers[0]):
            room = total + max(total // 4, 64)
            larger = tuple(x.new_empty(*x.shape[:2], room, *x.shape[3:]) for x in new)
            for old, buffer in zip(buffers, larger, strict=False):
                buffer[:, :, :done] = old[:, :, :done]
            buffers = larger
        for buffer, x in zip(buffers, new, strict=True):
            buffer[:, :, done:total] = x
        memory[name] = (buffers, total)
    return tuple(buffer[:, :, :total] for buffer in buffers)


def _frozen(buffer: Tensor) -> bool:
    # Tensors made in inference mode cannot be written outside it. A compiled graph cannot ask; it
    # is not entered in one mode and left in the other.
    if torch.compiler.is_compiling():
        return False
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def block_statistics(
    memory: dict[str, Any], k: Tensor, block: int, reduce: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """A statistic of every complete block of keys, computed once per block.

    Args:
        memory: the method's memory of this layer; uses the key "blocks".
        k: [B, Hkv, Lk, D].
        block: keys per block.
        reduce: maps keys [B, Hkv, n * block, D] and `block` to [B, Hkv, n, E].

    Returns:
        [B, Hkv, Lk // block, E].
    """

    def make(first: int, end: int) -> tuple[Tensor]:
        return (reduce(k[:, :, first * block : end * block], block),)

    return grown(memory, "blocks", k.shape[2] // block, make)[0]


def listed(
    k: Tensor,
    rows: int,
    block_size: tuple[int, int],
    low: int | Tensor,
    sink: int,
    span: int | None = None,
    columns: tuple[Tensor, Tensor] | None = None,
) -> BlockIndex:
    """Index of the sink, of chosen keys and of recent keys, for the last rows.

    Args:
        k: [B, Hkv, Lk, D].
        rows: blocks of queries; with more than one, a block is one query.
        block_size: of the index.
        low, sink, span: as in `tile_lists`.
        columns: (int32 [B, H, rows, C], int32 [B, H, rows]), keys between sink and recent keys, and
            how many of them count.
    """
    width = block_size[1]
    counts, starts = tile_lists(k, rows, width=width, low=low, sink=sink, span=span)
    # What the tiles of the sink leave of it.
    left = sink % width
    if left or columns is None:
        rest = torch.arange(sink - left, sink, dtype=torch.int32, device=k.device)
        rest = rest.expand(1, 1, rows, left)
    if columns is None:
        number = torch.full((1, 1, rows), left, dtype=torch.int32, device=k.device)
        return BlockIndex(counts, starts, block_size, number, rest)
    chosen, number = columns
    B, H = chosen.shape[:2]
    if left:
        chosen = torch.cat([rest.expand(B, H, -1, -1), chosen], dim=3)
        number = number + left
    return BlockIndex(
        counts.expand(B, H, -1), starts.expand(B, H, -1, -1), block_size, number, chosen
    )


def join_heads(parts: Sequence[tuple[list[int], BlockIndex]]) -> BlockIndex:
    """One index from indices of disjoint query heads.

    Args:
        parts: (heads, index with one head for each of them); together all heads, and of one block
            size and one number of query blocks.

    Returns:
        BlockIndex with every head, as wide as the widest part.
    """
    if len(parts) == 1 and parts[0][0] == list(range(len(parts[0][0]))):
        return parts[0][1]
    heads = sum(len(each) for each, _ in parts)
    first = parts[0][1]

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        present = [x for x in tensors if x is not None]
        if not present:
            return None
        like = present[0]
        shape = list(like.shape)
        shape[1] = heads
        if like.dim() == 4:
            shape[3] = max(x.shape[3] for x in present)
        # Entries past a count are never read, counts of absent lists are 0.
        out = like.new_zeros(shape) if like.dim() == 3 else like.new_empty(shape)
        for place, x in zip(places, tensors, strict=True):
            if x is None:
                continue
            if x.dim() == 3:
                out[:, place] = x
            else:
                out[:, place, :, : x.shape[3]] = x
        return out

    places = [on_device(each, first.device) for each, _ in parts]
    counts = joined([index.kv_num_blocks for _, index in parts])
    starts = joined([index.kv_starts for _, index in parts])
    if counts is None or starts is None:
        raise ValueError("parts: expected at least one index, got none")
    return BlockIndex(
        counts,
        starts,
        first.block_size,
        joined([index.kv_num_columns for _, index in parts]),
        joined([index.kv_columns for _, index in parts]),
    )
