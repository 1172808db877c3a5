"""Attention over listed keys: a prefill kernel, a split-KV decode kernel and its combine.

All three compute, for query row r at position p = Lk - Lq + r and head h,

    x_j = cap(scale * q_r . k_j)        cap(x) = softcap * tanh(x / softcap), or x
    out = sum_j e^x_j v_j / sum_j e^x_j        lse = log sum_j e^x_j

over the listed keys j with low <= j <= p, low = max(0, kv_start[b]). The softmax runs online and in
base 2: logits carry a factor log2(e), so that an exponential is one `ex2` instruction.

Lists. A tile whose width is a multiple of BLOCK_N is read in pieces of BLOCK_N keys at consecutive
addresses. Narrower tiles and single columns are one flat list of keys, read BLOCK_N at a time from
gathered addresses, so a page of 16 keys does not leave a tensor-core tile three quarters empty.
DENSE replaces the list by the pieces of BLOCK_N keys that cover low .. p.

Masks. A key that no row of the block may see (out of range, not listed, after the last row) gets
the key position Lk, which the causal comparison hides from every row, and is never loaded.

State of a row: m the largest logit so far, z = sum_j 2^(s_j - m), acc = sum_j 2^(s_j - m) v_j.
"""

import triton
import triton.language as tl

# fmt: off
# Sizes that change from call to call (lengths, list widths) must not start a new compilation when
# they happen to be 1 or a multiple of 16. Strides of q, k, v and out may: 16-byte loads need it.
UNSPECIALIZED = [
    "counts_b", "counts_h", "counts_n", "starts_b", "starts_h", "starts_n", "starts_s",
    "column_counts_b", "column_counts_h", "column_counts_n",
    "columns_b", "columns_h", "columns_n", "columns_c",
    "Hq", "group", "index_group", "Lq", "Lk", "lead", "block_q", "window", "S", "C",
    "sub_tiles", "pack", "chunks", "splits",
]


@triton.jit
def _load_rows(row_ptrs, valid, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of D numbers at `row_ptrs` [N], 0 where not `valid` [N] and beyond D: [N, BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    ptrs = row_ptrs[:, None] + d[None, :]  # [N, BLOCK_D]
    if MASKED and D == BLOCK_D:
        x = tl.load(ptrs, mask=valid[:, None], other=0.0)  # [N, BLOCK_D]
    elif MASKED:
        x = tl.load(ptrs, mask=valid[:, None] & (d < D)[None, :], other=0.0)  # [N, BLOCK_D]
    elif D == BLOCK_D:
        x = tl.load(ptrs)  # [N, BLOCK_D]
    else:
        x = tl.load(ptrs, mask=(d < D)[None, :], other=0.0)  # [N, BLOCK_D]
    return x


@triton.jit
def _step(
    q, acc, m, z, k_rows, v_rows, keys, valid, positions, window, logit_scale, cap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Adds BLOCK_N keys to the running softmax.

    m' = max(m, max_j s_j)    p_j = 2^(s_j - m')    a = 2^(m - m')
    z' = a z + sum_j p_j      acc' = a acc + sum_j p_j v_j
    """
    k = _load_rows(k_rows, valid, MASKED, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    # The factor, above 0, goes into the exponent, where it takes part in an FMA.
    factor = logit_scale
    if SOFTCAP:
        # tanh(y) = 1 - 2 / (e^2y + 1); logit_scale is 2 log2(e) scale / softcap, so 2^s = e^2y.
        s = cap * (1.0 - 2.0 / (tl.exp2(s * logit_scale) + 1.0))
        factor = 1.0
    if MASKED:
        visible = keys[None, :] <= positions[:, None]
        if WINDOW:
            visible = visible & (keys[None, :] > positions[:, None] - window)
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * factor)  # [BLOCK_M]
    if MASKED:
        # A row that has seen no key yet has m = -inf: subtract 0, so that its p is 2^-inf = 0.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        base = m_new
    p = tl.exp2(s * factor - base[:, None])
    alpha = tl.exp2(m - base)
    z = z * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v = _load_rows(v_rows, valid, MASKED, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, m_new, z


@triton.jit
def _tile_start(
    starts_ptr, stride_ss, i, last, skip_at, skip, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """First key of piece i, if it is before `last`; from `skip_at` on, `skip` pieces are left out.

    Loops ask for it an iteration ahead. A load of the same iteration would go through shared
    memory, and in the interior loop each tile then waited for copies that had just begun.
    """
    piece = i + tl.where(i >= skip_at, skip, 0)
    entry = starts_ptr + (piece // PIECES).to(tl.int64) * stride_ss
    return tl.load(entry, mask=i < last, other=0).to(tl.int64) + (piece % PIECES) * BLOCK_N


@triton.jit
def _tiles(
    q, acc, m, z, kv, starts, first, last, skip_at, skip, span, positions, logits,
    MASKED: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Attends to pieces first .. last - 1 of the tile list; a piece is BLOCK_N keys.

    A masked call leaves the interior pieces out, which an unmasked one handles. Unmasked pieces are
    clamped into the keys, so that a list that breaks its promise to ascend gives a wrong result but
    reads no foreign memory.
    """
    k_ptr, v_ptr, stride_kl, stride_vl = kv
    starts_ptr, stride_ss = starts
    low, high, Lk, window = span
    logit_scale, cap = logits
    PIECES: tl.constexpr = BLOCK_K // BLOCK_N
    offsets = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    ahead = 0
    if not DENSE:
        ahead = _tile_start(starts_ptr, stride_ss, first, last, skip_at, skip, PIECES, BLOCK_N)
    for i in range(first, last):
        if DENSE:
            start = (i + tl.where(i >= skip_at, skip, 0)).to(tl.int64) * BLOCK_N
        else:
            start = ahead  # scalar
            ahead = _tile_start(starts_ptr, stride_ss, i + 1, last, skip_at, skip, PIECES, BLOCK_N)
        if MASKED:
            keys = start + offsets
            valid = (keys >= low) & (keys <= high)
            keys = tl.where(valid, keys, Lk).to(tl.int32)
        else:
            if not DENSE:
                start = tl.minimum(tl.maximum(start, 0), Lk - BLOCK_N)
            keys = offsets
            valid = offsets >= 0
        k_rows = k_ptr + start * stride_kl + offsets.to(tl.int64) * stride_kl  # [BLOCK_N]
        v_rows = v_ptr + start * stride_vl + offsets.to(tl.int64) * stride_vl  # [BLOCK_N]
        acc, m, z = _step(
            q, acc, m, z, k_rows, v_rows, keys, valid, positions, window, logit_scale, cap,
            MASKED, WINDOW, SOFTCAP, D, BLOCK_D,
        )
    return acc, m, z


@triton.jit
def _listed_keys(list_ptr, stride_list, i, count, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys from i * BLOCK_N on of `count` runs of WIDTH keys [BLOCK_N], as `_tile_start`."""
    flat = i * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    entry = list_ptr + (flat // WIDTH).to(tl.int64) * stride_list
    return tl.load(entry, mask=flat < count * WIDTH, other=0) + flat % WIDTH


@triton.jit
def _gather(
    q, acc, m, z, kv, entries, first, last, count, span, positions, logits,
    WIDTH: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Attends to keys first * BLOCK_N .. last * BLOCK_N - 1 of `count` runs of WIDTH keys."""
    k_ptr, v_ptr, stride_kl, stride_vl = kv
    list_ptr, stride_list = entries
    low, high, Lk, window = span
    logit_scale, cap = logits
    ahead = _listed_keys(list_ptr, stride_list, first, count, WIDTH, BLOCK_N)
    for i in range(first, last):
        rows = ahead.to(tl.int64)  # [BLOCK_N]
        listed = i * BLOCK_N + tl.arange(0, BLOCK_N) < count * WIDTH
        ahead = _listed_keys(list_ptr, stride_list, i + 1, count, WIDTH, BLOCK_N)
        valid = listed & (rows >= low) & (rows <= high)
        keys = tl.where(valid, rows, Lk).to(tl.int32)
        acc, m, z = _step(
            q, acc, m, z, k_ptr + rows * stride_kl, v_ptr + rows * stride_vl,
            keys, valid, positions, window, logit_scale, cap,
            True, False, SOFTCAP, D, BLOCK_D,
        )
    return acc, m, z


@triton.jit
def _interior(starts, count, low, row_first, row_last, BLOCK_K: tl.constexpr):
    """Splits an ascending list into tiles before `low`, tiles seen whole by every row, the rest.

    `row_first` and `row_last` are the positions of the first and the last row.

    Returns (before, whole_end, seen): tiles before .. whole_end - 1 need no mask, tiles from `seen`
    on lie after every row. One vector pass of 128 entries: about 1 % of the work on those tiles.
    """
    starts_ptr, stride_ss = starts
    before = 0
    whole_end = 0
    seen = 0
    for i in range(0, count, 128):
        entry = i + tl.arange(0, 128)  # [128]
        listed = entry < count
        start = tl.load(starts_ptr + entry.to(tl.int64) * stride_ss, mask=listed, other=0)  # [128]
        start = start.to(tl.int64)
        before += tl.sum((listed & (start < low)).to(tl.int32), 0)
        whole_end += tl.sum((listed & (start + (BLOCK_K - 1) <= row_first)).to(tl.int32), 0)
        seen += tl.sum((listed & (start <= row_last)).to(tl.int32), 0)
    before = tl.minimum(before, seen)
    return before, tl.minimum(tl.maximum(whole_end, before), seen), seen


@triton.jit
def _count(count_ptr, limit):
    """The count of one row of a list, clamped to the width of the list."""
    return tl.maximum(tl.minimum(tl.load(count_ptr), limit), 0)  # scalar


@triton.jit
def _share(first, last, split, splits):
    """The part of first .. last - 1 that belongs to one split; empty if none is left."""
    size = tl.cdiv(tl.maximum(last - first, 0), splits)
    begin = first + split * size
    return begin, tl.minimum(begin + size, last)


@triton.jit
def _normalised(acc, m, z):
    """out = acc / z and the base-2 LSE m + log2(z); 0 and -inf for a row without keys.

    z >= 1 for a row with a visible key, as its largest logit gives 2^0, and 0 for one without.
    """
    empty = z == 0.0
    total = tl.where(empty, 1.0, z)
    return acc / total[:, None], tl.where(empty, float("-inf"), m + tl.log2(total))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    counts_ptr, starts_ptr, column_counts_ptr, columns_ptr, kv_start_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh, stride_ol,
    counts_b, counts_h, counts_n, starts_b, starts_h, starts_n, starts_s,
    column_counts_b, column_counts_h, column_counts_n, columns_b, columns_h, columns_n, columns_c,
    Hq, group, index_group, Lq, Lk, lead, block_q, window, S, C, sub_tiles, logit_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr, GATHER: tl.constexpr, COLUMNS: tl.constexpr,
    KV_START: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):
    """out[b, h, r] = sum_j e^x_j v_j / sum_j e^x_j for BLOCK_M rows r of one query block.

    Grid (tiles of query rows * Hq, B). The tiles with the latest rows have the longest lists and
    start first; heads vary fastest, so that heads that share K and V run together.
    """
    head = tl.program_id(0) % Hq
    tile = tl.num_programs(0) // Hq - 1 - tl.program_id(0) // Hq
    b = tl.program_id(1).to(tl.int64)
    block = tile // sub_tiles
    row0 = block * block_q - lead  # first row of the query block, negative if before the queries
    sub0 = (tile % sub_tiles) * BLOCK_M
    row_first = tl.maximum(row0 + sub0, 0)
    row_last = tl.minimum(row0 + tl.minimum(sub0 + BLOCK_M, block_q), Lq) - 1
    if row_first > row_last:
        return
    rows = row0 + sub0 + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    present = (rows >= row_first) & (rows <= row_last)
    positions = rows + (Lk - Lq)
    seen_by_all = row_first + (Lk - Lq)  # position of the first row
    high = row_last + (Lk - Lq)
    low = 0
    if KV_START:
        low = tl.maximum(tl.load(kv_start_ptr + b), 0)  # scalar

    h = head.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    kv = (
        k_ptr + b * stride_kb + kv_head * stride_kh,
        v_ptr + b * stride_vb + kv_head * stride_vh,
        stride_kl,
        stride_vl,
    )
    q_rows = q_ptr + b * stride_qb + h * stride_qh + rows.to(tl.int64) * stride_ql
    q = _load_rows(q_rows, present, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)

    n = block.to(tl.int64)
    index_head = (head // index_group).to(tl.int64)
    starts = (0, 0)
    count = 0
    if not DENSE:
        starts = (starts_ptr + b * starts_b + index_head * starts_h + n * starts_n, starts_s)
        count = _count(counts_ptr + b * counts_b + index_head * counts_h + n * counts_n, S)
    logits = (logit_scale, cap)
    if GATHER:
        span = (low, high, Lk, window)
        end = tl.cdiv(count * BLOCK_K, BLOCK_N)
        acc, m, z = _gather(
            q, acc, m, z, kv, starts, 0, end, count, span, positions, logits,
            BLOCK_K, SOFTCAP, D, BLOCK_D, BLOCK_N,
        )
    else:
        # Pieces first .. last - 1 hold every visible key; whole .. whole_end - 1 need no mask.
        if DENSE:
            whole = tl.cdiv(low, BLOCK_N)
            if WINDOW:
                whole = tl.cdiv(tl.maximum(high - window + 1, low), BLOCK_N)
                low = tl.maximum(seen_by_all - window + 1, low)
            first = low // BLOCK_N
            last = tl.maximum(high // BLOCK_N + 1, first)
            whole = tl.minimum(whole, last)
            whole_end = tl.maximum((seen_by_all + 1) // BLOCK_N, whole)
        else:
            before, whole_end, seen = _interior(starts, count, low, seen_by_all, high, BLOCK_K)
            first = 0
            last = seen * (BLOCK_K // BLOCK_N)
            whole = before * (BLOCK_K // BLOCK_N)
            whole_end = whole_end * (BLOCK_K // BLOCK_N)
        span = (low, high, Lk, window)
        skip = whole_end - whole
        # Lists take the loop of the interior last, DENSE first: in the other order, with triton
        # 3.7, ptxas puts a wait behind every wgmma of both loops (C7515).
        for turn in tl.static_range(2):
            if (turn == 0) == DENSE:
                acc, m, z = _tiles(
                    q, acc, m, z, kv, starts, whole, whole_end, 0, 0, span, positions, logits,
                    False, DENSE, False, SOFTCAP, D, BLOCK_D, BLOCK_K, BLOCK_N,
                )
            else:
                acc, m, z = _tiles(
                    q, acc, m, z, kv, starts, first, last - skip, whole, skip, span, positions,
                    logits, True, DENSE, WINDOW, SOFTCAP, D, BLOCK_D, BLOCK_K, BLOCK_N,
                )
    if COLUMNS:
        column_counts_ptr += b * column_counts_b + index_head * column_counts_h
        count = _count(column_counts_ptr + n * column_counts_n, C)
        columns = (columns_ptr + b * columns_b + index_head * columns_h + n * columns_n, columns_c)
        acc, m, z = _gather(
            q, acc, m, z, kv, columns, 0, tl.cdiv(count, BLOCK_N), count, span, positions, logits,
            1, SOFTCAP, D, BLOCK_D, BLOCK_N,
        )

    out, lse2 = _normalised(acc, m, z)
    tl.store(lse_ptr + (b * Hq + h) * Lq + rows, lse2 * 0.6931471805599453, mask=present)
    d = tl.arange(0, BLOCK_D)
    out_rows = out_ptr + b * stride_ob + h * stride_oh + rows.to(tl.int64) * stride_ol
    stored = present[:, None] & (d < D)[None, :]
    tl.store(out_rows[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    counts_ptr, starts_ptr, column_counts_ptr, columns_ptr, kv_start_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh, stride_ol,
    counts_b, counts_h, counts_n, starts_b, starts_h, starts_n, starts_s,
    column_counts_b, column_counts_h, column_counts_n, columns_b, columns_h, columns_n, columns_c,
    Hq, group, index_group, Lq, Lk, lead, block_q, window, S, C, pack, chunks, splits,
    logit_scale, cap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr, GATHER: tl.constexpr, COLUMNS: tl.constexpr,
    KV_START: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
):
    """Split s of the list of one short query block: out_s and the base-2 LSE of the keys in it.

    Grid (splits * chunks * Hkv * query blocks, B). The BLOCK_M rows of a program are the queries
    of the block times `pack` query heads that share a KV head, so that K and V are read once for
    the group; a group larger than `pack` takes several chunks. The list is split on its length on
    the device: the host knows only the widths S and C and never waits for a count. Without SPLIT
    (one split) the result goes to `out` and `lse`, else to partial buffers, fp32,
    [B, Hq, Lq, splits, D] and [B, Hq, Lq, splits].
    """
    split = tl.program_id(0) % splits
    unit = tl.program_id(0) // splits
    b = tl.program_id(1).to(tl.int64)
    heads = Hq // group * chunks
    kv_head = unit % heads // chunks
    in_group = unit % chunks * pack  # heads = Hkv * chunks, so this is the chunk of unit % heads
    block = unit // heads
    row0 = block * block_q - lead
    i = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rows = row0 + i // pack
    head = (kv_head * group + in_group + i % pack).to(tl.int64)  # [BLOCK_M]
    present = (i // pack < block_q) & (rows >= 0) & (rows < Lq) & (in_group + i % pack < group)
    positions = rows + (Lk - Lq)
    high = tl.minimum(row0 + block_q, Lq) - 1 + (Lk - Lq)
    low = 0
    if KV_START:
        low = tl.maximum(tl.load(kv_start_ptr + b), 0)  # scalar
    if WINDOW:
        low = tl.maximum(tl.maximum(row0, 0) + (Lk - Lq) - window + 1, low)

    kvh = kv_head.to(tl.int64)
    kv = (
        k_ptr + b * stride_kb + kvh * stride_kh,
        v_ptr + b * stride_vb + kvh * stride_vh,
        stride_kl,
        stride_vl,
    )
    q_rows = q_ptr + b * stride_qb + head * stride_qh + rows.to(tl.int64) * stride_ql
    q = _load_rows(q_rows, present, True, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)

    # Every head of a chunk has the same list: pack is 1 where the index has a list per query head.
    n = block.to(tl.int64)
    index_head = ((kv_head * group + in_group) // index_group).to(tl.int64)
    starts = (0, 0)
    span = (low, high, Lk, window)
    logits = (logit_scale, cap)
    count = 0
    if not DENSE:
        starts = (starts_ptr + b * starts_b + index_head * starts_h + n * starts_n, starts_s)
        count = _count(counts_ptr + b * counts_b + index_head * counts_h + n * counts_n, S)
    if GATHER:
        first, last = _share(0, tl.cdiv(count * BLOCK_K, BLOCK_N), split, splits)
        acc, m, z = _gather(
            q, acc, m, z, kv, starts, first, last, count, span, positions, logits,
            BLOCK_K, SOFTCAP, D, BLOCK_D, BLOCK_N,
        )
    else:
        # A decode step waits for memory, so a mask on every piece costs nothing.
        if DENSE:
            first, last = _share(low // BLOCK_N, high // BLOCK_N + 1, split, splits)
        else:
            first, last = _share(0, count * (BLOCK_K // BLOCK_N), split, splits)
        acc, m, z = _tiles(
            q, acc, m, z, kv, starts, first, last, 0, 0, span, positions, logits,
            True, DENSE, WINDOW, SOFTCAP, D, BLOCK_D, BLOCK_K, BLOCK_N,
        )
    if COLUMNS:
        column_counts_ptr += b * column_counts_b + index_head * column_counts_h
        count = _count(column_counts_ptr + n * column_counts_n, C)
        columns = (columns_ptr + b * columns_b + index_head * columns_h + n * columns_n, columns_c)
        # The last splits have the shortest share of the tiles and take the first columns.
        first, last = _share(0, tl.cdiv(count, BLOCK_N), splits - 1 - split, splits)
        acc, m, z = _gather(
            q, acc, m, z, kv, columns, first, last, count, span, positions, logits,
            1, SOFTCAP, D, BLOCK_D, BLOCK_N,
        )

    out, lse2 = _normalised(acc, m, z)
    d = tl.arange(0, BLOCK_D)
    stored = present[:, None] & (d < D)[None, :]
    lse_rows = (b * Hq + head) * Lq + rows  # [BLOCK_M]
    if SPLIT:
        lse_rows = lse_rows * splits + split
        out_rows = out_ptr + lse_rows * D
        tl.store(lse_ptr + lse_rows, lse2, mask=present)
    else:
        out_rows = out_ptr + b * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_ol
        tl.store(lse_ptr + lse_rows, lse2 * 0.6931471805599453, mask=present)
    tl.store(out_rows[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["Hq", "Lq", "splits"])
def combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, stride_ob, stride_oh, stride_ol,
    Hq, Lq, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):
    """out = sum_s w_s out_s / sum_s w_s,  lse = ln2 (M + log2 sum_s w_s),  w_s = 2^(lse_s - M).

    M = max_s lse_s. Grid (Lq * Hq * B); one program per query and head.
    """
    row = tl.program_id(0).to(tl.int64)  # of [B, Hq, Lq]
    s = tl.arange(0, BLOCK_S)
    lse_s = tl.load(
        partial_lse_ptr + row * splits + s, mask=s < splits, other=float("-inf")
    )  # [BLOCK_S]
    top = tl.max(lse_s, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse_s - top), 0)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + row, lse * 0.6931471805599453)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, splits, CHUNK):
        c = first + tl.arange(0, CHUNK)
        lse_c = tl.load(
            partial_lse_ptr + row * splits + c, mask=c < splits, other=float("-inf")
        )  # [CHUNK]
        part = tl.load(
            partial_ptr + ((row * splits + c) * D)[:, None] + d[None, :],
            mask=(c < splits)[:, None] & (d < D)[None, :],
            other=0.0,
        )  # [CHUNK, BLOCK_D]
        acc += tl.sum(tl.exp2(lse_c - top)[:, None] * part, 0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    b = row // (Lq * Hq)
    h = row // Lq % Hq
    out_ptr += b * stride_ob + h * stride_oh + row % Lq * stride_ol
    tl.store(out_ptr + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
