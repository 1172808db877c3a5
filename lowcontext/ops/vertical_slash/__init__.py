"""Vertical and slash lines: their scores from the last queries, and the index of chosen lines.

A vertical line is one key position, read by every query; a slash line is one distance between
query and key. MInference (Jiang et al., arXiv 2407.02490, section 3.2 and appendix C.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import _checks, _dispatch
from lowcontext.ops.vertical_slash import native, reference, triton

__all__ = ["last_window_scores", "line_index"]

BACKENDS = {"native": native, "triton": triton, "reference": reference}

MAX_WINDOW = 256


def last_window_scores(
    q: Tensor,
    k: Tensor,
    *,
    window: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sums the attention weights of the last queries along vertical and along slash lines.

    With n = min(window, Lq), p[r, j] the softmax weight of key j for the query at position
    i_r = Lk - n + r, r = 0 .. n - 1, causally masked:

        vertical[j] = sum_r p[r, j]        slash[d] = sum_r p[r, i_r - d]

    Both sum to n over their last dimension. Logits, softmax and sums are fp32 (fp64 for fp64
    inputs). Keys are read per KV head, not per query head.

    Args:
        q: [B, Hq, Lq, D], fp32, bf16 or fp16; only the last n queries are read.
        k: [B, Hkv, Lk, D], same dtype.
        window: queries that vote, 1 to 256.
        scale: factor of the logits, default `D ** -0.5`.
        softcap: logits become `softcap * tanh(logits / softcap)`, default off.
        backend: "auto" or a backend's name.

    Returns:
        (vertical, slash), each fp32 [B, Hq, Lk]; `slash` is indexed by the distance.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend can run it; the message says why.

    Example:
        >>> import torch
        >>> from lowcontext.ops.vertical_slash import last_window_scores
        >>> q, k = torch.randn(1, 4, 300, 64), torch.randn(1, 2, 300, 64)
        >>> vertical, slash = last_window_scores(q, k)
        >>> vertical.shape, bool((vertical.sum(-1) - 64).abs().max() < 1e-3)
        (torch.Size([1, 4, 300]), True)
    """
    _checks.check_qkv(q, k, k)
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: expected an int, got {window!r}")
    if not 0 < window <= MAX_WINDOW:
        raise ValueError(f"window: expected 1 to {MAX_WINDOW}, got {window}")
    _checks.check_rows("q", q)
    last = q[:, :, max(0, q.shape[2] - window) :]
    run = _dispatch.implementation(BACKENDS, "last_window_scores", backend, q)
    return run(
        last,
        k,
        scale=_checks.check_scale(scale, q.shape[3]),
        softcap=_checks.check_softcap(softcap),
    )


def line_index(
    vertical: Tensor,
    slash: Tensor,
    Lq: int,
    Lk: int,
    *,
    block: int = 64,
    most_vertical: int = 0,
    most_slash: int = 0,
    dense_from: Tensor | None = None,
    backend: str = "auto",
) -> BlockIndex:
    """Builds the index that covers chosen vertical and slash lines.

    For the query block m, with end = block * (m + 1): a slash of distance d < end asks for the
    window of `block` keys that ends at e = max(end - d, block), every key that the block's rows
    have at distance d. Windows are merged from left to right: one that starts after the last
    range ended opens a range; one that reaches past its end extends the range by a whole `block`.
    Tiles are the ranges, cut from their starts; columns are the vertical lines before the end of
    the last range that no range holds. So tiles may start anywhere, a tile may run past `end` or
    past the last key, no key is listed twice, and every column is visible to all rows of its block
    where distance 0 is chosen. Where it is not, keys near the diagonal stay unread.

    Args:
        vertical: bool [B, H, N], N >= Lk; True for each chosen key. Keys from Lk on are ignored.
        slash: bool [B, H, N]; True for each chosen distance.
        Lq: number of queries; Lk: number of keys; the last query sees the last key.
        block: queries per block and keys per tile.
        most_vertical: most True entries in a row of `vertical`, if the caller knows it: the width
            C of the index; more are dropped from the right. 0 means Lk.
        most_slash: the same for `slash`; bounds the width S of the index. 0 means Lk.
        dense_from: int32 [B, H] or None; blocks with a row at or after this position list
            everything.
        backend: "auto" or a backend's name.

    Returns:
        BlockIndex with H heads, block size (block, block), S = min(most_slash, ceil(Lk / block))
        and C = most_vertical.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: no backend can run it; the message says why.

    Example:
        >>> import torch
        >>> from lowcontext.ops.vertical_slash import line_index
        >>> vertical, slash = torch.zeros(2, 1, 1, 384, dtype=torch.bool)
        >>> vertical[..., [0, 1, 5, 30, 200, 300]] = True
        >>> slash[..., [0, 1, 2, 70, 130]] = True
        >>> index = line_index(vertical, slash, 384, 384)
        >>> n = int(index.kv_num_blocks[0, 0, 5])
        >>> index.kv_starts[0, 0, 5, :n].tolist()
        [190, 254, 318, 382]
        >>> index.kv_columns[0, 0, 5, : int(index.kv_num_columns[0, 0, 5])].tolist()
        [0, 1, 5, 30]
    """
    for name, mask in (("vertical", vertical), ("slash", slash)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: expected a bool tensor, got {got}")
        if mask.dim() != 3 or mask.shape[2] < Lk:
            raise ValueError(f"{name}: expected shape [B, H, >= {Lk}], got {list(mask.shape)}")
        if mask.shape != vertical.shape or mask.device != vertical.device:
            raise ValueError(
                f"{name}: expected shape {list(vertical.shape)} on {vertical.device}, got "
                f"{list(mask.shape)} on {mask.device}"
            )
    if not 0 < Lq <= Lk:
        raise ValueError(f"Lq: expected 1 to Lk={Lk} queries, got {Lq}")
    if block < 1:
        raise ValueError(f"block: expected a positive int, got {block}")
    if dense_from is not None and (
        dense_from.dtype != torch.int32 or dense_from.shape != vertical.shape[:2]
    ):
        raise ValueError(
            f"dense_from: expected int32 {list(vertical.shape[:2])}, got {dense_from.dtype} "
            f"{list(dense_from.shape)}"
        )
    tiles = -(-Lk // block)
    if most_slash and dense_from is None:
        tiles = min(most_slash, tiles)
    run = _dispatch.implementation(BACKENDS, "line_index", backend, vertical)
    counts, starts, num_columns, columns = run(
        vertical[..., :Lk],
        slash[..., :Lk],
        Lq,
        dense_from,
        block=block,
        tiles=tiles,
        columns=min(most_vertical, Lk) if most_vertical else Lk,
    )
    return BlockIndex(counts, starts, (block, block), num_columns, columns)
