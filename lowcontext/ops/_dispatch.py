"""Backends: which implementation of an op runs, and why the others do not."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
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


# Filled by `_load`. A plain dict: torch.compile reads it while tracing, and cannot guard an object
# that a function assumed constant returns.
_LOADED: dict[str, Backend] = {}


@torch.compiler.assume_constant_result
def _load(name: str) -> bool:
    if name not in _LOADED:
        _LOADED[name] = Backend(name, importlib.import_module(_MODULES[name]))
    return True


@cache
def _status(name: str) -> str | None:
    return backend_named(name).module.status()


def backend_named(name: str) -> Backend:
    """The backend, its module imported on first use.

    Raises:
        ValueError: `name` is not a backend.
    """
    if name not in _MODULES:
        raise ValueError(f"backend: expected 'auto' or one of {list(_MODULES)}, got {name!r}")
    _load(name)
    return _LOADED[name]


@torch.compiler.assume_constant_result
def unusable(name: str) -> str | None:
    """Why the backend cannot run on this machine at all; None if it can."""
    return _status(name)


def select(
    op: str, backend: str, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex | None = None
) -> Backend:
    """The backend that runs `op` on these arguments.

    Raises:
        ValueError: `backend` is not a known name.
        RuntimeError: the named backend, or with "auto" every backend, cannot run it; the message
            lists each reason.
        NotImplementedError: gradients through a backend other than the reference.
    """
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend != "auto":
        named = backend_named(backend)
        reason = named.supports(op, q, k, v, index)
        if reason:
            raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
        if grad and backend != "reference":
            raise NotImplementedError(
                f"backend {backend!r} is for inference: call it under torch.no_grad(), "
                "or use backend='reference' for gradients"
            )
        return named
    reasons: dict[str, str | None] = {}
    for name in _MODULES:
        if name == "reference" and q.device.type != "cpu" and not grad:
            reasons[name] = "never chosen silently on a GPU; pass backend='reference' to use it"
            continue
        candidate = backend_named(name)
        reason = candidate.supports(op, q, k, v, index)
        if not reason and grad and name != "reference":
            reason = "inference only, and a gradient is required"
        if not reason:
            if name == "reference" and not grad and not torch.compiler.is_compiling():
                _warn_slow(reasons)
            return candidate
        reasons[name] = reason
    listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no backend can run {op}: {listing}")


@cache
def _family_module(family: str, name: str) -> ModuleType | None:
    path = f"lowcontext.ops.{family}.{name}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def implementation(family: str, op: str, backend: str, like: Tensor) -> Callable[..., Any]:
    """The function that runs a score or select op on tensors like `like`.

    The ops of a family live in the package `lowcontext.ops.<family>`, one module per backend that
    has them: functions named as the ops, and `supports(op, like) -> reason | None`. On a GPU "auto"
    takes a `reference` only where that module says `FIT_FOR_GPU = True`: a few large PyTorch calls.

    Args:
        family: the package; op: the function in it.
        backend: "auto" or a backend's name.
        like: the tensor whose device and dtype decide.

    Raises:
        ValueError: `backend` is not a known name.
        RuntimeError: the named backend, or with "auto" every backend, cannot run it; the message
            lists each reason.
    """
    if backend != "auto":
        backend_named(backend)
    reasons: dict[str, str] = {}
    for name in _MODULES if backend == "auto" else (backend,):
        module = _family_module(family, name)
        if module is None:
            reasons[name] = "it does not have this op"
            continue
        silent = like.device.type in ("cpu", "meta") or getattr(module, "FIT_FOR_GPU", False)
        if backend == "auto" and name == "reference" and not silent:
            reasons[name] = "never chosen silently on a GPU; pass backend='reference' to use it"
            continue
        reason = unusable(name) or module.supports(op, like)
        if not reason:
            return getattr(module, op)
        reasons[name] = reason
    listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no backend can run {op}: {listing}")


def _warn_slow(reasons: dict[str, str | None]) -> None:
    native = reasons.get("native")
    if native == unusable("native"):
        warnings.warn(
            f"lowcontext runs its slow PyTorch reference, native is missing: {native}",
            RuntimeWarning,
            stacklevel=4,
        )


def table() -> list[tuple[str, str | None]]:
    """(backend name, reason it is unusable on this machine or None): what `info` prints."""
    return [(name, unusable(name)) for name in _MODULES]
