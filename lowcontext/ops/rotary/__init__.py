"""Keys at other positions than the model gave them: rotated there, or listed and gathered there.

R(new) k = R(new - old) R(old) k: a rotated key moves by the rotation of the difference.

    keys, first = list_keys(starts, counts, low, Lk, size)      one list that ends at the last key
    k, v = gather_moved(k, v, keys, first, inv_freq)            its keys, one position after another
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.ops import _checks, _dispatch
from lowcontext.ops.rotary import native, reference, triton
from lowcontext.ops.rotary._positions import Positions

__all__ = ["Positions", "gather_moved", "list_keys", "rotate_to"]

BACKENDS = {"native": native, "triton": triton, "reference": reference}


def rotate_to(
    x: Tensor,
    old: Positions,
    new: Positions,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rotates vectors that carry the rotation of one position to another.

    The pair of channels i turns by `new * inv_freq[i] - old * inv_freq[i]`. A model makes each of
    these products in fp32, so their difference is taken between the rounded products and not as
    `(new - old) * inv_freq[i]`: that is what the model itself would have made at the new position.
    Vectors whose position does not change come back bit for bit. A scaling that the model applies
    to its rotation (YaRN) is in `x` already and stays.

    Args:
        x: [..., D], any floating dtype; the arithmetic is fp32.
        old, new: int32 or int64 [...], broadcast to x without its last dim; or an int for all
            vectors; or a range along the last but one dim.
        inv_freq: fp32 [P]; the first 2 * P channels are rotated, the others pass.
        interleaved: pairs are channels (2i, 2i + 1) instead of (i, i + P).
        dtype: of the result; that of x where None.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [..., D].

    Raises:
        TypeError: the positions are no ints, or the frequencies no fp32.
        ValueError: more than D channels would be rotated, or a range has another length than x.
        RuntimeError: no backend, or not the named one, can run it.

    Example:
        >>> import torch
        >>> x, f = torch.tensor([1.0, 0.0]), torch.tensor([torch.pi / 2])
        >>> rotate_to(x, 4, 5, f).round(decimals=4).tolist()
        [0.0, 1.0]
    """
    _check_frequencies(x, inv_freq)
    for name, positions in (("old", old), ("new", new)):
        if isinstance(positions, Tensor) and positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected dtype int32 or int64, got {positions.dtype}")
        if isinstance(positions, range) and len(positions) != x.shape[-2]:
            raise ValueError(
                f"{name}: expected {x.shape[-2]} positions, got a range of {len(positions)}"
            )
    run = _dispatch.implementation(BACKENDS, "rotate_to", backend, x)
    return run(x, old, new, inv_freq, interleaved, x.dtype if dtype is None else dtype)


def list_keys(
    starts: Tensor,
    counts: Tensor,
    low: Tensor | int,
    Lk: int,
    size: int,
    *,
    width: int = 1,
    sink: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sink, tiles and recent keys as one list that ends at the last key, without gaps.

    The list is 0 .. sink - 1, the `width` keys of each tile, and max(low, sink) .. Lk - 1. Where
    `low` lies behind the last key, the last tile loses as many keys.

    Args:
        starts: int32 [B, H, S], first keys of the tiles, last dim contiguous.
        counts: int32 [B], tiles of each row of the batch.
        low: int32 [B or 1], or an int for all rows: the first recent key.
        Lk: keys.
        size: entries of a list, M; at least the longest.
        width: keys per tile.
        sink: keys at the start.
        backend: "auto", "triton" or "reference".

    Returns:
        int32 [B, H, M], the list in its last entries and 0 before them; int32 [B], where it begins.

    Raises:
        TypeError, ValueError: a tensor does not fit; the message names it.
        RuntimeError: no backend, or not the named one, can run it.

    Example:
        >>> import torch
        >>> starts, counts = torch.tensor([[[4, 6, 0]]]), torch.tensor([2])
        >>> keys, first = list_keys(starts.int(), counts.int(), 9, 11, 8, sink=2)
        >>> keys.tolist(), first.tolist()
        ([[[0, 0, 0, 1, 4, 6, 9, 10]]], [2])
    """
    B = starts.shape[0]
    _check_ints("starts", starts, starts.dim() == 3, "[B, H, S]")
    if starts.shape[2] > 1 and starts.stride(2) != 1:
        raise ValueError(f"starts: expected a contiguous last dim, got stride {starts.stride(2)}")
    _check_ints("counts", counts, counts.shape == (B,), f"[{B}]")
    if isinstance(low, Tensor):
        _check_ints("low", low, low.shape in ((1,), (B,)), f"[1] or [{B}]")
    run = _dispatch.implementation(BACKENDS, "list_keys", backend, starts)
    return run(starts, counts, low, Lk, size, width, sink)


def gather_moved(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    first: Tensor,
    inv_freq: Tensor,
    *,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Listed keys, rotated to stand one after another up to the last key, and their values.

    Entry i of M goes to position `Lk - M + i`, as `rotate_to` does it.

    Args:
        k: [B, Hkv, Lk, D], a floating dtype, last dim contiguous; v: [B, Hkv, Lk, Dv].
        keys: int32 [B, 1 or Hkv, M], from 0 to Lk - 1.
        first: int32 [B]; entries before it are not read, and come out as zeros.
        inv_freq: fp32 [P]; the first 2 * P channels are rotated, the others pass.
        interleaved: pairs are channels (2i, 2i + 1) instead of (i, i + P).
        backend: "auto", "native", "triton" or "reference".

    Returns:
        [B, Hkv, M, D] and [B, Hkv, M, Dv] in the dtypes of k and v.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend, or not the named one, can run it.

    Example:
        >>> import torch
        >>> k, v = torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64)
        >>> keys, f = torch.arange(0, 1000, 10).int().expand(1, 1, -1), torch.full((32,), 0.1)
        >>> moved, values = gather_moved(k, v, keys, torch.tensor([3]).int(), f)
        >>> moved.shape, torch.equal(values[:, :, 3:], v[:, :, 30::10])
        (torch.Size([1, 2, 100, 64]), True)
    """
    _checks.check_floats("k", k)
    _checks.check_floats("v", v)
    _check_frequencies(k, inv_freq)
    B, Hkv = k.shape[:2]
    if v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
        raise ValueError(
            f"v: expected {k.dtype} [{B}, {Hkv}, {k.shape[2]}, Dv] as k, got {v.dtype} "
            f"{list(v.shape)}"
        )
    fits = keys.dim() == 3 and keys.shape[0] == B and keys.shape[1] in (1, Hkv)
    _check_ints("keys", keys, fits, f"[{B}, 1 or {Hkv}, M]")
    _check_ints("first", first, first.shape == (B,), f"[{B}]")
    run = _dispatch.implementation(BACKENDS, "gather_moved", backend, k)
    return run(k, v, keys, first, inv_freq, interleaved)


def _check_ints(name: str, x: Tensor, fits: bool, shape: str) -> None:
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {x.dtype}")
    if not fits:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")


def _check_frequencies(x: Tensor, inv_freq: Tensor) -> None:
    if inv_freq.dtype != torch.float32:
        raise TypeError(f"inv_freq: expected dtype torch.float32, got {inv_freq.dtype}")
    P = inv_freq.shape[0]
    if x.shape[-1] < 2 * P:
        raise ValueError(f"inv_freq: expected at most {x.shape[-1] // 2} pairs, got {P}")
