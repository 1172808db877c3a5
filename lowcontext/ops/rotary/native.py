"""The C++ kernels of csrc/cpu/rotary.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops.native import loader
from lowcontext.ops.rotary import _fakes
from lowcontext.ops.rotary._positions import Positions, kernel_positions

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_D = 256


def _fake_rotate(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


_load = loader({"rotate_to": _fake_rotate, "gather_moved": _fakes.gather_moved})


def supports(op: str, like: Tensor) -> str | None:
    """None if the kernels take tensors like this one, else the reason they do not."""
    if op == "list_keys":
        return "it does not have this op"
    if like.device.type != "cpu":
        return f"its kernels run on the CPU, the tensor is on {like.device.type}"
    if like.dtype not in _DTYPES:
        return f"its kernels take fp32, bf16 and fp16, the tensor is {like.dtype}"
    if like.shape[-1] > _MAX_D or like.dim() > 4:
        return f"its kernels take 4 dimensions and rows of {_MAX_D}, got {list(like.shape)}"
    return None


def rotate_to(
    x: Tensor,
    old: Positions,
    new: Positions,
    inv_freq: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `lowcontext.ops.rotary.rotate_to`."""
    _load()
    # The kernel keeps the dtype; another one than that is reached from fp32.
    rows = x if x.dtype == dtype else x.float()
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    shape = (1,) * (4 - x.dim()) + x.shape
    tensors, steps = kernel_positions(old, new)
    tensors = [p if p is None else p.expand(shape[:3]) for p in tensors]
    rows = rows.expand(shape)
    out = torch.ops.lowcontext.rotate_to(rows, *tensors, *steps, inv_freq.contiguous(), interleaved)
    return out.view(x.shape).to(dtype)


def gather_moved(
    k: Tensor, v: Tensor, keys: Tensor, first: Tensor, inv_freq: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `lowcontext.ops.rotary.gather_moved`."""
    _load()
    return torch.ops.lowcontext.gather_moved(k, v, keys, first, inv_freq.contiguous(), interleaved)
