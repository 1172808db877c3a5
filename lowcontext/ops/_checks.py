"""Argument checks of the public ops. Private code below them trusts its caller."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowcontext.index import BlockIndex

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    check_groups(Hq, Hkv)
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


def check_groups(Hq: int, Hkv: int) -> None:
    """Raises unless every KV head serves the same number of query heads, at least one."""
    if Hkv == 0 or Hq == 0 or Hq % Hkv:
        raise ValueError(f"q: expected a multiple of {Hkv} heads, at least one, got {Hq}")


def check_rows(name: str, x: Tensor) -> None:
    """Raises unless x [B, H, L, D] has a row: without one there is no block to list."""
    if 0 in x.shape[1:3]:
        raise ValueError(f"{name}: expected at least one row, got {list(x.shape)}")


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
    """Returns `kv_start` as contiguous int32 [B], or None; values are cut to int32, not wrapped."""
    if kv_start is None:
        return None
    if not isinstance(kv_start, Tensor) or kv_start.dtype not in INT_DTYPES:
        got = kv_start.dtype if isinstance(kv_start, Tensor) else type(kv_start).__name__
        raise TypeError(f"kv_start: expected an int tensor [B], got {got}")
    if kv_start.shape != (q.shape[0],):
        raise ValueError(f"kv_start: expected shape [{q.shape[0]}], got {list(kv_start.shape)}")
    if kv_start.device != q.device:
        raise ValueError(f"kv_start: expected device {q.device} of q, got {kv_start.device}")
    return to_int32(kv_start).contiguous()


def to_int32(x: Tensor) -> Tensor:
    """An int tensor as int32; what does not fit becomes the nearest int32."""
    if x.dtype == torch.int64:
        x = x.clamp(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
    return x.to(torch.int32)


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
