"""Backends: which implementation of an op runs, and why the others do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowcontext.index import BlockIndex
from lowcontext.ops import native, reference, triton

_NOT_ON_GPU = "never chosen silently on a GPU; pass backend='reference' to use it"


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


# In order of preference. `reference` is last and, on a GPU, never chosen by "auto".
_BACKENDS = {
    "native": Backend("native", native),
    "triton": Backend("triton", triton),
    "reference": Backend("reference", reference),
}

# In the order in which "auto" asks them.
_ON_CPU = tuple(_BACKENDS)
_ON_GPU = ("triton", "native", "reference")


@cache
def _status(name: str) -> str | None:
    return _BACKENDS[name].module.status()


def backend_named(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: `name` is not a backend.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {list(_BACKENDS)}, got {name!r}")
    return _BACKENDS[name]


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
    reasons: dict[str, str] = {}
    for name, candidate in _BACKENDS.items():
        if name == "reference" and q.device.type != "cpu" and not grad:
            reasons[name] = _NOT_ON_GPU
            continue
        reason = candidate.supports(op, q, k, v, index)
        if not reason and grad and name != "reference":
            reason = "inference only, and a gradient is required"
        if not reason:
            if name == "reference" and not grad and not torch.compiler.is_compiling():
                _warn_slow(reasons["native"])
            return candidate
        reasons[name] = reason
    raise _none_runs(op, reasons)


def implementation(
    family: Mapping[str, ModuleType], op: str, backend: str, like: Tensor
) -> Callable[..., Any]:
    """The function that runs a score or select op on tensors like `like`; arguments as `choose`."""
    return getattr(family[choose(family, op, backend, like)], op)


def choose(family: Mapping[str, ModuleType], op: str, backend: str, like: Tensor) -> str:
    """The backend that runs a score or select op on tensors like `like`.

    Args:
        family: backend name -> module with functions named as the ops, and
            `supports(op, like) -> reason | None`. On a GPU "auto" takes a `reference` only where
            that module says `FIT_FOR_GPU = True`: a few large PyTorch calls.
        op: the function in it.
        backend: "auto" or a backend's name.
        like: the tensor whose device and dtype decide.

    Raises:
        ValueError: `backend` is not a known name.
        RuntimeError: the named backend, or with "auto" every backend, cannot run it; the message
            lists each reason.
    """
    if backend != "auto":
        names: tuple[str, ...] = (backend_named(backend).name,)
    else:
        names = _ON_GPU if like.device.type == "cuda" else _ON_CPU
    reasons: dict[str, str] = {}
    for name in names:
        if name not in family:
            reasons[name] = "it does not have this op"
            continue
        module = family[name]
        silent = like.device.type in ("cpu", "meta") or getattr(module, "FIT_FOR_GPU", False)
        if backend == "auto" and name == "reference" and not silent:
            reasons[name] = _NOT_ON_GPU
            continue
        reason = unusable(name) or module.supports(op, like)
        if not reason:
            return name
        reasons[name] = reason
    raise _none_runs(op, reasons)


def _none_runs(op: str, reasons: dict[str, str]) -> RuntimeError:
    listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return RuntimeError(f"no backend can run {op}: {listing}")


def _warn_slow(reason: str) -> None:
    warnings.warn(
        f"lowcontext runs its slow PyTorch reference, native cannot run: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )


def table() -> list[tuple[str, str | None]]:
    """(backend name, reason it is unusable on this machine or None): what `info` prints."""
    return [(name, unusable(name)) for name in _BACKENDS]
