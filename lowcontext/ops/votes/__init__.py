"""Scores of single keys and of pages, soft votes of the heads, top-k lists and top-p masks.

The steps of selection in decode, each a pure function: tensors in, tensors out, no host
synchronisation, no shape that depends on data. All arithmetic is fp32.

    scores, lse = token_scores(q, k)            or over pages that page_scores has chosen, or over
    votes = soft_vote(scores, lse, heads=1)     quantize_keys(k) in the place of k
    ids, counts = topk(votes, 2048)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowcontext.ops import _checks, _dispatch
from lowcontext.ops._checks import FLOAT_DTYPES
from lowcontext.ops.votes import native, reference, triton
from lowcontext.ops.votes._arguments import (
    check_active,
    check_float32,
    check_heads,
    check_pages,
    check_queries,
)
from lowcontext.ops.votes._pages import Pages

__all__ = [
    "Pages",
    "mass_mask",
    "page_bounds",
    "page_scores",
    "page_votes",
    "quantize_keys",
    "soft_vote",
    "token_scores",
    "topk",
]

BACKENDS = {"native": native, "triton": triton, "reference": reference}

# Entries of a row whose masses, below 2^40 each, sum up in 64 bits.
_MAX_MASSES = 2**23


def token_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = True,
    scales: Tensor | None = None,
    pages: Pages | None = None,
    active: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scores keys with queries; each key is read once for all query heads of its KV head.

    scores[b, h, r, i] = scale * q[b, h, r] . k[b, h // G, i], and lse their log-sum-exp over i.

    Args:
        q: [B, Hq, R, D], a floating dtype, read as fp32.
        k: [B, Hkv, N, D], a floating dtype, last dim contiguous; or what `quantize_keys` made of
            keys, with `scales`: int8, or uint8 [B, Hkv, N, D / 2]. Queries are then rounded to 15
            bits and a sign in steps of their largest element, which the kernels multiply as such.
        scale: factor of the scores.
        causal: row r scores the first `N - (R - 1 - r)` keys, the others are -inf. With `pages`
            every row scores every key of them.
        scales: fp32 [B, Hkv, N]; key i is `scales[i]` times its integers.
        pages: score only the keys of these pages; N is then `M * width`. A page must lie within
            the keys.
        active: bool [B], rows of the batch that matter; what is returned for the others is
            undefined, and a GPU does not compute it.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        fp32 [B, Hq, R, N] and fp32 [B, Hq, R], -inf for a row without keys.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend, or not the named one, can run it.

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1000, 64)
        >>> scores, lse = token_scores(q, k, scale=64**-0.5)
        >>> scores.shape, lse.shape
        (torch.Size([1, 8, 1, 1000]), torch.Size([1, 8, 1]))
    """
    check_queries(q)
    whole = k.dtype in (torch.int8, torch.uint8)
    if not whole and k.dtype not in FLOAT_DTYPES:
        raise TypeError(f"k: expected a floating dtype, int8 or uint8, got {k.dtype}")
    if k.dtype == torch.uint8 and q.shape[3] % 2:
        raise ValueError(f"q: expected an even last dim with uint8 keys, got {q.shape[3]}")
    check_heads(q, "k", k, q.shape[3] // 2 if k.dtype == torch.uint8 else q.shape[3])
    if (scales is not None) != whole:
        raise ValueError(
            f"scales: expected with int8 and uint8 keys and with no others, got "
            f"{type(scales).__name__} with {k.dtype}"
        )
    if scales is not None:
        check_float32("scales", scales, 3)
        if scales.shape != k.shape[:3]:
            raise ValueError(
                f"scales: expected shape {list(k.shape[:3])}, got {list(scales.shape)}"
            )
    ids, width, first = None, 1, 0
    if pages is not None:
        check_pages(pages, *k.shape[:2])
        if pages.width > k.shape[2]:
            raise ValueError(f"pages: expected a width of 1 to {k.shape[2]}, got {pages.width}")
        ids, width, first = pages.ids, pages.width, pages.first
    check_active(active, k.shape[0])
    run = _dispatch.implementation(BACKENDS, "token_scores", backend, k)
    return run(q, k, scales, ids, width, first, float(scale), causal and ids is None, active)


def soft_vote(
    scores: Tensor,
    lse: Tensor,
    *,
    heads: int = 1,
    active: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sums over heads the probability that each head gives to each key.

    votes[b, s, r, i] = sum of exp(scores[b, h, r, i] - lse[b, h, r]) over the heads h of list s

    Head soft vote of TokenSelect (Wu et al., arXiv 2411.02886, equation 7). No head can give more
    than 1 in all, whatever the size of its logits.

    Args:
        scores: fp32 [B, Hq, R, N], as from `token_scores`; all heads of a row have their -inf at
            the same keys.
        lse: fp32 [B, Hq, R].
        heads: lists wanted: 1 for one per row, Hkv for one per KV head.
        active: as in `token_scores`.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        fp32 [B, heads, R, N]; -inf where the scores are.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> scores = torch.zeros(1, 4, 1, 8)
        >>> soft_vote(scores, scores.logsumexp(-1))[0, 0, 0, 0].item()
        0.5
    """
    check_float32("scores", scores, 4)
    check_float32("lse", lse, 3)
    if lse.shape != scores.shape[:3]:
        raise ValueError(f"lse: expected shape {list(scores.shape[:3])}, got {list(lse.shape)}")
    if not 1 <= heads <= scores.shape[1] or scores.shape[1] % heads:
        raise ValueError(f"heads: expected a divisor of {scores.shape[1]}, got {heads}")
    check_active(active, scores.shape[0])
    run = _dispatch.implementation(BACKENDS, "soft_vote", backend, scores)
    return run(scores, lse, heads, active)


def topk(
    scores: Tensor,
    k: int,
    *,
    limits: Tensor | None = None,
    first: int = 0,
    pages: Pages | None = None,
    active: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Ids of the largest entries of each row, ascending; of equal entries the lower ids.

    Args:
        scores: fp32 [..., N]; entries that are -inf or NaN are never taken.
        k: most entries to take from a row.
        limits: int [...], fewer for some rows; k for all if not given.
        first: id of the first entry of a row.
        pages: what `token_scores` took; the ids are then keys, not entries. Scores are [B, H, R,
            M * width], and the pages ascend.
        active: as in `token_scores`, for scores [B, ..., N].
        backend: "auto", "native", "triton" or "reference".

    Returns:
        int32 [..., min(k, N)] ids, 0 beyond the count, and int32 [...] counts.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> topk(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2)[0]
        tensor([0, 2], dtype=torch.int32)
    """
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores: expected an fp32 tensor, got {got}")
    if scores.dim() < 1:
        raise ValueError("scores: expected at least 1 dimension, got 0")
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    rows = scores.shape[:-1]
    if limits is not None:
        if limits.dtype not in _checks.INT_DTYPES:
            raise TypeError(f"limits: expected an int tensor, got {limits.dtype}")
        limits = _checks.to_int32(limits).expand(rows).reshape(-1)
    of_pages, width = None, 1
    if pages is not None:
        if first:
            raise ValueError(f"first: expected 0 with pages, got {first}")
        width, first, M = pages.width, pages.first, pages.ids.shape[-1]
        if len(rows) != 3 or scores.shape[3] != M * width:
            raise ValueError(
                f"scores: expected [B, H, R, {M * width}] with pages, got {list(scores.shape)}"
            )
        check_pages(pages, *rows[:2])
        of_pages = pages.ids[:, :, None].expand(*rows, M).reshape(-1, M)
    flat = scores.reshape(math.prod(rows), scores.shape[-1])
    run = _dispatch.implementation(BACKENDS, "topk", backend, scores)
    if active is not None:
        check_active(active, rows[0] if rows else 0)
    ids, counts = run(flat, k, limits, of_pages, width, first, active)
    return ids.view(*rows, ids.shape[-1]), counts.view(rows)


def mass_mask(
    weights: Tensor, share: float, *, forced: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Marks the largest entries of each row that together hold `share` of its mass (top-p).

    Entries are taken in falling order, of equal ones the lower index first, while the mass before
    them is below `share` of the row's. Masses are integers in units of 2^-40 to 2^-39 of the
    largest entry, rounded down, and the share one in units of 2^-30: their sums are exact, so that
    every backend marks the same entries, also where the share is met exactly. An entry below a unit
    has no mass.

    Args:
        weights: fp32 [..., N], N at most 2^23; entries below 0, -inf among them, and NaN take no
            part and are never marked.
        share: above 0; from 1 on, every entry that takes part is marked.
        forced: bool [N] or [R, N] for weights [..., R, N]; taken first, where they take part.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        bool [..., N].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> mass_mask(torch.tensor([0.5, 0.1, 0.25, 0.15]), 0.75)
        tensor([ True, False,  True, False])
    """
    if not isinstance(weights, Tensor) or weights.dtype != torch.float32:
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: expected an fp32 tensor, got {got}")
    N = weights.shape[-1] if weights.dim() else 0
    if not weights.dim() or N > _MAX_MASSES:
        raise ValueError(
            f"weights: expected shape [..., N <= {_MAX_MASSES}], got {list(weights.shape)}"
        )
    if not share > 0:
        raise ValueError(f"share: expected more than 0, got {share}")
    if forced is not None:
        if forced.dtype != torch.bool:
            raise TypeError(f"forced: expected a bool tensor, got {forced.dtype}")
        if forced.shape not in (weights.shape[-1:], weights.shape[-2:]):
            raise ValueError(
                f"forced: expected shape {list(weights.shape[-1:])} or "
                f"{list(weights.shape[-2:])}, got {list(forced.shape)}"
            )
        forced = forced[None] if forced.dim() == 1 else forced
    if share >= 1:
        return weights >= 0
    units = max(1, round(share * 2**30))
    run = _dispatch.implementation(BACKENDS, "mass_mask", backend, weights)
    flat = weights.reshape(weights.shape[:-1].numel(), N)
    return run(flat, units, forced).view(weights.shape)


def page_bounds(k: Tensor, page: int) -> Tensor:
    """Channel-wise minimum and maximum of the keys of every complete page.

    Args:
        k: [B, Hkv, N, D], a floating dtype.
        page: keys per page.

    Returns:
        [B, Hkv, N // page, 2 * D] in k's dtype, which holds them exactly: minima, then maxima.

    Raises:
        ValueError: `page` is below 1.
    """
    if page < 1:
        raise ValueError(f"page: expected at least 1, got {page}")
    B, H, N, D = k.shape
    keys = k[:, :, : N // page * page].reshape(B, H, N // page, page, D)
    return torch.cat([keys.amin(dim=3), keys.amax(dim=3)], dim=-1)


def page_scores(q: Tensor, bounds: Tensor, *, backend: str = "auto") -> Tensor:
    """An upper bound of q . key over the keys of each page.

    bound(q, page) = sum_d max(q_d * min_d, q_d * max_d), Quest (Tang et al., arXiv 2406.10774,
    section 3).

    Args:
        q: [B, Hq, R, D], a floating dtype, read as fp32.
        bounds: [B, Hkv, P, 2 * D], a floating dtype, as from `page_bounds`.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        fp32 [B, Hq, R, P].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    return _page_scores(q, bounds, 1.0, False, None, backend)[0]


def page_votes(
    q: Tensor,
    bounds: Tensor,
    *,
    scale: float = 1.0,
    heads: int = 1,
    active: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The soft vote of the heads on pages, by the bounds of `page_scores`.

    Args:
        q, bounds, backend: as there.
        scale: factor of the bounds before the softmax.
        heads: lists wanted, as in `soft_vote`.
        active: as in `token_scores`.

    Returns:
        fp32 [B, heads, R, P].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    scores, lse = _page_scores(q, bounds, float(scale), True, active, backend)
    return soft_vote(scores, lse, heads=heads, active=active, backend=backend)


def _page_scores(
    q: Tensor, bounds: Tensor, scale: float, normalize: bool, active: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    check_queries(q)
    check_heads(q, "bounds", bounds, 2 * q.shape[3])
    if bounds.dtype not in FLOAT_DTYPES:
        raise TypeError(f"bounds: expected a floating dtype, got {bounds.dtype}")
    check_active(active, bounds.shape[0])
    run = _dispatch.implementation(BACKENDS, "page_scores", backend, bounds)
    return run(q, bounds, scale, normalize, active)


def quantize_keys(k: Tensor, *, bits: int = 8, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Keys in few bits with one scale for each key, the largest |k_d| over 127 or over 7.

    For scoring only; attention reads the keys themselves. Rounded to even.

    Args:
        k: [B, Hkv, N, D], a floating dtype.
        bits: 8, or 4 for an even D.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        int8 [B, Hkv, N, D], or for 4 bits uint8 [B, Hkv, N, D / 2], whose entry i holds channel i
        in the low and channel i + D / 2 in the high bits; and the scales, fp32 [B, Hkv, N].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    if not isinstance(k, Tensor) or k.dtype not in FLOAT_DTYPES:
        got = k.dtype if isinstance(k, Tensor) else type(k).__name__
        raise TypeError(f"k: expected a floating dtype, got {got}")
    if k.dim() != 4:
        raise ValueError(f"k: expected 4 dimensions [B, Hkv, N, D], got {list(k.shape)}")
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    if bits == 4 and k.shape[3] % 2:
        raise ValueError(f"k: expected an even last dim for 4 bits, got {k.shape[3]}")
    return _dispatch.implementation(BACKENDS, "quantize_keys", backend, k)(k, bits)
