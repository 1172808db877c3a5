"""The hierarchical searches: kernels of the scores of nodes and chunks, and of the lists of tiles.

    score(key) = max over the scored rows of the block, of the heads that share a list, of row . key

A list belongs to one batch, head of the index and block of queries; its candidate keys are the
tiles [low, high) between sink and window. Each level of the tree and each stage is a kernel of
scores, cut over its entries, so that a decode step of few lists fills the device, and the selection
of `select.py`, which keeps the best in ascending order. Products are those of fp32, as in
`scores.py`: what is found must not depend on the backend.

A block has R rows of queries. Rows before the first query or after the last repeat the nearest row
that holds one: a maximum does not see it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowcontext.ops.triton.attend import _load_rows
from lowcontext.ops.triton.scores import add_product

# fmt: off
UNSPECIALIZED = [
    "Hq", "group", "heads", "lists", "Nq", "Lk", "offset", "first", "block_q", "row_stride", "R",
    "block_k", "low", "behind", "window", "beam", "leaf", "key_stride", "offsets", "level",
    "halvings", "per_tile", "M", "parent_width", "chunk", "parts", "rounds", "entries",
    "kept_b", "kept_h", "kept_n", "old_b", "old_h", "old_n", "keep", "around", "picks", "width",
    "ahead", "size",
]


@triton.jit
def _high(n, first, block_q, behind, window, block_k, low):
    """End of the candidate tiles of query block `first + n`."""
    end = (first + n) * block_q - behind - window + 1
    return tl.maximum(tl.maximum(end, 0) // block_k, low)


@triton.jit
def _representative(left, right, WHICH: tl.constexpr):
    """Center, first or last of [left, right)."""
    if WHICH == 0:
        x = left + (right - left) // 2
    elif WHICH == 1:
        x = left
    else:
        x = tl.maximum(right - 1, 0)
    return x


@triton.jit
def _best(
    rows_ptr, R, k_rows, valid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Largest row . key over R rows [R, D] at `rows_ptr`: fp32 [BLOCK_N]."""
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for begin in range(0, R, BLOCK_M):
        # The last row again where there are no more: a maximum does not see it.
        r = tl.minimum(begin + tl.arange(0, BLOCK_M), R - 1)  # [BLOCK_M]
        s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for d in tl.static_range(0, D, BLOCK_D):
            k = _load_rows(k_rows + d, valid, True, D - d, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            q = _load_rows(rows_ptr + r * D + d, r >= 0, True, D - d, BLOCK_D)
            s = add_product(q, k, s, PRODUCTS, True)  # [BLOCK_N, BLOCK_M]
        best = tl.maximum(best, tl.max(s, 1))
    return best


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rows_kernel(
    q_ptr, rows_ptr, stride_qb, stride_qh, stride_ql,
    Nq, Lk, offset, first, block_q, row_stride, R,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MEAN: tl.constexpr,
):
    """rows fp32 [B, Hq, Nq, R, D]: the mean, or the last, of `row_stride` queries of a block.

    `offset` is the position of the first query. Grid (R * Nq * Hq, B).
    """
    n = tl.program_id(0) // R % Nq
    h = (tl.program_id(0) // R // Nq).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    begin = (first + n) * block_q
    end = tl.minimum(begin + block_q, Lk)
    nearest = tl.maximum(tl.program_id(0) % R, tl.maximum(offset - begin, 0) // row_stride)
    nearest = tl.minimum(nearest, (end - 1 - begin) // row_stride)
    low = tl.maximum(begin + nearest * row_stride, offset)
    high = tl.minimum(begin + (nearest + 1) * row_stride, end)
    if not MEAN:
        low = high - 1
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_N):
        p = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        q_rows = q_ptr + b * stride_qb + h * stride_qh + (p - offset).to(tl.int64) * stride_ql
        x = _load_rows(q_rows, p < high, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        total += tl.sum(x.to(tl.float32), 0)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    out = rows_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * D + d
    tl.store(out, total / (high - low).to(tl.float32), mask=d < D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tree_kernel(
    rows_ptr, k_ptr, ids_ptr, counts_ptr, parents_ptr, nodes_ptr, scores_ptr,
    stride_kb, stride_kh, stride_kl,
    Hq, group, heads, lists, Nq, R, first, block_q, block_k, low, window,
    beam, leaf, key_stride, offsets, level, halvings, per_tile, M, parent_width,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr, WHICH: tl.constexpr, PRODUCTS: tl.constexpr,
):
    """Nodes int32 [B, lists, Nq, M, 2] of a level, [left, right) in leaves, and their scores.

    The first level has the intervals of the grid, a later one the halves of the nodes `ids` that
    the one before kept. -inf for a node without leaves. Grid (tiles * Nq * lists, B).
    """
    NODES: tl.constexpr = BLOCK_N // KEYS
    tiles = tl.cdiv(M, NODES)
    n = tl.program_id(0) // tiles % Nq
    s = tl.program_id(0) // tiles // Nq
    b = tl.program_id(1).to(tl.int64)
    unit = (b * lists + s) * Nq + n
    high = _high(n, first, block_q, 0, window, block_k, low)
    leaves = (high - low) * per_tile
    length = tl.full([], 1, tl.int32)  # leaves of a node of this level
    for _ in range(halvings):
        length = tl.where(leaves > 2 * beam * length, 2 * length, length)
    place = tl.program_id(0) % tiles * NODES + tl.arange(0, BLOCK_N) // KEYS  # [BLOCK_N]
    exists = place < M
    if ids_ptr is None:
        left = tl.minimum(place * length, leaves)
        right = tl.minimum(left + length, leaves)
    else:
        length = tl.maximum(length >> level, 1)
        kept = exists & (place // 2 < tl.load(counts_ptr + unit))
        parent = tl.load(ids_ptr + unit * parent_width + place // 2, mask=kept, other=0)
        node = parents_ptr + (unit * 2 * beam + parent) * 2
        left = tl.load(node, mask=kept, other=0)
        right = tl.load(node + 1, mask=kept, other=0)
        middle = tl.minimum(left + length, right)
        right = tl.where(place % 2 == 0, middle, right)
        left = tl.where(place % 2 == 0, left, middle)
    some = exists & (left < right)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for begin in range(0, offsets, KEYS):
        u = begin + tl.arange(0, BLOCK_N) % KEYS  # [BLOCK_N]
        if WHICH == 3:
            reach = (right - left) * leaf
            key = left * leaf + (reach.to(tl.int64) * (2 * u + 1) // (2 * offsets)).to(tl.int32)
        else:
            key = _representative(left, right, WHICH) * leaf + u * key_stride + key_stride - 1
        valid = some & (u < offsets)
        key = tl.where(valid, low * block_k + key, 0)
        found = tl.full([BLOCK_N], float("-inf"), tl.float32)
        for i in range(heads):
            h = s * heads + i
            rows = rows_ptr + ((b * Hq + h) * Nq + n) * R * D
            kv_head = (h // group).to(tl.int64)
            k_rows = k_ptr + b * stride_kb + kv_head * stride_kh + key.to(tl.int64) * stride_kl
            score = _best(rows, R, k_rows, valid, D, BLOCK_D, BLOCK_M, BLOCK_N, PRODUCTS)
            found = tl.maximum(found, score)
        best = tl.maximum(best, tl.where(valid, found, float("-inf")))
    first_key = exists & (tl.arange(0, BLOCK_N) % KEYS == 0)
    node = nodes_ptr + (unit * 2 * beam + place) * 2
    tl.store(node, left, mask=first_key)
    tl.store(node + 1, right, mask=first_key)
    best = tl.max(tl.reshape(best, [NODES, KEYS]), 1)  # [NODES]
    place = tl.program_id(0) % tiles * NODES + tl.arange(0, NODES)
    tl.store(scores_ptr + unit * M + place, best, mask=place < M)


@triton.jit
def _chunk_start(e, old_ptr, chunk, parts, valid):
    """First key of entry e: of the grid, or of a part of the chunks `old` that were kept."""
    if old_ptr is None:
        start = e * chunk
    else:
        start = tl.load(old_ptr + e // parts, mask=valid, other=0) + e % parts * chunk
    return start


@triton.jit(do_not_specialize=UNSPECIALIZED)
def stage_kernel(
    rows_ptr, k_ptr, kept_ptr, old_ptr, scores_ptr,
    stride_kb, stride_kh, stride_kl, kept_b, kept_h, kept_n, old_b, old_h, old_n,
    Hq, group, heads, lists, Nq, R, first, block_q, block_k, low, behind, window,
    chunk, parts, rounds, entries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHICH: tl.constexpr, LAST: tl.constexpr, PRODUCTS: tl.constexpr,
):
    """Scores fp32 [B, lists, Nq, entries] of chunks; -inf where there are no candidates.

    Per head, `rounds` times the half of the chunk whose representative scores higher, the left one
    of equals; the score is the largest on the way, with LAST the last one. Grid (tiles * Nq *
    lists, B).
    """
    tiles = tl.cdiv(entries, BLOCK_N)
    n = tl.program_id(0) // tiles % Nq
    s = tl.program_id(0) // tiles // Nq
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    exists = e < entries
    if kept_ptr is not None:
        kept_ptr += b * kept_b + s.to(tl.int64) * kept_h + n.to(tl.int64) * kept_n
        old_ptr += b * old_b + s.to(tl.int64) * old_h + n.to(tl.int64) * old_n
        exists = exists & (e // parts < tl.load(kept_ptr))
    start = _chunk_start(e, old_ptr, chunk, parts, exists)
    begin = tl.maximum(start, low * block_k)
    end = _high(n, first, block_q, behind, window, block_k, low) * block_k
    end = tl.minimum(start + chunk, end)
    valid = exists & (begin < end)
    total = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if tl.max(valid.to(tl.int32), 0) > 0:
        for i in range(heads):
            h = s * heads + i
            rows = rows_ptr + ((b * Hq + h) * Nq + n) * R * D
            k_base = k_ptr + b * stride_kb + (h // group).to(tl.int64) * stride_kh
            left = tl.where(valid, begin, 0)
            right = tl.where(valid, end, 0)
            best = tl.full([BLOCK_N], float("-inf"), tl.float32)
            for _ in range(rounds):
                middle = left + (right - left + 1) // 2
                one = _representative(left, middle, WHICH)
                two = tl.where(middle < right, _representative(middle, right, WHICH), one)
                x = _best(
                    rows, R, k_base + one.to(tl.int64) * stride_kl, valid,
                    D, BLOCK_D, BLOCK_M, BLOCK_N, PRODUCTS,
                )
                y = _best(
                    rows, R, k_base + two.to(tl.int64) * stride_kl, valid,
                    D, BLOCK_D, BLOCK_M, BLOCK_N, PRODUCTS,
                )
                right = tl.where(x >= y, middle, right)
                left = tl.where(x >= y, left, middle)
                winner = tl.maximum(x, y)
                best = winner if LAST else tl.maximum(best, winner)
            total = tl.maximum(total, best)
    unit = (b * lists + s) * Nq + n
    total = tl.where(valid, total, float("-inf"))
    tl.store(scores_ptr + unit * entries + e, total, mask=e < entries)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def kept_kernel(
    ids_ptr, counts_ptr, old_ptr, starts_ptr, old_b, old_h, old_n,
    lists, Nq, chunk, parts, keep, BLOCK: tl.constexpr,
):
    """starts [B, lists, Nq, keep] of the chunks `ids` of a stage. Grid (Nq * lists, B)."""
    n = tl.program_id(0) % Nq
    s = tl.program_id(0) // Nq
    b = tl.program_id(1).to(tl.int64)
    unit = (b * lists + s) * Nq + n
    if old_ptr is not None:
        old_ptr += b * old_b + s.to(tl.int64) * old_h + n.to(tl.int64) * old_n
    count = tl.load(counts_ptr + unit)
    for begin in range(0, keep, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        e = tl.load(ids_ptr + unit * keep + i, mask=i < count, other=0)
        start = _chunk_start(e, old_ptr, chunk, parts, i < count)
        tl.store(starts_ptr + unit * keep + i, tl.where(i < count, start, 0), mask=i < keep)


@triton.jit
def _tile(e, unit, ids_ptr, nodes_ptr, old_ptr, valid, leaves, low, leaf, chunk, parts, block_k):
    """Tile of entry e: of leaf `ids[e]` of the last nodes, or of chunk e."""
    if nodes_ptr is None:
        tile = _chunk_start(e, old_ptr, chunk, parts, valid) // block_k
    else:
        place = tl.load(ids_ptr + unit * leaves + e, mask=valid, other=0)
        left = tl.load(nodes_ptr + (unit * 2 * leaves + place) * 2, mask=valid, other=0)
        tile = low + left * leaf // block_k
    return tile


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tile_votes_kernel(
    scores_ptr, ids_ptr, counts_ptr, nodes_ptr, kept_ptr, old_ptr, votes_ptr,
    kept_b, kept_h, kept_n, old_b, old_h, old_n,
    lists, Nq, M, entries, low, leaf, chunk, parts, block_k, size,
    BLOCK: tl.constexpr,
):
    """votes [B, lists, Nq, entries]: the best of a tile's entries at its last one, -inf elsewhere.

    Entries ascend; at most `size` of them lie in a tile. Grid (tiles * Nq * lists, B).
    """
    tiles = tl.cdiv(entries, BLOCK)
    n = tl.program_id(0) // tiles % Nq
    s = tl.program_id(0) // tiles // Nq
    b = tl.program_id(1).to(tl.int64)
    unit = (b * lists + s) * Nq + n
    count = entries
    if counts_ptr is not None:
        count = tl.load(counts_ptr + unit)
    if kept_ptr is not None:
        kept_ptr += b * kept_b + s.to(tl.int64) * kept_h + n.to(tl.int64) * kept_n
        old_ptr += b * old_b + s.to(tl.int64) * old_h + n.to(tl.int64) * old_n
        count = tl.load(kept_ptr) * parts
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    own = _tile(
        e, unit, ids_ptr, nodes_ptr, old_ptr, e < count, entries, low, leaf, chunk, parts, block_k,
    )
    after = _tile(
        e + 1, unit, ids_ptr, nodes_ptr, old_ptr, e + 1 < count, entries, low, leaf, chunk, parts,
        block_k,
    )
    last = (e < count) & ((e + 1 == count) | (own != after))
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for t in range(size):
        i = e - t
        valid = last & (i >= 0)
        tile = _tile(
            i, unit, ids_ptr, nodes_ptr, old_ptr, valid, entries, low, leaf, chunk, parts, block_k,
        )
        place = i
        if nodes_ptr is not None:
            place = tl.load(ids_ptr + unit * entries + i, mask=valid, other=0)
        score = tl.load(scores_ptr + unit * M + place, mask=valid, other=float("-inf"))  # [BLOCK]
        best = tl.maximum(best, tl.where(tile == own, score, float("-inf")))
    tl.store(votes_ptr + unit * entries + e, best, mask=e < entries)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def tile_list_kernel(
    ids_ptr, nodes_ptr, old_ptr, chosen_ptr, chosen_counts_ptr, counts_ptr, starts_ptr,
    old_b, old_h, old_n,
    lists, Nq, Lk, first, block_q, entries, low, behind, window, leaf, chunk, parts, block_k,
    picks, keep, width, ahead, BLOCK: tl.constexpr,
):
    """starts [B, lists, Nq, width] and counts: sink, the tiles of the chosen entries, window.

    Where there are at most `picks` candidates, all of them. Grid (Nq * lists, B).
    """
    n = tl.program_id(0) % Nq
    s = tl.program_id(0) // Nq
    b = tl.program_id(1).to(tl.int64)
    unit = (b * lists + s) * Nq + n
    if old_ptr is not None:
        old_ptr += b * old_b + s.to(tl.int64) * old_h + n.to(tl.int64) * old_n
    high = _high(n, first, block_q, behind, window, block_k, low)
    last = tl.minimum((first + n + 1) * block_q, Lk) - 1
    forced = (last + ahead) // block_k + 1
    everything = high - low <= picks
    found = tl.load(chosen_counts_ptr + unit)
    found = tl.where(everything, high - low, found)
    sinks = tl.minimum(low, forced)
    recent = sinks + found  # where the window begins
    total = recent + tl.maximum(forced - high, 0)
    seen = last // block_k + 1
    counted = tl.minimum(low, seen) + found + tl.maximum(seen - high, 0)
    tl.store(counts_ptr + unit, counted)
    for begin in range(0, width, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        listed = (i >= sinks) & (i < recent) & (not everything)
        e = tl.load(chosen_ptr + unit * keep + i - sinks, mask=listed, other=0)
        tile = _tile(
            e, unit, ids_ptr, nodes_ptr, old_ptr, listed, entries, low, leaf, chunk, parts, block_k,
        )
        tile = tl.where(listed, tile, low + i - sinks)
        tile = tl.where(i < sinks, i, tile)
        tile = tl.where(i >= recent, high + i - recent, tile)
        starts = starts_ptr + unit * width + i
        tl.store(starts, tl.where(i < total, tile * block_k, 0), mask=i < width)
# fmt: on
