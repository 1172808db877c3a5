"""The Triton kernels of the votes: scores.py, select.py and mass.py in lowcontext/ops/triton."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.triton import execute, operator, unfit_device
from lowcontext.ops.votes import _fakes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
_MAX_D = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this one, else the reason they do not."""
    if op in ("topk", "mass_mask"):
        return unfit_device(like)
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16, fp16, int8 and uint8, the tensor is {like.dtype}"
    if op != "soft_vote":
        widest = 2 * _MAX_D if op == "page_scores" else _MAX_D
        widest = _MAX_D // 2 if like.dtype == torch.uint8 else widest
        if like.shape[3] > widest:
            return f"its kernels take rows of at most {widest}, got {like.shape[3]}"
        if like.shape[3] > 1 and like.stride(3) != 1:
            return f"its kernels take a contiguous last dim, the tensor has stride {like.stride(3)}"
    if like.shape[0] >= 2**16:
        return f"its kernels take a batch below {2**16}, got {like.shape[0]}"
    return unfit_device(like)


def _token_scores(
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
    from lowcontext.ops.triton import scores

    plan = scores.plan_token_scores
    launches, out, lse = plan(_rows(q), k, scales, pages, width, first, scale, causal, active)
    execute(launches, q.device)
    return out, lse


def _soft_vote(scores: Tensor, lse: Tensor, heads: int, active: Tensor | None) -> Tensor:
    from lowcontext.ops.triton.scores import plan_soft_vote

    launches, votes = plan_soft_vote(scores.contiguous(), lse.contiguous(), heads, active)
    execute(launches, scores.device)
    return votes


def _topk(
    scores: Tensor,
    k: int,
    limits: Tensor | None,
    pages: Tensor | None,
    width: int,
    first: int,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.select import plan_topk

    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    limits = limits if limits is None else limits.contiguous()
    pages = pages if pages is None or pages.stride(1) == 1 else pages.contiguous()
    launches, ids, counts = plan_topk(scores, k, limits, pages, width, first, active)
    execute(launches, scores.device)
    return ids, counts


def _mass_mask(weights: Tensor, share: int, forced: Tensor | None) -> Tensor:
    from lowcontext.ops.triton.mass import plan_mass_mask

    weights = weights if weights.stride(1) == 1 else weights.contiguous()
    launches, keep = plan_mass_mask(weights, share, forced)
    execute(launches, weights.device)
    return keep


def _page_scores(
    q: Tensor, bounds: Tensor, scale: float, normalize: bool, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton import scores

    launches, out, lse = scores.plan_page_scores(_rows(q), bounds, scale, normalize, active)
    execute(launches, q.device)
    return out, lse


def _quantize_keys(k: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.scores import plan_quantize_keys

    launches, small, scales = plan_quantize_keys(k, bits)
    execute(launches, k.device)
    return small, scales


def _rows(q: Tensor) -> Tensor:
    q = q.float() if q.dtype == torch.float64 else q
    return q if q.stride(3) == 1 else q.contiguous()


# See the functions of the same names in `lowcontext.ops.votes`.
token_scores = operator("token_scores", _token_scores, _fakes.token_scores)
soft_vote = operator("soft_vote", _soft_vote, _fakes.soft_vote)
topk = operator("topk", _topk, _fakes.topk)
mass_mask = operator("mass_mask", _mass_mask, _fakes.mass_mask)
page_scores = operator("page_scores", _page_scores, _fakes.page_scores)
quantize_keys = operator("quantize_keys", _quantize_keys, _fakes.quantize_keys)
