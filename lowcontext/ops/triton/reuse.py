"""Whether queries still point where those did that made a selection: kernel and launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowcontext.ops.triton.attend import _load_rows
from lowcontext.ops.triton.launch import Launch
from lowcontext.ops.triton.sizes import power_of_2

# fmt: off


@triton.jit(do_not_specialize=["oldest", "heads"])
def stale_kernel(
    q_ptr, kept_ptr, lows_ptr, out_ptr, stride_qb, stride_qh, kept_b, oldest, threshold, heads,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BY_HEAD: tl.constexpr,
):
    """out[b] = lows[b] < oldest, or the cosine of q [B, heads, D] and kept is below the threshold.

    Grid (B, 1).
    """
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)  # [BLOCK_H]
    q = _load_rows(q_ptr + b * stride_qb + h.to(tl.int64) * stride_qh, h < heads, True, D, BLOCK_D)
    kept = _load_rows(kept_ptr + b * kept_b + h * D, h < heads, True, D, BLOCK_D).to(tl.float32)
    q = q.to(tl.float32)
    dot, size, other = tl.sum(q * kept, 1), tl.sum(q * q, 1), tl.sum(kept * kept, 1)  # [BLOCK_H]
    if BY_HEAD:
        turned = tl.max((dot < threshold * tl.sqrt(size * other)).to(tl.int32), 0)
    else:
        least = threshold * tl.sqrt(tl.sum(size, 0) * tl.sum(other, 0))
        turned = 1 - (tl.sum(dot, 0) >= least).to(tl.int32)
    old = (tl.load(lows_ptr + b) < oldest).to(tl.int32)
    tl.store(out_ptr + b, (turned | old) != 0)
# fmt: on


def plan_stale(
    q: Tensor, kept: Tensor, lows: Tensor, oldest: int, threshold: float, by_head: bool
) -> tuple[list[Launch], Tensor]:
    """The launch of `reuse.stale`, and the flags that it fills."""
    B, Hq, _, D = q.shape
    out = torch.empty(B, dtype=torch.bool, device=q.device)
    args = {"q_ptr": q, "kept_ptr": kept, "lows_ptr": lows, "out_ptr": out, "heads": Hq, "D": D}
    args |= {"stride_qb": q.stride(0), "stride_qh": q.stride(1), "kept_b": kept.stride(0)}
    args |= {"oldest": oldest, "threshold": threshold, "BY_HEAD": by_head}
    args |= {"BLOCK_H": power_of_2(Hq), "BLOCK_D": max(16, power_of_2(D))}
    return [Launch(stale_kernel, (B, 1), args, 8, 1)], out
