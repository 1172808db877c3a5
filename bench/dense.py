"""Dense attention as others compute it: the baselines of the GPU suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import lowcontext

Call = Callable[[], Any]
_SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def dense_calls(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, only: str = ""
) -> tuple[dict[str, Call], dict[str, str]]:
    """Causal dense attention by every implementation that runs these tensors here: each is tried.

    Args:
        q: [B, Hq, Lq, D] with Lq 1 or Lk; k, v: [B, Hkv, Lk, D].
        scale: factor of the logits, default `D ** -0.5`.
        only: try this one alone, and leave out ours.

    Returns:
        Calls by name, "ours-dense" among them, and what is missing with the reason.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for variants in _makers(q.is_cuda, q.shape[2]):
        for name, make in variants.items():
            if only not in ("", name):
                continue
            try:
                call = make(q, k, v, scale)
                call()
                calls[name] = call
                break
            except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
                missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if not only:
        calls["ours-dense"] = lambda: lowcontext.attention(q, k, v, scale=scale)
    return calls, missing


def best(p50_ms: dict[str, float]) -> str:
    """The fastest of the others' implementations among timed candidates; ours if none runs."""
    others = [name for name in p50_ms if name.removesuffix(REPEATED) in OTHERS]
    return min(others or ["ours-dense"], key=p50_ms.__getitem__)


OTHERS = ("sdpa", "flash", "flash-packed", "cudnn", "flash-attn", "flashinfer")
REPEATED = ", keys repeated"


def _makers(cuda: bool, Lq: int) -> Iterator[dict[str, Callable[..., Call]]]:
    """Implementations; the later variants of one are for where the first does not run."""
    if not cuda:
        yield {"sdpa": _plain}
        return
    for name in _SDPA:
        yield {
            name: lambda *args, name=name: _sdpa(_SDPA[name], *args),
            name + REPEATED: lambda *args, name=name: _repeated(_SDPA[name], *args),
        }
    if Lq == 1:
        yield {"flash-packed": _packed}
    if find_spec("flash_attn_interface") or find_spec("flash_attn"):
        yield {"flash-attn": _flash_attn}
    if find_spec("flashinfer"):
        yield {"flashinfer": _flashinfer}


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    causal = q.shape[2] > 1
    return lambda: sdpa(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    causal = q.shape[2] > 1

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)

    return call


def _repeated(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    """As many key heads as query heads, repeated before anything is timed."""
    G = q.shape[1] // k.shape[1]
    return _sdpa(backend, q, *(x.repeat_interleave(G, dim=1) for x in (k, v)), scale)


def _packed(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    """One query for each head: the heads of a group as queries of one head, keys read once."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(rows, k, v, scale=scale)

    return call


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    name = "flash_attn_interface" if find_spec("flash_attn_interface") else "flash_attn"
    run = import_module(name).flash_attn_func
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: run(q, k, v, softmax_scale=scale, causal=True)


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    library = import_module("flashinfer")
    if q.shape[0] > 1:
        raise ValueError("its calls for one sequence take a batch of 1")
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # [L, H, D]
    if len(q) == 1:
        return lambda: library.single_decode_with_kv_cache(q[0], k, v, sm_scale=scale)
    run = library.single_prefill_with_kv_cache
    return lambda: run(q, k, v, causal=True, sm_scale=scale)


def flex_call(q: Tensor, k: Tensor, v: Tensor, index: lowcontext.BlockIndex, scale: float) -> Call:
    """FlexAttention on the lists of an index of aligned tiles, compiled at the first call."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = index.to_flex(q.shape[2], k.shape[2], q.shape[1])
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = q.shape[1] != k.shape[1]
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
