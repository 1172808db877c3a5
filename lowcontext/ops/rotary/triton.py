"""The Triton kernels of moved keys: rotary.py in lowcontext/ops/triton."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.rotary import _fakes
from lowcontext.ops.rotary._positions import Positions, kernel_positions
from lowcontext.ops.triton import execute, operator, unfit_device

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_D = 256


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this one, else the reason they do not."""
    if op != "list_keys":
        if like.dtype not in _DTYPES:
            return f"its kernels take fp32, bf16 and fp16, the tensor is {like.dtype}"
        if like.shape[-1] > _MAX_D:
            return f"its kernels take rows of at most {_MAX_D}, got {like.shape[-1]}"
        if like.dim() > 4:
            return f"its kernels take at most 4 dimensions, got {like.dim()}"
    if like.dim() > 2 and like.shape[0] >= 2**16:
        return f"its kernels take a batch below {2**16}, got {like.shape[0]}"
    return unfit_device(like)


def rotate_to(
    x: Tensor,
    old: Positions,
    new: Positions,
    inv_freq: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `lowcontext.ops.rotary.rotate_to`."""
    tensors, steps = kernel_positions(old, new)
    return _rotate(x, *tensors, steps, inv_freq, interleaved, dtype)


def list_keys(
    starts: Tensor, counts: Tensor, low: Tensor | int, Lk: int, size: int, width: int, sink: int
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.rotary.list_keys`."""
    if isinstance(low, Tensor):
        return _list(starts, counts, low, [0, Lk], size, width, sink)
    return _list(starts, counts, None, [low, Lk], size, width, sink)


def _run_rotate(
    x: Tensor,
    old: Tensor | None,
    new: Tensor | None,
    steps: list[int],
    inv_freq: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    from lowcontext.ops.triton.rotary import plan_rotate_to

    x = x if x.stride(-1) == 1 else x.contiguous()
    launches, out = plan_rotate_to(x, (old, new), steps, inv_freq.contiguous(), interleaved, dtype)
    execute(launches, x.device)
    return out


def _run_list(
    starts: Tensor,
    counts: Tensor,
    low: Tensor | None,
    bounds: list[int],
    size: int,
    width: int,
    sink: int,
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.rotary import plan_list_keys

    launches, keys, first = plan_list_keys(starts, counts, low, bounds, size, width, sink)
    execute(launches, starts.device)
    return keys, first


def _run_gather(
    k: Tensor, v: Tensor, keys: Tensor, first: Tensor, inv_freq: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    from lowcontext.ops.triton.rotary import plan_gather_moved

    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    launches, *moved = plan_gather_moved(k, v, keys, first, inv_freq.contiguous(), interleaved)
    execute(launches, k.device)
    return moved[0], moved[1]


_rotate = operator("rotate_to", _run_rotate, _fakes.rotate_to)
_list = operator("list_keys", _run_list, _fakes.list_keys)
# See the function of the same name in `lowcontext.ops.rotary`.
gather_moved = operator("gather_moved", _run_gather, _fakes.gather_moved)
