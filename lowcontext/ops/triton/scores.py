"""Scores of keys and of pages, the votes on them, and keys in 8 bits: kernels and launches.

    score[row, i] = q_row . k_i (* scales_i)      lse[row] = log sum_i e^score[row, i]
    bound[row, i] = min(q_row, 0) . low_i + max(q_row, 0) . high_i
    vote[s, i]    = sum over the rows of list s of e^(score[row, i] - lse[row])

A program holds BLOCK_N keys and passes all query rows of their KV head by them, BLOCK_M at a time:
a key is read once for its G * R rows. Each program leaves the LSE of its own keys, and `lse_kernel`
joins them, so no sum depends on the order in which programs run.

Precision. Queries are fp32, and a selection must not depend on the backend, so the products are
those of fp32. FMA gives them ("ieee"), but 16 rows of D = 128 take 2048 FMA per key of 256 bytes:
at 4.8 TB/s that is 77 TFLOP/s, more than an H200 has. So for narrow keys q is split into three bf16
numbers of 8 bits each, which together hold its 24 bits. Keys in bf16, 8 and 4 bits are exact in
bf16, keys in fp16 (11 bits) in tf32; each of the three products is then exact in a tensor core, and
all that is rounded is the fp32 sum. fp32 keys take FMA: "tf32x3" keeps 22 of their 24 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton import interpreted
from lowcontext.ops.triton.attend import _load_rows
from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.sizes import ceil_div, power_of_2
from lowcontext.ops.votes.reference import query_levels

# fmt: off
UNSPECIALIZED = [
    "stride_sb", "stride_sh", "stride_sn", "pages_b", "pages_h", "pages_m",
    "Hkv", "group", "R", "N", "count", "width", "first", "tiles", "rows", "Hq", "heads",
]


@triton.jit
def _add(q, k, s, PRECISION: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """s + q k^T, or s + k q^T, for q [M, BLOCK_D], k [N, BLOCK_D]."""
    if KEYS_FIRST:
        s = tl.dot(k, tl.trans(q), s, input_precision=PRECISION)  # [N, M]
    else:
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)  # [M, N]
    return s


@triton.jit
def add_product(q, k, s, PRODUCTS: tl.constexpr, KEYS_FIRST: tl.constexpr = False):
    """s + q k^T, or s + k q^T, with the products of fp32: q fp32 [M, BLOCK_D], k [N, BLOCK_D].

    Warps share out the rows of the left operand: with few queries each warp would hold the three
    parts of all of them, unless the keys come first.
    """
    if PRODUCTS == "ieee":
        s = _add(q, k.to(tl.float32), s, "ieee", KEYS_FIRST)
    else:
        high = q.to(tl.bfloat16).to(tl.float32)
        middle = (q - high).to(tl.bfloat16).to(tl.float32)
        low = q - high - middle
        if PRODUCTS == "bf16":
            keys = k.to(tl.bfloat16)
            s = _add(low.to(tl.bfloat16), keys, s, "tf32", KEYS_FIRST)
            s = _add(middle.to(tl.bfloat16), keys, s, "tf32", KEYS_FIRST)
            s = _add(high.to(tl.bfloat16), keys, s, "tf32", KEYS_FIRST)
        else:
            keys = k.to(tl.float32)
            s = _add(low, keys, s, "tf32", KEYS_FIRST)
            s = _add(middle, keys, s, "tf32", KEYS_FIRST)
            s = _add(high, keys, s, "tf32", KEYS_FIRST)
    return s


@triton.jit
def idle(active_ptr, b):
    """Whether row b of the batch need not be computed."""
    result = False
    if active_ptr is not None:
        result = tl.load(active_ptr + b) == 0
    return result


@triton.jit
def _rounded(x, factor):
    """x [M, BLOCK_D] * factor [M], rounded to even."""
    # 1.5 * 2^23: a sum with it has no bits below 1, so the adder rounds, ties to even.
    return x * factor[:, None] + 12582912.0 - 12582912.0


@triton.jit
def _in_steps(q, step):
    """q [M, BLOCK_D] in whole multiples of step [M]."""
    steps = tl.where(step > 0.0, step, 1.0)[:, None] + tl.zeros_like(q)
    return (tl.div_rn(q, steps) + 12582912.0 - 12582912.0) * step[:, None]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def token_scores_kernel(
    q_ptr, k_ptr, scales_ptr, pages_ptr, active_ptr, out_ptr, partial_ptr,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_kn,
    stride_sb, stride_sh, stride_sn, pages_b, pages_h, pages_m,
    Hkv, group, R, N, count, width, first, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRODUCTS: tl.constexpr, BOUNDS: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Scores of BLOCK_N of the N entries for all group * R rows of a KV head, and their LSE.

    Grid (tiles * Hkv, B). Entries are the keys, or with `pages_ptr` the keys of these pages, page n
    the `width` keys from `first + n * width`. With BOUNDS an entry has 2 * D numbers: its minima,
    then its maxima. With PACKED queries have 2 * D channels, and byte i of an entry holds channels
    i and i + D, the first in the low bits. With scales queries are rounded to whole steps, LEVELS
    of which are their largest element. Scores are [B, Hkv, group * R, N], LSEs [B, Hkv, tiles,
    group * R]. Rows of the batch that are not active are left out.
    """
    tiles = tl.num_programs(0) // Hkv
    tile = tl.program_id(0) % tiles
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    if idle(active_ptr, b):
        return
    entries = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    exists = entries < N
    keys = entries.to(tl.int64)
    if pages_ptr is not None:
        pages = pages_ptr + b * pages_b + kv_head * pages_h
        pages += (entries // width).to(tl.int64) * pages_m
        page = tl.load(pages, mask=exists, other=0).to(tl.int64)
        keys = page * width + (first + entries % width)  # [BLOCK_N]
    valid = exists & (keys >= 0) & (keys < count)
    k_rows = k_ptr + b * stride_kb + kv_head * stride_kh + keys * stride_kn
    k = _load_rows(k_rows, valid, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    if BOUNDS:
        high = _load_rows(k_rows + D, valid, True, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    if PACKED:
        byte = k.to(tl.int32)
        k = ((byte & 15) ^ 8) - 8
        high = ((byte >> 4) ^ 8) - 8  # [BLOCK_N, BLOCK_D]
    if scales_ptr is not None:
        scales_ptr += b * stride_sb + kv_head * stride_sh
        factor = tl.load(scales_ptr + keys * stride_sn, mask=valid, other=0.0)  # [BLOCK_N]
    rows = group * R
    unit = b * Hkv + kv_head
    for row in range(0, rows, BLOCK_M):
        i = row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        present = i < rows
        head = kv_head * group + i // R
        q_rows = q_ptr + b * stride_qb + head * stride_qh + (i % R).to(tl.int64) * stride_qr
        q = _load_rows(q_rows, present, True, D, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        if PACKED:
            q_high = _load_rows(q_rows + D, present, True, D, BLOCK_D).to(tl.float32)
        if scales_ptr is not None:
            largest = tl.max(tl.abs(q), 1)
            if PACKED:
                largest = tl.maximum(largest, tl.max(tl.abs(q_high), 1))
            step = tl.div_rn(largest, tl.full([BLOCK_M], LEVELS, tl.float32))  # [BLOCK_M]
            q = _in_steps(q, step)
            if PACKED:
                q_high = _in_steps(q_high, step)
        q *= scale
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if BOUNDS:
            s = add_product(tl.minimum(q, 0.0), k, s, PRODUCTS)
            s = add_product(tl.maximum(q, 0.0), high, s, PRODUCTS)
        else:
            s = add_product(q, k, s, PRODUCTS)
        if PACKED:
            s = add_product(q_high * scale, high, s, PRODUCTS)
        if scales_ptr is not None:
            s *= factor[None, :]
        visible = valid[None, :]
        if CAUSAL:
            visible = visible & (entries[None, :] <= (N - R + i % R)[:, None])
        s = tl.where(visible, s, float("-inf"))
        out = out_ptr + ((unit * rows + i) * N)[:, None] + entries[None, :]
        tl.store(out, s, mask=present[:, None] & exists[None, :])
        if partial_ptr is not None:
            m = tl.max(s, 1)  # [BLOCK_M]
            base = tl.where(m == float("-inf"), 0.0, m)
            z = tl.sum(tl.exp(s - base[:, None]), 1)
            # z >= 1 where a row sees one of these keys, else 0.
            lse = tl.where(z == 0.0, float("-inf"), m + tl.log(tl.maximum(z, 1.0)))
            tl.store(partial_ptr + (unit * tiles + tile) * rows + i, lse, mask=present)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lse_kernel(
    partial_ptr, active_ptr, lse_ptr, tiles, rows, heads,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """lse[u, i] = log sum_t e^partial[u, t, i] over the tiles t; -inf where all are.

    Grid (row blocks * units, 1): BLOCK_M rows of one unit, BLOCK_N tiles at a time. A row of the
    batch is `heads` units.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    if idle(active_ptr, unit // heads):
        return
    i = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, tiles, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        part = tl.load(
            partial_ptr + ((unit * tiles + t) * rows)[:, None] + i[None, :],
            mask=(t < tiles)[:, None] & (i < rows)[None, :],
            other=float("-inf"),
        )  # [BLOCK_N, BLOCK_M]
        m_new = tl.maximum(m, tl.max(part, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        z = z * tl.exp(m - base) + tl.sum(tl.exp(part - base[None, :]), 0)
        m = m_new
    lse = tl.where(z == 0.0, float("-inf"), m + tl.log(tl.where(z == 0.0, 1.0, z)))
    tl.store(lse_ptr + unit * rows + i, lse, mask=i < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def soft_vote_kernel(
    scores_ptr, lse_ptr, active_ptr, out_ptr, Hq, heads, R, N, BLOCK_N: tl.constexpr,
):
    """votes[b, s, r, i] = sum of e^(scores[b, h, r, i] - lse[b, h, r]) over the heads h of list s.

    Grid (blocks of keys * heads * R, B).
    """
    blocks = tl.cdiv(N, BLOCK_N)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    s = unit // R
    r = unit % R
    b = tl.program_id(1).to(tl.int64)
    if idle(active_ptr, b):
        return
    i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    group = Hq // heads
    row = (b * Hq + s * group) * R + r
    votes = tl.zeros([BLOCK_N], tl.float32)
    seen = i < 0
    for g in range(group):
        lse = tl.load(lse_ptr + row)  # scalar
        base = tl.where(lse == float("-inf"), 0.0, lse)
        x = tl.load(scores_ptr + row * N + i, mask=i < N, other=float("-inf"))  # [BLOCK_N]
        votes += tl.exp(x - base)
        seen = seen | ((g == 0) & (x > float("-inf")))
        row += R
    out = out_ptr + ((b * heads + s) * R + r) * N + i
    tl.store(out, tl.where(seen, votes, float("-inf")), mask=i < N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_kernel(
    k_ptr, out_ptr, scales_ptr, stride_kb, stride_kh, stride_kn, Hkv, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr,
):
    """scales = max_d |k_d| / n, out = k * (n / max_d |k_d|) rounded to even.

    n is 127, or with PACKED 7 for keys of 2 * D channels, of which byte i holds i and i + D. Grid
    (blocks of keys * Hkv, B). Compiled without contraction to FMA, which would skip the rounding of
    the product.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    h = (tl.program_id(0) // blocks).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k_rows = k_ptr + b * stride_kb + h * stride_kh + keys.to(tl.int64) * stride_kn
    k = _load_rows(k_rows, keys < N, True, D, BLOCK_D).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    largest = tl.max(tl.abs(k), 1)  # [BLOCK_N]
    if PACKED:
        high = _load_rows(k_rows + D, keys < N, True, D, BLOCK_D).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(high), 1))
    steps = tl.full([BLOCK_N], 7.0 if PACKED else 127.0, tl.float32)
    nonzero = tl.where(largest > 0.0, largest, 1.0)
    factor = tl.where(largest > 0.0, tl.div_rn(steps, nonzero), 0.0)
    out = _rounded(k, factor).to(tl.int32)
    if PACKED:
        out = (out & 15) | (_rounded(high, factor).to(tl.int32) << 4)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    row = (b * Hkv + h) * N + keys
    stored = (keys < N)[:, None] & (d < D)[None, :]
    place = out_ptr + (row * D)[:, None] + d[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(scales_ptr + row, tl.div_rn(largest, steps), mask=keys < N)
# fmt: on


def products(dtype: torch.dtype) -> str:
    """How `add_product` multiplies fp32 queries with keys of this type; see the module's text."""
    if dtype == torch.float32:
        return "ieee"
    # The interpreter's tl.dot multiplies the bits of bf16 as integers: it gets the same parts in
    # fp32.
    return "tf32" if dtype == torch.float16 or interpreted() else "bf16"


def plan_token_scores(
    q: Tensor,
    k: Tensor,
    scales: Tensor | None,
    pages: Tensor | None,
    width: int,
    first: int,
    scale: float,
    causal: bool,
    active: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of `votes.token_scores`, and the (scores, lse) that they fill."""
    N = k.shape[2] if pages is None else pages.shape[2] * width
    scores = torch.empty((*q.shape[:3], N), dtype=torch.float32, device=q.device)
    more: dict[str, Any] = {"width": width, "first": first, "CAUSAL": causal}
    more |= {"active_ptr": active}
    if scales is not None:
        more |= {"scales_ptr": scales, "LEVELS": query_levels(q.shape[3])}
        more |= zip(("stride_sb", "stride_sh", "stride_sn"), scales.stride(), strict=True)
    if pages is not None:
        more |= {
            "pages_ptr": pages,
            "pages_b": 0 if pages.shape[0] == 1 else pages.stride(0),
            "pages_h": 0 if pages.shape[1] == 1 else pages.stride(1),
            "pages_m": pages.stride(2),
        }
    launches, lse = _scores(q, k, scores, scale, True, more)
    return launches, scores, lse


def plan_page_scores(
    q: Tensor, bounds: Tensor, scale: float, normalize: bool, active: Tensor | None = None
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of page scores times `scale`, and the (scores, lse) that they fill.

    lse is empty if not asked for.
    """
    scores = torch.empty((*q.shape[:3], bounds.shape[2]), dtype=torch.float32, device=q.device)
    more = {"BOUNDS": True, "active_ptr": active}
    launches, lse = _scores(q, bounds, scores, scale, normalize, more)
    return launches, scores, lse


def plan_lse(partial: Tensor, lse: Tensor, active: Tensor | None = None) -> Launch:
    """Joins the LSEs [B, Hkv, tiles, rows] of tiles of keys into `lse`, rows last."""
    B, Hkv, tiles, rows = partial.shape
    block_m = min(8, power_of_2(rows))  # 8 rows are one sector of 32 bytes
    args = {
        "partial_ptr": partial,
        "active_ptr": active,
        "lse_ptr": lse,
        "tiles": tiles,
        "rows": rows,
        "heads": Hkv,
        "BLOCK_M": block_m,
        "BLOCK_N": 1024 // block_m,
    }
    return Launch(lse_kernel, (ceil_div(rows, block_m) * B * Hkv, 1), args, 4, 1)


def plan_soft_vote(
    scores: Tensor, lse: Tensor, heads: int, active: Tensor | None = None
) -> tuple[list[Launch], Tensor]:
    """The launch of `votes.soft_vote` on contiguous arguments, and the votes that it fills."""
    B, Hq, R, N = scores.shape
    votes = torch.empty((B, heads, R, N), dtype=torch.float32, device=scores.device)
    if votes.numel() == 0:
        return [], votes
    args = {"scores_ptr": scores, "lse_ptr": lse, "active_ptr": active, "out_ptr": votes}
    args |= {"Hq": Hq, "heads": heads, "R": R, "N": N, "BLOCK_N": 1024}
    return [Launch(soft_vote_kernel, (ceil_div(N, 1024) * heads * R, B), args, 4, 1)], votes


def plan_quantize_keys(k: Tensor, bits: int) -> tuple[list[Launch], Tensor, Tensor]:
    """The launch of `votes.quantize_keys`, and the (keys, scales) that it fills."""
    B, Hkv, N, D = k.shape
    D, dtype = (D // 2, torch.uint8) if bits == 4 else (D, torch.int8)
    small = torch.empty((B, Hkv, N, D), dtype=dtype, device=k.device)
    scales = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    if small.numel() == 0:
        return [], small, scales.zero_()
    block_d = power_of_2(D)
    block_n = max(1, 8192 // block_d)
    args = {"k_ptr": k, "out_ptr": small, "scales_ptr": scales, "Hkv": Hkv, "N": N}
    args |= zip(("stride_kb", "stride_kh", "stride_kn"), k.stride(), strict=False)
    args |= {"D": D, "BLOCK_D": block_d, "BLOCK_N": block_n, "PACKED": bits == 4}
    grid = (ceil_div(N, block_n) * Hkv, B)
    return [Launch(quantize_kernel, grid, args, 4, 1, enable_fp_fusion=False)], small, scales


def score_tiles(D: int, kind: str, rows: int) -> tuple[int, int]:
    """BLOCK_M and BLOCK_N of the score kernel, with 4 warps, for a kind of `products`.

    Chosen from the compiler's report alone (`python -m bench.kernels_report --only scores`): the
    most keys that spill no register. tf32 operands take twice the room of bf16: 128 keys of fp16
    with D = 128 spill 112 bytes, 32 rows with D = 256 up to 728. Not timed yet.
    """
    if kind == "ieee":
        return 16, 64 if D <= 128 else 32
    keys = 128 if kind == "bf16" else 64
    if D > 128:
        return (16 if rows <= 16 or kind == "tf32" else 32), keys // 2
    return (16 if rows <= 16 else 32), keys


def _scores(
    q: Tensor, k: Tensor, scores: Tensor, scale: float, normalize: bool, more: dict[str, Any]
) -> tuple[list[Launch], Tensor]:
    """The launches that fill `scores` and the LSE of its rows, and the LSE, empty if not asked for.

    Args:
        q, k, scores, scale, normalize: as in `plan_token_scores` and `plan_page_scores`.
        more: arguments of the kernel that only some ops have.
    """
    B, Hq, R, D = q.shape
    shape = q.shape[:3] if normalize else (0,)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return [], lse.fill_(-torch.inf)
    Hkv, N = k.shape[1], scores.shape[3]
    group = Hq // Hkv
    kind = products(k.dtype)
    block_m, block_n = score_tiles(D, kind, group * R)
    D = D // 2 if k.dtype == torch.uint8 else D
    stride_qb, stride_qh, stride_qr, _ = q.stride()
    stride_kb, stride_kh, stride_kn, _ = k.stride()
    args: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "scales_ptr": None,
        "pages_ptr": None,
        "active_ptr": None,
        "out_ptr": scores,
        "partial_ptr": None,
        "stride_qb": stride_qb,
        "stride_qh": stride_qh,
        "stride_qr": stride_qr,
        "stride_kb": stride_kb,
        "stride_kh": stride_kh,
        "stride_kn": stride_kn,
        "stride_sb": 0,
        "stride_sh": 0,
        "stride_sn": 0,
        "pages_b": 0,
        "pages_h": 0,
        "pages_m": 0,
        "Hkv": Hkv,
        "group": group,
        "R": R,
        "N": N,
        "count": k.shape[2],
        "width": 1,
        "first": 0,
        "scale": scale,
        "D": D,
        "BLOCK_D": max(16, power_of_2(D)),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PRODUCTS": kind,
        "BOUNDS": False,
        "PACKED": k.dtype == torch.uint8,
        "CAUSAL": False,
        "LEVELS": 1,
        **more,
    }
    tiles = ceil_div(N, block_n)
    launch = Launch(token_scores_kernel, (tiles * Hkv, B), args, 4, 1)
    if not normalize:
        return [launch], lse
    partial = torch.empty((B, Hkv, tiles, group * R), dtype=torch.float32, device=q.device)
    args["partial_ptr"] = partial
    return [launch, plan_lse(partial, lse, args["active_ptr"])], lse
