"""The C++ kernels of csrc/cpu/token_scores.cpp and csrc/cpu/topk.cpp."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowcontext.ops.native import require_library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this one, else the reason they do not."""
    if like.device.type != "cpu":
        return f"its kernels run on the CPU, the tensor is on {like.device.type}"
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16, fp16 and int8, the tensor is {like.dtype}"
    if like.dim() and like.shape[-1] > 1 and like.stride(-1) != 1:
        return f"its kernels take a contiguous last dim, the tensor has stride {like.stride(-1)}"
    return None


def token_scores(
    q: Tensor,
    k: Tensor,
    scales: Tensor | None,
    starts: Tensor | None,
    width: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.votes.token_scores`."""
    _load()
    q = q if q.stride(3) == 1 else q.contiguous()
    starts = starts if starts is None or starts.stride(2) == 1 else starts.contiguous()
    return torch.ops.lowcontext.token_scores(q, k, scales, starts, width, scale, causal)


def soft_vote(scores: Tensor, lse: Tensor, heads: int) -> Tensor:
    """See `lowcontext.ops.votes.soft_vote`."""
    _load()
    return torch.ops.lowcontext.soft_vote(scores.contiguous(), lse.contiguous(), heads)


def topk(scores: Tensor, k: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.votes.topk`; scores [rows, N]."""
    _load()
    limits = None if limits is None else limits.contiguous()
    return torch.ops.lowcontext.topk(scores.contiguous(), k, limits)


def page_scores(q: Tensor, bounds: Tensor) -> Tensor:
    """See `lowcontext.ops.votes.page_scores`."""
    _load()
    return torch.ops.lowcontext.page_scores(q if q.stride(3) == 1 else q.contiguous(), bounds)


def quantize_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.votes.quantize_keys`."""
    _load()
    return torch.ops.lowcontext.quantize_keys(k)


def _load() -> None:
    require_library()
    _register_fakes()


@cache
def _register_fakes() -> None:
    register = torch.library.register_fake
    register("lowcontext::token_scores", _fake_token_scores)
    register("lowcontext::soft_vote", _fake_soft_vote)
    register("lowcontext::topk", _fake_topk)
    register("lowcontext::page_scores", _fake_page_scores)
    register("lowcontext::quantize_keys", _fake_quantize_keys)


def _fake_token_scores(
    q: Tensor,
    k: Tensor,
    scales: Tensor | None,
    starts: Tensor | None,
    width: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    N = k.shape[2] if starts is None else starts.shape[2] * width
    return q.new_empty(*q.shape[:3], N), q.new_empty(q.shape[:3])


def _fake_soft_vote(scores: Tensor, lse: Tensor, heads: int) -> Tensor:
    return scores.new_empty(scores.shape[0], heads, *scores.shape[2:])


def _fake_topk(scores: Tensor, k: int, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, N = scores.shape
    ids = scores.new_empty((rows, min(k, N)), dtype=torch.int32)
    return ids, scores.new_empty((rows,), dtype=torch.int32)


def _fake_page_scores(q: Tensor, bounds: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], bounds.shape[2])


def _fake_quantize_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k, dtype=torch.int8), k.new_empty(k.shape[:3], dtype=torch.float32)
