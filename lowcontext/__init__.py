"""Long-context sparse-attention kernels and methods for Hugging Face models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lowcontext._version import __version__
from lowcontext.index import BlockIndex
from lowcontext.methods import LayerContext, Method, available_methods, get_method
from lowcontext.ops import attention, sparse_attention

if TYPE_CHECKING:
    from lowcontext.integrations import (
        measure_density,
        measure_selection,
        patch_model,
        patched,
        unpatch_model,
    )

__all__ = [
    "BlockIndex",
    "LayerContext",
    "Method",
    "__version__",
    "attention",
    "available_methods",
    "get_method",
    "measure_density",
    "measure_selection",
    "patch_model",
    "patched",
    "sparse_attention",
    "unpatch_model",
]

_INTEGRATIONS = ("measure_density", "measure_selection", "patch_model", "patched", "unpatch_model")


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; only those who patch a model pay for it.
    if name in _INTEGRATIONS:
        return getattr(importlib.import_module("lowcontext.integrations"), name)
    raise AttributeError(f"module 'lowcontext' has no attribute {name!r}")
