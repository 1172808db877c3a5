"""The C++ kernels of token_scores.cpp, topk.cpp and mass_mask.cpp in csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.native import loader
from lowcontext.ops.votes import _fakes
from lowcontext.ops.votes._pages import keys_of
from lowcontext.ops.votes.reference import round_queries

_load = loader(
    {
        "token_scores": lambda q, k, scales, starts, width, scale, causal: _fakes.token_scores(
            q, k, scales, starts, width, 0, scale, causal, None
        ),
        "soft_vote": lambda scores, lse, heads: _fakes.soft_vote(scores, lse, heads, None),
        "topk": lambda scores, k, limits: _fakes.topk(scores, k, limits, None, 1, 0, None),
        "mass_mask": _fakes.mass_mask,
        "page_scores": lambda q, bounds: _fakes.page_scores(q, bounds, 1.0, False, None)[0],
        "quantize_keys": _fakes.quantize_keys,
    }
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this one, else the reason they do not."""
    if like.device.type != "cpu":
        return f"its kernels run on the CPU, the tensor is on {like.device.type}"
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16, fp16, int8 and uint8, the tensor is {like.dtype}"
    if like.dim() and like.shape[-1] > 1 and like.stride(-1) != 1:
        return f"its kernels take a contiguous last dim, the tensor has stride {like.stride(-1)}"
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
    _load()
    q = _rows(q) if scales is None else round_queries(q)
    starts = None if pages is None else pages * width + first
    return torch.ops.lowcontext.token_scores(q, k, scales, starts, width, scale, causal)


def soft_vote(scores: Tensor, lse: Tensor, heads: int, active: Tensor | None) -> Tensor:
    """See `lowcontext.ops.votes.soft_vote`."""
    _load()
    return torch.ops.lowcontext.soft_vote(scores.contiguous(), lse.contiguous(), heads)


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
    _load()
    limits = None if limits is None else limits.contiguous()
    ids, counts = torch.ops.lowcontext.topk(scores.contiguous(), k, limits)
    return keys_of(ids, counts, pages, width, first), counts


def mass_mask(weights: Tensor, share: int, forced: Tensor | None) -> Tensor:
    """See `lowcontext.ops.votes.mass_mask`; weights [rows, N], forced [R, N], share in 2^-30."""
    _load()
    forced = None if forced is None else forced.contiguous()
    return torch.ops.lowcontext.mass_mask(weights.contiguous(), share, forced)


def page_scores(
    q: Tensor, bounds: Tensor, scale: float, normalize: bool, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores of pages times `scale` and, if asked for, their LSE."""
    _load()
    q = _rows(q) if scale == 1.0 else q.float() * scale
    scores = torch.ops.lowcontext.page_scores(q, bounds)
    return scores, scores.logsumexp(dim=-1) if normalize else scores.new_empty(0)


def quantize_keys(k: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.votes.quantize_keys`."""
    _load()
    return torch.ops.lowcontext.quantize_keys(k, bits)


def _rows(q: Tensor) -> Tensor:
    q = q.float()
    return q if q.stride(3) == 1 else q.contiguous()
