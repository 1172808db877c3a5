"""Checks of outputs on a GPU: a sample of query blocks against fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext import BlockIndex

Part = tuple[int, int, BlockIndex | None]
# Queries of a dense part that are checked at once.
_DENSE_ROWS = 64


def sampled_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, part: Part, scale: float
) -> tuple[float, float]:
    """Error of the first, the middle and the last block of a part, and the largest allowed.

    Allowed is twice the error of the same arithmetic in PyTorch, plus 1e-5: logits and sums in
    fp32, weights and output rounded to the dtype. First and last head and batch row are looked at.

    Args:
        q: [B, Hq, Lq, D], the last Lq positions; k, v: [B, Hkv, Lk, D]; out: like q.
        part: (first row, end row, index of these rows and of the keys up to the last one).
        scale: factor of the logits.
    """
    row, end, index = part
    offset = k.shape[2] - q.shape[2]
    block = _DENSE_ROWS if index is None else index.block_q
    first, count = BlockIndex.query_blocks(end - row, offset + end, block)
    worst = allowed = 0.0
    for n in sorted({0, count // 2, count - 1}):
        begin = max(row, (first + n) * block - offset)
        stop = min(end, (first + n + 1) * block - offset)
        for b in sorted({0, q.shape[0] - 1}):
            for h in sorted({0, q.shape[1] - 1}):
                mask = _visible(part, n, (b, h), q, offset + begin, offset + stop)
                kv = h * k.shape[1] // q.shape[1]
                rows = q[b, h, begin:stop], k[b, kv, : offset + stop], v[b, kv, : offset + stop]
                exact = _exact(*rows, mask, scale)
                rounded = _rounded(*rows, mask, scale)
                error = (out[b, h, begin:stop].double() - exact).abs().max()
                # NaN is never allowed, and a maximum would hide it.
                worst = float("nan") if error.isnan() else max(worst, float(error))
                allowed = max(allowed, float((rounded.double() - exact).abs().max()))
    return worst, 2 * allowed + 1e-5


def _visible(part: Part, n: int, row: tuple[int, int], q: Tensor, begin: int, stop: int) -> Tensor:
    """bool [stop - begin, stop]: keys that the queries at [begin, stop) of a row (b, h) read."""
    index = part[2]
    keys = torch.arange(stop, device=q.device)
    causal = keys <= torch.arange(begin, stop, device=q.device)[:, None]
    if index is None:
        return causal
    listed = index.key_mask(stop, slice(n, n + 1))  # [B or 1, H, 1, stop]
    return causal & listed[row[0] % listed.shape[0], row[1] * listed.shape[1] // q.shape[1], 0]


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    logits = scale * (q.double() @ k.double().T)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    return weights @ v.double()


def _rounded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    logits = (scale * (q.float() @ k.float().T)).masked_fill(~mask, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    out = weights.to(q.dtype).float() @ v.float() / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return out.to(q.dtype)
