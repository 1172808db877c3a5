"""Backends: which implementation of an op runs, and why the others do not."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex

OPS = ("attention", "sparse_attention")

# In order of preference. `reference` is last and, on a GPU, never chosen by "auto".
_MODULES = {
    "native": "lowcontext.ops.native",
    "triton": "lowcontext.ops.triton",
    "reference": "lowcontext.ops.reference",
}


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Args:
        name: what the user passes as `backend=`.
        module: the module with `attention`, `sparse_attention`, `supports` and `status`.
    """

    name: str
    module: ModuleType

    def supports(
        self, op: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None
    ) -> str | None:
        """None if the backend can run `op` on these arguments, else the reason it cannot."""
        reason = unusable(self.name)
        return reason if reason else self.module.supports(op, q, k, v, index)

    def sparse_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The backend's (out, lse) of `lowcontext.sparse_attention`."""
        return self.module.sparse_attention(*args, **kwargs)

    def attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The backend's (out, lse) of `lowcontext.attention`."""
        return self.module.attention(*args, **kwargs)


@cache
def _load() -> dict[str, Backend]:
    return {name: Backend(name, importlib.import_module(m)) for name, m in _MODULES.items()}


@cache
def _status() -> dict[str, str | None]:
    return {name: backend.module.status() for name, backend in _load().items()}


@torch.compiler.assume_constant_result
def backends() -> dict[str, Backend]:
    """All backends by name, in order of preference."""
    return _load()


@torch.compiler.assume_constant_result
def unusable(name: str) -> str | None:
    """Why the backend cannot run on this machine at all; None if it can."""
    return _status()[name]


def select(
    op: str, backend: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None = None
) -> Backend:
    """The backend that runs `op` on these arguments.

    Raises:
        ValueError: `backend` is not a known name.
        RuntimeError: the named backend, or with "auto" every backend, cannot run it; the message
            lists each reason.
    """
    table = backends()
    if backend != "auto":
        if backend not in table:
            raise ValueError(f"backend: expected 'auto' or one of {list(table)}, got {backend!r}")
        reason = table[backend].supports(op, q, k, v, index)
        if reason:
            raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
        return table[backend]
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    reasons = {}
    for name, candidate in table.items():
        if name == "reference" and q.device.type != "cpu" and not grad:
            reasons[name] = "never chosen silently on a GPU; pass backend='reference' to use it"
            continue
        reason = candidate.supports(op, q, k, v, index)
        if not reason and grad and name != "reference":
            reason = "inference only, and a gradient is required"
        if not reason:
            if name == "reference" and not grad and unusable("native"):
                _warn_slow(str(unusable("native")))
            return candidate
        reasons[name] = reason
    listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no backend can run {op}: {listing}")


@torch.compiler.disable
def _warn_slow(reason: str) -> None:
    warnings.warn(
        f"lowcontext runs its slow PyTorch reference: {reason}", RuntimeWarning, stacklevel=4
    )


def table() -> list[tuple[str, str | None]]:
    """(backend name, reason it is unusable on this machine or None): what `info` prints."""
    return [(name, unusable(name)) for name in backends()]
