"""Whether the selection of an earlier decode step still serves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lowcontext.ops import _dispatch
from lowcontext.ops._checks import check_floats
from lowcontext.ops.reuse import reference, triton

__all__ = ["stale"]

BACKENDS = {"triton": triton, "reference": reference}


def stale(
    q: Tensor,
    kept: Tensor,
    lows: Tensor,
    oldest: int,
    *,
    threshold: float,
    by_head: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rows whose selection is too old, or was made for a query of another direction.

    Selection Cache of TokenSelect (Wu et al., arXiv 2411.02886, algorithm 1).

    Args:
        q: [B, Hq, 1, D], a floating dtype.
        kept: [B, Hq * D], the queries that made the selections.
        lows: int32 [B], first key that each of them did not see.
        oldest: the least of `lows` that is not too old.
        threshold: least cosine of a direction that counts as the same.
        by_head: every head must reach it; else all heads as one vector.
        reduce: sums a tensor over the ranks that hold the other heads, in place.
        backend: "auto", "triton" or "reference".

    Returns:
        bool [B].

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_floats("q", q)
    B, Hq, R, D = q.shape
    if R != 1:
        raise ValueError(f"q: expected one row, got shape {list(q.shape)}")
    for name, x, shape in (("kept", kept, (B, Hq * D)), ("lows", lows, (B,))):
        if x.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if reduce is not None:
        return reference.turned(q, kept, threshold, by_head, reduce) | (lows < oldest)
    run = _dispatch.implementation(BACKENDS, "stale", backend, q)
    return run(q, kept, lows, oldest, threshold, by_head)
