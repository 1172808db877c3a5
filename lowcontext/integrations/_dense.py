"""Dense attention of the integration: which implementation runs, in one place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowcontext.ops import _dispatch, attention

# A mask of one chunk of rows holds at most this many numbers (16 MiB as bool).
_MASK_ELEMENTS = 2**24


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    softcap: float | None = None,
    window: int = 0,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention, aligned bottom-right, over all keys or a sliding window.

    Args:
        q: [B, Hq, Lq, D]; k: [B, Hkv, Lk, D]; v: [B, Hkv, Lk, Dv].
        scale: factor of the logits, default `D ** -0.5`.
        softcap: softcap of the logits, or None.
        window: sliding window in tokens, 0 for none.
        dropout: probability of dropping an attention weight.

    Returns:
        [B, Hq, Lq, Dv].
    """
    Lq, Lk = q.shape[2], k.shape[2]
    if window >= Lk:
        window = 0
    plain = not softcap and not window
    # Prompts: the same call as transformers' own sdpa path, bit for bit. Dropout has no other path.
    if plain and Lq == Lk:
        return _sdpa(q, k, v, None, scale, dropout, causal=Lq > 1)
    if dropout:
        raise NotImplementedError(
            "attention dropout: expected 0 with a softcap, a window or cached keys, got "
            f"{dropout}; unpatch_model(model) before training, or set config.attention_dropout = 0"
        )
    kernel = _kernel(q, k, v)
    if kernel is not None:
        return _run(kernel, q, k, v, scale, softcap, window, None)
    if softcap:
        return attention(q, k, v, scale=scale, softcap=softcap, window=window or None)  # type: ignore[return-value]
    if plain and Lq == 1:
        return _sdpa(q, k, v, None, scale, dropout, causal=False)
    return _by_rows(q, k, v, scale, window)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, window: int
) -> Tensor:
    """Causal attention with a padding mask that is never read on the host.

    Args:
        q, k, v: as in `dense_attention`.
        mask: bool [B, Lk], False where the key is padding.
        window: sliding window in tokens, 0 for none.

    Returns:
        [B, Hq, Lq, Dv]; rows that see no key are 0.
    """
    Lq, Lk = q.shape[2], k.shape[2]
    visible = _band(Lk - Lq, Lq, 0, Lk, window, q.device) & mask[:, None, None, :]
    out = _packed(q, k, v, visible, scale)
    return torch.where(visible.any(-1, keepdim=True), out, 0.0).to(q.dtype)


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_start: Tensor,
    scale: float | None,
    softcap: float | None,
    window: int,
) -> Tensor | None:
    """A left-padded batch in one call of a compiled backend, or None where rows go one by one.

    Args:
        q, k, v, scale, softcap, window: as in `dense_attention`.
        kv_start: int32 [B]; the first valid key of each row.
    """
    plain_prompt = q.shape[2] == k.shape[2] and not softcap and not window
    kernel = None if plain_prompt else _kernel(q, k, v)
    return None if kernel is None else _run(kernel, q, k, v, scale, softcap, window, kv_start)


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> _dispatch.Backend | None:
    """The compiled backend of `lowcontext.attention` that takes this call, if there is one."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return None
    backend = _dispatch.backend_named("native" if q.device.type == "cpu" else "triton")
    return backend if backend.supports("attention", q, k, v, None) is None else None


def _run(
    kernel: _dispatch.Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    softcap: float | None,
    window: int,
    kv_start: Tensor | None,
) -> Tensor:
    # Not the public op: shapes and dtypes come from the model's own projections, and its checks
    # cost as much as the kernel at 128 keys.
    out, _ = kernel.attention(
        q,
        k,
        v,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        softcap=float(softcap or 0.0),
        window=window,
        kv_start=kv_start,
    )
    return out


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
    causal: bool,
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not (k.shape[3] == v.shape[3] <= 256):
        # Grouped heads with these sizes fall to the slow math kernel: repeat the heads instead.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        groups = 1
    return scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )


def _by_rows(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    """SDPA with a mask, in chunks of rows that keep the mask small and read only their keys."""
    Hq, Lq, Lk = q.shape[1], q.shape[2], k.shape[2]
    span = min(Lk, window) if window else Lk
    step = max(1, min(Lq, max(span, 64), _MASK_ELEMENTS // (span * max(1, Hq // k.shape[1]))))
    outs = []
    for row in range(0, Lq, step):
        rows = min(step, Lq - row)
        first = Lk - Lq + row
        low = max(0, first - window + 1) if window else 0
        high = first + rows
        mask = _band(first, rows, low, high, window, q.device)
        chunk = q[:, :, row : row + rows]
        outs.append(_packed(chunk, k[:, :, low:high], v[:, :, low:high], mask, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _band(first: int, rows: int, low: int, high: int, window: int, device: torch.device) -> Tensor:
    """bool [rows, high - low]: the keys in [low, high) that queries first, first+1, ... see."""
    position = torch.arange(first, first + rows, device=device)[:, None]
    key = torch.arange(low, high, device=device)
    visible = key <= position
    return visible & (key > position - window) if window else visible


def _packed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Masked SDPA with the query heads of a group as rows, so that k and v are not repeated."""
    B, Hq, Lq, D = q.shape
    Hkv = k.shape[1]
    groups = Hq // Hkv
    if groups > 1:
        q = q.reshape(B, Hkv, groups * Lq, D)
        mask = mask.repeat(*[1] * (mask.dim() - 2), groups, 1)
    out = scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return out.reshape(B, Hq, Lq, v.shape[3])
