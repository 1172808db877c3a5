"""Plain PyTorch on any device: what the other backends are tested against."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from lowcontext.ops.votes._pages import keys_of

# Matrix products, a softmax and a top-k over whole tensors.
FIT_FOR_GPU = True


def supports(op: str, like: Tensor) -> str | None:
    """Supports everything."""
    return None


def token_scores(
    q: Tensor,
    k: Tensor,
    scales: Tensor | None,
    pages: Tensor | None,
    width: int,
    first: int,
    scale: float,
    causal: bool,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.votes.token_scores`."""
    R, Hkv = q.shape[2], k.shape[1]
    q = q.float() if scales is None else round_queries(q)
    if k.dtype == torch.uint8:
        k = _unpack(k)
    if pages is not None:
        offsets = torch.arange(first, first + width, device=k.device)
        keys = (pages.long()[..., None] * width + offsets).flatten(2).expand(*k.shape[:2], -1)
        k = k.gather(2, keys[..., None].expand(-1, -1, -1, k.shape[3]))
        scales = None if scales is None else scales.gather(2, keys)
    grouped = rearrange(q * scale, "b (h g) r d -> b h (g r) d", h=Hkv)
    scores = grouped @ k.float().transpose(2, 3)
    if scales is not None:
        scores = scores * scales[:, :, None]
    N = k.shape[2]
    scores = scores.reshape(*q.shape[:3], N)
    if causal and R > 1:
        last = torch.arange(N - R, N, device=k.device)[:, None]
        scores = scores.masked_fill(torch.arange(N, device=k.device) > last, -torch.inf)
    return scores, scores.logsumexp(dim=-1)


def soft_vote(scores: Tensor, lse: Tensor, heads: int, active: Tensor | None) -> Tensor:
    """See `lowcontext.ops.votes.soft_vote`."""
    base = torch.where(lse == -torch.inf, 0.0, lse)
    weights = torch.exp(scores - base[..., None])
    votes = rearrange(weights, "b (s g) r n -> b s g r n", s=heads).sum(dim=2)
    none = rearrange(scores, "b (s g) r n -> b s g r n", s=heads)[:, :, 0] == -torch.inf
    return votes.masked_fill(none, -torch.inf)


def topk(
    scores: Tensor,
    k: int,
    limits: Tensor | None,
    pages: Tensor | None,
    width: int,
    first: int,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.votes.topk`; scores [rows, N], pages [rows, M]."""
    ids, counts = _topk(scores, k, limits)
    return keys_of(ids, counts, pages, width, first), counts


def _topk(scores: Tensor, k: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    N = scores.shape[-1]
    width = min(k, N)
    if width == 0:
        counts = torch.zeros(scores.shape[0], dtype=torch.int32, device=scores.device)
        return counts.new_zeros(scores.shape[0], 0), counts
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    most = torch.full_like(scores[:, 0], width, dtype=torch.int32) if limits is None else limits
    most = most.clamp(0, width)[:, None].long()
    # The k-th largest value splits the row; which of equal entries torch.topk takes is undefined.
    threshold = scores.topk(width, dim=-1).values.gather(-1, (most - 1).clamp(min=0))
    above = scores > threshold
    ties = scores == threshold
    room = most - above.sum(-1, keepdim=True)
    keep = above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= room))
    keep = keep & (most > 0) & (scores > -torch.inf)
    rank = keep.to(torch.int32).cumsum(-1)
    slot = torch.where(keep, rank - 1, width).clamp(max=width).long()
    ids = torch.zeros(scores.shape[0], width + 1, dtype=torch.int32, device=scores.device)
    source = torch.arange(N, device=scores.device, dtype=torch.int32).expand(keep.shape)
    ids.scatter_(1, slot, source)
    ids = ids[:, :width]
    counts = rank[:, -1].to(torch.int32)
    listed = torch.arange(width, device=scores.device) < counts[:, None]
    return torch.where(listed, ids, 0), counts


def mass_mask(weights: Tensor, share: int, forced: Tensor | None) -> Tensor:
    """See `lowcontext.ops.votes.mass_mask`; weights [rows, N], forced [R, N], share in 2^-30."""
    N = weights.shape[-1]
    part = weights >= 0
    if N == 0:
        return part
    if forced is not None:
        forced = part & forced.repeat(weights.shape[0] // forced.shape[0], 1)
    # The bits of floats that are not negative have their order.
    order = torch.where(part, weights.contiguous().view(torch.int32) & 0x7FFFFFFF, -1)
    exponent = (order >> 23).clamp(min=1)
    fraction = (order & 0x7FFFFF) + ((order >> 23) > 0) * 0x800000
    shift = (exponent.amax(-1, keepdim=True) - exponent).clamp(max=40)
    mass = torch.where(part, fraction.long() << 16 >> shift, 0)
    total = mass.sum(-1, keepdim=True)
    # ceil(total * share / 2^30) without the 93 bits of the product.
    high, low = total >> 32, total & 0xFFFFFFFF
    target = (high * share << 2) + (low * share + 2**30 - 1 >> 30)
    first = order if forced is None else order.masked_fill(forced, 2**31 - 1)
    places = first.sort(dim=-1, descending=True, stable=True).indices
    mass = mass.gather(-1, places)
    wanted = mass.cumsum(-1) - mass < target
    keep = torch.zeros_like(part).scatter_(-1, places, wanted)
    return (keep if forced is None else keep | forced) & part


def page_scores(
    q: Tensor, bounds: Tensor, scale: float, normalize: bool, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores of pages times `scale` and, if asked for, their LSE."""
    q = q.float() * scale
    # max(q_d * min_d, q_d * max_d) takes min_d where q_d < 0 and max_d where q_d > 0.
    signed = torch.cat([q.clamp(max=0), q.clamp(min=0)], dim=-1)
    grouped = rearrange(signed, "b (h g) r d -> b h (g r) d", h=bounds.shape[1])
    scores = grouped @ bounds.float().transpose(2, 3)
    scores = scores.reshape(*q.shape[:3], bounds.shape[2])
    return scores, scores.logsumexp(dim=-1) if normalize else scores.new_empty(0)


def quantize_keys(k: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.votes.quantize_keys`."""
    keys = k.float()
    largest = keys.abs().amax(dim=-1)
    levels = 2.0 ** (bits - 1) - 1
    # Not levels / largest: that is a product with the reciprocal, rounded twice.
    factor = torch.where(largest > 0, torch.full_like(largest, levels) / largest, 0.0)
    whole = (keys * factor[..., None]).round().to(torch.int8)
    if bits == 4:
        low, high = whole.chunk(2, dim=-1)
        whole = (low & 15 | high << 4).view(torch.uint8)
    return whole, largest / levels


def _unpack(k: Tensor) -> Tensor:
    """The signed 4-bit integers of uint8 [..., D / 2] as int8 [..., D]."""
    k = k.view(torch.int8)
    return torch.cat([k << 4 >> 4, k >> 4], dim=-1)


def query_levels(D: int) -> int:
    """Steps of a query's largest element, so that a sum of D products with int8 fits 32 bits."""
    return min(32767, (2**31 - 1) // (127 * max(D, 1)))


def round_queries(q: Tensor) -> Tensor:
    """fp32 queries, each in whole steps of its largest element."""
    q = q.float()
    step = q.abs().amax(dim=-1, keepdim=True) / query_levels(q.shape[3])
    return (q / torch.where(step > 0, step, 1.0)).round() * step
