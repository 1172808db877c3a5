"""Argument checks of the public ops. Private code below them trusts its caller."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowcontext.index import BlockIndex

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q [B, Hq, Lq, D], k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv] fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floats(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} of q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} of q, got {x.device}")
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    if k.shape != (B, Hkv, Lk, D):
        raise ValueError(f"k: expected shape {[B, 'Hkv', 'Lk', D]}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape {[B, Hkv, Lk, 'Dv']}, got {list(v.shape)}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"q: expected a multiple of {Hkv} heads, got {Hq}")
    if Lq > Lk:
        raise ValueError(f"q: expected at most Lk={Lk} queries, got Lq={Lq}")


def check_floats(name: str, x: Tensor) -> None:
    """Raises unless x is a floating tensor [B, H, L, D] with a contiguous last dim."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [B, H, L, D], got {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.shape[3] == 0:
        raise ValueError(f"{name}: expected a head_dim of at least 1, got {list(x.shape)}")
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"{name}: expected a contiguous last dim, got stride {x.stride(3)}")


def check_index(q: Tensor, k: Tensor, index: BlockIndex) -> None:
    """Raises unless the shapes and the device of `index` fit q and k. Contents are not read."""
    if not isinstance(index, BlockIndex):
        raise TypeError(f"index: expected a BlockIndex, got {type(index).__name__}")
    B, Hq, Lq, _ = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    b, h, n, _ = index.kv_starts.shape
    if b not in (1, B):
        raise ValueError(f"index: expected batch 1 or {B}, got {b}")
    if h not in (1, Hkv, Hq):
        raise ValueError(f"index: expected 1, {Hkv} or {Hq} heads, got {h}")
    _, Nq = BlockIndex.query_blocks(Lq, Lk, index.block_q)
    if n != Nq:
        raise ValueError(
            f"index: expected {Nq} query blocks for Lq={Lq}, Lk={Lk}, block_q={index.block_q}, "
            f"got {n}"
        )
    if index.device != q.device:
        raise ValueError(f"index: expected device {q.device} of q, got {index.device}")
    for name, x in (("kv_starts", index.kv_starts), ("kv_columns", index.kv_columns)):
        if x is not None and x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(f"{name}: expected a contiguous last dim, got stride {x.stride(3)}")


def check_kv_start(q: Tensor, kv_start: Tensor | None) -> Tensor | None:
    """Returns `kv_start` as contiguous int32 [B], or None."""
    if kv_start is None:
        return None
    if not isinstance(kv_start, Tensor) or kv_start.is_floating_point():
        raise TypeError("kv_start: expected an int tensor [B]")
    if kv_start.shape != (q.shape[0],):
        raise ValueError(f"kv_start: expected shape [{q.shape[0]}], got {list(kv_start.shape)}")
    if kv_start.device != q.device:
        raise ValueError(f"kv_start: expected device {q.device} of q, got {kv_start.device}")
    return kv_start.to(torch.int32).contiguous()


def check_scale(scale: float | None, D: int) -> float:
    """Returns the softmax scale, `D ** -0.5` where None."""
    if scale is None:
        return float(D) ** -0.5
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    # Not math.isfinite: torch.compile may trace with a symbolic float.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number or None, got {scale}")
    return float(scale)


def check_softcap(value: float | None) -> float:
    """Returns the softcap, 0 where None; raises unless it is a positive, finite number."""
    if value is None:
        return 0.0
    if not isinstance(value, (int, float)):
        raise TypeError(f"softcap: expected a positive number or None, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"softcap: expected a positive number or None, got {value}")
    return float(value)


def check_window(window: int | None) -> int:
    """Returns `window`, 0 where None; raises unless it is an int of at least 1."""
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: expected an int or None, got {window!r}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 or None, got {window}")
    return window
