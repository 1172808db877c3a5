"""Public ops: dense and block-sparse attention with one set of conventions, on every backend."""

from __future__ import annotations

from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import _checks, _dispatch

__all__ = ["attention", "sparse_attention"]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    kv_start: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes causal attention of each query over the keys that `index` lists for its block.

    Query r has position `Lk - Lq + r`; it sees key j if j is listed, `kv_start <= j` and j is not
    after it:

        Lq = 2, Lk = 5, everything listed    k0 k1 k2 k3 k4
                                         q0   x  x  x  x  .
                                         q1   x  x  x  x  x

    Softmax and accumulation are fp32; the result is normalised over the listed keys only. A query
    without a visible key gives zeros and an LSE of -inf. The contents of `index` are not checked
    (`BlockIndex.validate` does); positions outside the keys are masked, never read.

    Args:
        q: [B, Hq, Lq, D], fp32, bf16 or fp16 (fp64 on the reference only); any strides with the
            last dim contiguous.
        k: [B, Hkv, Lk, D], same dtype; Hq a multiple of Hkv, query head h reads head `h // G`.
        v: [B, Hkv, Lk, D], same dtype.
        index: the keys of each query block; heads 1, Hkv or Hq, batch 1 or B.
        scale: factor of the logits, default `D ** -0.5`.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2), default off.
        kv_start: int [B]; keys before it do not exist (left padding), default none.
        return_lse: also return the natural log-sum-exp of the logits.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, Hq, Lq, D] in q's dtype; with `return_lse`, also fp32 [B, Hq, Lq].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend, or not the named one, can run it; the message says why.

    Example:
        >>> import torch, lowcontext
        >>> q, k, v = (torch.randn(1, h, 256, 64) for h in (4, 2, 2))
        >>> keep = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
        >>> index = lowcontext.BlockIndex.from_blocks(keep, (64, 64))
        >>> out = lowcontext.sparse_attention(q, k, v, index)
        >>> torch.allclose(out, lowcontext.attention(q, k, v), atol=1e-5)
        True
    """
    _checks.check_qkv(q, k, v)
    _checks.check_index(q, k, index)
    kv_start = _checks.check_kv_start(q, kv_start)
    out, lse = _dispatch.select("sparse_attention", backend, q, k, v, index).sparse_attention(
        q,
        k,
        v,
        index,
        scale=_checks.check_scale(scale, q.shape[3]),
        softcap=_checks.check_softcap(softcap),
        kv_start=kv_start,
    )
    return (out, lse) if return_lse else out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    kv_start: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes dense causal attention with the conventions of `sparse_attention`.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D]; v: [B, Hkv, Lk, D]; as in `sparse_attention`.
        scale: factor of the logits, default `D ** -0.5`.
        softcap: logits become `softcap * tanh(logits / softcap)`, default off.
        window: sliding window in tokens: a query sees itself and the `window - 1` keys before it.
        kv_start: int [B]; keys before it do not exist (left padding), default none.
        return_lse: also return the natural log-sum-exp of the logits.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, Hq, Lq, D] in q's dtype; with `return_lse`, also fp32 [B, Hq, Lq].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend, or not the named one, can run it; the message says why.

    Example:
        >>> import torch, lowcontext
        >>> q, k = torch.randn(1, 4, 2, 64), torch.randn(1, 2, 100, 64)
        >>> lowcontext.attention(q, k, k, window=16).shape
        torch.Size([1, 4, 2, 64])
    """
    _checks.check_qkv(q, k, v)
    kv_start = _checks.check_kv_start(q, kv_start)
    out, lse = _dispatch.select("attention", backend, q, k, v).attention(
        q,
        k,
        v,
        scale=_checks.check_scale(scale, q.shape[3]),
        softcap=_checks.check_softcap(softcap),
        window=_checks.check_window(window),
        kv_start=kv_start,
    )
    return (out, lse) if return_lse else out
